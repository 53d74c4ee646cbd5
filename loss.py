"""The loss of a batch, and its gradient: in chunks of tokens at the head, and, for sequences of any length, in chunks along time.

RWKV needs no earlier token, only its state (rwkv6.py). So a row of T tokens can go through the model chunk by chunk, in the memory of one
chunk. The gradient stays that of the whole row, as it flows back through the states between the chunks:

    forward     s1 = chunk 0 from s0,  s2 = chunk 1 from s1,  ...     without a graph; the states alone are kept
    backward    the last chunk again, from its state, with a graph: loss -> gradients of the parameters and of that state
                the chunk before it: loss and gradient of the state after it -> gradients of the parameters and of the state before
                ...

Each chunk is computed twice, as grad_cp does; and what its matrix products gave is kept for the moment (quant.py), so that recomputing a block
within a chunk repeats none. That costs the memory of some activations of one chunk. `bptt` cuts the gradient after so many chunks
("truncated backpropagation through time"); with 1 each chunk is computed once, and the states pass no gradient.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

import data
import devices
import sharding

LOGITS = 1 << 24  # how many the head makes at once


def tokens_per_softmax(tokens_per_product, device):
    """How many of a product's tokens go through the softmax at once.

    On a CPU an eighth: 8 MB of float32, which stay in the cache. A GPU has no such cache, and
    pays for each launch: all of them.
    """
    return max(1, tokens_per_product // 8) if device.type == "cpu" else tokens_per_product


def largest_of_rows(x):
    """x.max(-1, keepdim=True), in a third of the time on a CPU: the block of numbers that holds it first (amax is vectorized, max is not)."""
    blocks = x.unflatten(-1, (-1, math.gcd(x.shape[-1], 256)))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    largest, at = blocks[torch.arange(len(x), device=x.device), block[:, 0]].max(-1, keepdim=True)
    return largest, at + block * blocks.shape[-1]


class HeadLoss(torch.autograd.Function):
    """Head product, summed cross-entropy and L2 wrap over chunks of tokens, so that the logits (tokens x vocabulary) never exist whole.

    x: (M, C); head: (vocab, C); targets: (M,); weight: (M,) of each token in the sum; l2: (M,) factor of each position's L2 wrap.
    The gradient is made with the loss, chunk by chunk, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weight, l2, dtype):
        W = head.to(dtype)
        gx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        ghead = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        many = max(
            1, LOGITS // len(head)
        )  # tokens in a product: with fewer, reading W would take longer than multiplying by it
        few = tokens_per_softmax(many, x.device)  # and in what is done in float32
        for start in range(0, len(x), many):
            rows = slice(start, start + many)
            x_rows = x[rows].to(dtype)
            g_rows = x_rows @ W.t()  # the logits, and soon, in their place, the gradient
            for g, t, wt, l2_t in zip(
                *(
                    a.split(few)
                    for a in (g_rows, targets[rows, None], weight[rows, None], l2[rows, None])
                )
            ):
                largest, at = largest_of_rows(g)
                largest, logits_of_targets = largest.to(loss.dtype), g.gather(-1, t)
                e = (g - largest).exp_()
                total = e.sum(-1, keepdim=True)
                loss += (wt * (total.log() + largest - logits_of_targets)).sum()
                g.copy_(
                    e.mul_(wt / total).scatter_add_(-1, t, -wt).scatter_add_(-1, at, largest * l2_t)
                )  # softmax - target + L2 wrap
            if gx is not None:
                gx[rows] = g_rows @ W
            if ghead is not None:
                ghead += g_rows.t() @ x_rows
        ctx.save_for_backward(gx, ghead)
        return loss

    @staticmethod
    def backward(ctx, gloss):
        return *(g if g is None else g * gloss for g in ctx.saved_tensors), None, None, None, None


def loss_fn(model, idx, targets, mask, tokens=None, positions=None, state=None):
    """Mean cross-entropy over the masked tokens; its backward includes the RWKV L2 wrap, + 1e-4 / positions * the largest logit.

    idx, targets: (B, T) int64; mask: (B, T), 1 where a token counts. A negative target is padding, and no position. A micro batch of
    a larger step gives the step's `tokens` (sum of masks) and `positions`, so that losses and gradients of its micro batches add up.
    With the model's state before these tokens (model.empty_state() to begin), returns (loss, state after them).
    """
    targets, mask = targets.reshape(-1), mask.reshape(-1)
    tokens = max(float(mask.sum() if tokens is None else tokens), 1.0)
    positions = max(int((targets >= 0).sum()) if positions is None else positions, 1)
    real = targets >= 0
    if model.config.head_qk:  # more than the head makes these logits: they are kept whole
        logits = model(idx, state)
        if state is not None:
            logits, state = logits
        logits = logits.flatten(0, 1).float()
        wrap = 0.5e-4 / positions * (logits.amax(-1).square() * real).sum()
        loss = (
            (F.cross_entropy(logits, targets.clamp(min=0), reduction="none") * mask).sum() / tokens
            + wrap
            - wrap.detach()
        )
    else:
        x, new_state = model.hidden(idx, state)
        state = None if state is None else new_state
        device = x.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else model.head.weight.dtype
        )
        l2 = real.to(x.dtype) * (
            1e-4 * tokens / positions
        )  # the sum is divided only below, so that fp16 can hold its gradient
        with torch.autocast(device, enabled=False):  # HeadLoss chooses its dtypes itself
            loss = (
                HeadLoss.apply(
                    x.flatten(0, 1),
                    model.head.weight,
                    targets.clamp(min=0),
                    mask.to(x.dtype),
                    l2,
                    dtype,
                )
                / tokens
            )
    return loss if state is None else (loss, state)


