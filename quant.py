"""Frozen weights in 8 or 4 bits: a base model that is only read, never trained, needs no more.

A weight (out, in) is cut, along its rows, into blocks of 64 numbers. A block keeps one scale and,
for each number, a small integer, its code. One multiplication gives the weight back:

    w = value[code] * scale

`int8`  127 even steps to either side of 0. The scale is absmax / 127, rounded up to bfloat16 before
        the codes are chosen by it: kept in 2 bytes, it costs next to no precision.
        8.25 bits per number.

`nf4`   4-bit NormalFloat, from QLoRA. Trained weights are normally distributed, so the 16 values
        are not evenly spaced: each is as likely as any other for a normal variable scaled to
        -1 .. 1. They lie closely around 0, where most weights are, and 0 itself is one of them.
        The scale is the block's absmax in float32. Two codes share a byte, the first in its upper
        half: 4.5 bits per number.

Sources: Dettmers et al., "QLoRA" (arXiv 2305.14314), section 3, and appendix E for the 16 values.
Codes, scales and float32 values are those of its implementation, bitsandbytes, bit for bit
(test_quant.py).
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

BLOCK = 64
# fmt: off
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on

# Numbers handled at once. On a CPU, what is temporary then stays in its cache. On a GPU a launch
# costs more than that saves, and most matrices are one chunk.
CHUNK_NUMEL = 1 << 20
GPU_CHUNK_NUMEL = 1 << 24

# ---- The two formats -----------------------------------------------------------------------------


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize w: (blocks, 64) float32 -> codes (blocks, 64) int8, scale (blocks) bfloat16."""
    exact = w.abs().amax(1) / 127
    # Round the scale up: with a smaller one the largest number could need the code 127.4.
    rounded = exact.bfloat16()
    next_larger = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    scale = torch.where(rounded < exact, next_larger, rounded)
    codes = (w / scale.float().clamp(min=1e-38)[:, None]).round().to(torch.int8)
    return codes, scale


