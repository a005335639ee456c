"""Which of several allocations is taken: the losses of the masked networks are compared on calibration data."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from regrow.allocation.ranked import BudgetError, uniform
from regrow.core.axes import Mark
from regrow.core.objectives import choose_objective
from regrow.core.scores import Scores
from regrow.core.sources import Batch, device_of
from regrow.methods.pruning.pruner import Kept, PruningTask, Ranking
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.spaces import inner
from regrow.surgery.gate import gate_inputs, gates_of

# How many labels of each source (without labels: examples) the losses are measured on, in whole batches.
LABELS = 2000
ALL, INNER, RANKED = "all blocks pruned", "first and last blocks unpruned", "one ranking of all units"


# Name of an allocation → the scores that it follows from, and a function that makes it.
Candidates = dict[str, tuple[Scores, Callable[[], Kept]]]


def uniform_candidates(task: PruningTask, scores: Scores, spare: tuple[float, float], minimum: int) -> Candidates:
    """Return the allocations that cut the same fraction of each axis: outside the first and last blocks, and in all.

    Source: ours; leaving outer blocks unpruned is from LLM-Pruner (arXiv 2305.11627).
    """
    inside, sets = inner(task.units, spare), {ALL: task.units}
    if not task.budget.regular and len(inside) < len(task.units):
        sets = {INNER: inside, **sets}
    result: Candidates = {}
    for name, units in sets.items():
        values = {axis.key: scores.values[axis.key] for axis in units if axis.key in scores.values}
        result[name] = scores, partial(uniform, task.axes, values, task.budget, minimum=minimum)
    return result


def choose_allocation(task: PruningTask, candidates: Candidates, *, compensate: bool) -> Ranking:
    """Return the scores and units of the allocation under which the masked network has the lowest loss.

    Allocations that cannot meet the budget are left out. Where the losses cannot be compared, the first is taken. A
    note says either. Source: ours.
    """
    kept: dict[str, Kept] = {}
    notes: list[str] = []
    for name, (_, allocate) in candidates.items():
        try:
            kept[name] = allocate()
        except BudgetError:
            if not kept and len(notes) == len(candidates) - 1:
                raise
            notes.append(f"{name}: cannot meet the budget")
    distinct: dict[str, Kept] = {}
    cuts: list[Kept] = []
    for name, units in kept.items():
        cut = {key: those for key, those in units.items() if len(those) < task.axes[key].size}
        if cut not in cuts:
            cuts.append(cut)
            distinct[name] = units
    losses: dict[str, float] = {}
    if len(distinct) > 1:
        note = "allocations were not compared: a unit that is masked is not one that is cut, with this --mark"
        if all(axis.mark is Mark.NEUTRAL for axis in task.units):
            losses = _compare(task, distinct, compensate)
            note = "allocations were not compared: no batch has labels and a finite loss"
        if losses:
            listed = ", ".join(f"{name} {loss:.3f}" for name, loss in sorted(losses.items(), key=lambda item: item[1]))
            note = f"the allocation with the lowest loss before any refit was taken: {listed}"
        notes.append(note)
    best = min(losses, key=lambda name: losses[name]) if losses else next(iter(kept))
    scores, units = candidates[best][0], kept[best]
    scores = replace(scores, values={key: scores.values[key] for key in units}, notes=(*scores.notes, *notes))
    return Ranking(scores, lambda _: {"starts": losses} if losses else {}, units)


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
    return {name: total / measured for name, total in sums.items()} if measured else {}


def _first(source: Iterable[Batch]) -> Iterator[Batch]:
    """Return the first batches that have enough labels together, or all; those without any are left out."""
    labels = 0
    for batch in source:
        if batch.size:
            yield batch
        labels += batch.size
        if labels >= LABELS:
            return
