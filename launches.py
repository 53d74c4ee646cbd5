"""What the loss and its gradient ask of a GPU, counted: launches, and bytes that they move.

One need not read this to understand Bone. `python bench.py launches` prints the table, and
test_rehearsal.py tests it. Forward and backward pass run on tensors that have shapes but no data
(PyTorch's FakeTensorMode), so the counts are the same on every machine. They need a device that is
not the CPU; gpu_standin.py can make one. The optimizer is not counted.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapt
import devices
import loss
import quant
import rwkv6
import wkv6

# Operators that neither compute nor copy: they make a tensor, or another view of one.
NO_LAUNCH = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "detach", "lift_fresh", "promote_types"),
)
TOKENS, VOCAB, N_LAYER = 512, 65536, 24


@dataclasses.dataclass(frozen=True)
class Count:
    """Launches, and the bytes that they read and write, caches not considered."""

    launches: int
    moved: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.launches + other.launches, self.moved + other.moved)

    def __sub__(self, other: "Count") -> "Count":
        return Count(self.launches - other.launches, self.moved - other.moved)

    def __mul__(self, times: int) -> "Count":
        return Count(self.launches * times, self.moved * times)

    def __str__(self) -> str:
        return f"{self.launches:6} launches  {self.moved / 1e9:6.2f} GB"


def storage_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's numbers, those of an expanded one counted once."""
    repeated = [
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 0
    ]
    once = tensor.numel()
    for size in repeated:
        once //= max(size, 1)
    return once * tensor.element_size()


class Counter(TorchDispatchMode):
    """Count every operator that would be a launch while this is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.moved = 0
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in NO_LAUNCH or func.namespace == "prim":
            return result
        # An argument may be the result, too: each tensor once.
        leaves = tree_leaves((args, kwargs, result))
        tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
        self.launches += 1
        self.moved += sum(storage_bytes(x) for x in tensors.values())
        self.names[name] = self.names.get(name, 0) + 1
        return result


def count(run: Callable[[], object]) -> Count:
    """Count what `run` launches. To be called inside FakeTensorMode."""
    with Counter() as counter:
        run()
    return Count(counter.launches, counter.moved)


class NoMixture(torch.autograd.Function):
    """In place of rwkv6.Mixture: make tensors of the right shapes, and launch nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, previous: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(x, previous, shares)
        shape = torch.broadcast_shapes(x.shape, shares.shape)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def model_1_6b(n_layer: int, quantization: str, *, with_bone: bool = True) -> rwkv6.RWKV:
    """Return a bat r 64 model of 1.6B's widths on the meta device; bone, time and ln are trained.

    with_bone: False leaves the frozen layers as they are.
    """
    with torch.device("meta"):
        model = rwkv6.RWKV(rwkv6.sizes(n_layer, 2048, VOCAB))
    for name, p in model.named_parameters():
        p.data = p.data.to(rwkv6.storage_dtype(model, name, torch.bfloat16))
    if quantization != "none":
        for name, module in list(model.named_modules()):
            if name.startswith("blocks.") and isinstance(module, rwkv6.Linear):
                model.set_submodule(name, quant.quantize(module.weight, quantization))
    if with_bone:
        adapt.add_bone(model, 64)
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in ("bone", "time", "ln")))
    model.grad_cp = True
    return model


def training_step(
    n_layer: int, quantization: str, device: torch.device, *, with_bone: bool = True
) -> Count:
    """Count forward, recomputation and backward of one row of 512 tokens, WKV-6 as one launch.

    device: not the CPU.
    """
    model = model_1_6b(n_layer, quantization, with_bone=with_bone)
    for module in model.modules():
        if isinstance(module, rwkv6.TimeMix):
            module.impl = "compiled"
    # The device with its number.
    device = torch.empty(0, device=device).device
    # Made once, not in each step.
    quant.nf4_pairs(device, torch.bfloat16)
    with (
        # Shapes need no kernel: as if it were loaded.
        mock.patch.object(wkv6, "kernel_problem", lambda device: ""),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model.to_empty(device=device)
        idx = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
        mask = torch.ones(1, TOKENS, device=device)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                counts = loss.Counts(TOKENS, TOKENS)
                value, _ = loss.loss_fn(model, idx, idx, mask, counts=counts)
            value.backward()

        return count(run)


def table(device: torch.device) -> dict[str, Count]:
    """Count a block, what a quantized one takes more, what is outside the blocks, and all."""
    one, two = (training_step(n_layer, "none", device) for n_layer in (1, 2))
    block = two - one
    plain = [training_step(n_layer, "none", device, with_bone=False) for n_layer in (1, 2)]
    with mock.patch.object(rwkv6, "Mixture", NoMixture):
        unmixed = [training_step(n_layer, "none", device) for n_layer in (1, 2)]
    rows = {
        "a block, bf16": block,
        "of these, Bone": block - (plain[1] - plain[0]),
        "of these, mixtures": block - (unmixed[1] - unmixed[0]),
    }
    for quantization in ("nf4", "int8"):
        one_quantized, two_quantized = (training_step(n, quantization, device) for n in (1, 2))
        rows[f"the same, {quantization}: more"] = two_quantized - one_quantized - block
    rows["outside the blocks"] = one - block
    all_blocks = block * N_LAYER
    rows["all 24 blocks, bf16"] = rows["outside the blocks"] + all_blocks
    more_for_nf4 = rows["the same, nf4: more"] * N_LAYER
    rows["all 24 blocks, nf4"] = rows["all 24 blocks, bf16"] + more_for_nf4
    return rows


def main(arguments: Sequence[str]) -> None:
    """Print the table, counted on the GPU that is here, or on a stand-in for one."""
    if arguments:
        raise ValueError(f"bench.py launches takes no arguments; drop {' '.join(arguments)}")
    if not torch.accelerator.is_available():
        import gpu_standin  # noqa: F401 (makes a device)
    print(
        "\nforward, recomputation and backward of 512 tokens, 1.6B, bat r 64, WKV-6 as one launch; "
        "bytes read and written, caches not considered"
    )
    for part, found in table(devices.find("gpu")).items():
        print(f"{part:<24}{found}", flush=True)
    # The threads of the stand-in can abort the interpreter's end.
    os._exit(0)
