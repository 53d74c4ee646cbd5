"""How much memory a training step takes, known before any weight is loaded.

One need not read this to understand Bone. The estimate is not a formula, which the next change to
the model would make wrong. A real step, forward and backward, runs on tensors that have shapes but
no data (PyTorch's FakeTensorMode), and every storage is counted from its allocation to its release.
That takes seconds, and no memory.

Only one and two blocks are run. In the forward pass every further block adds its activations, as
the second one did. In the backward pass activations are released block by block while gradients
come, so every further block adds the larger of the two.
"""

import contextlib
import ctypes
import dataclasses
import functools
import math
import pathlib
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adamw8bit
import quant
from rwkv6 import RWKV

# Bytes of a process beyond importing PyTorch and its tensors: libraries, the interpreter, all that
# is small. Measured, 0.14 GB with glibc to 0.20 with tcmalloc. A CUDA build also loads Triton, even
# where it trains on a CPU.
PROGRAM = 0.20e9 if torch.version.cuda is None else 0.26e9

# The same of PyTorch's compiler: what it imports, and what it holds while it compiles.
COMPILER = 0.15e9

# On a GPU: the code of the kernels, loaded on first use (0.24 GB on an H100), and cuBLAS's
# workspaces (32 MB each there). CUDA's context exists before anybody asks what is free.
GPU_PROGRAM = 0.3e9

# What PyTorch's GPU allocator holds beyond the tensors, as a fraction of those that stay, and of
# those that come and go: it rounds sizes up, and rows of one length leave holes that rows of
# another length do not fit in. From replaying the allocations of 12 rows of random lengths on a
# model of the allocator.
ALLOCATOR_OF_WEIGHTS = 0.01
ALLOCATOR_OF_REST = 0.2

M_MMAP_THRESHOLD = -3  # glibc's number for it


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that operators allocate while this is active.

    now: what is alive; peak: the most that ever was. Storages of `existing` do not count.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count_storage(tensor.untyped_storage())
        return result

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        self._add(storage.nbytes())
        weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, n: int) -> None:
        self.now += n
        self.peak = max(self.peak, self.now)


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes beyond the weights at four moments of a training step.

    forward_peak: the most during the forward pass; activations: what it leaves for the backward
    pass, with earlier gradients if there are any; backward_peak: the most during the backward pass;
    gradients: what that leaves.
    """

    forward_peak: float
    activations: float
    backward_peak: float
    gradients: float


def tensors(model: torch.nn.Module) -> list[Tensor]:
    """Return all parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def expected(
    model: RWKV,
    outputs: Callable[[], list[Tensor]],
    device: torch.device,
    *,
    accumulate: bool = False,
    gradient_shards: int = 1,
    optim: str = "adamw",
) -> dict[str, float]:
    """Return the bytes of tensors at the peak of training, {part: bytes}; their sum is the peak.

    model: on the meta device; it has other tensors afterwards.
    outputs: runs `model` on a batch that it makes, and returns what the backward pass starts from,
    loss and states. It is called with fake tensors, so it must not look at a value.
    accumulate: whether the gradients of an earlier micro batch exist already.
    gradient_shards: the number of ranks that each hold a part of every gradient.
    optim: adamw or adamw8bit.
    """
    moments, in_update = optimizer_bytes(model, optim, device)
    blocks = model.blocks
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        model.blocks = blocks[:1]
        one = _run_step(model, outputs, accumulate=accumulate)
        model.blocks = blocks[:2]
        two = _run_step(model, outputs, accumulate=accumulate)
    model.blocks = blocks

    if gradient_shards > 1:
        share = functools.partial(
            _on_one_rank,
            of_block=two.gradients - one.gradients,
            shards=gradient_shards,
            accumulate=accumulate,
        )
        one, two = share(one), share(two)

    further_blocks = len(blocks) - 1
    activations = further_blocks * (two.activations - one.activations)
    gradients = further_blocks * (two.gradients - one.gradients)
    in_update += one.gradients + gradients
    in_forward = one.forward_peak + activations
    in_backward = one.backward_peak + max(activations, gradients)
    peak = max(in_forward, in_backward, in_update)
    return {
        "weights": sum(t.nbytes for t in tensors(model)),
        "optimizer": moments,
        "activations, gradients": max(activations, gradients),
        "workspace": peak - max(activations, gradients),
    }


