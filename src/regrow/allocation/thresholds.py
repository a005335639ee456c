"""Learned pruning thresholds: weights below a threshold are masked, and the loss trains the threshold.

After Dynamic Sparse Training (Liu et al., ICLR 2020; read in its authors' code).
"""

from typing import Any

import torch
from torch import Tensor


def margin(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return how far each weight's magnitude is above its threshold: abs(w) − t, in the shape of the weight.

    Args:
        weight: ``[out, ...]``.
        threshold: One per output unit, ``[out]``, or one for all, ``[]``.
    """
    return weight.abs() - threshold.reshape(-1, *[1] * (weight.dim() - 1))


def surrogate(x: Tensor) -> Tensor:
    """Return the surrogate derivative of the step function: 2 − 4 abs(x) up to 0.4, 0.4 up to 1, 0 beyond.

    Args:
        x: Any shape; the distance from the step.

    >>> surrogate(torch.tensor([0.0, 0.25, -0.5, 2.0])).tolist()
    [2.0, 1.0, 0.4000000059604645, 0.0]
    """
    size = x.abs()
    return (2 - 4 * size).clamp_min_(0.4).mul_(size <= 1)


def apply_threshold(weight: Tensor, threshold: Tensor, owned: Tensor) -> Tensor:
    """Mask the weights whose magnitude is below their threshold; weights get the dense gradient.

    The weight's gradient is taken as if nothing were left out: a weight of exactly 0 under a strict step would never
    get one again. The threshold's is Σ −g · w · surrogate(|w| − t) over the entries that are not owned.

    Args:
        weight: The weight, ``[out, ...]``.
        threshold: The threshold of each output unit, ``[out]``.
        owned: Entries that are never masked, bool in the shape of the weight.

    >>> w, t = torch.tensor([[0.5, -0.1, 0.0]], requires_grad=True), torch.tensor([0.2], requires_grad=True)
    >>> y = apply_threshold(w, t, torch.tensor([[False, False, False]]))
    >>> y.sum().backward()
    >>> y.tolist(), w.grad.tolist(), round(t.grad.item(), 3)
    ([[0.5, -0.0, 0.0]], [[1.0, 1.0, 1.0]], -0.24)
    """
    result: Tensor = _Thresholded.apply(weight, threshold, owned)
    return result


class _Thresholded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor, owned: Tensor) -> Tensor:
        above = margin(weight, threshold)
        ctx.save_for_backward(weight, above, owned)
        ctx.shape = threshold.shape
        return weight * (above >= 0).logical_or_(owned)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, above, owned = ctx.saved_tensors
        each = surrogate(above).mul_(weight).mul_(gradient).masked_fill_(owned, 0.0)
        down = each.flatten(1).sum(1) if ctx.shape else each.sum()
        return gradient, -down.reshape(ctx.shape), None


def step_mask(over_by: Tensor) -> Tensor:
    """Return 1 where a value is at least 0, else 0; the backward pass uses the surrogate gradient.

    Args:
        over_by: How far values are above their thresholds, any shape.

    >>> z = torch.tensor([0.1, -0.1], requires_grad=True)
    >>> step_mask(z).sum().backward()
    >>> step_mask(z).tolist(), [round(g, 2) for g in z.grad.tolist()]
    ([1.0, 0.0], [1.6, 1.6])
    """
    result: Tensor = _StepFunction.apply(over_by)
    return result


class _StepFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, over_by: Tensor) -> Tensor:
        ctx.save_for_backward(over_by)
        return (over_by >= 0).to(over_by.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (over_by,) = ctx.saved_tensors
        return surrogate(over_by).mul_(gradient)


def keep_above(values: Tensor, over_by: Tensor) -> Tensor:
    """Return values where ``over_by`` is at least 0, else 0.

    The gradient of the values is dense, as if none were masked; that of ``over_by`` is the surrogate's.

    Args:
        values: Any shape.
        over_by: How far each value is above its threshold, in the same shape.
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
