"""AdamW whose moments take a byte for each number instead of four: --optim adamw8bit.

One need not read this to understand Bone. Adam keeps two numbers for each trained one: the running
means of its gradient, and of the gradient's square. In float32 these are 8 bytes. Here a block of
up to 256 of them keeps its largest magnitude in float32, and a byte, its code, for each:

    moment = value[code] * scale          scale: the largest magnitude in the block

The 256 values lie closely around 0: 64 of them (128 without a sign) between 0.1 and 1, half as many
in the decade below, and so on for 7 decades. ("Dynamic" quantization.) In each step the moments are
made float32, updated and used as AdamW does, and coded again.

Vectors, tensors of fewer than 4,096 numbers, and those whose rows have no blocks of 32 or more, are
left to PyTorch's AdamW in float32.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861). Two
things differ. A code is looked up by the number rounded to bfloat16, in a table, which on a CPU is
some 20 times as fast as searching. And a mean of squares that is not 0 is never coded as 0, since
the update divides by its root.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

LARGEST_BLOCK = 256
SMALLEST_BLOCK = 32
MIN_NUMEL = 4096

# Numbers that are updated at once. On a CPU they then stay in its cache. On a GPU the parts of many
# tensors are updated together, since a launch costs more than a cache saves.
CHUNK_NUMEL = 1 << 17
GPU_CHUNK_NUMEL = 1 << 22
# What is temporary meanwhile, for each number.
UPDATE_BYTES = 30


# ---- codes --------------------------------------------------------------------------------------


def dynamic_values(*, signed: bool) -> Tensor:
    """Return the 256 values in ascending order, float32; from -1 or 0 to 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        borders = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = (borders[1:] + borders[:-1]) / 2 * 10.0 ** (decade - 6)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values))


class Tables(NamedTuple):
    """How codes are read and found, on a device."""

    values: Tensor  # (256,) float32: of each code
    codes: Tensor  # (65536,) uint8: of each bfloat16, by its bits as a number


@functools.cache
def tables(device: torch.device, *, signed: bool) -> Tables:
    """Return the tables of signed or unsigned moments."""
    values = dynamic_values(signed=signed)
    bits = torch.arange(2**16).to(torch.uint16)
    numbers = bits.view(torch.bfloat16).float().nan_to_num(0.0)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(numbers, borders)
    if not signed:
        codes[numbers > 0] = codes[numbers > 0].clamp(min=1)
    return Tables(values.to(device), codes.to(torch.uint8).to(device))


