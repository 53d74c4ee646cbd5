"""Let Python, or a notebook, call train() by keywords, and return what came of it.

One need not read this to understand Bone. docs/python.md shows how it is used.
"""

import contextlib
import csv
import dataclasses
import functools
import gc
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

import devices
import memory
from options import Options
from parse_options import parse_keywords


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run, as its folder has it: all of it, if the run was resumed."""

    losses: list[tuple[int, float]]  # (step, loss), steps counted from 0
    held_out_losses: list[tuple[int, float]]  # (steps done, loss)
    checkpoints: list[str]  # paths, the last epoch's last
    peak_memory: int  # bytes: of the GPU's tensors, or of the whole process


def by_keywords(run: Callable[[Options], None]) -> Callable[..., Result]:
    """Let a function of Options be called with the flags as keywords, too, and return a Result."""

    @functools.wraps(run, assigned=("__module__", "__name__", "__qualname__"))
    def train(options: Options | None = None, **flags: Any) -> Result:
        if options is not None:
            if flags or not isinstance(options, Options):
                raise ValueError(
                    "train() takes the flags by name, as in "
                    'train(load_model="base.pth", data_file="data.jsonl"), or else Options alone'
                )
            run(options)
            return result_of(options)
        options = parse_keywords(flags)
        refuse_ranks(options)
        with settings_of_torch_as_found():
            run(options)
        return result_of(options)

    # What help(train) shows.
    del train.__wrapped__
    train.__doc__ = (
        f"{run.__doc__}\n    options: or the flags as keywords, as in "
        'train(load_model="base.pth", data_file="data.jsonl"),\n    see docs/python.md. '
        "Returns a Result. ValueError, in one line, for what cannot be done.\n    "
    )
    return train


def refuse_ranks(options: Options) -> None:
    """Raise ValueError where train() would start this program again, once for each device."""
    if options.devices * options.num_nodes > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"devices={options.devices}, num_nodes={options.num_nodes}: each device needs a "
            "process of its own; start python train.py in a shell, or your program by torchrun"
        )


@contextlib.contextmanager
def settings_of_torch_as_found() -> Iterator[None]:
    """Put back what training sets in PyTorch for the whole process, and count memory anew."""
    matmul = torch.backends.cuda.matmul
    precision = torch.get_float32_matmul_precision()
    reduced = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        matmul.allow_bf16_reduced_precision_reduction = reduced[0]
        matmul.allow_fp16_reduced_precision_reduction = reduced[1]
        # Compiled blocks and their model hold one another, and with them a GPU's memory.
        gc.collect()


def result_of(options: Options) -> Result:
    """Read from a run's folder what came of it; nothing where it was --dry_run."""
    losses: list[tuple[int, float]] = []
    held_out_losses: list[tuple[int, float]] = []
    checkpoints: dict[int, str] = {}
    if not options.dry_run:
        losses = read_column(options.proj_dir, "loss")
        held_out_losses = read_column(options.proj_dir, "val_loss")
        checkpoints = checkpoints_in(options.proj_dir, options.epoch_begin)
    peak = memory.peak(devices.find(options.accelerator))
    return Result(losses, held_out_losses, [checkpoints[n] for n in sorted(checkpoints)], peak)


def read_column(folder: str, column: str) -> list[tuple[int, float]]:
    """Return (step, value) of a column of loss.csv, as long as its steps go up to the end."""
    points: list[tuple[int, float]] = []
    with (
        contextlib.suppress(OSError, ValueError, KeyError, csv.Error),
        open(os.path.join(folder, "loss.csv"), encoding="utf-8") as f,
    ):
        for row in csv.DictReader(f):
            if not row.get(column):
                continue
            step = int(row["step"])
            if points and step <= points[-1][0]:
                # An earlier run ends here: its checkpoints were moved away, loss.csv was not.
                points.clear()
            points.append((step, float(row[column])))
    return points


def checkpoints_in(folder: str, epoch_begin: int) -> dict[int, str]:
    """Return the checkpoints in a folder, {epoch: path}, from an epoch on."""
    found = {}
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in names:
        match = re.fullmatch(r"rwkv-([0-9]{1,18})\.pth", name)
        if match and int(match[1]) >= epoch_begin:
            found[int(match[1])] = os.path.join(folder, name)
    return found