def dequantize_int8(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write code * scale into out (blocks, 64)."""
    # A 127th of a small weight is too small for float16; the scale then stays in float32.
    scale_dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
    out.copy_(codes).mul_(scale.to(scale_dtype)[:, None])


def quantize_nf4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize w: (blocks, 64) float32 -> codes (blocks, 32) uint8, scale (blocks) float32."""
    scale = w.abs().amax(1)
    scaled = (w * (1 / scale.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    # A number takes the nearest value: the borders lie halfway between neighbours.
    borders = ((NF4[1:] + NF4[:-1]) / 2).to(w.device)
    codes = torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


_nf4_pairs: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a table (256,): for each byte the two values in `dtype` that its two codes stand for.

    A pair is read as one integer of twice the width of `dtype`. The table is made once for each
    device and dtype, since copying it to a GPU makes the host wait.
    """
    if (device, dtype) in _nf4_pairs:
        return _nf4_pairs[device, dtype]
    two_values = torch.cartesian_prod(NF4, NF4).to(device, dtype)
    as_one_integer = {2: torch.int32, 4: torch.int64}[dtype.itemsize]
    pairs = two_values.view(as_one_integer)[:, 0]
    # The fake tensors that memory.py counts with have no data, and are not worth keeping.
    if type(pairs) is Tensor:
        _nf4_pairs[device, dtype] = pairs
    return pairs


def dequantize_nf4(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write value[code] * scale into out (blocks, 64), looking up both codes of a byte at once."""
    pairs = nf4_pairs(out.device, out.dtype)
    chunk_numel = CHUNK_NUMEL if out.device.type == "cpu" else GPU_CHUNK_NUMEL
    chunks = (tensor.split(chunk_numel // BLOCK) for tensor in (codes, scale, out))
    for c, s, o in zip(*chunks, strict=True):
        torch.index_select(pairs, 0, c.view(-1).int(), out=o.view(pairs.dtype).view(-1))
        o.mul_(s.to(o.dtype)[:, None])


# By name: how to quantize blocks, and how to dequantize them.
FORMATS = {"int8": (quantize_int8, dequantize_int8), "nf4": (quantize_nf4, dequantize_nf4)}


def dequantize(
    codes: Tensor, scale: Tensor, *, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Return the weight of a shape (out, in) that codes and scale stand for, a new tensor."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    _, dequantize_blocks = FORMATS[kind]
    dequantize_blocks(codes, scale, out.view(-1, BLOCK))
    return out


# On a CPU torch.compile would make a loop of the look-up in nf4's table that takes three times as
# long. So there dequantizing is one operator, into which it does not look. For GPUs it makes a good
# kernel of it.


@torch.library.custom_op("quant::dequantize", mutates_args=())
def opaque_dequantize(
    codes: Tensor, scale: Tensor, *, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return dequantize(codes, scale, kind=kind, shape=shape, dtype=dtype)


@opaque_dequantize.register_fake
def _(
    codes: Tensor, scale: Tensor, *, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


# ---- Quantized weights, and the linear layer of a frozen weight ----------------------------------


class Quantized(nn.Module):
    """A frozen weight (out, in) as codes and scales, and its linear layer: (..., in) -> (..., out).

    Made by `quantize`. shape: of the weight. dtype: of the layer's output without autocast.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, *, kind: str, shape: torch.Size, dtype: torch.dtype
    ):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.kind = kind
        self.shape = shape
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) in `dtype` (float32, bfloat16 or float16), a new tensor."""
        opaque = torch.compiler.is_compiling() and self.device.type == "cpu"
        function = opaque_dequantize if opaque else dequantize
        return function(self.codes, self.scale, kind=self.kind, shape=self.shape, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = matmul_dtype(x, self)
        device = x.device.type
        with torch.autocast(device, enabled=False):
            return FrozenLinear.apply(x.to(dtype), self)


@torch.no_grad()
def quantize(weight: Tensor, kind: str, dtype: torch.dtype | None = None) -> Quantized:
    """Quantize a weight (out, in) of any floating dtype, on its device.

    kind: `int8` or `nf4`. dtype: of the layer's output without autocast, by default the weight's.
    ValueError for another kind, a size that is not a multiple of the block, or a weight that holds
    NaN or infinite values.
    """
    if kind not in FORMATS:
        raise ValueError(f"quantization {kind!r} is unknown: int8 and nf4 are there")
    if weight.numel() % BLOCK:
        raise ValueError(
            f"a weight of {weight.shape[0]} x {weight.shape[1]} is not a multiple of {BLOCK} "
            f"numbers, the block of {kind}"
        )
    # Without data there is nothing to keep small, and one chunk is the quickest.
    chunk_numel = weight.numel() if weight.is_meta else CHUNK_NUMEL
    chunks = weight.reshape(-1, BLOCK).split(chunk_numel // BLOCK)
    quantize_blocks, _ = FORMATS[kind]
    parts = [quantize_blocks(chunk.float()) for chunk in chunks]
    codes = torch.cat([codes for codes, _ in parts])
    scale = torch.cat([scale for _, scale in parts])
    if not weight.is_meta and not scale.isfinite().all():
        raise ValueError(
            "a weight that holds NaN or infinite values cannot be quantized; the file is damaged"
        )
    dtype = dtype or weight.dtype
    # Codes hold less than float32 does, so a float64 layer would gain nothing.
    if dtype == torch.float64:
        dtype = torch.float32
    return Quantized(codes, scale, kind=kind, shape=weight.shape, dtype=dtype)


def to_dense(weight: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype`, whether it is a tensor or a Quantized."""
    if isinstance(weight, Quantized):
        return weight.dequantize(dtype)
    return weight.to(dtype)


def matmul_dtype(x: Tensor, weight: Tensor | Quantized) -> torch.dtype:
    """Return the dtype to multiply in: that of autocast where it is on, else the weight's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def frozen_matmul(x: Tensor, weight: Tensor | Quantized) -> Tensor:
    """Compute y = W x for x (..., in), in its dtype."""
    return x @ to_dense(weight, x.dtype).t()


class FrozenLinear(torch.autograd.Function):
    """y = W x for a frozen W. All that is saved for the backward pass is W, as it is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Quantized) -> Tensor:
        ctx.weight = weight
        return cached_matmul(frozen_matmul, x, weight)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:
        return gy @ to_dense(ctx.weight, gy.dtype), None


# ---- A cache of matrix products for recomputation ------------------------------------------------
#
# Gradient checkpointing runs a block twice: forward, keeping nothing, and again when the backward
# pass needs its activations. Products with frozen weights are most of a block's work, and their
# results are the smaller part of its activations. Where the first run caches these, the second
# costs little, and no weight is dequantized for it.


class MatmulCache:
    """A context in which `cached_matmul` adds its results to a queue, or takes them from there."""

    current: ClassVar["MatmulCache | None"] = None

    def __init__(self, results: collections.deque[Tensor], *, recomputing: bool):
        self.results = results
        self.recomputing = recomputing

    def __enter__(self) -> None:
        self.outer = MatmulCache.current
        MatmulCache.current = self

    def __exit__(self, *exception: object) -> None:
        MatmulCache.current = self.outer


def matmul_cache_contexts() -> tuple[MatmulCache, MatmulCache]:
    """Make the contexts of a block's two runs, for torch.utils.checkpoint's `context_fn`."""
    results: collections.deque[Tensor] = collections.deque()
    return MatmulCache(results, recomputing=False), MatmulCache(results, recomputing=True)


def cached_matmul(matmul: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Return matmul(*args, **options), or, in a recomputation, what it was in the first run.

    To be called within the forward of a torch.autograd.Function, which gives y its graph.
    """
    cache = MatmulCache.current
    if cache is None:
        return matmul(*args, **options)
    if cache.recomputing:
        return cache.results.popleft()
    y = matmul(*args, **options)
    # Detached: y's graph will hold the cache, and a cache that held y would never be freed.
    cache.results.append(y.detach())
    return y
