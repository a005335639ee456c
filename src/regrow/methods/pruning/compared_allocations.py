"""Which of several allocations is taken: the losses of the masked networks are compared on calibration data."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from regrow.allocation.ranked import BudgetError, uniform
from regrow.core.axes import Mark
from regrow.core.objectives import choose_objective
from regrow.core.sources import Batch, device_of
from regrow.methods.pruning.pruner import Kept, PruningTask
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.spaces import inner
from regrow.surgery.gate import gate_inputs, gates_of

LABELS = 2000
"""How many labels of each source (without labels: examples) the losses are measured on, in whole batches."""
ALL, INNER, RANKED = "all blocks pruned", "first and last blocks unpruned", "one ranking of all units"


@dataclass(frozen=True)
class ChosenAllocation:
    """The allocation that was taken among several.

    Args:
        name: Its name.
        kept: Axis key → the units that stay.
        losses: Name of an allocation → its mean loss on calibration data before any refit; empty if none was compared.
        notes: What a reader of the plan should know.
    """

    name: str
    kept: Kept
    losses: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> dict[str, object]:
        """The losses, for a report; empty if none was compared."""
        return {"starts": self.losses} if self.losses else {}


def uniform_candidates(
    task: PruningTask, values: Mapping[str, Tensor], spare: tuple[float, float], minimum: int
) -> dict[str, Callable[[], Kept]]:
    """Return the allocations that cut the same fraction of each axis: outside the first and last blocks, and in all.

    Args:
        task: The network, the axes that may be cut, and the budget; where it cuts every block alike, all are cut.
        values: Axis key → the importance of its units, ``[size]``.
        spare: The fractions of the numbered blocks, at the beginning and at the end, that stay unpruned in the first;
            where no block is, there is only the second.
        minimum: The smallest number of units that stay in an axis.

    Source: ours; leaving outer blocks unpruned is from LLM-Pruner (arXiv 2305.11627).
    """
    some = inner(task.units, *spare)
    whole = task.budget.regular or len(some) == len(task.units)
    result: dict[str, Callable[[], Kept]] = {}
    for name, units in {**({} if whole else {INNER: some}), ALL: task.units}.items():
        scored = {axis.key: values[axis.key] for axis in units if axis.key in values}
        result[name] = partial(uniform, task.axes, scored, task.budget, minimum=minimum)
    return result


def choose_allocation(
    task: PruningTask, candidates: Mapping[str, Callable[[], Kept]], *, compensate: bool
) -> ChosenAllocation:
    """Return the allocation under which the masked network has the lowest loss.

    Allocations that cannot meet the budget are left out. Where the losses cannot be compared (units at whose mark
    masking is not cutting, no labelled batch), the first one is taken. A note says either.

    Args:
        task: The network, the axes that may be cut, and the data.
        candidates: Name of an allocation → returns the units that stay, or raises :class:`BudgetError`.
        compensate: Whether the mean of dropped inputs takes their place.

    Raises:
        BudgetError: If no allocation can meet the budget.

    Source: ours.
    """
    found: dict[str, Kept] = {}
    notes: list[str] = []
    for name, allocate in candidates.items():
        try:
            found[name] = allocate()
        except BudgetError:
            if not found and len(notes) == len(candidates) - 1:
                raise
            notes.append(f"{name}: cannot meet the budget")
    first, distinct, cuts = next(iter(found)), dict[str, Kept](), []
    for name, kept in found.items():
        cut = {key: units for key, units in kept.items() if len(units) < task.axes[key].size}
        if cut not in cuts:
            cuts.append(cut)
            distinct[name] = kept
    if len(distinct) == 1:
        return ChosenAllocation(first, found[first], notes=tuple(notes))
    exact = all(axis.mark is Mark.NEUTRAL for axis in task.units)
    losses = _compare(task, distinct, compensate) if exact else {}
    if not losses:
        why = (
            "no batch has labels and a finite loss"
            if exact
            else "a unit that is masked is not one that is cut, with this --mark"
        )
        return ChosenAllocation(first, found[first], notes=(*notes, f"allocations were not compared: {why}"))
    ordered = sorted(losses.items(), key=lambda one: one[1])
    listed = ", ".join(f"{name} {loss:.3f}" for name, loss in ordered)
    notes.append(f"the allocation with the lowest loss before any refit was taken: {listed}")
    return ChosenAllocation(ordered[0][0], found[ordered[0][0]], losses, tuple(notes))


def _compare(task: PruningTask, kept: Mapping[str, Kept], compensate: bool) -> dict[str, float]:
    """Return the mean loss per label under each mask, of batches on which one of them is finite; empty if none is."""
    masks = {name: gates_of(task.axes, units) for name, units in kept.items()}
    fills = constant_inputs(task.model, task.evidence.pooled(gradients=False).moments) if compensate else {}
    sums, measured, seen = dict.fromkeys(masks, 0.0), 0, 0
    sources = list(task.evidence.data.values())
    for batch in (batch for source in sources for batch in _first(source)):
        task.progress(seen, max(seen + 1, LABELS * len(sources)), "comparing allocations")
        seen += batch.size
        objective, here = task.objective or choose_objective(None, batch), batch.to(device_of(task.model))
        row = {}
        for name, gates in masks.items():
            with torch.no_grad(), gate_inputs(task.model, task.axes, gates, fills):
                loss = float(objective.compute_loss(here.run(task.model), here))
            row[name] = loss if math.isfinite(loss) else math.inf
        if min(row.values()) < math.inf:
            measured += batch.size
            sums = {name: sums[name] + row[name] * batch.size for name in masks}
    return {name: one / measured for name, one in sums.items()} if measured else {}


def _first(source: Iterable[Batch]) -> Iterator[Batch]:
    """Return the first batches that have enough labels together, or all; those without any are left out."""
    labels = 0
    for batch in source:
        if batch.size:
            yield batch
        labels += batch.size
        if labels >= LABELS:
            return
