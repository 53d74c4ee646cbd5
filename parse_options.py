"""Read train.py's command line into Options, and refuse what cannot work whatever the files hold.

One need not read this to understand Bone. PyTorch is imported only where a check needs it, so that
--help and a mistyped flag are answered at once.
"""

import argparse
import importlib.util
import os
import re
from collections.abc import Sequence

from cli import Parser
from flags import add_flag
from options import Options, flags
from resume_flags import flags_of_earlier_run

PARTS = ("time", "ln", "emb", "head")


def make_parser() -> Parser:
    """Return the parser of train.py's flags. Flags that are not given leave nothing behind."""
    parser = Parser(
        prog="train.py",
        usage="train.py --load_model base.pth --data_file data.jsonl [flags]",
        description="Fine-tune an RWKV-6 or RWKV-5 model with Bone, on a GPU or a CPU. "
        "merge.py makes a complete model of the result.",
        argument_default=argparse.SUPPRESS,
    )
    group: argparse._ActionsContainer = parser
    for name, about in flags().items():
        if about.heading:
            group = parser.add_argument_group(about.heading)
        add_flag(group, name, about)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Return the options that a command line asks for; sys.argv's where none is given.

    Raises ValueError, in one line, for what cannot work whatever the files hold.
    """
    parser = make_parser()
    given = parser.parse_args(argv)
    for name, value in getattr(given, "bone_config", {}).items():
        # A flag of its own wins.
        if value is not None and not hasattr(given, name):
            parser.parse_args([f"--{name}={value}"], given)
    values = vars(given)
    values.pop("bone_config", None)
    values |= flags_of_earlier_run(values)
    options = Options(**values)
    options.train_parts = split_words(options.train_parts)
    check(options)
    return options


def split_words(parts: list[str]) -> list[str]:
    """Return the words in RWKV-PEFT's ways to write a list: time ln, [time, ln], ["time", "ln"]."""
    return re.sub("[][,\"']", " ", " ".join(parts)).split()


# ---- checks ----------------------------------------------------------------------------------


def require(condition: object, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check(options: Options) -> None:
    """Raise ValueError where options cannot work together, or not on this machine."""
    check_model_and_data(options)
    check_machines(options)
    for name, off in (("wandb", "''"), ("tensorboard", "0")):
        # On --resume it may come from args.json, where it cannot be dropped.
        instead = f"give --{name} {off}" if options.resume else f"drop --{name}"
        if getattr(options, name):
            require(
                importlib.util.find_spec(name),
                f"--{name}: {name} is not installed; pip install {name}, or {instead}",
            )
    require(
        not options.eval_steps or options.val_file or getattr(options, "val_split", 0),
        f"--eval_steps {options.eval_steps} measures a held-out loss: add --val_file, or drop it",
    )
    check_gpus(options)


def check_model_and_data(options: Options) -> None:
    """Raise ValueError where flags of the model and the data are missing, or contradict."""
    require(
        options.data_file or options.dry_run or options.data_type == "dummy",
        "--data_file is missing: give a .jsonl or a binidx prefix, as in --data_file data.jsonl",
    )
    if not options.load_model:
        require(
            options.n_layer and options.n_embd,
            "--load_model is missing: give a base model, "
            "or --n_layer and --n_embd to pretrain a new one",
        )
        require(
            options.quant in (None, "none"),
            f"--quant {options.quant} is for the frozen matrices of a base model: "
            "add --load_model, or drop it",
        )
        require(
            not options.bone_load,
            "--bone_load needs the base model it was trained on: add --load_model",
        )
    unknown = sorted(set(options.train_parts) - set(PARTS))
    require(
        not unknown,
        f"--train_parts {' '.join(unknown)} is unknown: time, ln, emb and head can be trained",
    )
    if options.loss_mask == "se":
        markers = [text for text in options.mask_id.values() if isinstance(text, str) and text]
        require(
            len(markers) == 2,
            "--mask_id needs two texts, as in "
            """--mask_id '{"mask0":"User:","mask1":"Assistant:"}'""",
        )


def check_machines(options: Options) -> None:
    """Raise ValueError where several machines are wanted and nothing says which one this is."""
    # torchrun sets WORLD_SIZE, and everything else.
    if options.num_nodes == 1 or options.dry_run or "WORLD_SIZE" in os.environ:
        return
    node = os.environ.get("NODE_RANK", "")
    require(
        os.environ.get("MASTER_ADDR")
        and re.fullmatch("[0-9]{1,18}", node)
        and int(node) < options.num_nodes,
        f"--num_nodes {options.num_nodes} needs to know where the first machine is, and which one "
        f"this is, from 0 to {options.num_nodes - 1}: "
        "MASTER_ADDR=10.0.0.1 NODE_RANK=0 python train.py ...",
    )
    port = os.environ.get("MASTER_PORT", "29500")
    require(
        re.fullmatch("[0-9]{1,5}", port),
        f"MASTER_PORT {port} is not a port; 29500 is usual",
    )


def check_gpus(options: Options) -> None:
    """Raise ValueError where PyTorch sees no GPU, or fewer of them, than are asked for."""
    needs_gpu = options.accelerator == "gpu"
    counts_gpus = options.devices > 1 and options.accelerator != "cpu" and not options.dry_run
    if not needs_gpu and not counts_gpus:
        return
    import torch

    if counts_gpus:
        seen = torch.accelerator.device_count()
        # Without any, the devices are processes on the CPU.
        require(
            seen == 0 or seen >= options.devices,
            f"--devices {options.devices}, but PyTorch sees {seen} GPUs here",
        )
    if needs_gpu:
        if torch.version.cuda or torch.version.hip:
            reason = "is its driver there?"
        else:
            reason = "a build for CPUs: with a GPU, install another one, as the README says"
        require(
            torch.accelerator.is_available(),
            f"--accelerator gpu, but PyTorch {torch.__version__} sees no GPU here ({reason}); "
            "use --accelerator cpu or leave it out",
        )
