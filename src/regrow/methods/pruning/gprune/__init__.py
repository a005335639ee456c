"""GPrune-LLM: rank units only within modules of similar cross-domain behaviour, and learn each module's pruning ratio.

Reconstructed from the abstracts: the paper's formulas could not be obtained, every formula and default here is ours.
A wrapper around a base metric: (1) measure how far a unit's rank moves between sources; (2) form modules of units with
similar sensitivity and score; (3) order the most sensitive and weak modules by a metric without activations (or mix
both orders, ``switch=blend``); (4) learn the pruning ratio of each module under the exact budget: the order in a module
is fixed, masks are straight-through, the loss is the divergence from the dense network, and the best allocation on
held-out text is kept, the base method's own and that of unpruned first and last blocks among them. On unseen text
partition and learning gain nothing over that last allocation, the mixture a little: see docs/reproductions/gprune.md.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from regrow.allocation.ranked import ALLOCATIONS, BudgetError, module_costs, rank, removal_ratios, uniform
from regrow.core.axes import Axis, AxisGraph, Mark
from regrow.core.budget import Budget
from regrow.core.errors import RefusedError
from regrow.core.scores import Need, Scores, Statistics, Tensors, merge_statistics
from regrow.methods.pruning.gprune.modules import Masks, Modules, compute_reliability, partition, rank_in_modules
from regrow.methods.pruning.gprune.shares import ModuleShares, as_axis_tensor, read_learning
from regrow.methods.pruning.pruner import NOT_FINITE, Kept, Pruner, PruningTask, Ranking, mean_inputs
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.metrics import BASES, peak_to_peak
from regrow.scoring.spaces import (
    MIN_RANKED_UNITS,
    RankPercentiles,
    Space,
    make_ranking_spaces,
    map_within,
    percentile,
    rank_units,
    removed_share,
    select_inner,
    sensitivity,
    spectrum,
)
from regrow.scoring.weights import scorable_axes
from regrow.settings.constraints import (
    CheckedSettings,
    Count,
    Fraction,
    NonNegative,
    OneOf,
    OpenFraction,
    Positive,
    Range,
)
from regrow.training.hooks import Check, EarlyStopping
from regrow.training.state import TrainState

CITATION = "Liu et al., GPrune-LLM, 2026, arXiv:2603.13418 (reconstructed from the abstracts; no code was published)"
STARTS = ("base", "inner", "uniform")  # the allocations from which learning may start


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``gprune``: base metric, partition into modules, learning of the pruning ratios, compensation.

    Args:
        base: The base method, whose metric and allocation are used: ``flap`` (WIFV), ``wanda_sp``, ``llm_pruner``
            (Taylor), ``magnitude`` or ``fisher``.
        shards: The number of parts into which each source is split, so that the report can tell how far ranks vary
            between sources from sampling noise.
        partition: How units are grouped into modules: ``thresholds``, ``random`` or ``layer``; see
            :func:`~.modules.partition`.
        switch: Which modules are ordered without activations: ``unreliable``, ``blend``, ``even``, ``never``,
            ``always`` or ``reversed``; see :func:`~.modules.compute_reliability`.
        switch_most: The largest fraction of units that ``unreliable`` and ``reversed`` may switch.
        instead: The metric that orders switched modules: ``peaks`` (peak to peak of a unit's rows) or ``weights`` (the
            weight-only part of the base metric).
        start: Where learning starts: ``base`` (the base method's own allocation), ``inner`` (the same fraction of every
            axis outside the first and last blocks; axes of few units are not pruned), ``uniform`` (the same fraction of
            every axis), or the ``best`` of these three on held-out text.
        steps: Steps of learning; 0 keeps the start.
        windows: Calibration windows per step.
        every: The number of steps between two evaluations of the allocation on held-out text.
        held_out: The fraction of each source's windows that is used for evaluation only.
        lr: Learning rate of the modules' logits.
        width: The range of relative ranks in a module, around the pruning ratio, that has a gradient.
        width_few: As ``width``, for modules of several small axes that are pooled.
        most: The largest fraction of a module that may be cut while learning.
        memory: GiB of the dense network's predictions that may be cached instead of computed again.
        compensate: Whether the mean of dropped inputs is added to biases; the masked network in learning does the same.
        seed: Seed of random partitions and of the order of windows.
    """

    base: Annotated[str, OneOf("flap", "wanda_sp", "llm_pruner", "magnitude", "fisher")] = "flap"
    shards: Count = 4
    partition: Annotated[str, OneOf("thresholds", "random", "layer")] = "thresholds"
    switch: Annotated[str, OneOf("unreliable", "blend", "even", "never", "always", "reversed")] = "unreliable"
    switch_most: Fraction = 0.25
    instead: Annotated[str, OneOf("peaks", "weights")] = "peaks"
    start: Annotated[str, OneOf("base", "inner", "uniform", "best")] = "best"
    steps: Annotated[int, Range(0)] = 40
    windows: Count = 2
    every: Count = 10
    held_out: OpenFraction = 0.25
    lr: Positive = 0.1
    width: Positive = 0.05
    width_few: Positive = 0.1
    most: OpenFraction = 0.95
    memory: NonNegative = 3.0
    compensate: bool = True
    seed: int = 0


