"""The files of merge.py: do the two it reads belong together, and may it write the third.

One need not read this to understand Bone.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ai00 import save_for_ai00
from archive import read_checkpoint, save_stream
from bone_record import check_base, trained_quant
from checkpoint import check_fits

AI00 = (".st", ".safetensors")


class Inputs(NamedTuple):
    """What is merged. Both files are mapped into memory: only a tensor that is read takes any."""

    base: dict[str, Tensor]
    trained: dict[str, Tensor]
    r: int
    mode: str
    quant: str  # of the base in training


def read_inputs(
    base_path: str, bone_path: str, *, quant: str | None, other_base: bool = False
) -> Inputs:
    """Read a base and a Bone checkpoint. ValueError where they do not belong together.

    quant: see `bone_record.trained_quant`; other_base: see `bone_record.check_base`.
    """
    base = read_checkpoint(base_path)
    trained = read_checkpoint(bone_path)
    if any(name.endswith(".bone") for name in base):
        raise ValueError(
            f"{base_path}: a Bone checkpoint, not a base model; "
            "the order is merge.py base checkpoint output"
        )
    shapes = {name: tensor.shape for name, tensor in base.items()}
    r, mode = check_fits(trained, shapes, bone_path)
    check_base(bone_path, base_path, other_base)
    return Inputs(base, trained, r, mode, trained_quant(bone_path, quant))


def check_output(base_path: str, bone_path: str, out_path: str) -> None:
    """Raise ValueError where the output has an unknown ending, or would overwrite a file."""
    if not str(out_path).lower().endswith((".pth", *AI00)):
        raise ValueError(
            f"{out_path}: its ending does not say what to write; "
            "name it *.pth (RWKV Runner, generate.py) or *.st (Ai00)"
        )
    if not os.path.exists(out_path):
        return
    for path, what in ((base_path, "base model"), (bone_path, "checkpoint")):
        if os.path.samefile(path, out_path):
            raise ValueError(f"{out_path}: would overwrite the {what}; give another name")
    if os.path.isfile(out_path):
        raise ValueError(f"{out_path}: already there; delete it, or give another name")


def save_merged(base: dict[str, Tensor], merged: Callable[[str], Tensor], out_path: str) -> None:
    """Write {name: merged(name)} for every name of the base, in the format of the path's ending."""
    if str(out_path).lower().endswith(AI00):
        save_for_ai00(base, merged, out_path)
    else:
        save_stream(dict(base), merged, out_path)
