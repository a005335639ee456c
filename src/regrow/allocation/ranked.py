"""Rank the units of many axes together, by score or by share of the axis, and cut where the cost fits the budget."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.allocation.cost import Cost, cost_of
from regrow.core.amounts import STEPS_PER_UNIT
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.scores import Scores, Tensors, rank_order


class BudgetError(ValueError):
    """Raised if a budget cannot be met; ``least``: the smallest ``keep``, or value of the target, that can be."""

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class AxisGroup:
    """Axes of equal size that are cut together, in steps, each of which removes their lowest-scored units.

    Args:
        keys: The keys of the axes.
        members: Their places in a vector of sizes (``Cost.index``).
        orders: Per axis, the indices of its units from the lowest to the highest score.
        sizes: The sizes to which they may shrink, descending from their own, ``[steps + 1]``.
        values: The mean score of the units that each step removes, in non-decreasing order, ``[steps]``.
    """

    keys: tuple[str, ...]
    members: list[int]
    orders: tuple[np.ndarray, ...]
    sizes: np.ndarray
    values: np.ndarray


def rank(axes: AxisGraph, scores: Scores | Tensors, budget: Budget) -> dict[str, tuple[int, ...]]:
    """Return axis key → the units kept: the best of all scored axes in one ranking, so that the cost fits the budget.

    ``scores``: axis key → a score per unit, ``[size]``; low ones go first. Raises :class:`BudgetError` if the budget
    cannot be met, ``ValueError`` if scores are not finite or of other sizes. Units are sorted by score (equal ones by
    axis key, then unit), the longest affordable tail is found by bisection on the exact cost of the planned network,
    and what still fits is put back, best first. So the cost is within the budget, and no step of any axis would fit.

    Axes with the same ``count`` lose their i-th worst units together, at the mean of their scores; if one of them is
    free but not scored, none is cut. In a regular budget so do all axes of one kind, in whatever block; if one of them
    is not scored, none is cut. Rounding is part of the steps: all sizes reached are multiples of ``budget.round_to``,
    or the present size; axes with fewer units than that are not rounded.
    """
    values = scores.values if isinstance(scores, Scores) else scores
    cost = cost_of(axes, budget)
    limit = budget.limit(cost.total)
    groups = list(_make_axis_groups(axes, values, budget, cost))
    owner = np.concatenate([np.full(len(group.values), i) for i, group in enumerate(groups)] or [np.zeros(0, int)])
    order = np.argsort(np.concatenate([group.values for group in groups] or [np.zeros(0)]), kind="stable")
    owner = owner[order].astype(np.int64)

    def count_steps(total: int) -> np.ndarray:
        """Return how many of the first ``total`` steps each group takes."""
        return np.bincount(owner[:total], minlength=len(groups))

    def vector_of(taken: np.ndarray) -> np.ndarray:
        vector = cost.present.copy()
        for group, steps in zip(groups, taken, strict=True):
            vector[group.members] = group.sizes[steps]
        return vector

    def fits(total: int) -> bool:
        return cost.at(vector_of(count_steps(total))) <= limit

    if not fits(len(owner)):
        raise _make_budget_error(budget, cost.at(vector_of(count_steps(len(owner)))), cost.total, len(values))
    taken = count_steps(bisect_left(range(len(owner)), True, key=fits))
    vector, open_groups = vector_of(taken), {*np.flatnonzero(taken).tolist()}
    # Keep removed units after all, best first. The remaining budget only shrinks and no unit gets cheaper as others
    # return, so a group that does not fit once is closed.
    for number in owner[: int(taken.sum())][::-1].tolist():
        if number in open_groups:
            group, wider = groups[number], vector.copy()
            wider[group.members] = group.sizes[taken[number] - 1]
            if fitting := cost.at(wider) <= limit:
                vector = wider
                taken[number] -= 1
            if not fitting or not taken[number]:
                open_groups.remove(number)
    kept = {key: tuple(range(len(scored))) for key, scored in values.items()}
    for group, steps in zip(groups, taken, strict=True):
        for key, worst in zip(group.keys, group.orders, strict=True):
            kept[key] = tuple(np.sort(worst[len(worst) - group.sizes[steps] :]).tolist())
    return kept


def uniform(axes: AxisGraph, scores: Scores | Tensors, budget: Budget) -> dict[str, tuple[int, ...]]:
    """Return axis key → the units kept: the same fraction of every scored axis, the best of each, within the budget.

    Scores, which need not be comparable between axes, are replaced by percentiles within the axis, (rank + ½) / n, and
    ranked together as by :func:`rank`. The ½ rounds small axes to the nearest number of units (of three groups, one is
    removed from a fraction of 1/6 on).
    """
    values = scores.values if isinstance(scores, Scores) else scores
    finite = {key: bool(torch.isfinite(value).all()) for key, value in values.items()}
    # rank raises an error for scores that are not finite, with the axis's name.
    shares = {key: rank_order(value) if finite[key] else value for key, value in values.items()}
    return rank(axes, shares, budget)


def _make_axis_groups(axes: AxisGraph, values: Tensors, budget: Budget, cost: Cost) -> Iterator[AxisGroup]:
    """Yield the groups of axes that are cut together; ``ValueError`` if scores (key → ``[size]``) do not fit."""
    for key, scores in values.items():
        if key not in axes.axes or len(scores) != axes[key].size:
            raise ValueError(f"the scores of {key!r} do not fit the network: {len(scores)} numbers")
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"the scores of {key!r} hold NaN or infinity")
    for keys in _group_keys(axes, values, budget.regular):
        size = axes[keys[0]].size
        if any(key not in values or axes[key].size != size for key in keys):
            continue
        least = max(1, *(axes[key].least for key in keys))
        multiple = lcm(*(axes[key].multiple for key in keys))
        rounded = lcm(budget.round_to, multiple)
        sizes = _reachable_sizes(size, min(least, size), rounded if size >= rounded else multiple)
        steps = -np.diff(sizes)
        arrays = [values[key].double().numpy() for key in keys]
        orders = tuple(np.argsort(array, kind="stable") for array in arrays)
        mean = np.mean([array[order] for array, order in zip(arrays, orders, strict=True)], axis=0)
        starts = np.cumsum(steps) - steps
        sums = np.add.reduceat(mean, np.append(starts, steps.sum()))[:-1] if 0 < steps.sum() < size else np.zeros(0)
        # Rounding errors must not let a later step come before an earlier one.
        means = np.maximum.accumulate(sums / steps) if len(steps) else sums
        yield AxisGroup(tuple(keys), [cost.index[key] for key in keys], orders, sizes, means)


def _group_keys(axes: AxisGraph, values: Tensors, regular: bool) -> list[list[str]]:
    """Return the keys of axes that must keep equally many units, by group: those scored, and others bound to them.

    ``values``: axis key → scores; ``regular``: whether axes of one kind are a group.
    """
    regular_kinds = {axes[key].kind for key in values} if regular else frozenset()
    group_of: dict[Any, int] = {}
    groups: dict[int, list[str]] = {}
    for number, axis in enumerate(sorted(axes, key=lambda axis: axis.key)):
        labels: list[Any] = [axis.count] if axis.count and axis.free else []
        if regular_kinds and axis.kind in regular_kinds:
            labels.append(axis.kind)
        if not labels and axis.key not in values:
            continue
        first, *others = sorted({group_of[label] for label in labels if label in group_of}) or [number]
        for other in others:
            groups[first] += groups.pop(other)
            group_of = {label: first if group == other else group for label, group in group_of.items()}
        groups.setdefault(first, []).append(axis.key)
        group_of |= dict.fromkeys(labels, first)
    return [sorted(keys) for keys in groups.values()]


def _reachable_sizes(size: int, least: int, round_to: int) -> np.ndarray:
    """Return an axis's possible sizes, descending: its own, then multiples of ``round_to`` that are ≥ ``least``.

    >>> _reachable_sizes(21, 3, 8).tolist(), _reachable_sizes(5, 3, 1).tolist()
    ([21, 16, 8], [5, 4, 3])
    """
    return np.array([size, *range((size - 1) // round_to * round_to, least - 1, -round_to)], dtype=np.int64)


def _make_budget_error(budget: Budget, least: int, total: int, axes: int) -> BudgetError:
    """Return the error for a budget below ``least``, the least cost of ``axes`` axes; ``total`` is the present one."""
    why = f"{axes} axes keep their least" if axes else "no axis is left to cut: loosen --only, --exclude"
    if axes and budget.regular:
        why += "; axes of one kind are cut in every block or in none"
    reachable = budget.least(least, total)
    if budget.target is None:
        what, remedy = f"keep {budget.keep:g} of {budget.measure}", f"the least reachable keep is {reachable:g}"
    else:
        share, amount = (reachable, 0.0) if budget.target.share else (0.0, reachable)
        least_target = replace(budget.target, share=share, amount=amount)
        now = total / STEPS_PER_UNIT.get(budget.measure, 1)
        what, remedy = f"the target {budget.target}", f"the least possible is {least_target}, of {now:,.10g} now"
    return BudgetError(f"{what} cannot be reached ({why}); {remedy}", reachable)


# Name → allocation function: (axes, scores, budget) → axis key → units kept
ALLOCATIONS: Mapping[str, Callable[..., dict[str, tuple[int, ...]]]] = {"ranked": rank, "uniform": uniform}


def removal_ratios(logits: Tensor, costs: Tensor, removed: float, *, most: float = 0.95) -> Tensor:
    """Return the fraction that each module removes, ``[modules]``, from learned logits; the budget is met exactly.

    p = most · σ(logits + b), with the shift b such that Σ cost · p = removed. ``logits`` and ``costs`` have one entry
    per module; ``removed`` is the cost to be removed in all, ``most`` the largest fraction of a module. ``ValueError``
    if ``removed`` is negative or not below most · Σ cost.

    b is found by bisection, and takes part in the derivative: ∂b/∂logits_g = −w_g with w ∝ cost · σ′, Σ w = 1. So the
    budget is met at every step of learning and needs no penalty.

    >>> p = removal_ratios(torch.zeros(2), torch.tensor([30.0, 10.0]), 8.0)
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
    low, high = -60.0 - float(values.max()), 60.0 - float(values.min())  # every σ is nearly 0, or 1
    for _ in range(80):  # 120 / 2⁸⁰ is less than float64 resolves
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

    ``labels``: axis key → the index of the module of each unit, ``[size]``; ``modules``: how many there are. A unit's
    cost is the average over all units that can be removed from its axis alone, which is exact where no two of the axes
    meet in one weight, as in a transformer.
    """
    cost, costs = cost_of(axes, budget), torch.zeros(modules, dtype=torch.float64)
    for key, label in labels.items():
        size = axes[key].size
        low = min(axes[key].least, size - 1)
        costs += torch.bincount(label, minlength=modules) * ((cost.total - cost({key: low})) / (size - low))
    if budget.target is None:
        return costs, cost.total * (1 - budget.keep)
    return costs, float(max(0, cost.total - budget.limit(cost.total)))


def soft_step(percentiles: Tensor, share: Tensor, width: Tensor | float) -> Tensor:
    """Return 1 for units that stay (percentile ≥ ``share``, the fraction removed) and 0 for others, differentiably.

    The backward pass uses the slope of σ((percentile − share) / width). ``share`` and ``width`` broadcast to
    ``percentiles``.
    """
    soft = torch.sigmoid((percentiles - share) / width)
    return (percentiles >= share).to(soft) + (soft - soft.detach())
