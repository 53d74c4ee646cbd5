"""Read train.py's command line into Options, and refuse what cannot work whatever the files hold.

One need not read this to understand Bone. PyTorch is imported only where a check needs it, so that
--help and a mistyped flag are answered at once.
"""

import argparse
import glob
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from cli import Parser, no_such_file
from flags import Flag, add_flag
from options import CONFIGS, SWITCH, Options, flags, share
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
    values = vars(given)
    for config in CONFIGS:
        for key, value in values.pop(config, {}).items():
            name = f"bone_{key.removeprefix('bone_')}"
            # A flag of its own wins.
            if value is not None and name not in values:
                parser.parse_args([f"--{name}={value}"], given)
    values |= flags_of_earlier_run(values)
    require(
        values.get("loss_mask") != "se" or "mask_id" in values,
        "--loss_mask se needs --mask_id: what follows mask1 counts, up to mask0, as in "
        """--mask_id '{"mask0":"User:","mask1":"Assistant:"}'""",
    )
    options = Options(**values)
    options.train_parts = split_words(options.train_parts)
    check(options)
    return options


def parse_keywords(keywords: dict[str, Any]) -> Options:
    """Return the options that keywords ask for: the flags by name, with values of Python's.

    None stands for a flag that is not given. ValueError, in one line, as by a command line.
    """
    known = flags()
    argv = []
    for name, value in keywords.items():
        if name not in known:
            advice = make_parser().advice(name).replace("--", "")
            text = advice or "python train.py --help lists all flags"
            raise ValueError(f"train() takes no {name}; {text}")
        if value is not None:
            argv += _as_arguments(name, value, known[name])
    return parse_args(argv)


def _as_arguments(name: str, value: Any, about: Flag) -> list[str]:
    """Return a flag and its value as one would type them."""
    flag = f"--{name}"
    if isinstance(about.default, list):
        parts = [value] if isinstance(value, str) else value
        return [flag, *map(str, parts)]
    if isinstance(value, bool):
        if about.default is False:
            return [flag if value else f"--no-{name}"]
        if about.parse is share or {*SWITCH} <= {*about.choices}:
            value = int(value)
        elif about.bare is not None:
            return [flag] if value else []
    if isinstance(value, (list, tuple, set)):
        raise ValueError(f"{name}={value!r}: one value is needed")
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, (bytes, os.PathLike)):
        value = os.fsdecode(value)
    return [f"{flag}={value}"]


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
        not options.eval_steps or options.val_file or options.val_split,
        f"--eval_steps {options.eval_steps} measures a held-out loss: add --val_file or "
        "--val_split, or give --eval_steps 0",
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
    if options.val_split:
        require(not options.val_file, "--val_split and --val_file: give one of them")
        require(
            options.dataload != "get",
            "--val_split holds out documents, but --dataload get takes windows across them all; "
            "use --val_file, or another --dataload",
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


def check_files(options: Options) -> None:
    """Raise ValueError, naming the flag, where a file is not there on this machine."""
    for flag in ("load_model", "bone_load", "data_file", "val_file"):
        path = getattr(options, flag)
        found = os.path.exists(path)
        if flag in ("data_file", "val_file"):
            # x may stand for x.bin and x.idx, x.bin for x.jsonl.
            prefix = re.sub(r"\.(bin|idx)$", "", path)
            found = found or bool(glob.glob(glob.escape(prefix) + ".*"))
        require(not path or found, f"--{flag} {path}: {no_such_file(path)}")
