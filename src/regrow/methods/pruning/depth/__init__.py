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
    Window,
    divergence,
    first_batches,
    predict,
    without,
)
from regrow.methods.pruning.pruner import (
    NOT_FINITE,
    Pruner,
    PruningTask,
    Ranking,
    Removal,
    pooled_means,
    without_modules,
)
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
    """Return the pruner that drops whole modules."""
    return Pruner(
        needs=frozenset({Need.WEIGHTS, Need.ACTIVATIONS}),
        score=lambda task: Ranking(_score_neurons(settings, task)),
        allocate=uniform,
        compensate=pooled_means if settings.compensate else None,
        origin={"method": "depth", "settings": asdict(settings)},
        prune_outer=settings.prune_outer,
        runs_network=True,
        compares_classes=True,
        drop=partial(_choose, settings),
        check=partial(_check, settings),
    )


def _check(s: Settings, axes: AxisGraph, units: Sequence[Axis], budget: Budget) -> None:
    """Raise ValueError if a budget cannot be met, or counts what dropped modules have no known share of."""
    if budget.measure == Measure.TIME:
        raise ValueError("the time of whole modules is not measured; use a target in params, macs or bytes")
    if budget.regular and s.fill == "neurons":
        raise ValueError("depth with fill=neurons gives blocks different widths; leave out regular, or set fill=none")
    rest, _ = without_modules(axes, budget, _candidates(s, axes, budget))
    steps, total = _least_cost(s, rest, units, budget), cost_of(axes, budget).total
    if steps > budget.limit(total):
        wanted = str(budget.target) if budget.target else f"keep {budget.keep:g}"
        least, word = budget.least(steps, total), "target" if budget.target else "keep"
        raise BudgetError(
            f"{wanted} cannot be met: without every module that can be dropped, {100 * steps / total:.2f} % "
            f"of {budget.measure} stays; use {word} {least:g}, or let more be cut (unit=any, fill=neurons)",
            least,
        )


def _choose(s: Settings, task: PruningTask) -> Removal:
    modules = _candidates(s, task.axes, task.budget)
    if not modules:
        note = f"unit={s.unit}: no module can be dropped whole (`regrow.with_branches` says why); only units are cut"
        return Removal(notes=(note,))
    search = DepthSearch(s, task, modules)
    path = search.path()
    counts = search.counts(path) if s.fill == "neurons" else {}
    best = min(counts, key=lambda number: (counts[number], number)) if counts else len(path)
    chosen = tuple(step.module for step in path[:best])
    left = path[best - 1].left if best else 1.0
    names = f" ({', '.join(chosen)})" if chosen else ""
    share = f"{100 * left:.2f} % of {task.budget.measure}"
    notes = [f"modules dropped whole: {best} of {len(modules)}, which leaves {share}{names}"]
    if counts and search.short:
        notes.append(
            "how many modules are dropped was judged on the windows on which removals were measured, since there are "
            f"no further ones of {', '.join(search.short)}; give more data, or set tokens lower"
        )
    search.journal.write()
    tables: dict[str, Any] = {
        "unit": s.unit,
        "path": [asdict(step) for step in path],
        "counts": [{"modules": number, "divergence": loss} for number, loss in counts.items()],
        "measured": len(search.journal.values),
    }
    return Removal(chosen, {"depth": tables}, tuple(notes))


