"""Run WKV-6 on a GPU: check the tensors, make the others, launch the kernels of wkv6_cuda.cu.

One need not read this to understand Bone. This file alone says which kernels run, in which order,
with which grids, arguments and shared memory. The head of wkv6_cuda.cu says what they compute, and
why there are four of them.

The caller passes in `launch`, a function that starts a kernel on the GPU. There are three: the
operator of wkv6_cuda_op.cpp, which nvcc compiles; nvrtc.Launcher, for machines without nvcc; and,
for tests on machines without a GPU, the emulator cuda_on_cpu.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HEAD_SIZES = (32, 64)
SCALARS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}

CHUNK = 64  # tokens that a block walks; any number gives the right results
# As in wkv6_cuda.cu.
TILE = 16
SCAN_THREADS = 128

# launch(kernel, grid, threads, shared_bytes, tensors, ints): start a kernel on the tensors' GPU,
# in its current stream. Its arguments are pointers to the tensors' numbers, then the ints.
Grid = tuple[int, int, int]
Launch = Callable[[str, Grid, int, int, list[Tensor], list[int]], None]


class Inputs(NamedTuple):
    """What wkv6::forward is called with, each contiguous.

    r, k, v: (B, T, H, N), one dtype; w: (B, T, H, N), u: (H, N), state: (B, H, N, N), float32.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    u: Tensor
    state: Tensor


def forward(launch: Launch, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H, N), and the state after the last token."""
    check(inputs)
    r, k, v, w, u, state = inputs
    kernels = Kernels(launch, r)
    states, log_decay = kernels.chunk_states(k, v, w)
    last = kernels.scan(states, log_decay, state)
    y = kernels.along_values([r, k, v, w, u, states])
    return y, last


def backward(launch: Launch, inputs: Inputs, gy: Tensor, gstate: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs, from those of what `forward` returns."""
    check(inputs)
    check(inputs._replace(v=gy, state=gstate))  # gy is like v, and gstate like state
    r, k, v, w, u, state = inputs
    kernels = Kernels(launch, r)

    # The states where chunks begin; and, walking back, their gradients where chunks end.
    states, log_decay = kernels.chunk_states(k, v, w)
    kernels.scan(states, log_decay, state)
    gstates, log_decay = kernels.chunk_states(r, gy, w, reverse=True)
    gfirst = kernels.scan(gstates, log_decay, gstate, reverse=True)

    gv = kernels.along_values([k, r, gy, w, u, gstates], reverse=True)
    gr, gk, gw, gu_of_chunks = kernels.along_keys([r, k, v, w, u, gy, states, gstates])
    # With the dtype given, autocast leaves the sum alone.
    gu = gu_of_chunks.sum((0, 2), dtype=torch.float32)
    return gr, gk, gv, gw, gu, gfirst


def register(launch: Launch, dispatch_key: str = "CUDA") -> None:
    """Make these functions wkv6::forward and wkv6::backward for the tensors of a dispatch key."""
    # Dropping a library unregisters its functions.
    _libraries.pop(dispatch_key, None)
    library = torch.library.Library("wkv6", "IMPL")

    def run_forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return forward(launch, Inputs(*tensors))

    def run_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        *inputs, gy, gstate = tensors
        return backward(launch, Inputs(*inputs), gy, gstate)

    library.impl("forward", run_forward, dispatch_key)
    library.impl("backward", run_backward, dispatch_key)
    _libraries[dispatch_key] = library


# A function stays registered as long as its library is kept.
_libraries: dict[str, torch.library.Library] = {}


def check(inputs: Inputs) -> None:
    """Raise RuntimeError, in one line, where the kernels cannot read the tensors."""
    problem = _shape_problem(inputs) or _dtype_problem(inputs) or _memory_problem(inputs)
    if problem:
        raise RuntimeError(f"wkv6: {problem}")


def _shape_problem(inputs: Inputs) -> str:
    r, k, v, w, u, state = inputs
    if r.ndim != 4:
        return f"r must be (B, T, H, N), not {list(r.shape)}"
    B, T, H, N = r.shape
    if not r.shape == k.shape == v.shape == w.shape:
        return "r, k, v, w must have one shape"
    if u.shape != (H, N):
        return f"u must be (H, N), not {list(u.shape)}"
    if state.shape != (B, H, N, N):
        return f"state must be (B, H, N, N), not {list(state.shape)}"
    if 0 in (B, T, H):
        return f"r is empty: {list(r.shape)}"
    if N not in HEAD_SIZES:
        return f"head size {N} is not compiled in"
    return ""


