"""Allocations compared on data: which blocks pay for a cut, by the loss of the masked network."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from regrow.allocation.ranked import BudgetError, rank, uniform
from regrow.allocation.widening import classify_axes
from regrow.core.axes import Axis, Mark
from regrow.core.objectives import choose_objective
from regrow.core.scores import Scores
from regrow.core.sources import Batch, device_of
from regrow.methods.pruning.pruner import Kept, Pruner, PruningTask, Ranking
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.spaces import select_inner
from regrow.surgery.gate import gate_inputs, make_gates

# How many labels of each source (without labels: examples) allocations are compared on, in whole batches.
LABELS = 512
ALL, INNER, RANKED = "all blocks pruned", "first and last blocks unpruned", "one ranking of all units"
# Name of an allocation → (scores of the axes that pay, (axes, scores, budget) → the units kept)
Allocations = dict[str, tuple[Scores, Callable[..., Kept]]]


def compare_allocations(
    pruner: Pruner, score: Callable[[PruningTask], Scores], comparable: Callable[[PruningTask], Scores]
) -> Pruner:
    """Return the pruner that takes the one of several allocations under which the masked network has the lowest loss.

    ``pruner``: the same with an equal fraction of each axis; ``score``, ``comparable``: scores in and between axes.
    """

    def rank_measured(task: PruningTask) -> Ranking:
        return _rank_measured(task, score(task), comparable(task), compensate=pruner.compensate is not None)

    settings = {**cast(dict[str, object], pruner.origin["settings"]), "allocation": "measured"}
    origin = {**pruner.origin, "settings": settings}
    return replace(pruner, score=rank_measured, origin=origin, runs_network=True, prune_outer=True)


def _list_allocations(task: PruningTask, scores: Scores, comparable: Scores) -> Allocations:
    """Return name → (scores of the axes that pay, allocation function), of the allocations that are compared.

    Where neurons of MLPs and other units may be cut, neurons alone pay for an equal fraction of each axis: of the few
    key-value groups of a layer, one is a large part. Leaving outer blocks unpruned is from LLM-Pruner (arXiv
    2305.11627).
    """
    parts = classify_axes(task.axes)
    paying = [axis for axis in task.units if parts.get(axis.key) == "mlp"] or task.units
    inside = select_inner(paying)

    def of(units: Sequence[Axis]) -> Scores:
        return replace(scores, values={axis.key: scores.values[axis.key] for axis in units})

    result: Allocations = {}
    if not task.budget.regular and len(inside) < len(paying):
        result[INNER] = of(inside), uniform
    return result | {ALL: (of(paying), uniform), RANKED: (comparable, rank)}


def _rank_measured(task: PruningTask, scores: Scores, comparable: Scores, *, compensate: bool) -> Ranking:
    """Return the scores and kept units of the allocation under which the masked network has the lowest loss.

    Allocations that cannot meet the budget are left out. Where the losses cannot be compared, the first is taken. A
    note says either.
    """
    candidates = _list_allocations(task, scores, comparable)
    kept: dict[str, Kept] = {}
    cuts: list[Kept] = []
    notes: list[str] = []
    for name, (candidate_scores, allocate) in candidates.items():
        try:
            units = allocate(task.axes, candidate_scores, task.budget)
        except BudgetError:
            if not kept and len(notes) == len(candidates) - 1:  # no candidate meets the budget
                raise
            notes.append(f"{name}: cannot meet the budget")
            continue
        cut = {key: keep for key, keep in units.items() if len(keep) < task.axes[key].size}
        if cut not in cuts:  # allocations that cut the same are measured once
            cuts.append(cut)
            kept[name] = units
    losses: dict[str, float] = {}
    if len(kept) > 1:
        note = "allocations were not compared: a unit that is masked is not one that is cut, with this --mark"
        if all(axis.mark is Mark.NEUTRAL for axis in task.units):
            losses = _compare_losses(task, kept, compensate)
            note = "allocations were not compared: no batch has labels and a finite loss"
        if losses:
            listed = ", ".join(f"{name} {loss:.3f}" for name, loss in sorted(losses.items(), key=lambda item: item[1]))
            note = f"the allocation with the lowest loss before any refit was taken: {listed}"
        notes.append(note)
    best = min(losses, key=lambda name: losses[name]) if losses else next(iter(kept))
    chosen = candidates[best][0]
    return Ranking(
        replace(chosen, notes=(*chosen.notes, *notes)), lambda _: {"starts": losses} if losses else {}, kept[best]
    )


def _compare_losses(task: PruningTask, kept: Mapping[str, Kept], compensate: bool) -> dict[str, float]:
    """Return name of an allocation → mean loss per label with its units masked; ``{}`` if no batch has a finite loss.

    ``kept``: name of an allocation → the units that stay; ``compensate``: masked inputs have their mean, not 0.
    """
    masks = {name: make_gates(task.axes, units) for name, units in kept.items()}
    fills = constant_inputs(task.model, task.evidence.pooled(gradients=False).moments) if compensate else {}
    sums, counted_labels = dict.fromkeys(masks, 0.0), 0
    batches = [batch for source in task.evidence.data.values() for batch in _first_labelled(source)]
    for i, batch in enumerate(batches):
        task.context.progress(i, len(batches), "comparing allocations")
        objective, moved = task.objective or choose_objective(None, batch), batch.to(device_of(task.model))
        row = {}  # name of an allocation → its loss on the batch
        for name, gates in masks.items():
            with torch.no_grad(), gate_inputs(task.model, task.axes, gates, fills):
                loss = float(objective.compute_loss(moved.run(task.model), moved))
            row[name] = loss if math.isfinite(loss) else math.inf
        if min(row.values()) < math.inf:
            counted_labels += batch.size
            sums = {name: sums[name] + row[name] * batch.size for name in masks}
    return {name: total / counted_labels for name, total in sums.items()} if counted_labels else {}


def _first_labelled(source: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches with labels from the start of a source, until these have at least ``LABELS`` labels."""
    labels = 0
    for batch in source:
        if batch.size:
            yield batch
        labels += batch.size
        if labels >= LABELS:
            return