def modules_of(axes: AxisGraph, unit: str) -> dict[str, Branch]:
    """Return the modules of a unit type that can be dropped, by path, in the order of the network.

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
    of = {"attention": inner, "mlp": outer, "any": inner | outer, "block": cached - inner}
    chosen = of[unit] if axes.caches else outer
    return {path: branch for path, branch in free.items() if path in chosen}


def _candidates(s: Settings, axes: AxisGraph, budget: Budget) -> dict[str, Branch]:
    """Return the modules that may be dropped for a budget: all of their weights are among those that may be cut."""

    def allowed(branch: Branch) -> bool:
        names = [name for name in axes.parameters if lies_in(name, branch.module)]
        chosen = not budget.only or all(any(matches(name, pattern) for pattern in budget.only) for name in names)
        return chosen and not any(matches(name, pattern) for pattern in budget.exclude for name in names)

    return {path: branch for path, branch in modules_of(axes, s.unit).items() if allowed(branch)}


def _neurons(s: Settings, axes: AxisGraph, units: Sequence[Axis]) -> Sequence[Axis]:
    """Return the axes that may be cut: those inside MLPs, and in a network without attention all."""
    if s.fill != "neurons":
        return ()
    if not axes.caches:
        return units
    mlps = modules_of(axes, "mlp")
    return [axis for axis in units if any(all(lies_in(slot.name, path) for slot in axis.slots) for path in mlps)]


def _least_cost(s: Settings, axes: AxisGraph, units: Sequence[Axis], budget: Budget) -> int:
    """Return what is left of the measure once as many neurons are cut as may be, in whole steps."""
    cut = _neurons(s, axes, [axes[axis.key] for axis in units if axis.key in axes.axes])
    return cost_of(axes, budget)({axis.key: min(axis.size, max(axis.least, 1)) for axis in cut})


def _score_neurons(s: Settings, task: PruningTask) -> Scores:
    """Return the weighted input variance of the neurons that may be cut; no scores if none may."""
    units, pooled = _neurons(s, task.axes, task.units), task.evidence.pooled()
    if not units:
        return Scores({}, "divergence", task.evidence.sources, pooled.tokens)
    return wifv(task.weights, task.axes, pooled, units=units)


@dataclass(frozen=True)
class DepthStep:
    """A module in the order of removals, the divergence once it is dropped, and what is left of the measure."""

    module: str
    divergence: float
    left: float


class DepthSearch:
    """The measurements on the network that the choice of modules needs."""

    def __init__(self, s: Settings, task: PruningTask, modules: Mapping[str, Branch]) -> None:
        self.s, self.task, self.modules = s, task, modules
        self.journal = DivergenceJournal(task)
        self.short: list[str] = []  # the sources without further batches
        near: list[Batch] = []
        held_out: list[Batch] = []
        for source in task.evidence.data.values():
            first, others = first_batches(source, s.tokens)
            batches = max(1, POSITIONS * len(first) // max(1, sum(batch.size for batch in first)))
            near += join_batches(replace(source, batches=first), batches)
            held_out += join_batches(replace(source, batches=others or first), batches)
            if not others:
                self.short.append(source.name)
        with evaluating(task.model):
            self.near, self.held_out = map(self._with_predictions, (near, held_out))

    def _with_predictions(self, batches: Sequence[Batch]) -> list[Window]:
        result = [(batch, Predictions.of(predict(self.task.model, batch))) for batch in batches]
        if not all(bool(dense.chances.isfinite().all()) for _, dense in result):
            raise RefusedError(NOT_FINITE)
        return result

    def _rest(self, dropped: Sequence[str]) -> AxisGraph:
        return self.task.axes.without(self.modules[path] for path in dropped)

    def _left(self, dropped: Sequence[str]) -> int:
        """Return what is left of the measure without some modules, in whole steps."""
        return cost_of(self._rest(dropped), self.task.budget).total

    def path(self) -> list[DepthStep]:
        """Return the modules in the order in which they are dropped, as far as the budget takes them.

        The next one is that whose absence raises the divergence least per unit of what the budget counts.
        """
        whole = cost_of(self.task.axes, self.task.budget).total
        limit = self.task.budget.limit(whole)
        saved = {path: max(1, whole - self._left([path])) for path in self.modules}
        dropped: list[str] = []
        result: list[DepthStep] = []
        now, left, measured = 0.0, whole, dict.fromkeys(self.modules, -1)
        rises = dict.fromkeys(self.modules, -inf)  # not yet measured
        while left > limit:
            finite = [path for path, rise in rises.items() if rise < inf]
            fits = [path for path in finite if left - saved[path] >= limit]
            enough = not fits and _least_cost(self.s, self._rest(dropped), self.task.units, self.task.budget) <= limit
            if enough and (finite or dropped):
                break
            if not finite:
                raise RefusedError(NOT_FINITE)
            best = min(fits or finite, key=lambda path: rises[path] / saved[path])
            if measured[best] != len(dropped):
                self.task.run.progress(whole - left, whole - limit, f"measuring without {best}")
                less = [*dropped, best]
                rises[best] = self._divergence(" ".join(sorted(less)), less, self.near) - now
                measured[best] = len(dropped)
                continue
            dropped.append(best)
            now, left = now + rises.pop(best), self._left(dropped)
            result.append(DepthStep(best, now, left / whole))
        return result

    def counts(self, path: Sequence[DepthStep]) -> dict[int, float]:
        """Return number of dropped modules → divergence on held-out windows, with neurons cut to the budget.

        Five numbers from none to all are measured, and then those halfway from the best one to its neighbours.
        """
        scores = _score_neurons(self.s, self.task)
        losses: dict[int, float | None] = {}
        wanted = {round(i * len(path) / 4) for i in range(5)}
        while wanted:
            for number in sorted(wanted):
                self.task.run.progress(number, len(path) + 1, "judging numbers of modules")
                losses[number] = self._filled([step.module for step in path[:number]], scores)
            known = {number: inf if loss is None else loss for number, loss in sorted(losses.items())}
            best = min(known, key=lambda number: known[number])
            numbers = [*known]
            at = numbers.index(best)
            wanted = {(best + number) // 2 for number in numbers[max(0, at - 1) : at + 2]} - known.keys()
        finite = {number: loss for number, loss in known.items() if loss < inf}
        if not finite and any(loss is not None for loss in losses.values()):
            raise RefusedError(NOT_FINITE)
        return finite

    def _filled(self, dropped: Sequence[str], scores: Scores) -> float | None:
        """Return the divergence without some modules, with neurons cut to the budget; ``None`` if those are too few."""
        model, (rest, budget) = self.task.model, without_modules(self.task.axes, self.task.budget, dropped)
        values = {key: value for key, value in scores.values.items() if key in rest.axes}
        try:
            kept = uniform(rest, values, budget)
        except BudgetError:
            return None
        cut = {key: units for key, units in kept.items() if len(units) < rest[key].size}
        moments = self.task.evidence.pooled(gradients=False).moments if self.s.compensate else {}
        reads = {reader.weight for reader in readers(rest, [rest[key] for key in cut])}
        fills = constant_inputs(model, {name: moments[name] for name in reads & moments.keys()})
        masked = gate_inputs(model, rest, make_gates(rest, cut), fills)
        limit = budget.limit(cost_of(rest, budget).total)
        return self._divergence(f"neurons to {limit}: {' '.join(sorted(dropped))}", dropped, self.held_out, masked)

    def _divergence(
        self,
        key: str,
        dropped: Sequence[str],
        windows: Sequence[Window],
        masked: AbstractContextManager[object] | None = None,
    ) -> float:
        """Return the divergence without some modules; the journal has it under ``key``."""

        def measure() -> float:
            model = self.task.model
            with evaluating(model), without(model, [self.modules[path] for path in dropped]), masked or nullcontext():
                return divergence(model, windows)

        return self.journal.take(key, measure)
