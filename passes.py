"""The gradient of a step: micro batch by micro batch, and chunk by chunk along time.

RWKV needs no earlier token, only its state (rwkv6.py). So a row of T tokens can go through the
model chunk by chunk, in the memory of one chunk. The gradient stays that of the whole row, because
it flows back through the states between the chunks:

    forward     s1 = chunk 0 from s0,  s2 = chunk 1 from s1,  ...
                without a graph; only the states are kept
    backward    the last chunk again, from its state, with a graph:
                loss -> gradients of the parameters and of that state
                the chunk before it: loss and gradient of the state after it
                     -> gradients of the parameters and of the state before it
                ...

Each chunk is computed twice, as with grad_cp. What its matrix products gave is kept for the moment
(quant.py), so that recomputing a block within a chunk repeats no product. That costs the memory of
some activations of one chunk. `bptt` cuts the gradient after so many chunks ("truncated
backpropagation through time"); with 1, each chunk is computed once.

One need not read this to understand Bone.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from loss import Batch, Counts, count_tokens, loss_fn
from rwkv6 import RWKV, State


def no_scaler() -> torch.amp.GradScaler:
    """Return a gradient scaler that does nothing."""
    return torch.amp.GradScaler("cpu", enabled=False)


@dataclass(frozen=True)
class Passes:
    """How batches pass through the model, forward and backward: precision, chunks and ranks."""

    autocast: AbstractContextManager = field(default_factory=contextlib.nullcontext)
    # Of fp16; the default scales nothing.
    scaler: torch.amp.GradScaler = field(default_factory=no_scaler)
    # Tokens that go through the model at once; 0: whole rows.
    chunk_ctx: int = 0
    # Chunks that the gradient flows back through; 0: all of a row's.
    bptt: int = 0
    # How a chunk gets from the host to the model's device. Nothing waits for it.
    to_device: Callable[[Batch], Batch] = lambda batch: batch

    # Of several ranks (devices.py): how many they are; the largest of a number over all of them;
    # loss_fn of the model by an engine, whose backward pass takes the mean of all ranks' gradients;
    # and a context without that.
    ranks: int = 1
    max_over_ranks: Callable[[int], int] = int  # of one rank: the number
    engine: Callable[..., tuple[Tensor, State | None]] | None = None
    no_gradient_sync: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def forward(
        self, model: RWKV, chunk: Batch, *, counts: Counts, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Return loss_fn of a chunk, with a graph."""
        compute = self.engine or functools.partial(loss_fn, model)
        with self.autocast:
            return compute(*self.to_device(chunk), counts=counts, state=state)

    def backward(self, loss: Tensor, ends: list[tuple[Tensor, Tensor | None]]) -> None:
        """Run the backward pass from a loss, and from tensors whose gradients are known."""
        # The engines take the mean over ranks, and the sum is wanted.
        loss = self.scaler.scale(loss * self.ranks)
        torch.autograd.backward([loss, *(x for x, _ in ends)], [None, *(g for _, g in ends)])


def split_chunks(batch: Batch, passes: Passes) -> list[Batch]:
    """Split a batch into chunks of at most chunk_ctx tokens, as many as on any other rank.

    A rank whose rows are shorter gets chunks of one token at the end, which does not count.
    """
    idx, targets, mask = batch
    chunk_ctx = passes.chunk_ctx or idx.shape[1]
    chunks = list(zip(*(x.split(chunk_ctx, 1) for x in batch), strict=True))
    missing = passes.max_over_ranks(len(chunks)) - len(chunks)
    for _ in range(missing):
        no_target = torch.full_like(targets[:, :1], -100)
        chunks.append((torch.zeros_like(idx[:, :1]), no_target, torch.zeros_like(mask[:, :1])))
    return chunks


def state_tensors(state: State | None) -> list[Tensor]:
    """Return the tensors of a state, in a fixed order."""
    return [x for x in tree_leaves(state) if x is not None]


