"""train.py's command line, as a table: flag, kind, default, what it is for. The names are those of RWKV-PEFT.

A kind is what argparse calls a type, a tuple of choices, bool for a flag without a value, list, or a dict of argparse's own words. A default of None is found
elsewhere, as the help says. The README's tables are held against this one by test_options.py.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re

import torch

from cli import Parser

SWITCH = (0, 1)
STRATEGIES = (
    "auto",
    "ddp",
    *(f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload")),
)
RWKV_PEFT, ONLY_NF4 = (
    "RWKV-PEFT (github.com/JL-er/RWKV-PEFT) has it",
    "is not there; nf4 takes as little memory, and is closer to the weights",
)
REFUSED = {  # values that RWKV-PEFT takes, and why they are not taken here
    "data_type": {
        "wds_img": "holds images, and RWKV-6 language models take no images; give text or tokens",
        "sft": "is a Hugging Face data set; write its texts into a .jsonl, and give that",
    },
    "my_testing": {"x070": f"is RWKV-7; {RWKV_PEFT}"},
    "quant": {"4bit": ONLY_NF4, "fp4": ONLY_NF4},
    "train_type": {"state": f"would train initial states; {RWKV_PEFT}"},
    "peft": {
        **dict.fromkeys(("lora", "pissa", "state"), f"is another method than Bone; {RWKV_PEFT}"),
        "disha": "is Bone's later name there; use --peft bone",
        "none": "would train every parameter; RWKV-LM (github.com/BlinkDL/RWKV-LM) does",
    },
}


def checked(name, convert, fits, need):
    """A type for argparse: what `convert` makes of a text, where that `fits`; else an error that says what it needs to be."""

    def parse(text):
        if not fits(value := convert(text)):
            raise argparse.ArgumentTypeError(f"{text} {need(text)}")
        return value

    parse.__name__ = name
    return parse


def number(kind, least, below=2**63):
    limit = "2^63" if below == 2**63 else below
    return checked(
        kind.__name__,
        kind,
        lambda n: least <= n < below,
        lambda _: f"must be a number of at least {least}, and below {limit}",
    )


def json_with(*keys):
    def parse(text):
        with contextlib.suppress(ValueError):
            return json.loads(text)

    example = ",".join(f'"{key}":...' for key in keys)
    return checked(
        "json",
        parse,
        lambda x: isinstance(x, dict) and {*x} <= {*keys},
        lambda _: f"is not, in single quotes and without spaces, '{{{example}}}'",
    )


def choice(name, values):
    unknown = f"is unknown; there are {', '.join(map(str, values))}"
    return checked(
        name,
        {str(value): value for value in values}.get,
        lambda value: value is not None,
        lambda text: REFUSED.get(name, {}).get(text, unknown),
    )


TABLE = {
    "model": [
        (
            "load_model",
            str,
            "",
            "base model, a published RWKV-6 or RWKV-5 .pth; without it a new model is pretrained",
        ),
        (
            "n_layer",
            number(int, 1),
            None,
            "number of blocks; read from the base model, where it must agree, as the next ones must",
        ),
        ("n_embd", number(int, 1), None, "width"),
        (
            "vocab_size",
            number(int, 0),
            0,
            "vocabulary; 0: of the base model, else of the data (65536 for jsonl and binidx)",
        ),
        (
            "my_testing",
            ("x060", "x052"),
            None,
            "version, RWKV-6 or RWKV-5 (default of a new model: x060)",
        ),
        (
            "pre_ffn",
            SWITCH,
            None,
            "1: a new model's first block has a channel mix in place of its time mix",
        ),
        (
            "head_qk",
            number(int, 0),
            None,
            "N: a new model has an attention of width N that adds to the logits of earlier tokens",
        ),
    ],
    "Bone": [
        ("peft", ("bone",), "bone", "the method; there is no other"),
        (
            "bone_r",
            number(int, 1),
            None,
            "rank: the side of a block; must divide every layer's sizes (default: 64, or that of bone_load)",
        ),
        (
            "bone_mode",
            ("bat", "bone"),
            None,
            "bat: block affine; bone: shard sharing (default: bat, or that of bone_load)",
        ),
        ("bone_load", str, None, "go on from this Bone checkpoint"),
        (
            "bone_config",
            json_with("bone_load", "bone_r", "bone_mode"),
            None,
            "the three above at once, as RWKV-PEFT has them",
        ),
        (
            "train_parts",
            list,
            ["time", "ln"],
            "also train parameters whose names contain these: time ln emb head, or nothing",
        ),
    ],
    "data": [
        (
            "data_file",
            str,
            "",
            'a .jsonl with a "text" per line, a binidx prefix (x for x.bin and x.idx), or a file of another data_type',
        ),
        (
            "data_type",
            ("binidx", "jsonl", "utf-8", "utf-16le", "dummy", "numpy", "uint16"),
            None,
            "utf-8, utf-16le: a text's characters; dummy: sums; numpy, uint16: bare tokens (default: told by the file's name)",
        ),
        (
            "val_file",
            str,
            "",
            "held-out data of the same kind; its loss is measured after every epoch",
        ),
        (
            "ctx_len",
            number(int, 1),
            512,
            "longest row in tokens; longer documents are cut, unless train_type is infctx",
        ),
        (
            "dataload",
            ("pad", "only", "get"),
            "pad",
            "pad: one document per row; only: the same without padding, micro_bsz 1; get: random windows",
        ),
        ("data_shuffle", SWITCH, 1, "0: documents in the order of the file"),
        (
            "loss_mask",
            ("pad", "none", "qa", "se"),
            "pad",
            "what counts: pad: the documents; none: the padding too; qa: only what follows Assistant:; se: the same with mask_id",
        ),
        (
            "mask_id",
            json_with("mask0", "mask1"),
            '{"mask0":"0","mask1":"1"}',
            "texts for se: what follows mask1 counts, up to mask0",
        ),
    ],
    "training": [
        ("proj_dir", str, "out", "folder for checkpoints and logs"),
        ("epoch_count", number(int, 1), 1, "number of epochs"),
        ("epoch_begin", number(int, 0), 0, "number of the first epoch"),
        (
            "epoch_steps",
            number(int, 0),
            0,
            "optimizer steps in an epoch; 0: as many as it takes to see the data once",
        ),
        (
            "epoch_save",
            number(int, 0),
            1,
            "save a checkpoint every this many epochs; 0: the last one alone",
        ),
        (
            "save_steps",
            number(int, 0),
            500,
            "save the state of the run every this many steps, and with every checkpoint; 0: only then",
        ),
        ("keep", number(int, 1), 1, "number of states that are kept"),
        (
            "resume",
            {
                "nargs": "?",
                "const": "last",
                "type": choice("resume", ("last", "auto")),
                "metavar": "auto",
            },
            None,
            "go on from the last state in proj_dir, exactly (the same as last); auto: begin anew where there is none",
        ),
        (
            "train_type",
            ("none", "infctx"),
            "none",
            "infctx: rows of any length in the memory of chunk_ctx tokens, with the gradient of the whole row",
        ),
        ("chunk_ctx", number(int, 1), 512, "tokens that infctx takes at once"),
        (
            "bptt",
            number(int, 0),
            0,
            "chunks of infctx that the gradient flows back through; 0: all; 1 is fastest",
        ),
        (
            "micro_bsz",
            number(int, 1),
            1,
            "rows in a micro batch: what goes through the model at once",
        ),
        ("accumulate_grad_batches", number(int, 1), 1, "micro batches in an optimizer step"),
        ("random_seed", number(int, 0), 0, "seed of the data order and of a new model"),
        ("wandb", str, "", "also log to this project of Weights & Biases"),
    ],
    "optimizer (Adam)": [
        (
            "lr_init",
            number(float, 0),
            2e-5,
            "learning rate at the start; 6e-4 suits a new small model",
        ),
        (
            "lr_final",
            number(float, 0),
            2e-5,
            "and after epoch_count epochs; exponential in between, linear where one is 0",
        ),
        (
            "warmup_steps",
            number(int, -1),
            0,
            "steps over which the learning rate rises from a fifth to the whole",
        ),
        ("beta1", number(float, 0, below=1), 0.9, "decay of the mean of gradients"),
        ("beta2", number(float, 0, below=1), 0.99, "decay of the mean of squared gradients"),
        ("adam_eps", number(float, 0), 1e-8, "added to the denominator"),
        ("weight_decay", number(float, 0), 0.0, "of matrices and bones, as in AdamW"),
        (
            "layerwise_lr",
            SWITCH,
            1,
            "1: time_decay learns at twice the rate, and no time parameter decays",
        ),
    ],
    "machine": [
        ("accelerator", ("auto", "gpu", "cpu"), "auto", "auto: the GPU where there is one"),
        (
            "devices",
            number(int, 1),
            1,
            "number of GPUs, or of processes on CPUs; one process is started for each",
        ),
        (
            "num_nodes",
            number(int, 1),
            1,
            "number of machines; on each of them the same is started, see the README",
        ),
        (
            "strategy",
            STRATEGIES,
            "auto",
            "how devices share: auto and ddp: trained tensors alone; deepspeed_stage_1: Adam's moments are dealt out; 2, 3, "
            "2_offload, 3_offload: the weights, too",
        ),
        (
            "precision",
            ("bf16", "fp16", "fp32", "tf32"),
            "bf16",
            "of the matrix products; trained parameters are always float32",
        ),
        (
            "quant",
            ("none", "int8", "nf4"),
            None,
            "keep the base model's large matrices in 8 or 4 bits (default: none, or as bone_load was trained)",
        ),
        (
            "grad_cp",
            SWITCH,
            1,
            "1: recompute activations block by block in the backward pass, to save memory; 0: keep them",
        ),
        (
            "fla",
            bool,
            False,
            "the chunked form of WKV-6; on a GPU with fla installed, its Triton operator",
        ),
        ("dry_run", bool, False, "only say what would be trained, and how much memory that takes"),
    ],
}


def shown_default(default):
    return (
        ""
        if default is None or default is False
        else " ".join(default)
        if isinstance(default, list)
        else str(default)
    )


def make_parser():
    parser = Parser(
        prog="train.py",
        usage="train.py --load_model base.pth --data_file data.jsonl [flags]",
        description="Fine-tune an RWKV-6 or RWKV-5 model with Bone, on a GPU or a CPU. merge.py makes a complete model of the result.",
    )
    for title, flags in TABLE.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in flags:
            if isinstance(kind, tuple):
                choices = f"{{{','.join(map(str, kind))}}}"
                options = {
                    "type": choice(name, kind),
                    "metavar": choices if len(choices) < 60 else "NAME",
                }
            else:
                options = (
                    kind
                    if isinstance(kind, dict)
                    else {list: {"nargs": "*"}, bool: {"action": "store_true"}}.get(kind)
                    or {"type": kind, "metavar": kind.__name__.upper()}
                )
            shown = f" (default: {shown_default(default)})" if shown_default(default) else ""
            group.add_argument(f"--{name}", default=default, help=text + shown, **options)
    return parser


def why_no_gpu():
    """The likeliest reason why PyTorch sees no GPU, in brackets."""
    if torch.version.cuda or torch.version.hip:
        return " (is its driver there?)"
    return " (a build for CPUs: with a GPU, install another one, as the README says)"


def parse_args(argv=None):
    """The arguments as a namespace. ValueError, in one line, for what cannot work whatever the files hold."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, value in (args.bone_config or {}).items():
        if getattr(args, name) is None and value is not None:  # a flag of its own wins
            parser.parse_args([f"--{name}={value}"], args)
    args.bone_load = args.bone_load or ""
    del args.bone_config
    args.train_parts = [
        word for part in args.train_parts for word in re.sub("[][,\"']", " ", part).split()
    ]
    unknown, new = sorted({*args.train_parts} - {"time", "ln", "emb", "head"}), not args.load_model
    started_here = args.num_nodes > 1 and "WORLD_SIZE" not in os.environ and not args.dry_run
    markers = [text for text in args.mask_id.values() if isinstance(text, str) and text]
    for wrong, problem in (
        (
            not (args.data_file or args.dry_run or args.data_type == "dummy"),
            "--data_file is missing: give a .jsonl or a binidx prefix, as in --data_file data.jsonl",
        ),
        (
            new and not (args.n_layer and args.n_embd),
            "--load_model is missing: give a base model, or --n_layer and --n_embd to pretrain a new one",
        ),
        (
            new and args.quant not in (None, "none"),
            f"--quant {args.quant} is for the frozen matrices of a base model: add --load_model, or drop it",
        ),
        (
            new and args.bone_load,
            "--bone_load needs the base model it was trained on: add --load_model",
        ),
        (
            unknown,
            f"--train_parts {' '.join(unknown)} is unknown: time, ln, emb and head can be trained",
        ),
        (
            args.loss_mask == "se" and len(markers) < 2,
            """--mask_id needs two texts, as in --mask_id '{"mask0":"User:","mask1":"Assistant:"}'""",
        ),
        (
            started_here
            and not (
                os.environ.get("MASTER_ADDR")
                and os.environ.get("NODE_RANK", "") in map(str, range(args.num_nodes))
            ),
            f"--num_nodes {args.num_nodes} needs to know where the first machine is, and which one this is, from 0 to {args.num_nodes - 1}: "
            "MASTER_ADDR=10.0.0.1 NODE_RANK=0 python train.py ...",
        ),
        (
            started_here and not re.fullmatch("[0-9]{1,5}", os.environ.get("MASTER_PORT", "29500")),
            f"MASTER_PORT {os.environ.get('MASTER_PORT')} is no port; 29500 is usual",
        ),
        (
            not args.dry_run
            and args.accelerator != "cpu"
            and 0 < torch.accelerator.device_count() < args.devices,
            f"--devices {args.devices}, but PyTorch sees {torch.accelerator.device_count()} GPUs here",
        ),
        (
            args.accelerator == "gpu" and not torch.accelerator.is_available(),
            f"--accelerator gpu, but PyTorch {torch.__version__} sees no GPU here{why_no_gpu()}; use --accelerator cpu or leave it out",
        ),
        (
            args.wandb and not importlib.util.find_spec("wandb"),
            "--wandb: wandb is not installed; pip install wandb, or drop --wandb",
        ),
    ):
        if wrong:
            raise ValueError(problem)
    return args
