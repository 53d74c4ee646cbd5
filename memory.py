"""How much memory a training step takes, known before anything is loaded.

No table of formulas, which would be wrong after the next change: the step itself is run, forward and backward, on tensors that
have shapes and no data (PyTorch's FakeTensorMode), while every storage is counted from its making to its end. That takes seconds and
no memory. One and two blocks are run. Each further block adds its activations, as the second one did; in the backward pass they go,
block by block, while gradients come, so that there the larger of the two counts.
"""

import contextlib
import ctypes
import math
import pathlib
import re
import sys
import weakref

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import compiled

# What a run takes beyond PyTorch and its tensors, measured: libraries, the interpreter, all that is
# small. A build for CUDA brings more along (Triton), even where it trains on a CPU.
PROGRAM = 0.20e9 if torch.version.cuda is None else 0.26e9

# On a GPU: the code of the kernels, which is loaded as they are first used (0.24 GB on an H100), and
# cuBLAS's workspaces (32 MB each there). CUDA's context exists before anybody asks what is free.
GPU_PROGRAM = 0.3e9
# What PyTorch's allocator holds beyond the tensors, as a part of those that stay, and of those that
# come and go: it rounds sizes up, and rows of another length do not fit where the last ones were.
# Found by playing the allocations of 12 rows of random lengths back to a model of the allocator.
ALLOCATOR_OF_WEIGHTS, ALLOCATOR_OF_REST = 0.01, 0.2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make while it is active: `now`, and the most there ever was, `peak`."""

    def __init__(self, existing):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                self.seen.add(tensor.untyped_storage())
                self.count(tensor.untyped_storage().nbytes())
                weakref.finalize(
                    tensor.untyped_storage(), self.count, -tensor.untyped_storage().nbytes()
                )
        return result

    def count(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def expected(model, outputs, device, accumulate=False, shares=1):
    """Bytes of tensors at the peak of training `model`, which is on the meta device: {part: bytes}, to be added up.

    outputs(): runs `model` on a batch that it makes, and returns what the backward pass begins from, loss and states; called with fake
    tensors, it may not look at a value. accumulate: whether the gradients of an earlier micro batch are there already; shares: ranks that have a part
    of each gradient.
    """

    def backward(outputs):
        outputs = [x for x in outputs if x.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    blocks, runs = model.blocks, []
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(t.nbytes for t in tensors(model))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        for model.blocks in (blocks[:1], blocks[:2]):
            with LiveBytes(tensors(model)) as live:
                if accumulate:
                    backward(outputs())
                    live.peak = live.now
                values = outputs()
                forward, live.peak = (live.peak, live.now), live.now
                backward(values)
                del values
            runs.append((*forward, live.peak, live.now))
            model.zero_grad()
    model.blocks = blocks
    (forward, activations, backward, gradients), (_, both_activations, _, both_gradients) = runs
    activations, of_block = (
        both_activations - activations,
        both_gradients - gradients,
    )  # of one block; with `accumulate` the first holds the second
    if (
        shares > 1
    ):  # the others have their parts of the gradients; a block's new ones are there whole, and again in the piece that is sent
        elsewhere = 1 - 1 / shares
        forward, backward = (
            forward - accumulate * elsewhere * gradients,
            backward - elsewhere * gradients + 2 * of_block,
        )
        activations -= accumulate * elsewhere * of_block
    more, larger = len(blocks) - 1, max(activations, of_block / shares)
    peak = max(forward + more * activations, backward + more * larger)
    return {
        "weights": weights,
        "optimizer": 8 * trained,
        "activations, gradients": more * larger,
        "workspace": peak - more * larger,
    }


def beside_tensors(parts: dict[str, float], device: torch.device) -> dict[str, float]:
    """Return the bytes that a run takes beside its tensors, {part: bytes}, from those that they take."""
    if device.type == "cpu":
        return {"program": PROGRAM}
    weights = parts["weights"] + parts["optimizer"]
    rest = sum(parts.values()) - weights
    allocator = ALLOCATOR_OF_WEIGHTS * weights + ALLOCATOR_OF_REST * rest
    return {"allocator": allocator, "program": GPU_PROGRAM}


def available(device):
    """Bytes that are free on a device; on a CPU, what the system can give without swapping."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "mps":  # which shares the host's memory, and has no other answer
        return psutil.virtual_memory().available
    torch.empty(1, device=device)  # what the driver takes for this process is gone from here on
    try:
        return torch.accelerator.get_memory_info()[0]
    except (NotImplementedError, RuntimeError):
        print(
            f"note: PyTorch cannot say how much memory of this {device.type} is free, so nobody knows whether the run fits"
        )
        return math.inf


def peak(device):
    """Bytes at the peak so far, of the GPU's tensors or of the process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    if sys.platform == "linux":
        status = pathlib.Path(
            "/proc/self/status"
        ).read_text()  # getrusage, below, would count the program that started this one too
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give_back_freed():
    """Have the C library give back the memory of a tensor when it is freed. For what comes and goes in pieces of ever other sizes, as FSDP's gathered
    weights do: in the holes that one leaves the next finds no room. Only where that is glibc; slower, as new memory comes page by page."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def reuse_freed():
    """Keep the memory of freed CPU tensors for the next ones, as PyTorch does on a GPU: see memory_op.cpp. Without a compiler, nothing."""
    if not compiled.load():
        torch.ops.memory.reuse()
