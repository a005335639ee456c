"""Fisher pruning: cut the units whose masks have the least Fisher information, an estimate of the loss of a cut.

Like Kwon et al.: the squared gradient of a mask per unit, from one forward and one backward pass, without fine-tuning.
Unlike them: the gradient is taken per token, with labels that are drawn from the network's own predictions (there: per
example, with the labels of the data); their mask rearrangement and tuning are left out, and dropped inputs are replaced
by their mean unless switched off. The first eighth and the last sixteenth of the blocks are not pruned, as in
``llm_pruner``, unless ``allocation=measured`` (ours) finds a lower loss of the masked network with them pruned.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

import torch

from regrow.allocation.cost import cost_of
from regrow.allocation.ranked import BudgetError, rank, uniform
from regrow.core.axes import Mark
from regrow.core.objectives import choose_objective
from regrow.core.scores import Need, Scores
from regrow.core.sources import Batch, device_of
from regrow.methods.pruning.pruner import Kept, Pruner, PruningTask, Ranking, simple_pruner
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.metrics import fisher
from regrow.scoring.spaces import select_inner
from regrow.settings.constraints import CheckedSettings, OneOf
from regrow.surgery.gate import gate_inputs, make_gates

CITATION = (
    "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, arXiv:1801.05787; for masks as "
    "in Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022, arXiv:2204.09656"
)

# How many labels of each source (without labels: examples) allocations are compared on, in whole batches.
LABELS = 2000
ALL, INNER, RANKED = "all blocks pruned", "first and last blocks unpruned", "one ranking of all units"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``fisher``: allocation, unpruned blocks and compensation.

    Args:
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of the estimated loss per
            removed weight; ``measured``: of the same fraction of each axis outside the first and last blocks, the same
            in all blocks, and one ranking of all blocks, the one with the lowest loss of the cut network on 2,000
            labels of each source, before any refit.
        compensate: Whether the mean of dropped inputs is added to biases.
        prune_outer: Whether the first eighth and the last sixteenth of the blocks are pruned, too; ``measured`` decides
            it by itself.
    """

    allocation: Annotated[str, OneOf("uniform", "ranked", "measured")] = "uniform"
    compensate: bool = True
    prune_outer: bool = False


def build(settings: Settings) -> Pruner:
    """Return the pruner that removes the units of least Fisher information."""
    needs, score = {Need.WEIGHTS, Need.FISHER}, partial(_score_units, per_weight=settings.allocation == "ranked")
    if settings.allocation != "measured":
        return simple_pruner("fisher", settings, needs, score, settings.prune_outer)
    uniform_of_all = replace(settings, allocation="uniform")  # whose budget is checked before anything is measured
    pruner = simple_pruner("fisher", uniform_of_all, needs, score)
    origin = {"method": "fisher", "settings": asdict(settings)}
    return replace(pruner, score=partial(_rank_measured, settings=settings), origin=origin, runs_network=True)


def _score_units(task: PruningTask, per_weight: bool) -> Scores:
    """Return the estimated loss of cutting each unit; ``per_weight``: divided by the cost that cutting it removes."""
    scores = fisher(task.weights, task.axes, task.evidence.pooled(), units=task.units)
    return _divide_by_cost(task, scores) if per_weight else scores


def _divide_by_cost(task: PruningTask, scores: Scores) -> Scores:
    """Return scores divided by the mean cost, in the budget's measure, that cutting a unit of their axis saves."""
    cost, values = cost_of(task.axes, task.budget), {}
    for key, losses in scores.values.items():
        axis = task.axes[key]
        least = min(axis.least, axis.size - 1)
        values[key] = losses * (axis.size - least) / max(1, cost.total - cost({key: least}))
    return replace(scores, values=values, metric=f"{scores.metric}/cost")


def _rank_measured(task: PruningTask, settings: Settings) -> Ranking:
    """Return the scores and kept units of the allocation under which the masked network has the lowest loss.

    Allocations that cannot meet the budget are left out. Where the losses cannot be compared, the first is taken. A
    note says either. Leaving outer blocks unpruned is from LLM-Pruner (arXiv 2305.11627).
    """
    scores = _score_units(task, per_weight=False)
    inside = {axis.key for axis in select_inner(task.units)}
    candidates: dict[str, tuple[Scores, Callable[..., Kept]]] = {}
    if not task.budget.regular and len(inside) < len(task.units):
        values = {key: value for key, value in scores.values.items() if key in inside}
        candidates[INNER] = replace(scores, values=values), uniform
    candidates |= {ALL: (scores, uniform), RANKED: (_divide_by_cost(task, scores), rank)}
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
            losses = _compare_losses(task, kept, settings.compensate)
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
    sums, counted_labels, all_labels = dict.fromkeys(masks, 0.0), 0, 0
    sources = list(task.evidence.data.values())
    for batch in (batch for source in sources for batch in _first_labelled(source)):
        task.context.progress(all_labels, max(all_labels + 1, LABELS * len(sources)), "comparing allocations")
        all_labels += batch.size
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
