"""Learned pruning thresholds: weights below a threshold are masked, and the loss trains the threshold.

After Dynamic Sparse Training (Liu et al., ICLR 2020; read in its authors' code).
"""

from typing import Any

import torch
from torch import Tensor


def margin(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return how far each weight's magnitude is above its threshold, one per output unit or for all: abs(w) − t."""
    return weight.abs() - threshold.reshape(-1, *[1] * (weight.dim() - 1))


def surrogate(x: Tensor) -> Tensor:
    """Return the surrogate derivative of the step function: 2 − 4 abs(x) up to 0.4, 0.4 up to 1, 0 beyond.

    >>> surrogate(torch.tensor([0.0, 0.25, -0.5, 2.0])).tolist()
    [2.0, 1.0, 0.4000000059604645, 0.0]
    """
    size = x.abs()
    return (2 - 4 * size).clamp_min_(0.4).mul_(size <= 1)


def apply_threshold(weight: Tensor, threshold: Tensor, owned: Tensor) -> Tensor:
    """Mask the weights whose magnitude is below their threshold; weights get the dense gradient.

    The weight's gradient is taken as if nothing were left out: a weight of exactly 0 under a strict step would never
    get one again. The threshold's is Σ −g · w · surrogate(|w| − t) over the entries that are not owned; those that are
    (bool, in the shape of the weight) are never masked.

    >>> w, t = torch.tensor([[0.5, -0.1, 0.0]], requires_grad=True), torch.tensor([0.2], requires_grad=True)
    >>> y = apply_threshold(w, t, torch.tensor([[False, False, False]]))
    >>> y.sum().backward()
    >>> y.tolist(), w.grad.tolist(), round(t.grad.item(), 3)
    ([[0.5, -0.0, 0.0]], [[1.0, 1.0, 1.0]], -0.24)
    """
    return keep_above(weight, margin(weight.detach(), threshold).masked_fill(owned, torch.inf))


def step_mask(over_by: Tensor) -> Tensor:
    """Return 1 where a value is at least 0, else 0; the backward pass uses the surrogate gradient."""
    return keep_above(over_by.new_ones(()), over_by)


def keep_above(values: Tensor, over_by: Tensor) -> Tensor:
    """Return values where ``over_by`` is at least 0, else 0.

    The gradient of the values is dense, as if none were masked; that of ``over_by`` is the surrogate's.
    """
    result: Tensor = _Kept.apply(values, over_by)
    return result


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, over_by: Tensor) -> Tensor:
        ctx.save_for_backward(values, over_by)
        return values * (over_by >= 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, over_by = ctx.saved_tensors
        return gradient, surrogate(over_by).mul_(values).mul_(gradient)
