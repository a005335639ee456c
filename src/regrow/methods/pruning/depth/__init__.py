"""Depth pruning: drop whole attentions, MLPs or decoder blocks, those whose absence changes the predictions least.

Modules are dropped one after the other: each time the one without which the KL divergence from the dense network rises
least per unit of what the budget counts (weights, MACs, bytes), measured in forward passes on every source. What whole
modules leave of the budget is met by cutting MLP neurons, those of the least weighted input variance first; how many
modules are dropped is then chosen on other windows, from none to as many as the budget allows. Unlike SLEB and
BlockPruner: divergence in place of perplexity, rises are divided by what a module saves, one that cannot be the
smallest is not measured again, and the budget is exact.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf
from typing import Annotated, Any

from regrow.allocation.cost import cost_of
from regrow.allocation.ranked import BudgetError, uniform
from regrow.core.amounts import Measure
from regrow.core.axes import Axis, AxisGraph, matches
from regrow.core.axes.operations import Branch, lies_in
from regrow.core.budget import Budget
from regrow.core.errors import RefusedError
from regrow.core.scores import Need, Scores
from regrow.core.sources import Batch
from regrow.data.batch_streams import join_batches
from regrow.evaluation.measure import evaluating
from regrow.methods.pruning.depth.predictions import (
    DivergenceJournal,
    Predictions,
    ReferenceBatch,
    compute_logits,
    drop_modules,
    first_batches,
    measure_divergence,
)
from regrow.methods.pruning.pruner import NOT_FINITE, Pruner, PruningTask, Ranking, Removal, mean_inputs, remove_modules
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.metrics import wifv
from regrow.scoring.weights import readers
from regrow.settings.constraints import CheckedSettings, Count, OneOf
from regrow.surgery.gate import gate_inputs, make_gates

CITATION = (
    "Song et al., SLEB, ICML 2024, arXiv:2402.09025, and Zhong et al., BlockPruner, arXiv:2406.10594; whole blocks as "
    "in Men et al., ShortGPT, arXiv:2403.03853"
)

POSITIONS = 2048  # the most positions that run at a time: their logits are in memory


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``depth``: which modules are dropped, how they are chosen, and what meets the rest of the budget.

    Args:
        unit: The modules that may be dropped: ``block`` (attention and MLP together), ``attention``, ``mlp``, or
            ``any`` (attentions and MLPs, each on its own).
        fill: ``neurons``: MLP neurons are cut to meet the budget exactly, in the order of FLAP, and the number of
            modules is chosen by measurement; ``none``: modules alone, as few as meet the budget.
        tokens: The tokens of each source on which a removal is measured; at least one window. How many modules are
            dropped is judged on the next windows, of twice as many; in a source without further windows, on the same.
        compensate: Whether the mean of dropped neurons is added to biases.
        prune_outer: Whether neurons of the first eighth and the last sixteenth of the blocks are cut, too.
    """

    unit: Annotated[str, OneOf("block", "attention", "mlp", "any")] = "block"
    fill: Annotated[str, OneOf("neurons", "none")] = "neurons"
    tokens: Count = 512
    compensate: bool = True
    prune_outer: bool = False


def build(settings: Settings) -> Pruner:
    """Return the pruner that drops whole modules, and cuts MLP neurons to meet the rest of the budget."""
    return Pruner(
        needs=frozenset({Need.WEIGHTS, Need.ACTIVATIONS}),
        score=lambda task: Ranking(_score_neurons(settings, task)),
        allocate=uniform,
        compensate=mean_inputs if settings.compensate else None,
        origin={"method": "depth", "settings": asdict(settings)},
        prune_outer=settings.prune_outer,
        runs_network=True,
        compares_classes=True,
        drop=partial(_choose_modules, settings),
        check=partial(_check_budget, settings),
    )


