"""Merge a Bone checkpoint into its base model: `python merge.py base.pth out/rwkv-0.pth tuned.pth`.

Adapted weights W become W' (see bone.py), computed in float32 and rounded once. Other trained
tensors replace the base's. Where the base was quantized in training, W is what the training
saw: quantized and dequantized. An output named .st is a model for Ai00 (safetensors, float16).
"""

import argparse
import os

from cli import Parser, run_cli  # isort: skip

import torch
from torch import Tensor
from tqdm import tqdm

from archive import all_finite, drop_mapped_pages
from bone import merge_weight
from merge_files import check_output, read_inputs, save_merged
from quant import FORMATS, quantize


def merge(
    base_path: str,
    bone_path: str,
    out_path: str,
    *,
    quant: str | None = None,
    other_base: bool = False,
) -> None:
    """Write the merged model, one tensor after the other.

    quant: of the base in training; None: as the checkpoint says. other_base: merge into a base that
    is not the one it was trained on. ValueError where the files do not belong together, or the
    output is there already.
    """
    check_output(base_path, bone_path, out_path)
    inputs = read_inputs(base_path, bone_path, quant=quant, other_base=other_base)
    base, trained = inputs.base, inputs.trained

    def merged(name: str) -> Tensor:
        bar.update()
        weight = base.pop(name)
        result = merge_tensor(name, weight, trained, quant=inputs.quant)
        drop_mapped_pages(weight)
        if not all_finite(result):
            raise ValueError(
                f"{name} would hold NaN or infinite values in {result.dtype}: "
                f"{base_path} is damaged, or the training went wrong"
            )
        return result

    with tqdm(total=len(base), desc="merging", unit="tensor", dynamic_ncols=True, delay=0.5) as bar:
        save_merged(base, merged, out_path)

    bones = sum(name.endswith(".bone") for name in trained)
    bone_kind = f"Bone {inputs.mode}, r {inputs.r}"
    if inputs.quant != "none":
        bone_kind += f", {inputs.quant} base"
    print(
        f"merged {bones} weights ({bone_kind}) and {len(trained) - bones} other trained tensors "
        f"into {base_path}"
    )
    print(f"wrote {out_path} ({os.path.getsize(out_path) / 1e9:.2f} GB)")


def merge_tensor(name: str, weight: Tensor, trained: dict[str, Tensor], *, quant: str) -> Tensor:
    """Return one tensor of the merged model, in the dtype of the base's, `weight`."""
    bone = trained.get(name.removesuffix("weight") + "bone")
    if bone is not None:
        W = weight
        if quant != "none":
            W = quantize(weight, quant).dequantize(torch.float32)
        return merge_weight(W, bone).to(weight.dtype)
    if name in trained:
        return trained[name].view_as(weight).to(weight.dtype)
    return weight


def main() -> None:
    parser = Parser(
        prog="merge.py",
        usage="merge.py base.pth out/rwkv-0.pth tuned.pth [--quant {none,int8,nf4}]",
        description="Merge a Bone checkpoint into its base model. "
        "The files are given in this order, or by the flags of RWKV-PEFT.",
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="file", help=argparse.SUPPRESS)
    add("--base_model", metavar="STR", help="the base model (.pth) that was trained on")
    add(
        *("--lora_checkpoint", "--peft_checkpoint"),
        metavar="STR",
        help="the Bone checkpoint (proj_dir/rwkv-N.pth)",
    )
    output_help = "the merged model to write: a .pth, or a .st (safetensors, float16) for Ai00"
    add("--output", metavar="STR", help=output_help)
    quant_help = "of the base in training (default: as the checkpoint says)"
    add("--quant", choices=("none", *FORMATS), help=quant_help)
    other_help = "merge into a base that the checkpoint was not trained on"
    add("--other_base", action="store_true", help=other_help)
    args = parser.parse_intermixed_args()

    # A path that its flag does not give is the next of the files.
    files = list(args.files)
    paths = []
    for path in (args.base_model, args.lora_checkpoint, args.output):
        if not path and files:
            paths.append(files.pop(0))
        else:
            paths.append(path)
    if files or not all(paths):
        parser.error("three files are needed, base model, checkpoint and output")
    base_path, bone_path, out_path = paths
    merge(base_path, bone_path, out_path, quant=args.quant, other_base=args.other_base)


if __name__ == "__main__":
    run_cli(main)
