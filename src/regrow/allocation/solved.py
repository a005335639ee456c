"""Pruning ratios that always meet a budget: one logit per module is learned, a common shift is solved for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from regrow.allocation.cost import cost_of
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget


def ratios(logits: Tensor, costs: Tensor, removed: float, *, most: float = 0.95) -> Tensor:
    """Return the fraction that each module removes, from learned logits, so that a budget is met exactly.

    p = most · σ(logits + b), with the shift b such that Σ cost · p = removed.

    b is found by bisection, and takes part in the derivative: ∂b/∂logits_g = −w_g with w ∝ cost · σ′, Σ w = 1. So the
    budget is met at every step of learning and needs no penalty.

    >>> p = ratios(torch.zeros(2), torch.tensor([30.0, 10.0]), 8.0)
    >>> p.tolist(), float((p * torch.tensor([30.0, 10.0])).sum())
    ([0.20000000298023224, 0.20000000298023224], 8.0)

    Source: GPrune-LLM (arXiv 2603.13418) learns module-wise sparsity under a global budget; this form of it is ours.
    """
    if not 0 <= removed < most * float(costs.sum()):
        raise ValueError(
            f"{removed:g} of a cost of {float(costs.sum()):g} cannot be removed if every module keeps {1 - most:.0%}"
        )
    costs = costs.to(logits)
    values, exact = logits.detach().double(), costs.double()
    low, high = -60.0 - float(values.max()), 60.0 - float(values.min())
    for _ in range(80):
        shift = (low + high) / 2
        if float((exact * most * torch.sigmoid(values + shift)).sum()) > removed:
            high = shift
        else:
            low = shift
    slope = torch.sigmoid(values + shift)
    weights = exact * slope * (1 - slope)
    weights = (weights / weights.sum().clamp_min(1e-300)).to(logits)
    return most * torch.sigmoid(logits + shift - (weights * (logits - logits.detach())).sum())


def module_costs(axes: AxisGraph, labels: Mapping[str, Tensor], modules: int, budget: Budget) -> tuple[Tensor, float]:
    """Return the cost of all units of each module, ``[modules]``, and the total cost that must be removed.

    A unit's cost is the average over all units that can be removed from its axis alone, which is exact where no two of
    the axes meet in one weight, as in a transformer.
    """
    cost, costs = cost_of(axes, budget), torch.zeros(modules, dtype=torch.float64)
    for key, label in labels.items():
        size = axes[key].size
        low = min(axes[key].least, size - 1)
        costs += torch.bincount(label, minlength=modules) * ((cost.total - cost({key: low})) / (size - low))
    if budget.target is None:
        return costs, cost.total * (1 - budget.keep)
    return costs, float(max(0, cost.total - budget.limit(cost.total)))


def soft_step(places: Tensor, share: Tensor, width: Tensor | float) -> Tensor:
    """Return 1 for each unit that stays and 0 for each that is removed, with a sigmoid's gradient.

    The backward pass uses the slope of σ((place − share) / width).
    """
    soft = torch.sigmoid((places - share) / width)
    return (places >= share).to(soft) + (soft - soft.detach())