def _check_budget(s: Settings, axes: AxisGraph, prunable: Sequence[Axis], budget: Budget) -> None:
    """Raise ValueError if a budget cannot be met, is regular with ``fill=neurons``, or limits time."""
    if budget.measure == Measure.TIME:
        raise ValueError("the time of whole modules is not measured; use a target in params, macs or bytes")
    if budget.regular and s.fill == "neurons":
        raise ValueError("depth with fill=neurons gives blocks different widths; leave out regular, or set fill=none")
    rest, _ = remove_modules(axes, budget, _find_candidates(s, axes, budget))
    cost, total = _least_cost(s, rest, prunable, budget), cost_of(axes, budget).total
    if cost > budget.limit(total):
        limit = str(budget.target) if budget.target else f"keep {budget.keep:g}"
        setting = "target" if budget.target else "keep"
        least = budget.least(cost, total)
        raise BudgetError(
            f"{limit} cannot be met: without every module that can be dropped, {100 * cost / total:.2f} % "
            f"of {budget.measure} stays; use {setting} {least:g}, or let more be cut (unit=any, fill=neurons)",
            least,
        )


def _choose_modules(s: Settings, task: PruningTask) -> Removal:
    """Return the modules to drop: the first that :meth:`DepthSearch.order_modules` removes.

    ``fill=neurons``: as many as diverge least on held-out windows once neurons are cut to the budget; else as many as
    the budget needs. None, with a note, where no module can be dropped.
    """
    modules = _find_candidates(s, task.axes, task.budget)
    if not modules:
        note = f"unit={s.unit}: no module can be dropped whole (`regrow.with_branches` says why); only units are cut"
        return Removal(notes=(note,))
    search = DepthSearch(s, task, modules)
    steps = search.order_modules()
    divergences = search.divergence_by_count(steps) if s.fill == "neurons" else {}
    search.journal.write()  # so that an interrupted run need not measure again
    count = len(steps)
    if divergences:
        count = min(divergences, key=lambda number: (divergences[number], number))  # ties: the fewest
    chosen = tuple(step.module for step in steps[:count])
    remaining = steps[count - 1].left if count else 1.0
    names = f" ({', '.join(chosen)})" if chosen else ""
    share = f"{100 * remaining:.2f} % of {task.budget.measure}"
    notes = [f"modules dropped whole: {count} of {len(modules)}{names}; {share} stays"]
    if divergences and search.without_held_out:
        notes.append(
            "how many modules are dropped was judged on the windows on which removals were measured, since there are "
            f"no further ones of {', '.join(search.without_held_out)}; give more data, or set tokens lower"
        )
    tables: dict[str, Any] = {
        "unit": s.unit,
        "path": [asdict(step) for step in steps],
        "counts": [{"modules": number, "divergence": value} for number, value in divergences.items()],
        "measured": len(search.journal.values),
    }
    return Removal(chosen, {"depth": tables}, tuple(notes))


def find_modules(axes: AxisGraph, unit: str) -> dict[str, Branch]:
    """Return the modules of a type (``Settings.unit``) that can be dropped, by path, in the order of the network.

    An attention is the innermost module that can be dropped and caches keys and values; a block is one around it; an
    MLP is the outermost module without a cache. Without caches, each type gives the outermost modules that can be
    dropped.
    """
    free = {
        path: branch
        for path, branch in axes.branches.items()
        if branch.free and branch.gives != "nothing" and any(branch.holds(name) for name in axes.counted)
    }
    cached = {path for path in free if any(lies_in(cache.module, path) for cache in axes.caches)}
    inner = {path for path in cached if not any(other != path and lies_in(other, path) for other in cached)}
    plain = free.keys() - cached
    outer = {path for path in plain if not any(other != path and lies_in(path, other) for other in plain)}
    by_unit = {"attention": inner, "mlp": outer, "any": inner | outer, "block": cached - inner}
    chosen = by_unit[unit] if axes.caches else outer
    return {path: branch for path, branch in free.items() if path in chosen}


def _find_candidates(s: Settings, axes: AxisGraph, budget: Budget) -> dict[str, Branch]:
    """Return path → module that may be dropped: of type ``s.unit``, and the budget lets all its weights be cut."""

    def is_allowed(branch: Branch) -> bool:
        names = [name for name in axes.parameters if lies_in(name, branch.module)]
        included = not budget.only or all(any(matches(name, pattern) for pattern in budget.only) for name in names)
        return included and not any(matches(name, pattern) for pattern in budget.exclude for name in names)

    return {path: branch for path, branch in find_modules(axes, s.unit).items() if is_allowed(branch)}


