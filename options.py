"""The options of train.py, each with all that is known of it. Their names are RWKV-PEFT's flags.

One need not read this to understand Bone. `python train.py --help` shows what is declared here, and
`make docs` writes it to docs/flags.md; parse_options.py reads them from a command line.
"""

import argparse
import dataclasses
from typing import Any

from flags import CHANGEABLE, FIXED, Flag, flag, json_object, number

SWITCH = (0, 1)
RWKV_PEFT = "RWKV-PEFT (github.com/JL-er/RWKV-PEFT) has it"
ANOTHER_METHOD = f"is another method than Bone; {RWKV_PEFT}"
ONLY_ADAM = "is not there; adamw is the usual one, adamw8bit takes less memory"
ONLY_NF4 = "is not there; nf4 takes as little memory, and is closer to the weights"


def share(text: str) -> float | str:
    """Parse a number from 0 to 1, or auto."""
    if text == "auto":
        return text
    try:
        value = float(text)
        if not 0 <= value <= 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is neither a number from 0 to 1 nor auto"
        ) from None
    return int(value) if value in (0, 1) else value


@dataclasses.dataclass
class Options:
    """What a run of train.py is asked to do. A default of None is found later, as the help says."""

    load_model: str = flag(
        "",
        "the base model to fine-tune, a published RWKV-6 or RWKV-5 .pth; without it, a new model "
        "of n_layer and n_embd is pretrained",
        per_machine=True,
        heading="model",
    )
    n_layer: int | None = flag(
        None,
        "number of blocks; only for a new model: a base model says it, and a value given here "
        "must agree with it",
        parse=number(int, 1),
    )
    n_embd: int | None = flag(None, "width; only for a new model", parse=number(int, 1))
    vocab_size: int = flag(
        0,
        "size of the vocabulary; 0: the base model's, else the data's (the characters of a text; "
        "65536 for jsonl and binidx; the largest token + 1)",
        parse=number(int, 0),
    )
    my_testing: str | None = flag(
        None,
        "version, x060: RWKV-6, x052: RWKV-5; only for a new model (default of a new model: x060)",
        choices=("x060", "x052"),
        refused={"x070": f"is RWKV-7; {RWKV_PEFT}"},
    )
    pre_ffn: int | None = flag(
        None,
        "1: a new model's first block has a channel mix in place of its time mix, which is "
        "sometimes better",
        choices=SWITCH,
    )
    head_qk: int | None = flag(
        None,
        "N: a new model has an attention of width N that helps to copy earlier tokens; it takes "
        "memory that grows with ctx_len squared",
        parse=number(int, 0),
    )

    peft: str = flag(
        "bone",
        "the method; there is no other here, and disha is its later name in RWKV-PEFT",
        choices=("bone", "disha"),
        refused={
            **dict.fromkeys(("lora", "pissa", "state"), ANOTHER_METHOD),
            "none": "would train every parameter; RWKV-LM (github.com/BlinkDL/RWKV-LM) does",
        },
        heading="Bone",
    )
    bone_r: int | None = flag(
        None,
        "rank: the side of a block, which with bat must divide every layer's sizes; 32 trains and "
        "saves half of what 64 does (default: 64, or that of bone_load)",
        parse=number(int, 1),
        resume=FIXED,
    )
    bone_mode: str | None = flag(
        None,
        "bat: block affine, what RWKV-PEFT's tutorial calls Bone; bone: shard sharing, which is "
        "simpler and takes any rank (default: bat, or that of bone_load)",
        choices=("bat", "bone"),
        resume=FIXED,
    )
    bone_load: str = flag(
        "",
        "train this Bone checkpoint further; rank, mode and quantization are then its own",
        per_machine=True,
    )
    other_base: bool = flag(
        False, "train bone_load further on another base than the one it was trained on"
    )
    train_parts: list[str] = flag(
        ["time", "ln"],
        "also train parameters whose names contain these: time ln emb head; nothing after it: "
        "train Bone alone; emb and head are for new words or a new language, and take much more "
        "memory",
        resume=FIXED,
    )

    data_file: str = flag(
        "",
        "a .jsonl or .json of texts or conversations, a binidx prefix (x for x.bin and x.idx), a "
        ".npy of tokens, or a .txt for a model of characters",
        per_machine=True,
        heading="data",
    )
    data_type: str | None = flag(
        None,
        "utf-8 (.txt), utf-16le: a text, whose characters are the tokens; dummy: made-up sums, as "
        "characters; numpy (.npy), uint16: bare tokens (default: told by the file's name)",
        choices=("binidx", "jsonl", "utf-8", "utf-16le", "dummy", "numpy", "uint16"),
        refused={
            "json": "is not needed: a .json is known by its content; leave it out",
            "wds_img": "holds images, and RWKV-6 language models take no images; "
            "give text or tokens",
            "sft": "is a Hugging Face data set; write its texts into a .jsonl, and give that",
        },
    )
    val_file: str = flag(
        "",
        "held-out data of the same kind; its loss, measured after every epoch, tells when to stop",
        per_machine=True,
    )
    val_split: float = flag(
        0.0,
        "in place of val_file: hold out this share of data_file's documents, 0.05 say; the same "
        "ones for the same random_seed; 0: none",
        parse=number(float, 0, below=1),
        resume=FIXED,
    )
    eval_steps: int = flag(
        0,
        "measure the held-out loss every this many steps, too, and keep the checkpoint where it is "
        "the best as rwkv-best.pth; 0: only after every epoch",
        parse=number(int, 0),
    )
    ctx_len: int = flag(
        512,
        "longest row in tokens; longer documents are cut, unless train_type is infctx",
        parse=number(int, 1),
        resume=FIXED,
    )
    dataload: str = flag(
        "pad",
        "pad: one document per row; only: the same without padding, micro_bsz 1; get: random "
        "windows, for long texts",
        choices=("pad", "only", "get"),
        resume=FIXED,
    )
    data_shuffle: int = flag(
        1, "0: documents in the order of the file", choices=SWITCH, resume=FIXED
    )
    loss_mask: str = flag(
        "pad",
        "which tokens count: pad: those of documents; none: the padding too; qa: only what follows "
        "Assistant: at the beginning of a line, up to User: at one; se: the same with the markers "
        "of mask_id",
        choices=("pad", "none", "qa", "se"),
        resume=FIXED,
    )
    mask_id: dict = flag(
        {"mask0": "0", "mask1": "1"},
        "markers for se, which needs them, any texts: what follows mask1 counts, up to mask0; one "
        "that begins with a letter or digit counts only at the beginning of a line",
        parse=json_object("mask0", "mask1"),
        resume=FIXED,
    )

    proj_dir: str = flag(
        "out",
        "folder for checkpoints and logs, one per run; checkpoints are never overwritten",
        per_machine=True,
        heading="training",
    )
    epoch_count: int = flag(
        1,
        "number of epochs; more, as long as the held-out loss falls",
        parse=number(int, 1),
        resume=CHANGEABLE,
    )
    epoch_begin: int = flag(
        0,
        "number of the first epoch, to count on with bone_load: epoch_count more are trained; the "
        "learning rate reaches lr_final after epoch_count epochs, counted from 0, and stays there",
        parse=number(int, 0),
        resume=FIXED,
    )
    epoch_steps: int = flag(
        0,
        "optimizer steps in an epoch; 0: as many as it takes to see the data once",
        parse=number(int, 0),
        resume=FIXED,
    )
    epoch_save: int = flag(
        1,
        "save a checkpoint every this many epochs, and after the last; 0: only after the last",
        parse=number(int, 0),
    )
    save_steps: int = flag(
        500,
        "save the state of the run every this many steps, and with every checkpoint; 0: only then",
        parse=number(int, 0),
    )
    save_minutes: float = flag(
        0.0,
        "save it also when so many minutes have passed since it was saved last, for slow steps; "
        "0: never",
        parse=number(float, 0),
    )
    keep: int = flag(
        1, "number of states that are kept; more, to go back further", parse=number(int, 1)
    )
    resume: str | None = flag(
        None,
        "continue exactly from the last state in proj_dir (the same as last), with the flags of "
        "its args.json where none are given; auto: start a new run if there is nothing to resume, "
        "so that one command starts and restarts",
        choices=("last", "auto"),
        bare="last",
    )
    train_type: str = flag(
        "none",
        "infctx: rows of any length in the memory of chunk_ctx tokens, with the gradient of the "
        "whole row",
        choices=("none", "infctx"),
        refused={"state": f"would train initial states; {RWKV_PEFT}"},
        resume=FIXED,
    )
    chunk_ctx: int = flag(
        512,
        "tokens that infctx takes at once; fewer take less memory, more are faster",
        parse=number(int, 1),
        resume=FIXED,
    )
    bptt: int = flag(
        0,
        "chunks of infctx that the gradient flows back through; 0: all, the exact gradient; 1 is "
        "a third faster, but gradients do not cross chunk borders",
        parse=number(int, 0),
        resume=FIXED,
    )
    micro_bsz: int = flag(
        1,
        "rows in a micro batch, which goes through the model at once; as many as fit: more are "
        "faster per token",
        parse=number(int, 1),
        resume=FIXED,
    )
    accumulate_grad_batches: int = flag(
        1,
        "micro batches in an optimizer step: N of them make exactly the step of one that is N "
        "times as large, in the memory of one",
        parse=number(int, 1),
        resume=FIXED,
    )
    random_seed: int = flag(
        0, "seed of the data order and of a new model", parse=number(int, 0), resume=FIXED
    )
    wandb: str = flag("", "also log to this project of Weights & Biases (pip install wandb)")
    tensorboard: int = flag(
        0,
        "also log to proj_dir/tensorboard, for TensorBoard (pip install tensorboard); "
        "without a value: 1",
        choices=SWITCH,
        bare=1,
    )

    lr_init: float = flag(
        2e-5,
        "learning rate at the start; higher if the loss falls too slowly; 6e-4 suits a new small "
        "model",
        parse=number(float, 0),
        resume=CHANGEABLE,
        heading="optimizer (Adam)",
    )
    lr_final: float = flag(
        2e-5,
        "learning rate after epoch_count epochs; exponential in between, linear if one of them "
        "is 0",
        parse=number(float, 0),
        resume=CHANGEABLE,
    )
    warmup_steps: int = flag(
        0,
        "steps over which the learning rate rises from a fifth of it; 50, say, if it is high",
        parse=number(int, -1),
        resume=CHANGEABLE,
    )
    optim: str = flag(
        "adamw",
        "adamw8bit: AdamW with moments in 8 bits, which take a quarter of the memory; steps take a "
        "little longer",
        choices=("adamw", "adamw8bit"),
        refused={"none": ONLY_ADAM, "adam_mini": ONLY_ADAM, "muon": ONLY_ADAM},
        resume=FIXED,
    )
    beta1: float = flag(
        0.9, "decay of the mean of gradients", parse=number(float, 0, below=1), resume=CHANGEABLE
    )
    beta2: float = flag(
        0.99,
        "decay of the mean of squared gradients; 0.999 near convergence",
        parse=number(float, 0, below=1),
        resume=CHANGEABLE,
    )
    adam_eps: float = flag(
        1e-8, "added to the denominator", parse=number(float, 0), resume=CHANGEABLE
    )
    weight_decay: float = flag(
        0.0,
        "decay of matrices and bones, as in AdamW; 0.001 to 0.1 keeps weights small",
        parse=number(float, 0),
        resume=CHANGEABLE,
    )
    layerwise_lr: int = flag(
        1,
        "1: time_decay learns at twice the rate, and no time parameter decays",
        choices=SWITCH,
        resume=CHANGEABLE,
    )

    accelerator: str = flag(
        "auto",
        "auto: the GPU if there is one; gpu: an error if there is none",
        choices=("auto", "gpu", "cpu"),
        heading="machine",
    )
    devices: int = flag(
        1,
        "number of GPUs, or of processes on CPUs; one process is started for each",
        parse=number(int, 1),
        per_machine=True,
    )
    num_nodes: int = flag(
        1,
        "number of machines; the same command is started on each of them, with MASTER_ADDR and "
        "NODE_RANK set",
        parse=number(int, 1),
    )
    strategy: str = flag(
        "auto",
        "how several devices share memory: auto, ddp: each holds everything; deepspeed_stage_1: "
        "a share of Adam's moments; 2: of all that is trained; 3: of the frozen weights, too; "
        "offload: that share in the CPU's memory",
        choices=(
            "auto",
            "ddp",
            "deepspeed_stage_1",
            "deepspeed_stage_2",
            "deepspeed_stage_3",
            "deepspeed_stage_2_offload",
            "deepspeed_stage_3_offload",
        ),
    )
    precision: str = flag(
        "bf16",
        "precision of the matrix products; trained parameters are always float32; fp16, with "
        "gradient scaling, is for GPUs without bf16; tf32 is fp32 with faster products on a GPU",
        choices=("bf16", "fp16", "fp32", "tf32"),
        resume=FIXED,
    )
    quant: str | None = flag(
        None,
        "keep the base model's large matrices in 8 or 4 bits, if memory is short (default: none, "
        "or as bone_load was trained)",
        choices=("none", "int8", "nf4"),
        refused={"4bit": ONLY_NF4, "fp4": ONLY_NF4},
        resume=FIXED,
    )
    grad_cp: Any = flag(
        "auto",
        "how much of the forward pass the backward pass computes again, which saves memory: 1: "
        "all; 0: nothing, which is faster; between: a share of the matrix products (blocks that "
        "are not compiled keep all of them); auto: as little as free memory allows",
        parse=share,
    )
    compile: Any = flag(
        "auto",
        "1: run the blocks through PyTorch's compiler, which takes up to a minute or two, once, "
        "and makes steps faster; 0: do not; auto: where the run is long enough to gain by it",
        choices=("auto", *SWITCH),
    )
    fla: bool = flag(
        False,
        "on a GPU with flash-linear-attention installed, its Triton operator for WKV-6; elsewhere "
        "a note, and the kernel that is used without this flag",
    )
    dry_run: bool = flag(
        False,
        "only say what would be trained on which data, and what it takes of memory and disk; "
        "writes nothing but the tokens of a jsonl, beside it; try it first",
    )


# RWKV-PEFT's ways to write three options at once, the later one last. Not options of their own.
CONFIGS = {
    "bone_config": Flag(
        None,
        """the three above at once, as RWKV-PEFT has them: '{"bone_load":"","bone_r":64}'""",
        parse=json_object("bone_load", "bone_r", "bone_mode"),
    ),
    "disha_config": Flag(
        None,
        """the same, as RWKV-PEFT has it since: '{"mode":"bone","load":"","r":64}'""",
        parse=json_object("load", "r", "mode"),
    ),
}


def flags() -> dict[str, Flag]:
    """Return all flags by name, in the order of --help."""
    found = {}
    for field in dataclasses.fields(Options):
        found[field.name] = field.metadata["flag"]
        if field.name == "bone_load":
            found |= CONFIGS
    return found


def per_machine() -> list[str]:
    """Return the flags that may differ between machines; the contents of their files may not."""
    return [name for name, about in flags().items() if about.per_machine]


def fixed() -> list[str]:
    """Return the flags that a resumed run must have the same values of."""
    return [name for name, about in flags().items() if about.resume == FIXED]


def changeable() -> list[str]:
    """Return the flags that a resumed run may change, which its log then says."""
    return [name for name, about in flags().items() if about.resume == CHANGEABLE]
