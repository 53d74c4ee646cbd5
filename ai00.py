"""Write a merged model for Ai00: a .st file (safetensors), as its converter makes it.

One need not read this to understand Bone.
"""

import re
from collections.abc import Callable

from torch import Tensor

from archive import all_finite, drop_mapped_pages, save_safetensors


def for_ai00(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return name and tensor as Ai00's converter makes them.

    That is float16, some names changed, and low-rank matrices transposed.
    """
    tensor = tensor.half()
    if re.search(r"time_(maa|decay)_w[12]$", name):
        tensor = tensor.mT.contiguous()
    return name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix"), tensor


def save_for_ai00(base: dict[str, Tensor], merged: Callable[[str], Tensor], out_path: str) -> None:
    """Write merged(name) for every name of the base, as a .st for Ai00.

    ValueError where a number is too large for float16.
    """
    original_names = {}
    layout = {}
    for name, tensor in base.items():
        ai00_name, ai00_tensor = for_ai00(name, tensor.to("meta"))
        original_names[ai00_name] = name
        layout[ai00_name] = ai00_tensor

    def merged_float16(ai00_name: str) -> Tensor:
        name = original_names[ai00_name]
        weight = merged(name)
        _, half = for_ai00(name, weight)
        if not all_finite(half):
            raise ValueError(
                f"{name} reaches {weight.abs().max().item():g}, but float16, which {out_path} "
                "would hold, ends at 65504; write a .pth"
            )
        drop_mapped_pages(weight)
        return half

    save_safetensors(layout, merged_float16, out_path)