def _select_neuron_axes(s: Settings, axes: AxisGraph, units: Sequence[Axis]) -> Sequence[Axis]:
    """Return those of the axes ``units`` that lie in MLPs, or all without attention; none unless fill=neurons."""
    if s.fill != "neurons":
        return ()
    if not axes.caches:
        return units
    mlps = find_modules(axes, "mlp")
    return [axis for axis in units if any(all(lies_in(slot.name, path) for slot in axis.slots) for path in mlps)]


def _least_cost(s: Settings, axes: AxisGraph, units: Sequence[Axis], budget: Budget) -> int:
    """Return a network's cost, in the budget's measure, with as many neurons of the axes ``units`` cut as may be."""
    cut = _select_neuron_axes(s, axes, [axes[axis.key] for axis in units if axis.key in axes.axes])
    return cost_of(axes, budget)({axis.key: min(axis.size, max(axis.least, 1)) for axis in cut})


def _score_neurons(s: Settings, task: PruningTask) -> Scores:
    """Return the weighted input variance (WIFV) of each neuron that may be cut; no scores if none may."""
    units, pooled = _select_neuron_axes(s, task.axes, task.units), task.evidence.pooled()
    if not units:
        return Scores({}, "divergence", task.evidence.sources, pooled.tokens)
    return wifv(task.weights, task.axes, pooled, units=units)


@dataclass(frozen=True)
class DepthStep:
    """A module in the order of removals, with those before it: the divergence, and what is left, once it is dropped."""

    module: str  # its path
    divergence: float  # from the dense network, in nats per label
    left: float  # the fraction of the cost, in the budget's measure


