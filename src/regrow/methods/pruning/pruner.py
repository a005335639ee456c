"""One-shot pruning: evidence → scores → allocation → plan, and compensation for what is cut.

Most pruning papers are a choice of these functions; :class:`Pruner` is a record of them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regrow.allocation.cost import cost_of, find_paying_axes
from regrow.allocation.ranked import ALLOCATIONS
from regrow.core.amounts import Measure, Target
from regrow.core.axes import Axis, AxisGraph
from regrow.core.budget import Budget
from regrow.core.objectives import MULTI_LABEL, REGRESSION, Objective, choose_objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.scores import Evidence, Need, Scores
from regrow.core.sources import Source
from regrow.scoring.collect import BlockVisits
from regrow.scoring.compensate import means, note_uncompensated, weights_without_bias
from regrow.scoring.metrics import BASES, random
from regrow.scoring.spaces import select_inner
from regrow.scoring.weights import weights_of
from regrow.tracing import with_branches
from regrow.training.hooks import freeze

NOT_FINITE = "the predictions hold NaN or infinity; try float32 or bfloat16"
Kept = Mapping[str, tuple[int, ...]]  # axis key → the units that are kept


@dataclass(frozen=True)
class PruningContext:
    """Where an interrupted run resumes from, how a network larger than memory runs, and where progress is reported.

    Args:
        checkpoint: The file from which interrupted learning resumes; ``None``: it starts again.
        checkpoint_header: Returns JSON data for the header of that file.
        progress: Called with (steps done, steps in all, what is being done).
        block_runner: Runs the network block by block, where it does not fit into memory; ``None``: it runs as a whole.
        weights: Parameter name → tensor; ``None``: those of the model.
    """

    checkpoint: Path | None = None
    checkpoint_header: Callable[[], Mapping[str, object]] = dict
    progress: Progress = silent
    block_runner: BlockVisits | None = None
    weights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class PruningTask:
    """What a pruning method scores: the network, its axes, the budget and the measurements on the user's sources.

    Args:
        model: The network, with its parameters frozen; where it is larger than memory, they have no numbers.
        axes: The axes of the network.
        weights: Parameter name → tensor, for scores; a network larger than memory reads each when it is asked for.
        units: The axes that may be cut.
        budget: How much of the network may stay.
        evidence: The measured activations and gradients, per source.
        objective: What the network is trained for; ``None``: it follows from the labels.
        context: How scoring resumes, runs a network larger than memory, and reports its progress.
    """

    model: nn.Module
    axes: AxisGraph
    weights: Mapping[str, Tensor]
    units: Sequence[Axis]
    budget: Budget
    evidence: Evidence
    objective: Objective | None = None
    context: PruningContext = PruningContext()


@dataclass(frozen=True)
class Removal:
    """The result of ``Pruner.drop``: whole modules to drop before units are ranked, and tables about the choice."""

    modules: tuple[str, ...] = ()  # their paths
    findings: Mapping[str, object] = field(default_factory=dict)  # tables for a report, as JSON data
    notes: tuple[str, ...] = ()  # what a reader of the plan should know


@dataclass(frozen=True)
class Ranking:
    """The result of ``Pruner.score``: the importance of units, and tables about it for a report.

    Args:
        scores: One number per unit; higher for units worth keeping.
        findings: Called with the kept units of every scored axis; returns tables for a report, as JSON data.
        kept: Axis key → the units that stay within the budget, for every axis in ``scores``, where scoring has compared
            allocations; ``None``: ``Pruner.allocate`` chooses them.
    """

    scores: Scores
    findings: Callable[[Kept], Mapping[str, object]] = lambda kept: {}
    kept: Kept | None = None


@dataclass(frozen=True)
class Pruner:
    """A pruning method, as a record of the functions that score, allocate and compensate, and of what they need.

    Args:
        needs: What has to be measured before: weights, activations, gradients.
        score: Returns the importance of each unit.
        allocate: (axes, scores, budget) → axis key → the units that stay. It is called before anything is measured,
            too, to see whether the budget can be met; with :attr:`Ranking.kept` only then.
        compensate: (model, axes, kept, evidence) → ``Plan.means``, the means of dropped inputs; ``None`` if they count
            as zero.
        origin: Data recorded in the plan: the method's name and its settings.
        shards: The number of disjoint parts into which each source is split.
        sources: The smallest number of sources that the method needs.
        prune_outer: Whether the first eighth and the last sixteenth of the numbered blocks are pruned, too; a regular
            plan prunes them in any case, since it cuts every block alike.
        runs_network: Whether scoring calls ``task.model``, which must be in memory for that.
        compares_classes: Whether scoring compares predicted probabilities of classes; other outputs are refused.
        products: Whether scoring calls :func:`regrow.scoring.grams.sum_products`, whose memory is then predicted.
        drop: Returns whole modules that are dropped; units of what is left are then scored and allocated. ``None``: no
            module is dropped.
        check: (axes, units, budget) → ``None``; raises ``ValueError`` if the method cannot be used.
    """

    needs: frozenset[Need]
    score: Callable[[PruningTask], Ranking]
    allocate: Callable[[AxisGraph, Scores, Budget], Kept]
    compensate: Callable[[nn.Module, AxisGraph, Kept, Evidence], Mapping[str, Mapping[int, float]]] | None = None
    origin: Mapping[str, object] = field(default_factory=dict)
    shards: int = 1
    sources: int = 1
    prune_outer: bool = True
    runs_network: bool = False
    compares_classes: bool = False
    products: bool = False
    drop: Callable[[PruningTask], Removal] | None = None
    check: Callable[[AxisGraph, Sequence[Axis], Budget], None] = lambda axes, units, budget: None


@dataclass(frozen=True)
class PlannedCut:
    """The result of :func:`plan_cut`: the plan, the scores that it follows from, and tables for a report."""

    plan: Plan
    scores: Scores
    findings: Mapping[str, object] = field(default_factory=dict)  # of ``Removal`` and ``Ranking``, as JSON data


def simple_pruner(
    name: str, settings: Any, needs: Collection[Need], score: Callable[[PruningTask], Scores], prune_outer: bool = True
) -> Pruner:
    """Return the pruner that ranks units by one score; ``settings`` has ``allocation`` and ``compensate``.

    ``name``: recorded in the plan; ``needs``: what ``score`` reads; activations are added where it compensates.
    """
    return Pruner(
        needs=frozenset({*needs, *([Need.ACTIVATIONS] if settings.compensate else [])}),
        score=lambda task: Ranking(score(task)),
        allocate=ALLOCATIONS[settings.allocation],
        compensate=mean_inputs if settings.compensate else None,
        origin={"method": name, "settings": asdict(settings)},
        prune_outer=prune_outer,
    )


def baseline_pruner(name: str, settings: Any, prune_outer: bool = True) -> Pruner:
    """Return the pruner of the metric ``name`` in ``BASES``; for ``ranked``, scores are comparable between axes."""
    base = BASES[name]
    metric = base.score if settings.allocation == "ranked" else base.metric

    def score(task: PruningTask) -> Scores:
        statistics = None if base.need == Need.WEIGHTS else task.evidence.pooled()
        return metric(task.weights, task.axes, statistics, units=task.units)

    return simple_pruner(name, settings, {Need.WEIGHTS, base.need}, score, prune_outer)


def mean_inputs(model: nn.Module, axes: AxisGraph, kept: Kept, evidence: Evidence) -> Mapping[str, Mapping[int, float]]:
    """Return the means of dropped inputs over all sources: weight name → input position → mean (:attr:`Plan.means`)."""
    return means(model, axes, kept, evidence.pooled(gradients=False))


def check_pruner(pruner: Pruner, axes: AxisGraph, budget: Budget) -> None:
    """Raise ValueError unless a method can meet a budget, whatever it will measure; no data are read."""
    units = _prunable_axes(pruner, axes, budget)
    if pruner.drop is None:  # whether a budget can be met does not depend on the scores
        pruner.allocate(axes, random(axes, units=units), budget)
    pruner.check(axes, units, budget)


def check_objective(pruner: Pruner, sources: Iterable[Source], objective: Objective | None) -> None:
    """Raise ValueError if a method compares probabilities of classes, and the network predicts something else.

    ``objective``: what the network is trained for; ``None``: the labels in each source's first batch tell.
    """
    if not pruner.compares_classes:
        return
    # A loss of the user's own says nothing about that, and is accepted.
    firsts = (batch for source in sources for batch in islice(source, 1))
    for predicted in [objective] if objective else [choose_objective(None, batch) for batch in firsts]:
        if predicted in (MULTI_LABEL, REGRESSION):
            raise ValueError(
                f"{pruner.origin.get('method', 'this method')} compares probabilities of classes, got "
                f"{predicted.name}; use another method, for example fisher or obs, or loss='classification' if these "
                "are classes"
            )


def plan_cut(
    pruner: Pruner,
    model: nn.Module,
    axes: AxisGraph,
    budget: Budget,
    evidence: Evidence | None = None,
    *,
    objective: Objective | None = None,
    context: PruningContext | None = None,
) -> PlannedCut:
    """Score units, choose which stay within the budget, and return the plan; the model is unchanged.

    ``evidence``: what was measured; ``None`` for methods without data. ``objective``: as in :class:`PruningTask`. Raise
    ValueError if the budget cannot be met, or the method cannot score this network.
    """
    evidence, context, removal = evidence or Evidence(), context or PruningContext(), Removal()
    axes = with_droppable_modules(pruner, model, axes)
    units, whole_axes, whole_budget = _prunable_axes(pruner, axes, budget), axes, budget
    check_objective(pruner, evidence.data.values(), objective)
    with freeze(model):
        weights = weights_of(model) if context.weights is None else context.weights
        task = PruningTask(model, axes, weights, units, budget, evidence, objective, context)
        if pruner.drop is not None:
            removal = pruner.drop(task)
            axes, budget = remove_modules(axes, budget, removal.modules)
            units = [axes[axis.key] for axis in units if axis.key in axes.axes]
        if pruner.compensate:  # biases that compensation adds count, too
            budget = replace(budget, compensated=weights_without_bias(model, axes, find_paying_axes(axes, budget)))
        ranking = pruner.score(replace(task, axes=axes, units=units, budget=budget))
        scores = ranking.scores
        chosen = pruner.allocate(axes, scores, budget) if ranking.kept is None else ranking.kept
        kept = {key: keep for key, keep in chosen.items() if len(keep) < axes[key].size}
        means = pruner.compensate(model, axes, kept, evidence) if pruner.compensate else {}
        notes = [*evidence.notes, *removal.notes, *scores.notes]
        notes += note_uncompensated(model, axes, kept) if pruner.compensate else ()
    origin = {**pruner.origin, **whole_budget.record()}
    origin |= {"metric": scores.metric, "sources": list(scores.sources), "tokens": scores.tokens}
    origin |= {"notes": notes} if notes else {}
    plan = Plan.dropping(whole_axes, removal.modules, kept, means=means, origin=origin)
    return PlannedCut(plan, scores, {**removal.findings, **ranking.findings(chosen)})


def with_droppable_modules(pruner: Pruner, model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the axes; for a method that drops modules, with ``branches`` found by another run of the network."""
    is_known = any(branch.free and branch.gives != "nothing" for branch in axes.branches.values())
    return with_branches(model, axes) if pruner.drop and axes.steps and not is_known else axes


def remove_modules(axes: AxisGraph, budget: Budget, modules: Collection[str]) -> tuple[AxisGraph, Budget]:
    """Return the axes without the dropped modules (paths), and a budget with the same limit in absolute numbers."""
    if not modules:
        return axes, budget
    limit = budget.limit(cost_of(axes, budget).total)
    context = budget.target.context if budget.target else 0
    context = context or int(budget.measure == Measure.CACHE)
    target = Target(budget.measure, float(limit), context)
    return axes.without(axes.branches[path] for path in modules), replace(budget, keep=1.0, target=target)


def _prunable_axes(pruner: Pruner, axes: AxisGraph, budget: Budget) -> Sequence[Axis]:
    """Return the axes that the budget lets be cut; without those of outer blocks, unless the method prunes these."""
    units = find_paying_axes(axes, budget)
    return units if budget.regular or pruner.prune_outer else select_inner(units)
