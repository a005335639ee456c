"""Uniform allocation: the same fraction of every axis is kept."""

from collections.abc import Mapping

import torch
from torch import Tensor

from regrow.allocation.ranked import rank
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.scores import Scores


def uniform(
    axes: AxisGraph,
    scores: Scores | Mapping[str, Tensor],
    budget: Budget,
    *,
    minimum: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Keep the same fraction of the units of every scored axis, the best of each, so that the budget is met.

    Scores are replaced by percentiles within the axis, (rank + ½) / n, and ranked together.

    The ½ in the percentile rounds small axes to the nearest number of units (of three groups, one is removed from a
    fraction of 1/6 on).

    Args:
        axes: The network's axes.
        scores: Axis key → one score per unit, ``[size]``; they need not be comparable between axes.
        budget: The limit, as for :func:`rank`.
        minimum: The least number of units that every axis keeps.

    Returns:
        Axis key → the positions of the units kept, ascending.

    Raises:
        BudgetError: If the budget cannot be met.
        ValueError: If scores do not fit the axes or are not numbers.
    """
    values = scores.values if isinstance(scores, Scores) else scores
    shares = {key: _percentile(value) for key, value in values.items()}
    return rank(axes, shares, budget, minimum=minimum)


def _percentile(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        return values  # refused by the ranking, with the axis's name
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[torch.argsort(values, stable=True)] = torch.arange(len(values), dtype=torch.float64)
    return (ranks + 0.5) / len(values)
