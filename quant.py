"""Frozen weights in 8 or 4 bits, written out: what a base model needs that is only read, never trained.

A weight (out, in) is cut, along its rows, into blocks of 64 numbers. A block keeps one scale and, for each number, a small
integer, its code. Getting the weight back is one multiplication:  w = value[code] * scale.

`int8`  127 even steps to either side of 0. The scale, absmax / 127, is rounded (up) to bfloat16 before the codes are chosen by it,
        so keeping it in 2 bytes costs next to no precision: 8.25 bits per number.

`nf4`   4-bit NormalFloat, from QLoRA. Trained weights are normally distributed, so the 16 values are not evenly spaced: each is
        as likely as any other for a normal variable scaled to -1 .. 1. They lie closely around 0, where most weights are, and
        0 itself is one of them. The scale is the block's absmax in float32; two codes share a byte, the first in its upper
        half: 4.5 bits per number.

Sources: Dettmers et al., "QLoRA" (arXiv 2305.14314), section 3 and appendix E for the 16 values; codes, scales and float32 values
are those of its implementation, bitsandbytes, bit for bit (test_quant.py).
"""

import collections
import contextlib

import torch
from torch import nn

BLOCK = 64
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
PIECE = 1 << 20  # numbers handled at once on a CPU: what is temporary stays in the cache
GPU_PIECE = 1 << 24  # on a GPU, where a launch costs more than that: most matrices are one piece


def quantize_int8(w):
    """w: (blocks, 64) float32 -> codes (blocks, 64) int8, scale (blocks) bfloat16."""
    exact = w.abs().amax(1) / 127
    scale = exact.bfloat16()
    scale = torch.where(
        scale < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale
    )  # else 127.4 could be needed
    codes = (w / scale.float().clamp(min=1e-38)[:, None]).round().to(torch.int8)
    return codes, scale


def dequantize_int8(codes, scale, out):
    out.copy_(codes).mul_(
        scale.to(torch.float32 if out.dtype == torch.float16 else out.dtype)[:, None]
    )  # float16 has no room for a 127th


def quantize_nf4(w):
    """w: (blocks, 64) float32 -> codes (blocks, 32) uint8, scale (blocks) float32."""
    scale = w.abs().amax(1)
    between = ((NF4[1:] + NF4[:-1]) / 2).to(
        w.device
    )  # a number takes the value on its side of these
    codes = torch.bucketize(
        (w * (1 / scale.clamp(min=1e-38))[:, None]).clamp(-1, 1), between, out_int32=True
    ).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


_pairs: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def nf4_pairs(device, dtype):
    """Return a table (256,) of the two values that a byte holds, read as one integer of twice the width of `dtype`.

    It is made once for each device and dtype: copying it there stops a GPU.
    """
    if (device, dtype) in _pairs:
        return _pairs[device, dtype]
    two_values = torch.cartesian_prod(NF4, NF4).to(device, dtype)
    pairs = two_values.view({2: torch.int32, 4: torch.int64}[dtype.itemsize])[:, 0]
    if type(pairs) is torch.Tensor:  # not one of those without data that memory.py counts with
        _pairs[device, dtype] = pairs
    return pairs


def dequantize_nf4(codes, scale, out):
    """A byte is looked up as a whole, in a table of pairs of values."""
    pairs = nf4_pairs(out.device, out.dtype)
    blocks = (PIECE if out.device.type == "cpu" else GPU_PIECE) // BLOCK
    for c, s, o in zip(codes.split(blocks), scale.split(blocks), out.split(blocks)):
        torch.index_select(pairs, 0, c.view(-1).int(), out=o.view(pairs.dtype).view(-1))
        o.mul_(s.to(o.dtype)[:, None])


FORMATS = {"int8": (quantize_int8, dequantize_int8), "nf4": (quantize_nf4, dequantize_nf4)}


class Quantized(nn.Module):
    """A frozen weight (out, in) as codes and scales, and the linear layer that it is: (..., in) -> (..., out).

    Made by `quantize`. The product runs in the autocast dtype where autocast is on, else in `dtype`, by default that of the weight.
    """

    def __init__(self, codes, scale, kind, shape, dtype):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.kind, self.shape, self.dtype = kind, shape, dtype

    @property
    def device(self):
        return self.codes.device

    @torch.no_grad()
    def dequantize(self, dtype):
        """The weight (out, in) in `dtype` (float32, bfloat16 or float16), a new tensor."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        FORMATS[self.kind][1](self.codes, self.scale, out.view(-1, BLOCK))
        return out

    def forward(self, x):
        device = x.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        )
        with torch.autocast(device, enabled=False):
            return FrozenLinear.apply(x.to(dtype), self)


class FrozenLinear(torch.autograd.Function):
    """y = x W^T for a Quantized or a frozen tensor W. What is saved for the backward pass is W as it is kept, and nothing else."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return product(lambda: x @ dense(weight, x.dtype).t())

    @staticmethod
    def backward(ctx, gy):
        return gy @ dense(ctx.weight, gy.dtype), None


# Of a block that is recomputed in the backward pass (gradient checkpointing) the products with frozen weights are most of the work, and what they
# gave is the smaller part of its activations. With them kept, recomputing it costs little, and no weight is dequantized for it.
_kept = None  # while such a block runs: (what its products gave so far, whether this is the second time)


@contextlib.contextmanager
def _keeping(outputs, again):
    global _kept
    before, _kept = _kept, (outputs, again)
    try:
        yield
    finally:
        _kept = before


def keep_products():
    """For torch.utils.checkpoint(context_fn=keep_products): what `product` makes in the first run of a block is kept for the second."""
    outputs = collections.deque()
    return _keeping(outputs, False), _keeping(outputs, True)


def product(make):
    """make(), a tensor; or what it was the first time. Called within the forward of an autograd.Function."""
    outputs, again = _kept or (None, False)
    if again:
        return outputs.popleft()
    y = make()
    if outputs is not None:
        outputs.append(
            y.detach()
        )  # y will have the graph at its back, which would then hold itself
    return y


def dense(weight, dtype):
    """A weight in `dtype`, whether it is a tensor or a Quantized."""
    return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight.to(dtype)


@torch.no_grad()
def quantize(weight, kind, dtype=None):
    """A Quantized of kind `int8` or `nf4` from a weight (out, in) of any floating dtype, on its device. dtype: see there.

    ValueError for another kind, a size that is no multiple of the block, or a weight that holds NaN or infinite values.
    """
    if kind not in FORMATS:
        raise ValueError(f"quantization {kind!r} is unknown: int8 and nf4 are there")
    if weight.numel() % BLOCK:
        raise ValueError(
            f"a weight of {weight.shape[0]} x {weight.shape[1]} is no multiple of {BLOCK} numbers, the block of {kind}"
        )
    piece = weight.numel() if weight.is_meta else PIECE
    pieces = [FORMATS[kind][0](w.float()) for w in weight.reshape(-1, BLOCK).split(piece // BLOCK)]
    codes, scale = (torch.cat(parts) for parts in zip(*pieces))
    if not weight.is_meta and not scale.isfinite().all():
        raise ValueError(
            "a weight that holds NaN or infinite values cannot be quantized; the file is damaged"
        )
    dtype = dtype or weight.dtype
    return Quantized(
        codes, scale, kind, weight.shape, torch.float32 if dtype == torch.float64 else dtype
    )  # what it holds is no finer