def _dtype_problem(inputs: Inputs) -> str:
    r, k, v, w, u, state = inputs
    if not r.dtype == k.dtype == v.dtype:
        return "r, k, v must have one dtype"
    for x in (w, u, state):
        if x.dtype != torch.float32:
            return f"w, u, state must be float32, not {x.dtype}"
    if r.dtype not in SCALARS:
        return f"{r.dtype} is not compiled in"
    return ""


def _memory_problem(inputs: Inputs) -> str:
    device = inputs.r.device
    for x in inputs:
        if not x.is_contiguous():
            return "every tensor must be contiguous"
        if x.device != device:
            return f"every tensor must be on {device}, as r is; one is on {x.device}"
    if inputs.state.data_ptr() % 16 != 0:
        return "state must be aligned to 16 bytes"
    return ""


def kernel_names() -> list[str]:
    """List every kernel that may be launched, by the name that it has in C++."""
    names = [f"scan<{N}>" for N in HEAD_SIZES]
    for kernel in ("chunk_states", "along_values", "along_keys"):
        names += [f"{kernel}<{scalar}, {N}>" for scalar in SCALARS.values() for N in HEAD_SIZES]
    return names


def shared_bytes(N: int) -> int:
    """Return the bytes of shared memory that a block has: those of Shared<N> in wkv6_cuda.cu."""
    tiles = 4 * TILE * (N + 4)
    decay = N
    dots = TILE * (TILE + 4)
    return 4 * (tiles + decay + dots)


class Kernels:
    """The kernels, for tensors like r, (B, T, H, N). Each makes the tensors that it writes."""

    def __init__(self, launch: Launch, r: Tensor) -> None:
        B, T, H, N = r.shape
        chunks = -(-T // CHUNK)
        self.launch = launch
        self.r = r
        self.scalar = SCALARS[r.dtype]
        self.per_chunk = (B, H, chunks, N)
        self.block_per_chunk = (chunks, H, B)
        self.thread_per_4_numbers = (B * H, N * N // 4 // SCAN_THREADS, 1)

    def chunk_states(
        self, k: Tensor, v: Tensor, w: Tensor, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return what each chunk adds to the state, and the log of how far it decays the state."""
        N = self.r.shape[-1]
        states = w.new_empty(*self.per_chunk, N)
        log_decay = w.new_empty(self.per_chunk)
        self._launch_on_chunks("chunk_states", [k, v, w, states, log_decay], [reverse])
        return states, log_decay

    def scan(
        self, states: Tensor, log_decay: Tensor, first: Tensor, *, reverse: bool = False
    ) -> Tensor:
        """Turn what each chunk adds into the state where it begins (reverse: ends), in place.

        Return the state after the last chunk (reverse: before the first).
        """
        *_, chunks, N = self.per_chunk
        last = torch.empty_like(first)
        grid = self.thread_per_4_numbers
        tensors = [states, log_decay, first, last]
        self.launch(f"scan<{N}>", grid, SCAN_THREADS, 0, tensors, [chunks, int(reverse)])
        return last

    def along_values(self, inputs: list[Tensor], *, reverse: bool = False) -> Tensor:
        """Return y, from r, k, v, w, u, states; or, in reverse, gv from k, r, gy, w, u, gstates."""
        y = torch.empty_like(self.r)
        self._launch_on_chunks("along_values", [*inputs, y], [reverse])
        return y

    def along_keys(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return gr, gk, gw, and gu of every chunk, from r, k, v, w, u, gy, states, gstates."""
        w = inputs[3]
        gr = torch.empty_like(self.r)
        gk = torch.empty_like(self.r)
        gw = torch.empty_like(w)
        gu = w.new_empty(self.per_chunk)
        self._launch_on_chunks("along_keys", [*inputs, gr, gk, gw, gu], [])
        return gr, gk, gw, gu

    def _launch_on_chunks(self, kernel: str, tensors: list[Tensor], flags: list[bool]) -> None:
        """Launch a kernel with a block per chunk, head and batch element, a thread per channel."""
        _, T, _, N = self.r.shape
        name = f"{kernel}<{self.scalar}, {N}>"
        ints = [T, CHUNK, *map(int, flags)]
        self.launch(name, self.block_per_chunk, N, shared_bytes(N), tensors, ints)