class DepthSearch:
    """Measures what dropping ``modules`` (path → module) costs; when created, it runs the dense network.

    Removals are measured on the first windows of each source (``search``), their number on the next (``held_out``).
    """

    def __init__(self, s: Settings, task: PruningTask, modules: Mapping[str, Branch]) -> None:
        self.s, self.task, self.modules = s, task, modules
        self.journal = DivergenceJournal(task)
        self.without_held_out: list[str] = []  # names of sources without further batches
        search: list[Batch] = []
        held_out: list[Batch] = []
        for source in task.evidence.data.values():
            first, others = first_batches(source, s.tokens)
            batches = max(1, POSITIONS * len(first) // max(1, sum(batch.size for batch in first)))
            search += join_batches(replace(source, batches=first), batches)
            held_out += join_batches(replace(source, batches=others or first), batches)
            if not others:
                self.without_held_out.append(source.name)
        with evaluating(task.model):
            self.search, self.held_out = map(self._with_predictions, (search, held_out))

    def _with_predictions(self, batches: Sequence[Batch]) -> list[ReferenceBatch]:
        """Return each batch with the dense network's predictions on it; raise RefusedError if one is not finite."""
        result = [(batch, Predictions.from_logits(compute_logits(self.task.model, batch))) for batch in batches]
        if not all(bool(dense.probabilities.isfinite().all()) for _, dense in result):
            raise RefusedError(NOT_FINITE)
        return result

    def _axes_without(self, dropped: Sequence[str]) -> AxisGraph:
        """Return the axes of the network without the modules of some paths."""
        return self.task.axes.without(self.modules[path] for path in dropped)

    def _cost_without(self, dropped: Sequence[str]) -> int:
        """Return the cost, in the budget's measure, of the network without the modules of some paths."""
        return cost_of(self._axes_without(dropped), self.task.budget).total

    def order_modules(self) -> list[DepthStep]:
        """Return the modules in the order in which they are dropped, until neurons or the last one meet the budget.

        The next one is that whose absence raises the divergence least per unit of what the budget counts. Raise
        RefusedError if the divergence is not finite without any of them.
        """
        total = cost_of(self.task.axes, self.task.budget).total
        limit = self.task.budget.limit(total)
        saved = {path: max(1, total - self._cost_without([path])) for path in self.modules}
        dropped: list[str] = []
        result: list[DepthStep] = []
        divergence, cost = 0.0, total
        measured_at = dict.fromkeys(self.modules, -1)  # the number of dropped modules when a rise was measured
        rises = dict.fromkeys(self.modules, -inf)  # of the divergence; -inf: not yet measured
        while cost > limit:
            finite = [path for path, rise in rises.items() if rise < inf]
            fits = [path for path in finite if cost - saved[path] >= limit]
            may_end = not fits and bool(finite or dropped)
            if may_end and _least_cost(self.s, self._axes_without(dropped), self.task.units, self.task.budget) <= limit:
                break  # neurons alone meet the rest of the budget
            if not finite:
                raise RefusedError(NOT_FINITE)
            best = min(fits or finite, key=lambda path: rises[path] / saved[path])
            if measured_at[best] != len(dropped):  # an old rise: measure it again, and look for the best once more
                self.task.context.progress(total - cost, total - limit, f"measuring without {best}")
                trial = [*dropped, best]
                rises[best] = self._divergence(" ".join(sorted(trial)), trial, self.search) - divergence
                measured_at[best] = len(dropped)
                continue
            dropped.append(best)
            divergence, cost = divergence + rises.pop(best), self._cost_without(dropped)
            result.append(DepthStep(best, divergence, cost / total))
        return result

    def divergence_by_count(self, steps: Sequence[DepthStep]) -> dict[int, float]:
        """Return number of dropped modules → divergence on held-out windows, with neurons cut to the budget.

        ``steps``: the modules in the order of :meth:`order_modules`. Five numbers from none to all are measured, and
        then those halfway from the best one to its neighbours. Numbers that cannot meet the budget are left out.
        """
        scores = _score_neurons(self.s, self.task)
        divergences: dict[int, float | None] = {}
        numbers = {round(i * len(steps) / 4) for i in range(5)}
        while numbers:
            for number in sorted(numbers):
                self.task.context.progress(number, len(steps) + 1, "judging numbers of modules")
                divergences[number] = self._divergence_at_budget([step.module for step in steps[:number]], scores)
            measured = {number: inf if value is None else value for number, value in sorted(divergences.items())}
            best = min(measured, key=lambda number: measured[number])
            index = [*measured].index(best)
            neighbours = [*measured][max(0, index - 1) : index + 2]
            numbers = {(best + number) // 2 for number in neighbours} - measured.keys()
        finite = {number: value for number, value in measured.items() if value < inf}
        if not finite and any(value is not None for value in divergences.values()):
            raise RefusedError(NOT_FINITE)
        return finite

    def _divergence_at_budget(self, dropped: Sequence[str], scores: Scores) -> float | None:
        """Return the divergence on held-out windows without some modules, neurons of low score cut to the budget.

        ``dropped``: paths. ``None`` if too few neurons may be cut for the budget.
        """
        model, (rest, budget) = self.task.model, remove_modules(self.task.axes, self.task.budget, dropped)
        values = {key: value for key, value in scores.values.items() if key in rest.axes}
        try:
            kept = uniform(rest, values, budget)
        except BudgetError:
            return None
        cut = {key: units for key, units in kept.items() if len(units) < rest[key].size}
        moments = self.task.evidence.pooled(gradients=False).moments if self.s.compensate else {}
        reading = {reader.weight for reader in readers(rest, [rest[key] for key in cut])}
        fills = constant_inputs(model, {name: moments[name] for name in reading & moments.keys()})
        masked = gate_inputs(model, rest, make_gates(rest, cut), fills)
        limit = budget.limit(cost_of(rest, budget).total)
        return self._divergence(f"neurons to {limit}: {' '.join(sorted(dropped))}", dropped, self.held_out, masked)

    def _divergence(
        self,
        key: str,
        dropped: Sequence[str],
        batches: Sequence[ReferenceBatch],
        masked: AbstractContextManager[object] | None = None,
    ) -> float:
        """Return the divergence in nats per label without some modules (paths), measured inside ``masked``.

        ``key``: under which it is recorded, or read if it is there; ``masked``: a context in which units are masked.
        """

        def measure() -> float:
            model = self.task.model
            branches = [self.modules[path] for path in dropped]
            with evaluating(model), drop_modules(model, branches), masked or nullcontext():
                return measure_divergence(model, batches)

        return self.journal.get_or_measure(key, measure)