def build(settings: Settings) -> Pruner:
    """Return the GPrune-LLM pruner: a base metric, ranked within modules whose pruning ratios are learned."""
    runs = settings.steps > 0 or settings.start == "best"
    return Pruner(
        needs=frozenset({Need.WEIGHTS, Need.ACTIVATIONS, BASES[settings.base].need}),
        score=partial(score_units, s=settings),
        allocate=rank,
        compensate=mean_inputs if settings.compensate else None,
        origin={"method": "gprune", "settings": asdict(settings)},
        shards=settings.shards,
        sources=3,
        runs_network=runs,
        compares_classes=runs,
        check=partial(_check_budget, settings),
    )


def _check_budget(settings: Settings, axes: AxisGraph, prunable: Sequence[Axis], budget: Budget) -> None:
    """Raise ValueError if units are not neutral when masked, or the budget cuts more than ``settings.most`` of them."""
    units = scorable_axes(axes, prunable)
    if other := next((axis for axis in units if axis.mark is not Mark.NEUTRAL), None):
        raise ValueError(f"gprune masks units by 0 or their mean; {other.key!r} is {other.mark}: leave --mark neutral")
    single = {axis.key: torch.zeros(axis.size, dtype=torch.int64) for axis in units}  # all units in one module
    costs, removed = module_costs(axes, single, 1, budget)
    removal_ratios(torch.zeros(1, dtype=torch.float64), costs, removed, most=settings.most)


def score_units(task: PruningTask, s: Settings) -> Ranking:
    """Learn the pruning ratio of each module; return each unit's relative rank minus its module's ratio as the score.

    With a checkpoint, learning resumes from it. Raise RefusedError if the predictions hold NaN or infinity.
    """
    task.context.progress(0, 1, "forming modules")
    units = scorable_axes(task.axes, task.units)
    views, all_spaces = score_views(task, s, units), make_ranking_spaces(units, parts=4)
    first = views[0]
    modules = form_modules(s, first, all_spaces)
    trusted = compute_reliability(s.switch, all_spaces, modules, first.scores.values, first.sigma, most=s.switch_most)
    masks = order_modules(task, s, views, modules, trusted.trust, all_spaces)
    priced = [
        module_costs(task.axes, {key: row[view] for key, row in masks.modules.items()}, len(modules), task.budget)
        for view in range(len(views))
    ]
    costs, removed = torch.stack([view_costs for view_costs, _ in priced]), priced[0][1]  # the budget is the same
    shares = ModuleShares(s, task, masks, costs, removed, torch.tensor(modules.spaces))

    kept = {name: _allocate_start(name, task, s, first) for name in (STARTS if s.start == "best" else (s.start,))}
    base = kept.get("base") or _allocate_start("base", task, s, first)
    starts = {  # without those that are the same as that of the base method
        name: masks.cut_shares(units) for name, units in kept.items() if name == next(iter(kept)) or units != base
    }
    losses, state = read_learning(task) if s.steps else ({}, None)
    if state is None and (s.steps or s.start == "best"):
        for i, (name, share) in enumerate(starts.items()):
            task.context.progress(i, len(starts), f"evaluating the start {name}")
            losses[name] = shares.held_out_loss(share)
    start = s.start
    if losses:
        finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            raise RefusedError(NOT_FINITE)
        start = min(finite, key=lambda name: finite[name])
    if state is None:
        history = (Check(0, losses[start]),) if losses else ()
        trained = shares.initial_tensors(starts[start])
        state = TrainState(EarlyStopping(trained, {"share": as_axis_tensor(starts[start])}, history))
    if s.steps:
        state = shares.learn(state, losses)
    learned = state.learner
    share, checks = learned.best["share"].values, [asdict(check) for check in learned.history]
    columns = {
        "sensitivity": modules.mean(first.sigma),
        "activity": modules.mean(map_within(first.scores.values, all_spaces, percentile)),
        "unreliability": trusted.unreliability,
        "trust": trusted.trust,
        "cost": costs[0],
        "start": starts[start],
        "learned": share,
    }
    groups = make_ranking_spaces(units)
    robust = map_within(first.sigma, groups, lambda sigma: (sigma <= sigma.median()).double())
    several_shards = next(iter(first.ranks.shards.values())).shape[1] > 1

    def findings(kept: Kept) -> dict[str, Any]:
        cut = {"base": removed_share(robust, base), "gprune": removed_share({key: robust[key] for key in kept}, kept)}
        return {
            "sources": list(first.ranks.sources),
            "spectrum": spectrum(first.ranks, groups) if several_shards else [],
            "modules": modules.table(all_spaces, {**columns, "given": masks.cut_shares(kept)}),
            "robust_among_cut": cut,
            "notes": list(task.evidence.notes),
            "starts": losses,
            "history": checks,
            "best_step": learned.best_check.step if checks else 0,
        }

    metric, tokens = f"gprune/{first.scores.metric}", task.evidence.pooled().tokens
    return Ranking(Scores(masks.margins(share), metric, task.evidence.sources, tokens), findings)


