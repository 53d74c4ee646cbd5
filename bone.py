"""Bone (Block Affine): fine-tune a frozen linear layer, one small square block per block column.

A frozen layer y = W x, W of shape (out, in), is cut into r x r blocks W_ab (a: block row, b: block
column). learn_bone.ipynb shows what follows step by step.

`bat`, block affine, is the default mode. One trainable tensor `bone` of shape (in/r, r, r), zero at
the start, has a block B_b for each block column, which all its blocks share:

    W'_ab = W_ab + W_ab B_b + B_b              what merging writes

Training builds neither W' nor its gradient. With the segments x_b of x, of length r:

    z_b = B_b x_b
    s   = sum_b z_b
    y   = W (x + z) + tile(s)                  tile repeats s out/r times

Backward, with gy = dL/dy and u = x + z:

    gs   = fold(gy)                            the sum of gy's segments
    gu   = W^T gy
    gz_b = gu_b + gs
    gB_b = gz_b x_b^T                          summed over tokens
    gx_b = gu_b + B_b^T gz_b

By hand, with W of 4 x 4 and r = 2:

        1 0 | 2 1                                            1 2 | 5 1
    W = 0 1 | 1 0    B_0 = 0 1   B_1 = 1 0      so that      0 1 | 2 0
        ----+----          0 0         0 0              W' = ----+----
        1 1 | 0 0                                            1 3 | 1 0
        2 0 | 0 1                                            2 2 | 0 1

W'_01, for instance, is W_01 + W_01 B_1 + B_1 = (2 1, 1 0) + (2 0, 1 0) + (1 0, 0 0) = (5 1, 2 0).
Now x = (1 1, 1 2), with and without W':

    W' x                                                       = (10 3, 5 6)
    z = (B_0 x_0, B_1 x_1) = (1 0, 1 0)    s = z_0 + z_1 = (2 0)
    W (x + z) = W (2 1, 2 2) = (8 3, 3 6)    + (2 0, 2 0)      = (10 3, 5 6)

`bone`, shard sharing, is the other mode. One trainable tensor `bone` of shape (r, out):

    y = W x + bone^T (sum_b x_b)               x is padded with zeros to a multiple of r

Source: Jiale Kang, arXiv 2409.15371. Its versions 2 and 3 call `bat` Bone; later ones and PEFT call
it Bat, and `bone` Bone, now MiSS. Names and shapes are RWKV-PEFT's. Tests: test_bone.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import FrozenLinear, Quantized, cached_matmul, matmul_dtype, to_dense


def segments(x: Tensor, r: int) -> Tensor:
    """View x (tokens, n * r) as n matrices (n, tokens, r): matrix b has segment b of each token."""
    return x.unflatten(1, (-1, r)).transpose(0, 1)


def fold(x: Tensor, r: int) -> Tensor:
    """Add up the segments of each token: (tokens, n * r) -> (tokens, r)."""
    return x.unflatten(1, (-1, r)).sum(1, dtype=x.dtype)  # in autocast it would be float32


def tile(s: Tensor, out_features: int) -> Tensor:
    """Repeat the s of each token until it is as long as y: (tokens, r) -> (tokens, out)."""
    return s.repeat(1, out_features // s.shape[1])


def block_affine_matmul(x: Tensor, x_b: Tensor, weight: Tensor | Quantized, *, B: Tensor) -> Tensor:
    """Compute y = W' x of mode `bat` without W': (tokens, in) -> (tokens, out).

    x_b: the segments of x, (in/r, tokens, r), in the dtype of B (in/r, r, r) and of y. x keeps its
    own dtype.
    """
    dtype = B.dtype
    r = B.shape[1]

    z = torch.bmm(x_b, B.mT)
    s = z.sum(0)

    # y = W (x + z) + tile(s), where x + z, and the product with s, are each rounded once: changes
    # smaller than one bfloat16 step then still count on average.
    u = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.add(x.unflatten(1, (-1, r)), z.transpose(0, 1), out=u.unflatten(1, (-1, r)))
    y = tile(s, out_features=weight.shape[0])
    y.addmm_(u, to_dense(weight, dtype).t())
    return y.view_as(y)  # of y itself, torch.compile in PyTorch 2.11 loses the gradient


class BlockAffine(torch.autograd.Function):
    """y = W' x of mode `bat` with its gradients, by the formulas above.

    x: (tokens, in). weight: (out, in), frozen. B: (in/r, r, r), in the dtype to compute in.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Quantized, B: Tensor) -> Tensor:
        x_b = segments(x, B.shape[1]).to(B.dtype, memory_format=torch.contiguous_format)
        ctx.save_for_backward(x_b, B)
        ctx.weight = weight  # not saved as a tensor, since it may be Quantized
        ctx.x_dtype = x.dtype
        # This calls block_affine_matmul, unless its result was kept (quant.py).
        return cached_matmul(block_affine_matmul, x, x_b, weight, B=B)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, Tensor]:
        x_b, B = ctx.saved_tensors
        r = B.shape[1]
        gs = fold(gy, r)
        gu = gy @ to_dense(ctx.weight, gy.dtype)

        # gz_b = gu_b + gs
        gz = torch.add(segments(gu, r), gs, out=gu.new_empty(x_b.shape))
        gB = torch.bmm(gz.mT, x_b)

        # gx_b = gu_b + B_b^T gz_b
        gx_b = torch.baddbmm(segments(gu, r), gz, B)
        gx = gx_b.transpose(0, 1).to(ctx.x_dtype, memory_format=torch.contiguous_format)
        return gx.reshape(gu.shape), None, gB


