"""Bone (Block Affine): fine-tune a frozen linear layer through one small square block per block column.

A frozen layer y = W x, W of shape (out, in), is cut into r x r blocks W_ab (a: block row, b: block column). Two modes:

`bat`, block affine, the default. One trainable tensor `bone` of shape (in/r, r, r), zero at the start. Its block B_b
belongs to block column b and is shared by all block rows:

    W'_ab = W_ab + W_ab B_b + B_b              (what merging writes)

The straightforward way builds W' (out x in) in every step and its gradient (out x in) in every backward pass. Neither is
needed. Multiply W' by x, cut into segments x_b of length r, and take the sums apart:

    z_b = B_b x_b                              r x r per segment: small
    y   = W (x + z) + tile(s),  s = sum_b z_b  the frozen product, once; s, of length r, repeated out/r times

and going back, with gy = dL/dy:

    gs   = fold(gy)                            the transpose of tile: gy cut into segments of length r, added up
    gu   = W^T gy                              the frozen product, once: no gradient of the shape of W
    gz_b = gu_b + gs
    gB_b = gz_b x_b^T                          summed over tokens
    gx_b = gu_b + B_b^T gz_b

`bone`, shard sharing: `bone` of shape (r, out), y = W x + bone^T (sum_b x_b), with x padded by zeros to a multiple of r.
Later papers, and PEFT, call this one Bone, then MiSS.

Source: Jiale Kang, "Bone: Block-Affine Adaptation of Large Language Models" (arXiv 2409.15371), and RWKV-PEFT, whose names and
shapes are kept. The rearrangement above is exact; test_bone.py holds it against W'.
"""

import torch
import torch.nn.functional as F
from torch import nn

from quant import FrozenLinear, Quantized, dense, product


def segments(x, r):
    """(tokens, n * r) -> (n, tokens, r): a view that has segment b of every token as matrix b of a batch."""
    return x.view(x.shape[0], -1, r).transpose(0, 1)


class Bat(torch.autograd.Function):
    """y = W' x of the `bat` mode for x (tokens, in), W (out, in), bone (in/r, r, r), without W'. Products run in `dtype`."""

    @staticmethod
    def forward(ctx, x, weight, bone, dtype):
        r = bone.shape[1]
        B = bone.to(dtype)

        # z_b = B_b x_b. The copy casts x and regroups it into segments at once.
        x_b = torch.empty(bone.shape[0], len(x), r, dtype=dtype, device=x.device).copy_(
            segments(x, r)
        )
        z = torch.empty(x.shape, dtype=dtype, device=x.device)
        torch.bmm(x_b, B.transpose(1, 2), out=segments(z, r))
        s = z.view(len(x), -1, r).sum(1, dtype=dtype)

        # y = W (x + z) + tile(s). z meets x before x is rounded, and s meets y inside the product's
        # float32 sums: a bone too small to move a bfloat16 number by a step still counts, on average.
        # Added to rounded numbers, it would vanish.
        y = product(
            lambda: s.repeat(1, weight.shape[0] // r).addmm_(z.add_(x), dense(weight, dtype).t())
        )
        ctx.save_for_backward(x_b, B)
        ctx.weight, ctx.dtypes = weight, (x.dtype, bone.dtype)
        return y

    @staticmethod
    def backward(ctx, gy):
        x_b, B = ctx.saved_tensors
        r = B.shape[1]
        gs = gy.view(len(gy), -1, r).sum(1, dtype=gy.dtype)
        gu = gy @ dense(ctx.weight, gy.dtype)
        gz = torch.add(segments(gu, r), gs, out=torch.empty_like(x_b))
        gB = torch.bmm(gz.transpose(1, 2), x_b)
        gx = gu  # W^T gy becomes the gradient of x in its own place
        segments(gx, r).baddbmm_(gz, B)
        x_dtype, bone_dtype = ctx.dtypes
        return gx.to(x_dtype), None, gB.to(bone_dtype), None


def bone_shape(weight_shape, r, mode):
    out_features, in_features = weight_shape
    return (in_features // r, r, r) if mode == "bat" else (r, out_features)


class BoneLinear(nn.Module):
    """A frozen linear layer with its trainable `bone`.

    weight: (out, in), any floating dtype or Quantized, kept as it is and frozen; r: rank, the side of a block; mode: `bat` or `bone`.
    forward: (..., in) -> (..., out), in the autocast dtype where autocast is on, else in the weight's.
    """

    def __init__(self, weight, r, mode="bat"):
        super().__init__()
        self.r, self.mode = r, mode
        self.weight = (
            weight
            if isinstance(weight, Quantized)
            else nn.Parameter(weight.detach(), requires_grad=False)
        )
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.bone = nn.Parameter(
            torch.zeros(bone_shape(weight.shape, r, mode), dtype=dtype, device=weight.device)
        )

    def forward(self, x):
        device = x.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else self.weight.dtype
        )
        # Every dtype below is chosen by hand; no device's own list of operators has a say in it.
        with torch.autocast(device, enabled=False):
            if self.mode == "bat":
                y = Bat.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bone, dtype)
                return y.view(*x.shape[:-1], -1)
            x = x.to(dtype)
            shards = F.pad(x, (0, -x.shape[-1] % self.r)).unflatten(-1, (-1, self.r))
            return FrozenLinear.apply(x, self.weight) + shards.sum(-2) @ self.bone.to(dtype)


def add_bone(model, r, mode="bat"):
    """Freeze `model` and give every linear layer inside its blocks a bone of rank r. Returns the model, changed in place.

    A layer is inside a block when its name has a dot (blocks.0.att.key); the output head stays as it is.
    Only the bones require gradients afterwards. ValueError if r does not divide a layer (mode bat needs it to).
    """
    if mode not in ("bat", "bone"):
        raise ValueError(
            f"bone mode {mode!r} is unknown: use bat (block affine) or bone (shard sharing)"
        )
    if r < 1:
        raise ValueError(f"bone_r {r} must be at least 1; 64 is the usual choice")
    linears = {
        name: m if isinstance(m, Quantized) else m.weight
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, Quantized)) and "." in name
    }
    for name, weight in linears.items():
        out_features, in_features = weight.shape
        if mode == "bat" and (in_features % r or out_features % r):
            fitting = [
                n
                for n in (8, 16, 32, 64, 128, 256)
                if all(s % n == 0 for w in linears.values() for s in w.shape)
            ]
            raise ValueError(
                f"bone_r {r} does not divide {name} ({out_features} x {in_features}); this model takes {fitting}, or any with mode bone"
            )
    model.requires_grad_(False)
    for name, weight in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, BoneLinear(weight, r, mode))
    return model


@torch.no_grad()
def merge_weight(weight, bone):
    """The merged weight W' (out, in), in the dtype of `weight`, from W (out, in) and bone (in/r, r, r) or (r, out).

    Computes in float32 (float64 for float64) and rounds once, one block row at a time: no other temporary of the size of W.
    """
    merged = torch.empty_like(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    bone, r = bone.to(dtype), bone.shape[-2]
    if bone.ndim == 3:
        for w, w_merged in zip(weight.split(r), merged.split(r)):
            w_b = segments(w.to(dtype), r)  # W_ab for all b of one block row a: (b, r, r)
            segments(w_merged, r).copy_(torch.baddbmm(w_b + bone, w_b, bone))
    else:
        shards = -(-weight.shape[1] // r)
        for w, w_merged, b in zip(weight.split(64), merged.split(64), bone.t().split(64)):
            w_merged.copy_(w.to(dtype) + b.repeat(1, shards)[:, : weight.shape[1]])
    return merged