def optimizer_bytes(model: RWKV, optim: str, device: torch.device) -> tuple[float, float]:
    """Return the bytes of Adam's moments, and of what is temporary in the optimizer's step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = sum(adamw8bit.bytes_of_moments(p.shape, optim) for p in trained)
    if optim == "adamw":
        return moments, 0
    together = min(adamw8bit.chunk_numel(device), sum(p.numel() for p in trained))
    return moments, adamw8bit.UPDATE_BYTES * together


def _run_step(model: RWKV, outputs: Callable[[], list[Tensor]], *, accumulate: bool) -> StepBytes:
    """Run forward and backward pass on fake tensors, and count."""
    with LiveBytes(tensors(model)) as live, one_chunk_of_each_weight():
        if accumulate:
            _backward(outputs())
            live.peak = live.now
        values = outputs()
        forward_peak = live.peak
        activations = live.now
        live.peak = live.now
        _backward(values)
        del values
        step = StepBytes(forward_peak, activations, live.peak, live.now)
    model.zero_grad()
    return step


@contextlib.contextmanager
def one_chunk_of_each_weight() -> Iterator[None]:
    """Have only the first chunk of a weight in nf4 dequantized.

    The others take the same memory after it, and thousands of them take seconds.
    """

    quantize_nf4, dequantize_nf4 = quant.FORMATS["nf4"]

    def first_chunk(codes: Tensor, scale: Tensor, out: Tensor) -> None:
        numel = quant.CHUNK_NUMEL if out.device.type == "cpu" else quant.GPU_CHUNK_NUMEL
        blocks = numel // quant.BLOCK
        dequantize_nf4(codes[:blocks], scale[:blocks], out[:blocks])

    with mock.patch.dict(quant.FORMATS, nf4=(quantize_nf4, first_chunk)):
        yield


def _backward(outputs: list[Tensor]) -> None:
    outputs = [x for x in outputs if x.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def _on_one_rank(step: StepBytes, *, of_block: float, shards: int, accumulate: bool) -> StepBytes:
    """Return what one of `shards` ranks takes if each holds a part of every gradient.

    of_block: bytes of one block's gradients. The new ones exist here whole, and once more in the
    buffer that is sent. accumulate: whether earlier gradients are part of `step`.
    """
    elsewhere = (1 - 1 / shards) * step.gradients
    earlier_elsewhere = elsewhere if accumulate else 0
    return StepBytes(
        forward_peak=step.forward_peak - earlier_elsewhere,
        activations=step.activations - earlier_elsewhere,
        backward_peak=step.backward_peak - elsewhere + 2 * of_block,
        gradients=step.gradients - elsewhere,
    )


def beside_tensors(parts: dict[str, float], device: torch.device) -> dict[str, float]:
    """Return the bytes that a run takes beside its tensors, {part: bytes}.

    parts: what `expected` returns.
    """
    if device.type == "cpu":
        return {"program": PROGRAM}
    weights = parts["weights"] + parts["optimizer"]
    rest = sum(parts.values()) - weights
    allocator = ALLOCATOR_OF_WEIGHTS * weights + ALLOCATOR_OF_REST * rest
    return {"allocator": allocator, "program": GPU_PROGRAM}


def available(device: torch.device) -> float:
    """Return the free bytes of a device; on a CPU, what the system can give without swapping.

    Infinity, after a note, where PyTorch cannot tell.
    """
    # Apple's GPU (mps) shares the host's memory, and PyTorch knows nothing more about it.
    if device.type in ("cpu", "mps"):
        return psutil.virtual_memory().available
    # From the first tensor on, what the driver takes for this process is no longer free.
    torch.empty(1, device=device)
    try:
        return torch.accelerator.get_memory_info()[0]
    except (NotImplementedError, RuntimeError):
        print(
            f"note: PyTorch cannot tell how much memory is free on this {device.type} device, "
            "so nobody knows whether the run fits"
        )
        return math.inf


def peak(device: torch.device) -> int:
    """Return the bytes at the peak so far: of the GPU's tensors, or of the whole process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    if sys.platform == "linux":
        # Not getrusage, as below: on Linux it counts the program that started this one, too.
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def allocator() -> str:
    """Name what gives PyTorch its memory on a CPU."""
    maps = pathlib.Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    for name in ("tcmalloc", "jemalloc"):
        if name in loaded:
            return name
    return "the system's allocator (docs/memory.md has a faster one)"


def give_back_freed() -> None:
    """Have glibc return the memory of every freed tensor to the system at once.

    For a CPU where memory is tight, and for FSDP's gathered weights, whose sizes differ. By default
    glibc keeps freed memory in a heap. A tensor of another size does not fit into its holes, so a
    run takes up to half more than `expected`; but fresh memory comes page by page, which is slower
    (docs/memory.md has figures). With another C library or allocator this does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
