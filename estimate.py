"""How much memory a run will take, said before anything is loaded, and what helps if it is much.

One need not read this to understand Bone.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import memory
import sharding
from build import (
    DTYPES,
    BuiltModel,
    build_model,
    chunk_ctx,
    count_parameters,
    keep_small_gradients,
    precision,
)
from host_embedding import HostEmbedding
from loss import LOGITS, Counts, loss_fn
from options import Options
from passes import detach_state, state_tensors
from run_state import micro_batches_of_rank
from rwkv6 import RWKV
from training_data import longest_row

META = torch.device("meta")
# What compiled blocks keep, in proportion to the results of matrix products. Measured.
KEPT = 1.2


class MemoryEstimate(NamedTuple):
    """What a run takes at its peak, on one rank."""

    built: BuiltModel  # on the meta device
    parts: dict[str, float]  # bytes, to be added up

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.parts.values())


class MemoryCheck(NamedTuple):
    """What a run takes at its peak, on one rank, and what is free for it."""

    estimate: MemoryEstimate
    free: float  # bytes; infinity where nobody knows

    @property
    def fits(self) -> bool:
        """Whether the run fits."""
        return self.estimate.total <= self.free


def expected_memory(
    options: Options, device: torch.device, longest: int | None = None
) -> MemoryEstimate:
    """Return what training takes by settled options, on rows of `longest` tokens.

    Without `longest`, the options or the data say it.
    """
    if options.compile:
        return memory_of_compiled(options, device, longest)(options.grad_cp)
    built = build_model(options, META, for_device=device)
    longest = longest or longest_row(options)
    at_once = min(longest, chunk_ctx(options) or longest)
    in_chunks = at_once < longest
    # From here on memory grows in proportion to the tokens, and to run more takes minutes.
    rows_of_head = LOGITS // built.model.config.vocab_size
    enough = max(4096, rows_of_head) // options.micro_bsz + 1
    if at_once <= 2 * enough:
        parts = parts_of(built.model, options, device, tokens=at_once, in_chunks=in_chunks)
    else:
        few = parts_of(built.model, options, device, tokens=enough, in_chunks=in_chunks)
        many = parts_of(built.model, options, device, tokens=2 * enough, in_chunks=in_chunks)
        parts = {}
        for part, size in few.items():
            per_token = (many[part] - size) / enough
            parts[part] = size + per_token * (at_once - enough)
    if in_chunks:
        chunks = -(-longest // at_once)
        together = min(options.bptt or chunks, chunks)
        states = together - 2  # one more is in the activations of a chunk
        if together < chunks:
            states += 2  # those before and after a group of chunks
        size = built.model.state_bytes(options.micro_bsz)
        parts["states between chunks"] = states * size
    parts = sharding.memory_of_one_rank(
        parts, built.model, options.strategy, ranks=sharding.ranks(options)
    )
    return MemoryEstimate(built, parts | memory.beside_tensors(parts, device))


def memory_of_compiled(
    options: Options, device: torch.device, longest: int | None = None
) -> Callable[[float], MemoryEstimate]:
    """Return a function of grad_cp: what training takes then, from what it takes with eager blocks.

    Compiled blocks keep for the backward pass what eager ones do that keep the results of matrix
    products (or, with --grad_cp, a share of these), and some operands of WKV-6 besides; all else is
    computed again.
    """
    eager = functools.partial(dataclasses.replace, options, compile=0)
    nothing_kept = expected_memory(eager(grad_cp=1), device, longest)
    products_kept = expected_memory(eager(grad_cp=0.5), device, longest)

    def at(grad_cp: float) -> MemoryEstimate:
        parts = {}
        for part, size in nothing_kept.parts.items():
            parts[part] = size + KEPT * (1 - grad_cp) * (products_kept.parts[part] - size)
        if device.type == "cpu":
            parts["compiler"] = memory.COMPILER
        return MemoryEstimate(nothing_kept.built, parts)

    return at


def parts_of(
    model: RWKV, options: Options, device: torch.device, *, tokens: int, in_chunks: bool
) -> dict[str, float]:
    """Return what a step on rows of so many tokens takes, {part: bytes}: it runs without data.

    in_chunks: whether that is a chunk of a longer row, with states before and after it.
    """
    model = copy.deepcopy(model)  # it has other tensors afterwards
    autocast, _ = precision(options, device)
    dtype = DTYPES[options.precision]

    micro_batches = micro_batches_of_rank(options)

    def outputs() -> list[Tensor]:
        # Here, since moving the model to fake tensors has made new parameters.
        keep_small_gradients(model, options, micro_batches)
        idx = torch.zeros(options.micro_bsz, tokens, dtype=torch.int64, device=device)
        mask = torch.ones(idx.shape, device=device)
        counts = Counts(1, idx.numel())
        x = idx
        if isinstance(model.emb, HostEmbedding):
            x = torch.zeros(*idx.shape, model.config.n_embd, dtype=dtype, device=device)
        with autocast:
            state = None
            if in_chunks:
                with torch.no_grad():
                    _, state = model.hidden(x[:, :1], model.empty_state())
                state = detach_state(state, requires_grad=True)
            loss, state = loss_fn(model, x, idx, mask, counts=counts, state=state)
            return [loss, *state_tensors(state)]

    n = sharding.ranks(options)
    shares_gradients = sharding.Sharding.of(options.strategy, n).trained
    # DDP keeps the place of the gradients from step to step.
    keeps_gradients = n > 1 and not shares_gradients
    earlier = micro_batches > 1 or in_chunks or keeps_gradients
    return memory.expected(
        model,
        outputs,
        device,
        accumulate=earlier,
        gradient_shards=n if shares_gradients else 1,
        optim=options.optim,
    )


def free_memory(options: Options, device: torch.device) -> float:
    """Return the free bytes that one rank may take."""
    free = memory.available(device)
    if device.type == "cpu":
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", options.devices))
    return free


def print_parts(options: Options, check: MemoryCheck, device: torch.device) -> None:
    """Print what is trained and frozen, the parts of the peak, and what is free."""
    estimate, free = check
    model = estimate.built.model
    if sharding.ranks(options) > 1:
        print(f"each of {sharding.ranks(options)} ranks, by {sharding.describe(options.strategy)}:")
    numbers = {}
    numbers["trained"], total = count_parameters(model)
    numbers["frozen"] = total - numbers["trained"]
    for what, number in numbers.items():
        tensors = [t for t in memory.tensors(model) if t.requires_grad == (what == "trained")]
        size = sum(t.nbytes for t in tensors)
        print(f"{what:<26}{size / 1e9:8.2f} GB   {number:,} parameters")
    verdict = "it fits" if check.fits else "too little"
    lines = estimate.parts | {
        "expected peak": estimate.total,
        f"free on {device.type}: {verdict}": free,
    }
    for part, part_size in lines.items():
        print(f"{part:<26}{part_size / 1e9:8.2f} GB")
