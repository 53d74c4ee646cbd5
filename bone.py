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

from files import all_finite, read_checkpoint
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


def weight_shapes(model):
    """{name: shape} of every parameter of a base model, the quantized ones included."""
    quantized = {
        f"{name}.weight": m.shape for name, m in model.named_modules() if isinstance(m, Quantized)
    }
    return {name: p.shape for name, p in model.named_parameters()} | quantized


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


def rank_and_mode(checkpoint, path):
    """Rank and mode of a Bone checkpoint (dict of tensors), read off the shapes. ValueError where it holds no bone or several ranks."""
    shapes = [tensor.shape for name, tensor in checkpoint.items() if name.endswith(".bone")]
    for shape in shapes:
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[1] != shape[2]):
            raise ValueError(
                f"{path}: a bone is {tuple(shape)}; (in/r, r, r) or (r, out) is needed, so it is damaged, or of another method"
            )
    found = {(shape[-2], "bat" if len(shape) == 3 else "bone") for shape in shapes}
    if not found:
        raise ValueError(
            f"{path}: holds no tensor named *.bone; it is not a Bone checkpoint (a base model, or another method's?)"
        )
    if len(found) > 1:
        raise ValueError(
            f"{path}: mixes {' and '.join(f'{mode} r {r}' for r, mode in sorted(found))}; one rank and one mode are needed"
        )
    return found.pop()


@torch.no_grad()
def load_bone(model, path):
    """Put Bone layers into `model` and load a checkpoint: rank and mode from the file, bones and trained parts into place.

    Returns the model. ValueError, with the model unchanged, where a tensor of the file has no counterpart of its shape.
    """
    checkpoint = read_checkpoint(path)
    r, mode = check_fits(checkpoint, weight_shapes(model), path)
    add_bone(model, r, mode)
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint.items():
        parameters[name].copy_(tensor.view_as(parameters[name]))
    return model


def check_fits(checkpoint, shapes, path):
    """Rank and mode of a Bone checkpoint; ValueError unless its tensors are finite and fit the base model's {name: shape}."""
    r, mode = rank_and_mode(checkpoint, path)
    for name, tensor in checkpoint.items():
        linear = (
            shapes.get(name.removesuffix("bone") + "weight", ())
            if name.endswith(".bone") and name.startswith("blocks.")
            else ()
        )
        linear = linear if len(linear) == 2 else None
        expected = bone_shape(linear, r, mode) if linear else shapes.get(name)
        if expected is None:
            raise ValueError(
                f"{path}: {name} has no counterpart in the base model; it was trained on another model"
            )
        if mode == "bat" and linear and any(n % r for n in linear):
            raise ValueError(
                f"{path}: r {r} of {name} does not divide {tuple(linear)}; it was trained on another model"
            )
        if [n for n in tensor.shape if n != 1] != [
            n for n in expected if n != 1
        ]:  # time_maa_*: (1, 1, C) and (C,) are both about
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, but this base model needs {tuple(expected)}; it was trained on another model"
            )
        if not all_finite(tensor):
            raise ValueError(
                f"{path}: {name} holds NaN or infinite values; its training went wrong, use an earlier checkpoint"
            )
    return r, mode


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