def shard_sharing(x: Tensor, weight: Tensor | Quantized, bone: Tensor) -> Tensor:
    """Compute y = W x + bone^T (sum_b x_b), mode `bone`, for x (..., in) and bone (r, out)."""
    r = bone.shape[0]
    x_b = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r))
    return FrozenLinear.apply(x, weight) + x_b.sum(-2) @ bone


def check_bone(r: int, mode: str) -> None:
    """Raise ValueError where no layer can have such a bone."""
    if mode not in ("bat", "bone"):
        raise ValueError(f"bone mode {mode!r} is unknown: use bat or bone (shard sharing)")
    if r < 1:
        raise ValueError(f"bone_r {r} must be at least 1; 64 is the usual choice")


def bone_shape(weight_shape: tuple[int, ...], r: int, mode: str) -> tuple[int, ...]:
    """Return the shape of the trainable tensor for a weight of shape (out, in).

    ValueError as of check_bone, and where r does not divide both, which mode `bat` needs.
    """
    check_bone(r, mode)
    out_features, in_features = weight_shape
    if mode == "bat" and (in_features % r or out_features % r):
        raise ValueError(f"r = {r} does not divide both sides of {out_features, in_features}")
    return (in_features // r, r, r) if mode == "bat" else (r, out_features)


class BoneLinear(nn.Module):
    """A frozen linear layer with its trainable `bone`: (..., in) -> (..., out).

    weight: (out, in), of any floating dtype or Quantized. bias: (out), or None. Both are frozen.
    r: the side of a block (`bat`), or the rows of the shard (`bone`). ValueError as of bone_shape.
    The trainable tensor is float32 (float64 beside a weight in float64). The output is in the
    autocast dtype where autocast is on, else in the weight's.
    """

    weight: Quantized | nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor | Quantized, r: int, mode: str = "bat", *, bias: Tensor | None = None
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.r = r
        self.mode = mode
        if isinstance(weight, Quantized):
            self.weight = weight
        else:
            self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        shape = bone_shape(weight.shape, r, mode)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.bone = nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        dtype = matmul_dtype(x, self.weight)
        device = x.device.type
        # Every dtype is chosen by hand: which operators autocast changes depends on the device.
        with torch.autocast(device, enabled=False):
            bone = self.bone.to(dtype)
            if self.mode == "bone":
                y = shard_sharing(x.to(dtype), self.weight, bone)
            else:
                # x keeps its dtype until z has been added to it.
                y = BlockAffine.apply(x.reshape(-1, x.shape[-1]), self.weight, bone)
                y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, r={self.r}, mode={self.mode}"

    def merged(self) -> nn.Linear:
        """Return a plain layer with the weight W', in the weight's dtype, not quantized."""
        weight = merge_weight(to_dense(self.weight, self.weight.dtype), self.bone.detach())
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear


@torch.no_grad()
def merge_weight(weight: Tensor, bone: Tensor) -> Tensor:
    """Compute the merged weight W' (out, in), in the dtype of W.

    Computes in float32 (float64 for float64), a few rows at a time, so that nothing else of the
    size of W is made, and rounds once. The shape of the bone tells the mode; RuntimeError where
    it does not fit.
    """
    merged = torch.empty_like(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    bone = bone.to(dtype)
    if bone.ndim == 3:
        r = bone.shape[1]
        for row, merged_row in zip(weight.split(r), merged.split(r), strict=True):
            # The blocks W_ab of one block row a, (in/r, r, r).
            W = segments(row.to(dtype), r)
            segments(merged_row, r).copy_(torch.baddbmm(W + bone, W, bone))
        return merged

    # Mode `bone`: column i of the bone, repeated, is added to row i of W.
    r, in_features = bone.shape[0], weight.shape[1]
    repeats = (in_features + r - 1) // r
    chunks = zip(weight.split(64), merged.split(64), bone.t().split(64), strict=True)
    for rows, merged_rows, columns in chunks:
        merged_rows.copy_(rows.to(dtype) + columns.repeat(1, repeats)[:, :in_features])
    return merged
