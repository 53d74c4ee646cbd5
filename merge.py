"""Merge a Bone checkpoint into its base model: `python merge.py base.pth out/rwkv-0.pth tuned.pth`.

Every adapted weight W becomes W' = W + W B + B (see bone.py), computed in float32 and rounded once; the trained time and ln
parameters take the place of the base's. The result is a complete model for RWKV Runner, Ai00 (after its converter) and the like.
"""

import os

import torch
from tqdm import tqdm

from bone import check_fits, merge_weight, rank_and_mode
from files import Parser, atomic_path, read_checkpoint, run_cli


def merge(base_path, bone_path, out_path):
    """Write the merged model. Peak memory is the base's size: its file is mapped privately and merged in place, tensor by tensor."""
    for path in (base_path, bone_path):
        if os.path.exists(out_path) and os.path.exists(path) and os.path.samefile(path, out_path):
            raise ValueError(f"{out_path}: would overwrite {'the base model' if path == base_path else 'the checkpoint'}; give another name")
    base, checkpoint = read_checkpoint(base_path), read_checkpoint(bone_path)
    r, mode = rank_and_mode(checkpoint, bone_path)
    if any(name.endswith(".bone") for name in base):
        raise ValueError(f"{base_path}: a Bone checkpoint, not a base model; the order is merge.py base checkpoint output")
    check_fits(checkpoint, {name: tensor.shape for name, tensor in base.items()}, bone_path)
    with atomic_path(out_path) as temporary:
        for name, tensor in tqdm(checkpoint.items(), desc="merging", unit="tensor", dynamic_ncols=True):
            if name.endswith(".bone"):
                weight = base[name.removesuffix("bone") + "weight"]
                weight.copy_(merge_weight(weight, tensor))
            else:
                base[name].copy_(tensor.view_as(base[name]))
        torch.save(base, temporary)
    bones = sum(name.endswith(".bone") for name in checkpoint)
    print(f"merged {bones} weights (Bone {mode}, r {r}) and {len(checkpoint) - bones} other trained tensors into {base_path}\n"
          f"wrote {out_path} ({os.path.getsize(out_path) / 1e9:.2f} GB)")


def main():
    parser = Parser(prog="merge.py", description="Merge a Bone checkpoint into its base model.", allow_abbrev=False,
                                     epilog="example: python merge.py base.pth out/rwkv-0.pth tuned.pth")
    parser.add_argument("base", help="the base model (.pth) that was trained on")
    parser.add_argument("checkpoint", help="the Bone checkpoint (proj_dir/rwkv-N.pth)")
    parser.add_argument("out", help="the merged model to write")
    args = parser.parse_args()
    merge(args.base, args.checkpoint, args.out)


if __name__ == "__main__":
    run_cli(main)
