"""Two functions whose gradients are written by hand, because autograd's would be slower.

One need not read this to understand Bone: the first line of each says what it computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Mixture(torch.autograd.Function):
    """Compute x + (previous - x) * mix, for every mixture.

    x, previous: (B, T, C); mix: (mixtures, B, T, C) or (mixtures, 1, 1, C), or (1, 1, C) for one.
    Returns (mixtures, B, T, C), or (B, T, C): the largest tensor of a block, which autograd would
    read more often than these formulas.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, previous: Tensor, mix: Tensor) -> Tensor:
        ctx.save_for_backward(x, previous, mix)
        return torch.lerp(x, previous, mix)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, previous, mix = ctx.saved_tensors
        gprevious = (g * mix).sum_to_size(x.shape)
        gx = g.sum_to_size(x.shape) - gprevious
        gmix = None
        if ctx.needs_input_grad[2]:
            gmix = (g * (previous - x)).sum_to_size(mix.shape)
        return gx, gprevious, gmix


class SquaredReLU(torch.autograd.Function):
    """Compute relu(x)^2.

    Its gradient is 2 relu(x) g: half of the passes that autograd would make.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (g * positive).mul_(2)