def split(batch, chunk_ctx):
    """idx, targets and mask (B, T) as chunks of at most chunk_ctx tokens (0: as one); on each rank as many, if need be with some that count nothing."""
    chunks = [*zip(*(x.split(chunk_ctx or x.shape[1], 1) for x in batch))]
    missing = int(devices.max_over_ranks([len(chunks)])[0]) - len(chunks)
    if missing == 0:
        return chunks
    return chunks + [data.empty_batch(len(batch[0]), batch[0].device)] * missing


def tensors(state):
    return [x for x in tree_leaves(state) if x is not None]


def apart(state, requires_grad=False):
    """The same state, apart from the graph that it came from."""
    return tree_map(
        lambda x: None if x is None else x.detach().requires_grad_(requires_grad), state
    )


def backward(
    model, compute, batch, tokens, positions, autocast, scaler=None, chunk_ctx=0, bptt=0, last=True
):
    """Forward and backward of a micro batch, as the head of this file describes it; gradients are added to those of the parameters. Returns its
    loss, as loss_fn counts it. compute: loss_fn of the model, perhaps by an engine that adds up the gradients of all ranks (sharding.py), which
    happens in the `last` micro batch; scaler: of fp16; chunk_ctx: tokens in a chunk, 0: all; bptt: chunks the gradient flows through, 0: all.
    The loss is a tensor (): nothing here waits for the device."""
    chunks, state, loss = split(batch, chunk_ctx), model.empty_state(), 0.0
    bptt = bptt or len(chunks)
    for first in range(0, len(chunks), bptt):
        group, states, gradients = chunks[first : first + bptt], [state], None
        for idx, _, _ in group[:-1]:
            with torch.no_grad(), autocast:
                states.append(model.hidden(idx, states[-1])[1])
        for chunk in reversed(group):
            before = apart(states.pop(), requires_grad=bool(states))
            at_end = last and not states and first + bptt >= len(chunks)
            with contextlib.nullcontext() if at_end else sharding.no_gradient_sync(compute):
                with autocast:
                    if len(chunks) > 1:
                        value, after = compute(*chunk, tokens, positions, before)
                    else:  # a row that is whole needs no states
                        value, after = compute(*chunk, tokens, positions), []
                if gradients is None:  # no chunk of the group comes after this one
                    state, gradients = apart(after) if first + bptt < len(chunks) else None, []
                # (Not all: the shift of the first block depends on nothing that is trained, where neither ln nor emb is.)
                ends = [(x, g) for x, g in zip(tensors(after), gradients) if x.requires_grad]
                del after  # what is not needed, here and below, would be there at the peak
                scaled = value * devices.size()  # the engines take the mean over ranks
                torch.autograd.backward(
                    [scaler.scale(scaled) if scaler else scaled, *(x for x, _ in ends)],
                    [None, *(g for _, g in ends)],
                )
            gradients = [x.grad for x in tensors(before)]
            loss = loss + value.detach()
            del before, value, scaled, ends
    return loss


def count_tokens(micro):
    """Tokens that count in the loss, and positions that are no padding, in these micro batches of all ranks.

    Call it while the batches are on the CPU: the sums of a GPU's tensors would have to be waited for.
    """
    tokens = sum(mask.sum().item() for _, _, mask in micro)
    positions = sum((targets >= 0).sum().item() for _, targets, _ in micro)
    return devices.sum_over_ranks([tokens, positions])


def step(model, micro, autocast, scaler=None, chunk_ctx=0, bptt=0, *, compute=None, counts=None):
    """Forward and backward of an optimizer step's micro batches; gradients are added up.

    micro: [(idx, targets, mask)], of several ranks those of this one, as many as the others have.
    counts: what `count_tokens` says of them, where that is known already.
    Returns the loss of each micro batch, tensors () on the device; over all ranks, their sum is the
    mean over all tokens that count.
    """
    tokens, positions = counts or count_tokens(micro)
    compute = compute or functools.partial(loss_fn, model)
    losses = []
    for number, batch in enumerate(micro, 1):
        last = number == len(micro)
        losses.append(
            backward(
                model, compute, batch, tokens, positions, autocast, scaler, chunk_ctx, bptt, last
            )
        )
    return losses


@torch.no_grad()
def val_loss(
    model,
    documents,
    micro_bsz,
    ctx_len,
    loss_mask,
    autocast,
    cut=True,
    chunk_ctx=0,
    device=torch.device("cpu"),
    check=lambda: None,
):
    """Mean loss over the counting tokens of all documents, each seen once, by one of the ranks. check: called after each micro batch."""
    losses, tokens = [], 0.0
    for start in range(0, len(documents), micro_bsz * devices.size()):
        start += micro_bsz * devices.rank()
        rows = [documents[i] for i in range(start, min(start + micro_bsz, len(documents)))]
        batch = data.collate(rows, ctx_len, loss_mask, cut=cut) if rows else data.empty_batch()
        tokens += batch[2].sum().item()
        [batch] = data.to_device([batch], device)
        chunks = split(batch, chunk_ctx)
        state = model.empty_state()
        for chunk in chunks:
            with autocast:
                if len(chunks) > 1:
                    value, state = loss_fn(model, *chunk, tokens=1, positions=1, state=state)
                else:
                    value = loss_fn(model, *chunk, tokens=1, positions=1)
            losses.append(value)
        check()
    total = sum(torch.stack(losses).tolist()) if losses else 0.0  # the only wait for the device
    total, tokens = devices.sum_over_ranks([total, tokens])
    return total / max(tokens, 1.0)