def detach_state(state: State | None, requires_grad: bool = False) -> State | None:
    """Return the same state, detached from the graph that it came from."""

    def detached(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().requires_grad_(requires_grad)

    return tree_map(detached, state)


def states_before(
    model: RWKV, chunks: list[Batch], state: State | None, *, passes: Passes
) -> list[State | None]:
    """Return the states before each of some successive chunks, without a graph."""
    states = [state]
    for chunk in chunks[:-1]:
        idx, _, _ = passes.to_device(chunk)
        with torch.no_grad(), passes.autocast:
            states.append(model.hidden(idx, states[-1])[1])
    return states


def backward(
    model: RWKV, batch: Batch, passes: Passes, *, counts: Counts, is_last: bool = True
) -> Tensor:
    """Run forward and backward over a micro batch, chunk by chunk; return its loss, a tensor ().

    Gradients are added to those of the parameters. With is_last, those of all ranks are summed.
    Nothing here waits for the device.
    """
    chunks = split_chunks(batch, passes)
    if len(chunks) == 1:  # a whole row needs no states
        with contextlib.nullcontext() if is_last else passes.no_gradient_sync():
            loss, _ = passes.forward(model, chunks[0], counts=counts)
            passes.backward(loss, [])
        return loss.detach()

    losses: list[Tensor] = []
    state: State | None = model.empty_state()
    bptt = passes.bptt or len(chunks)
    groups = [chunks[i : i + bptt] for i in range(0, len(chunks), bptt)]
    for number, group in enumerate(groups, 1):
        states = states_before(model, group, state, passes=passes)
        state = None
        gradients: list[Tensor | None] = []  # of the state after the chunk
        for chunk in reversed(group):
            state_before = detach_state(states.pop(), requires_grad=len(states) > 0)
            at_end = is_last and number == len(groups) and not states
            with contextlib.nullcontext() if at_end else passes.no_gradient_sync():
                loss, state_after = passes.forward(model, chunk, counts=counts, state=state_before)
                if chunk is group[-1] and number < len(groups):
                    state = detach_state(state_after)
                # `gradients` is empty at the last chunk: nothing uses the state after it. Some of
                # the state requires no gradient: where neither ln nor emb is trained, the shift of
                # the first block depends on nothing that is.
                pairs = zip(state_tensors(state_after), gradients, strict=len(gradients) > 0)
                ends = [(x, gradient) for x, gradient in pairs if x.requires_grad]
                # What is not needed, here and below, would be in memory at the peak.
                del state_after, pairs
                passes.backward(loss, ends)
            gradients = [x.grad for x in state_tensors(state_before)]
            losses.append(loss.detach())
            del state_before, loss, ends
    return sum(losses[1:], start=losses[0])


def accumulate_gradients(
    model: RWKV,
    micro_batches: Sequence[Batch],
    passes: Passes | None = None,
    *,
    counts: Counts | None = None,
) -> list[Tensor]:
    """Run forward and backward over a step's micro batches; their gradients add up.

    micro_batches: of several ranks those of this one, as many as the others have.
    counts: of all micro batches of all ranks; without, of these.
    Returns the loss of each, tensors () on the device; over all ranks, their sum is the mean over
    all tokens that count.
    """
    passes = passes or Passes()
    counts = counts or count_tokens(micro_batches)
    losses = []
    for number, batch in enumerate(micro_batches, 1):
        is_last = number == len(micro_batches)
        losses.append(backward(model, batch, passes, counts=counts, is_last=is_last))
    return losses


@torch.no_grad()
def chunk_losses(model: RWKV, batch: Batch, passes: Passes) -> list[Tensor]:
    """Return the summed cross-entropy of each chunk of a batch, tensors () on the device."""
    chunks = split_chunks(batch, passes)
    state = model.empty_state() if len(chunks) > 1 else None
    losses = []
    for chunk in chunks:
        with passes.autocast:
            on_device = passes.to_device(chunk)
            loss, state = loss_fn(model, *on_device, counts=Counts(1, 1), state=state)
        losses.append(loss)
    return losses