def dequantize(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """Return moments (blocks, block) float32 from codes (blocks, block) and scale (blocks, 1)."""
    values = tables(codes.device, signed=signed).values
    return values.index_select(0, codes.flatten().int()).view(codes.shape).mul_(scale)


def quantize(moments: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes (blocks, block) uint8 and scale (blocks, 1) of moments (blocks, block)."""
    magnitudes = moments.abs() if signed else moments
    scale = magnitudes.amax(1, keepdim=True)
    scaled = moments / scale.clamp(min=1e-38)
    bits = scaled.bfloat16().view(torch.uint16).flatten()
    codes = tables(moments.device, signed=signed).codes.index_select(0, bits.int())
    return codes.view(moments.shape), scale


# ---- which tensors, and how large their moments are ---------------------------------------------


def block_size(shape: Sequence[int]) -> int:
    """Return how many numbers of a tensor share a scale; 0: its moments stay in float32.

    A block lies within one entry of the first dimension, along which ranks share out tensors.
    """
    numel = math.prod(shape)
    is_vector = max(shape, default=1) == numel
    if is_vector or numel < MIN_NUMEL:
        return 0
    block = math.gcd(numel // shape[0], LARGEST_BLOCK)
    return block if block >= SMALLEST_BLOCK else 0


def chunk_numel(device: torch.device) -> int:
    """Return how many numbers are updated at once."""
    return CHUNK_NUMEL if device.type == "cpu" else GPU_CHUNK_NUMEL


def new_moments(p: Tensor) -> dict[str, Tensor]:
    """Return what the optimizer keeps of a parameter before its first step."""
    state = {"step": torch.zeros((), device=p.device)}
    block = block_size(p.shape)
    for key in ("exp_avg", "exp_avg_sq"):
        if not block:
            state[key] = torch.zeros_like(p)
            continue
        # Made from p, they are shared out among ranks as p is.
        state[key] = torch.zeros_like(p, dtype=torch.uint8)
        rows = p.detach().flatten(1)
        state[f"{key}_scale"] = torch.zeros_like(rows[:, : rows.shape[1] // block])
    # The code of 0.
    if block:
        state["exp_avg"].fill_(int(tables(torch.device("cpu"), signed=True).codes[0]))
    return state


def moments_like(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Return what AdamW, or AdamW8bit, keeps of a parameter, as tensors without data."""
    p = torch.empty(p.shape, dtype=p.dtype, device="meta")
    if isinstance(optimizer, AdamW8bit):
        return new_moments(p)
    return {"step": p.new_empty(()), "exp_avg": p, "exp_avg_sq": p}


def bytes_of_moments(shape: Sequence[int], optim: str) -> int:
    """Return the bytes of the moments that AdamW, or AdamW8bit, keeps of a float32 parameter."""
    if optim == "adamw":
        return 8 * math.prod(shape)
    state = new_moments(torch.empty(shape, device="meta"))
    return sum(x.nbytes for key, x in state.items() if key != "step")


def on_this_rank(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that ranks share out; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- the optimizer ------------------------------------------------------------------------------


def is_known(found_inf: Tensor) -> bool:
    """Return whether its value can be had without waiting for a device."""
    return found_inf.device.type == "cpu"


class Part(NamedTuple):
    """Some numbers of a parameter, and what belongs to them: views, flat."""

    numbers: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_scale: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor
    step: Tensor  # (), of the parameter


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in 8 bits, for parameters in float32.

    As in PyTorch's fused AdamW, a step leaves everything as it was where the attribute `found_inf`,
    a tensor (), is 1; nothing waits for the device to find out. ValueError for other dtypes.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            if p.dtype != torch.float32:
                raise ValueError(f"a parameter is {p.dtype}; adamw8bit updates float32")
        # Copied to a GPU now, lest the first step wait for it.
        for device in {p.device for p in parameters}:
            tables(device, signed=True)
            tables(device, signed=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        # That makes codes float32, as the parameters are, and leaves `step` where it is.
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            state["step"] = state["step"].to(p.device)
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{key}_scale" in state:
                    state[key] = state[key].to(torch.uint8)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        found_inf = self.found_inf
        if found_inf is not None and is_known(found_inf):
            if found_inf:
                return
            found_inf = None
        for group in self.param_groups:
            by_block: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_block.setdefault(block_size(p.shape), []).append(p)
                    if not self.state[p]:
                        self.state[p] = new_moments(p)
            for block, parameters in by_block.items():
                if block:
                    self._step_in_8_bits(parameters, group, block, found_inf=found_inf)
                else:
                    self._step_in_float32(parameters, group, found_inf)

    def _step_in_float32(
        self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],  # all have one
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_in_8_bits(
        self,
        parameters: list[Tensor],
        group: dict[str, Any],
        block: int,
        *,
        found_inf: Tensor | None,
    ) -> None:
        steps = [self.state[p]["step"] for p in parameters]
        if found_inf is None:
            torch._foreach_add_(steps, 1)
        else:
            # A list, since adding one tensor to many would wait for it on some devices.
            torch._foreach_add_(steps, [1 - found_inf] * len(steps))
        for parts in self._chunks(parameters, block, chunk_numel(parameters[0].device)):
            update(parts, group, block, found_inf=found_inf)

    def _chunks(self, parameters: list[Tensor], block: int, numel: int) -> Iterator[list[Part]]:
        """Deal the numbers of parameters into lists of parts, of `numel` numbers in all."""
        parts: list[Part] = []
        room = numel
        for p in parameters:
            state = {key: on_this_rank(x).flatten() for key, x in self.state[p].items()}
            numbers = on_this_rank(p).view(-1)
            assert p.grad is not None
            gradient = on_this_rank(p.grad).reshape(-1)
            start = 0
            while start < len(numbers):
                stop = min(len(numbers), start + room)
                here, blocks = slice(start, stop), slice(start // block, stop // block)
                parts.append(
                    Part(
                        numbers[here],
                        gradient[here],
                        state["exp_avg"][here],
                        state["exp_avg_scale"][blocks],
                        state["exp_avg_sq"][here],
                        state["exp_avg_sq_scale"][blocks],
                        state["step"],
                    )
                )
                room -= stop - start
                start = stop
                if room == 0:
                    yield parts
                    parts, room = [], numel
        if parts:
            yield parts


def update(
    parts: list[Part], group: dict[str, Any], block: int, *, found_inf: Tensor | None
) -> None:
    """Take a step of AdamW on some parts of parameters; `step` counts it already."""
    (beta1, beta2), lr = group["betas"], group["lr"]

    def together(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    gradient = together("gradient").float().view(-1, block)
    old_m = together("exp_avg").view(-1, block), together("exp_avg_scale")[:, None]
    old_v = together("exp_avg_sq").view(-1, block), together("exp_avg_sq_scale")[:, None]
    step = torch.cat([part.step.expand(len(part.exp_avg_scale)) for part in parts])[:, None]

    # m = beta1 m + (1 - beta1) g, and v = beta2 v + (1 - beta2) g^2.
    m = dequantize(*old_m, signed=True).lerp_(gradient, 1 - beta1)
    v = dequantize(*old_v, signed=False).mul_(beta2)
    v.addcmul_(gradient, gradient, value=1 - beta2)
    new_m, new_v = quantize(m, signed=True), quantize(v, signed=False)

    # p = p - lr * weight_decay * p - lr * m_hat / (sqrt(v_hat) + eps), where the hats stand for
    # division by 1 - beta^step: the moments begin at 0, and are too small at first.
    root = v.sqrt_().div_((1 - beta2**step).sqrt_()).add_(group["eps"])
    change = m.div_(root).mul_(lr / (1 - beta1**step))
    if group["weight_decay"]:
        change.add_(together("numbers").view(-1, block), alpha=lr * group["weight_decay"])
    if found_inf is not None:
        skip = found_inf.bool()
        change.masked_fill_(skip, 0.0)
        new_m, new_v = keep_where(skip, old_m, new_m), keep_where(skip, old_v, new_v)
    numbers = [part.numbers for part in parts]
    sizes = [len(part.numbers) for part in parts]
    torch._foreach_sub_(numbers, change.flatten().split(sizes))
    for key, (codes, scale) in (("exp_avg", new_m), ("exp_avg_sq", new_v)):
        torch._foreach_copy_([getattr(part, key) for part in parts], codes.flatten().split(sizes))
        blocks = [size // block for size in sizes]
        of_blocks = [getattr(part, f"{key}_scale") for part in parts]
        torch._foreach_copy_(of_blocks, scale.flatten().split(blocks))


def keep_where(
    skip: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the old codes and scales where skip, a tensor (), is true, else the new ones."""
    (old_codes, old_scale), (codes, scale) = old, new
    return torch.where(skip, old_codes, codes), torch.where(skip, old_scale, scale)
