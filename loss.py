"""The loss: masked mean cross-entropy, and RWKV's "L2 wrap", without ever holding all logits.

    loss = sum over tokens of mask * (log sum exp(logits) - logits[target]) / sum of masks

The logits of T tokens are T x 65,536 numbers, far more than the model's activations. So the head's
product, the loss and its gradient are made chunk by chunk of tokens, and the logits are dropped.

The L2 wrap keeps logits small: the gradient of the largest logit at each position gets
+ 1e-4 / positions * that logit. It has no part in the value of the loss.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv6 import RWKV, State

# The head makes at most so many logits at once.
LOGITS = 1 << 24

Batch = tuple[Tensor, Tensor, Tensor]  # idx, targets and mask, each (B, T)


# ---- the head -----------------------------------------------------------------------------------


def largest_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x.max(-1, keepdim=True) of x (M, N): values and places, (M, 1).

    On a CPU this takes a third of the time, because amax is vectorized and max is not. It finds the
    first block of numbers that holds the largest, and looks for the place only there.
    """
    block_size = math.gcd(x.shape[-1], 256)
    blocks = x.unflatten(-1, (-1, block_size))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    row = torch.arange(len(x), device=x.device)
    largest, place_in_block = blocks[row, block[:, 0]].max(-1, keepdim=True)
    return largest, place_in_block + block * block_size


def cross_entropy_(logits: Tensor, targets: Tensor, weight: Tensor, l2: Tensor) -> Tensor:
    """Return the weighted sum of cross-entropies, and overwrite the logits by their gradient.

    logits: (M, vocab); targets: (M,); weight, l2: (M,), as in HeadLoss. Returns a tensor ().
    """
    targets, weight, l2 = targets[:, None], weight[:, None], l2[:, None]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    largest, place_of_largest = largest_of_rows(logits)
    largest = largest.to(dtype)
    exp = (logits - largest).exp_()
    sum_of_exp = exp.sum(-1, keepdim=True)
    cross_entropy = sum_of_exp.log() + largest - logits.gather(-1, targets)
    loss = (weight * cross_entropy).sum()

    # gradient = weight * (softmax - one_hot(target)) + l2 * largest, this only where it stands
    gradient = exp.mul_(weight / sum_of_exp)
    gradient.scatter_add_(-1, targets, -weight)
    gradient.scatter_add_(-1, place_of_largest, largest * l2)
    logits.copy_(gradient)
    return loss


class HeadLoss(torch.autograd.Function):
    """Head product, summed cross-entropy and L2 wrap, without ever holding all logits at once.

    x: (M, C); head: (vocab, C); targets: (M,); weight: (M,), of each token in the sum;
    l2: (M,), factor of each position's L2 wrap; dtype: of the matrix products.
    The gradient is made together with the loss, chunk by chunk of tokens, so that the logits
    (M, vocab) never exist whole. The backward pass only scales it.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weight, l2, dtype):  # noqa: PLR0913 (autograd takes tensors)
        W = head.to(dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        # With fewer tokens in a product, reading W would take longer than multiplying by it.
        tokens_per_matmul = max(1, LOGITS // len(head))
        # On a CPU the float32 of an eighth of them, 8 MB, stays in the cache. A GPU has no such
        # cache, and pays for each launch.
        parts = 8 if x.device.type == "cpu" else 1
        tokens_per_softmax = max(1, tokens_per_matmul // parts)
        for start in range(0, len(x), tokens_per_matmul):
            rows = slice(start, start + tokens_per_matmul)
            x_rows = x[rows].to(dtype)
            logits = x_rows @ W.t()
            columns = (logits, targets[rows], weight[rows], l2[rows])
            for pieces in zip(
                *(column.split(tokens_per_softmax) for column in columns), strict=True
            ):
                loss += cross_entropy_(*pieces)
            grad_logits = logits  # cross_entropy_ has put it in their place
            if grad_x is not None:
                grad_x[rows] = grad_logits @ W
            if grad_head is not None:
                grad_head += grad_logits.t() @ x_rows
        ctx.save_for_backward(grad_x, grad_head)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_head = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grad_loss
        if grad_head is not None:
            grad_head = grad_head * grad_loss
        return grad_x, grad_head, None, None, None, None


# ---- the loss of a batch ------------------------------------------------------------------------


class Counts(NamedTuple):
    """What the losses of a step's micro batches are divided by, so that they add up to a mean."""

    tokens: float  # that count in the loss: the sum of the masks
    positions: float  # that are not padding


def count_tokens(micro_batches: Sequence[Batch]) -> Counts:
    """Count the tokens and positions of micro batches.

    Call it while they are on the CPU: the sums of a GPU's tensors would have to be waited for.
    """
    tokens = sum(mask.sum().item() for _, _, mask in micro_batches)
    positions = sum((targets >= 0).sum().item() for _, targets, _ in micro_batches)
    return Counts(tokens, positions)


def loss_fn(
    model: RWKV,
    idx: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    counts: Counts | None = None,
    state: State | None = None,
) -> tuple[Tensor, State | None]:
    """Return the mean cross-entropy over the masked tokens, and the model's state after them.

    idx, targets: (B, T) int64; a negative target is padding, and not a position.
    mask: (B, T), 1 where a token counts.
    counts: of the whole step, where this is one of its micro batches.
    state: of the model before these tokens, to begin with model.empty_state(). Without one, None is
    returned in its place.
    The backward pass includes the L2 wrap.
    """
    if counts is None:
        counts = count_tokens([(idx, targets, mask)])
    tokens, positions = max(float(counts.tokens), 1.0), max(counts.positions, 1)
    targets, mask = targets.flatten(), mask.flatten()
    is_position = targets >= 0
    targets = targets.clamp(min=0)
    if model.config.head_qk:
        # More than the head makes these logits: they are kept whole.
        result = model(idx, state)
        logits, state = result if state is not None else (result, None)
        logits = logits.flatten(0, 1).float()
        l2_wrap = 0.5e-4 / positions * (logits.amax(-1).square() * is_position).sum()
        cross_entropy = F.cross_entropy(logits, targets, reduction="none")
        # The wrap has a gradient, and adds nothing to the loss.
        return (cross_entropy * mask).sum() / tokens + l2_wrap - l2_wrap.detach(), state
    x, new_state = model.hidden(idx, state)
    device = x.device.type
    dtype = model.head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    head = model.head.weight
    if not torch.is_grad_enabled():
        head = head.detach()  # or HeadLoss would make its gradient
    # The sum is divided by `tokens` only below, so that fp16 can hold its gradient.
    l2 = is_position.to(x.dtype) * (1e-4 * tokens / positions)
    # HeadLoss chooses its dtypes itself.
    with torch.autocast(device, enabled=False):
        x, weight = x.flatten(0, 1), mask.to(x.dtype)
        loss = HeadLoss.apply(x, head, targets, weight, l2, dtype) / tokens
    return loss, None if state is None else new_state
