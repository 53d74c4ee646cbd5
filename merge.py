"""Merge a Bone checkpoint into its base model: `python merge.py base.pth out/rwkv-0.pth tuned.pth`; or into tuned.st, for Ai00.

Adapted weights W become W' = W + W B + B (see bone.py), computed in float32 and rounded once; other trained tensors replace the base's.
Where a quantized base was trained on, W is what that was: quantized and dequantized.
"""

import argparse
import os
import re

import torch
from tqdm import tqdm

from archive import (
    all_finite,
    drop_mapped_pages,
    read_checkpoint,
    save_safetensors,
    save_stream,
    trained_quant,
)
from bone import merge_weight
from checkpoint import check_fits
from cli import Parser, run_cli
from quant import FORMATS, quantize


def for_ai00(name, tensor):
    """(name, tensor) as Ai00's converter would have it: float16, some names changed, low-rank matrices transposed."""
    tensor = tensor.half()
    if re.search(r"time_(maa|decay)_w[12]$", name):
        tensor = tensor.mT.contiguous()
    return name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix"), tensor


def merge(base_path, bone_path, out_path, quant=None):
    """Write the merged model, one tensor after the other: both files are mapped, and what was read is given back at once."""
    for path, what in ((base_path, "base model"), (bone_path, "checkpoint")):
        if os.path.exists(out_path) and os.path.samefile(path, out_path):
            raise ValueError(f"{out_path}: would overwrite the {what}; give another name")
    if os.path.isfile(out_path):
        raise ValueError(f"{out_path}: already there; delete it, or give another name")
    base, checkpoint = read_checkpoint(base_path), read_checkpoint(bone_path)
    quant = trained_quant(bone_path, quant)
    if any(name.endswith(".bone") for name in base):
        raise ValueError(
            f"{base_path}: a Bone checkpoint, not a base model; the order is merge.py base checkpoint output"
        )
    r, mode = check_fits(
        checkpoint, {name: tensor.shape for name, tensor in base.items()}, bone_path
    )

    def merged(name):
        bar.update()
        weight, bone = base.pop(name), checkpoint.get(name.removesuffix("weight") + "bone")
        if bone is None:
            result = (
                checkpoint[name].view_as(weight).to(weight.dtype) if name in checkpoint else weight
            )
        else:
            result = merge_weight(
                quantize(weight, quant).dequantize(torch.float32) if quant != "none" else weight,
                bone,
            ).to(weight.dtype)
        drop_mapped_pages(weight)
        if not all_finite(result):
            raise ValueError(
                f"{name} would hold NaN or infinite values in {result.dtype}: {base_path} is damaged, or the training went wrong"
            )
        return result

    def merged_float16(name):
        weight = merged(names[name])
        half = for_ai00(names[name], weight)[1]
        if not all_finite(half):
            raise ValueError(
                f"{names[name]} reaches {weight.abs().max().item():g}, but float16, which {out_path} would hold, ends at 65504; write a .pth"
            )
        drop_mapped_pages(weight)
        return half

    with tqdm(total=len(base), desc="merging", unit="tensor", dynamic_ncols=True, delay=0.5) as bar:
        if str(out_path).lower().endswith((".st", ".safetensors")):
            names = {for_ai00(name, tensor.to("meta"))[0]: name for name, tensor in base.items()}
            save_safetensors(
                dict(for_ai00(name, tensor.to("meta")) for name, tensor in base.items()),
                merged_float16,
                out_path,
            )
        else:
            save_stream(dict(base), merged, out_path)
    bones = sum(name.endswith(".bone") for name in checkpoint)
    on = f", {quant} base" if quant != "none" else ""
    print(
        f"merged {bones} weights (Bone {mode}, r {r}{on}) and {len(checkpoint) - bones} other trained tensors into {base_path}"
    )
    print(f"wrote {out_path} ({os.path.getsize(out_path) / 1e9:.2f} GB)")


def main():
    parser = Parser(
        prog="merge.py",
        usage="merge.py base.pth out/rwkv-0.pth tuned.pth [--quant {none,int8,nf4}]",
        description="Merge a Bone checkpoint into its base model. The files are given in this order, or by the flags of RWKV-PEFT.",
    )
    parser.add_argument("files", nargs="*", metavar="file", help=argparse.SUPPRESS)
    parser.add_argument(
        "--base_model", metavar="STR", help="the base model (.pth) that was trained on"
    )
    parser.add_argument(
        "--lora_checkpoint", metavar="STR", help="the Bone checkpoint (proj_dir/rwkv-N.pth)"
    )
    parser.add_argument(
        "--output",
        metavar="STR",
        help="the merged model to write: a .pth, or a .st (safetensors, float16) for Ai00",
    )
    parser.add_argument(
        "--quant",
        choices=("none", *FORMATS),
        help="of the base in training (default: as args.json beside the checkpoint says)",
    )
    args = parser.parse_intermixed_args()
    files = iter(args.files)
    paths = [
        given or next(files, None) for given in (args.base_model, args.lora_checkpoint, args.output)
    ]
    if None in paths or [*files]:
        parser.error("three files are needed, base model, checkpoint and output")
    merge(*paths, args.quant)


if __name__ == "__main__":
    run_cli(main)