@dataclass(frozen=True)
class View:
    """Scores, ranks and sensitivity of units, computed from a choice of sources."""

    pooled: Statistics  # summed over the sources
    scores: Scores
    ranks: RankPercentiles
    sigma: Tensors  # how much the ranks vary between the sources


def score_views(task: PruningTask, s: Settings, units: Sequence[Axis]) -> list[View]:
    """Return a view with all sources (the first), then one without each source in turn, in the order of sources.

    ``units``: the axes whose units are scored. A decision made without a source can be evaluated on that source as an
    unseen text domain.
    """
    sums, groups = task.evidence.statistics, make_ranking_spaces(units)

    def score(shards: Sequence[Statistics]) -> Scores:
        return BASES[s.base].score(task.weights, task.axes, merge_statistics(shards), units)

    by_source = {name: (score(shards), [score([shard]) for shard in shards]) for name, shards in sums.items()}
    result = []
    for excluded in (None, *sums):
        names = [name for name in sums if name != excluded]
        pooled = [shard for name in names for shard in sums[name]]
        ranking = rank_units({name: by_source[name] for name in names}, groups)
        result.append(View(merge_statistics(pooled), score(pooled), ranking, sensitivity(ranking)))
    return result


def form_modules(s: Settings, view: View, all_spaces: Sequence[Space]) -> Modules:
    """Return the units of each ranking space, divided into modules of similar sensitivity and score in one view."""
    return partition(s.partition, all_spaces, view.scores.values, view.sigma, seed=s.seed)


def order_modules(
    task: PruningTask, s: Settings, views: Sequence[View], modules: Modules, trust: Tensor, all_spaces: Sequence[Space]
) -> Masks:
    """Return the order of the units in each module in every view; ``modules`` and ``trust`` are those of view 0.

    ``trust``: :attr:`.modules.Reliability.trust`, ``[modules]``; ``all_spaces``: those that ``modules`` divides.
    """
    # A source must not influence the modules by which it is judged, as far as these have counterparts without it.
    formed = [modules, *(form_modules(s, view, all_spaces).numbered_as(modules, all_spaces) for view in views[1:])]
    units = [task.axes[key] for key in modules.labels]
    if s.instead == "peaks":
        instead = peak_to_peak(task.weights, task.axes, units=units)
    else:
        instead = BASES[s.base].score(task.weights, task.axes, None, units)
    relative_ranks = [
        rank_in_modules(m, trust, view.scores.values, instead.values) for m, view in zip(formed, views, strict=True)
    ]
    filled = constant_inputs(task.model, views[0].pooled.moments) if s.compensate else ()
    return Masks(
        {key: torch.stack([m.labels[key] for m in formed]) for key in modules.labels},
        {key: torch.stack([ranks[key] for ranks in relative_ranks]) for key in modules.labels},
        {name: torch.stack([view.pooled.moments[name].mean for view in views]) for name in filled},
        torch.tensor([s.width_few if all_spaces[i].pooled else s.width for i in modules.spaces]).double(),
    )


def _allocate_start(how: str, task: PruningTask, s: Settings, view: View) -> Kept:
    """Return axis key → the units that stay where learning starts, by ``how`` (one of ``STARTS``), in one view."""
    base, scores = BASES[s.base], view.scores.values
    allocate = ALLOCATIONS[base.allocation] if how == "base" else uniform
    inside = [task.axes[key] for key in scores]
    if how == "inner" or (how == "base" and not base.prune_outer):
        inside = inside if task.budget.regular else select_inner(inside)  # a regular plan cuts every block alike
    chosen = {axis.key: scores[axis.key] for axis in inside if how != "inner" or axis.size >= MIN_RANKED_UNITS}
    try:
        kept = allocate(task.axes, chosen, task.budget)
    except BudgetError:  # blocks that stay whole otherwise are cut, too
        kept = allocate(task.axes, scores, task.budget)
    return {key: kept.get(key, tuple(range(len(row)))) for key, row in scores.items()}
