"""Which of several allocations is taken: the losses of the masked networks are compared on calibration data."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from regrow.allocation import BudgetError, uniform
from regrow.axes import Mark
from regrow.methods.pruning.pruner import Kept, PruningTask
from regrow.objectives import choose_objective
from regrow.scoring import constant_inputs
from regrow.scoring.spaces import inner
from regrow.sources import device_of
from regrow.surgery.gate import gate_inputs, gates_of

BATCHES = 2
"""How many batches of each source the losses are measured on."""
ALL, INNER, RANKED = "all blocks pruned", "first and last blocks unpruned", "one ranking of all units"


def allocate_alike(
    task: PruningTask, values: Mapping[str, Tensor], spare: tuple[float, float], minimum: int
) -> dict[str, Callable[[], Kept]]:
    """Return the allocations that cut the same fraction of each axis: outside the first and last blocks, and in all.

    Args:
        task: The network, the axes that may be cut, and the budget; where it cuts every block alike, all are cut.
        values: Axis key → the importance of its units, ``[size]``.
        spare: The fractions of the numbered blocks, at the beginning and at the end, that stay unpruned in the first.
        minimum: The smallest number of units that stay in an axis.

    Source: ours; leaving outer blocks unpruned is from LLM-Pruner (arXiv 2305.11627).
    """
    blocks = {ALL: task.units} if task.budget.regular else {INNER: inner(task.units, *spare), ALL: task.units}
    scored = {name: {one.key: values[one.key] for one in own if one.key in values} for name, own in blocks.items()}
    return {name: partial(uniform, task.axes, own, task.budget, minimum=minimum) for name, own in scored.items()}


def choose_allocation(
    task: PruningTask, candidates: Mapping[str, Callable[[], Kept]], *, compensate: bool
) -> tuple[Kept, dict[str, float]]:
    """Return the units that stay in the allocation under which the masked network has the lowest loss.

    Allocations that cannot meet the budget are left out. Where the losses cannot be compared (units at whose mark
    masking is not cutting, no labelled batch), the first one is taken.

    Args:
        task: The network, the axes that may be cut, and the data.
        candidates: Name of an allocation → returns the units that stay, or raises :class:`BudgetError`.
        compensate: Whether the mean of dropped inputs takes their place.

    Returns:
        The units that stay, and name of an allocation → its mean loss on the data before any refit; empty if none was
        compared.

    Raises:
        BudgetError: If no allocation can meet the budget.

    Source: ours.
    """
    found: dict[str, Kept] = {}
    for name, allocate in candidates.items():
        try:
            found[name] = allocate()
        except BudgetError:
            if not found and name == [*candidates][-1]:
                raise
    several = len({tuple(sorted(kept.items())) for kept in found.values()}) > 1
    exact = all(axis.mark is Mark.NEUTRAL for axis in task.units)
    losses = _compare(task, found, compensate) if several and exact else {}
    return found[min(losses, key=losses.__getitem__) if losses else next(iter(found))], losses


def describe_losses(losses: Mapping[str, float]) -> tuple[str, ...]:
    """Return the note of a plan on the allocations that were compared, lowest loss first; none if there were none.

    Args:
        losses: Name of an allocation → its mean loss.

    >>> describe_losses({"a": 2.0, "b": 1.0})
    ('the allocation with the lowest loss before any refit was taken: b 1.000, a 2.000',)
    """
    told = ", ".join(f"{name} {loss:.3f}" for name, loss in sorted(losses.items(), key=lambda one: one[1]))
    return (f"the allocation with the lowest loss before any refit was taken: {told}",) if losses else ()


def _compare(task: PruningTask, kept: Mapping[str, Kept], compensate: bool) -> dict[str, float]:
    """Return the mean loss under each mask over the batches on which one of them is finite; empty if there is none."""
    masks: dict[str, dict[str, Tensor]] = {name: gates_of(task.axes, one) for name, one in kept.items()}
    fills = constant_inputs(task.model, task.evidence.pooled(gradients=False).moments) if compensate else {}
    batches = [batch for source in task.evidence.data.values() for batch in source.batches[:BATCHES]]
    rows: list[dict[str, float]] = []
    for number, batch in enumerate(batches):
        task.progress(number, len(batches), "comparing allocations")
        objective, here = task.objective or choose_objective(None, batch), batch.to(device_of(task.model))
        row = {}
        for name, gates in masks.items():
            with torch.no_grad(), gate_inputs(task.model, task.axes, gates, fills):
                loss = float(objective.compute_loss(task.model(*here.args, **here.kwargs), here))
            row[name] = loss if math.isfinite(loss) else math.inf
        rows += [row] if min(row.values()) < math.inf else []
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in masks} if rows else {}
