"""GPrune-LLM: rank units only within modules of similar cross-domain behaviour, and learn the ratio of each module.

Reconstructed from the abstracts: the paper's formulas could not be obtained, every formula and default here is ours.
A wrapper around a base metric: (1) measure how far a unit's rank moves between sources; (2) form modules of units with
similar sensitivity and score; (3) the more sensitive and weak a module is, the more it is ordered by a metric without
activations; (4) learn the pruning ratio of each module under the exact budget: the order in a module is fixed, masks
are straight-through, the loss is the divergence from the dense network, and the best allocation on held-out text is
kept, the base method's own and that of unpruned first and last blocks among them. The strongest baseline is
``llm_pruner`` on MLP neurons; partition, switch and learning add little to it: see docs/reproductions/gprune.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regrow import scoring
from regrow.allocation import BudgetError, allocation, module_costs, payers, ranked, ratios, uniform
from regrow.axes import Axis, AxisGraph, Mark
from regrow.method import Budget, Evidence, Group, Need, State, Training
from regrow.methods.pruning.masked import Comparison, Masks, least_curvature
from regrow.methods.pruning.pruner import compensating, told
from regrow.plan import Plan
from regrow.scores import Scores, Statistics
from regrow.scoring.base import BASES
from regrow.scoring.partition import PARTITIONS, Modules, partition
from regrow.scoring.reliability import SWITCHES, Reliability, ordered, reliability
from regrow.scoring.sensitivity import SCALES, share_of, spectrum
from regrow.scoring.spaces import FEW, Space, inner, spaces, within
from regrow.scoring.views import View, halves, views
from regrow.sources import Batch, drawn

CITATION = "Liu et al., GPrune-LLM, 2026, arXiv:2603.13418 (reconstructed from the abstracts; no code was published)"


STARTS = ("base", "inner", "uniform", "curvature", "best")
OUTER = (0.125, 0.0625)
"""Which shares of the blocks at the beginning and at the end the start ``inner`` leaves whole."""
INSTEAD = ("weights", *scoring.PATHS, "mean_rank")


@dataclass(frozen=True)
class Settings:
    """Settings of ``gprune``.

    Args:
        base: The metric and start: ``flap`` (WIFV), ``wanda_sp``, ``llm_pruner`` (Taylor) or ``magnitude``.
        shards: Into how many parts each source is split, to tell sensitivity from sampling noise.
        rank: ``raw``: sensitivity of percentile ranks; ``probit``: of their normal quantiles.
        denoise: Take the noise within sources out of the sensitivity.
        partition: ``thresholds``, ``grid``, ``quantiles``, ``profiles``, ``random`` or ``layer``: see there.
        bins: How many modules ``quantiles`` and ``profiles`` make of each layer.
        switch: ``blend``, ``unreliable``, ``both``, ``weak``, ``halves``, ``never``, ``always`` or ``reversed``.
        switch_most: The largest share of units that ``unreliable`` and ``reversed`` may switch.
        instead: What orders switched modules: ``peaks`` (peak to peak of a unit's rows), ``norms`` (their norms, as a
            product), ``through`` (the map through it), ``weights`` (weight-only factor of the base), ``mean_rank``.
        cross: Teach and judge each source with the order and the means of the others alone, as if it were a kind that
            calibration never saw.
        start: Where learning starts: ``base`` (the base method's own allocation), ``inner`` (the same share of every
            axis outside the first and last blocks; axes of few units stay whole), ``uniform`` (the same share of every
            axis), ``best`` of these three on held-out text, or ``curvature`` (least second-order divergence).
        steps: Steps of learning; 0 keeps the start.
        windows: Calibration windows per step.
        every: After how many steps an allocation is judged on held-out text.
        held_out: What share of each source's windows judges and does not teach.
        lr: Learning rate of the modules' logits.
        width: Over what range of places in a module the gradient is felt; ``width_few``: where small axes are pooled.
        width_few: As ``width``, for modules of pooled axes.
        most: The largest share any module may give up while learning.
        loss: ``kl``: divergence of the dense network's answers from the pruned one's; ``cross_entropy``: of the text.
        memory: GiB of the dense network's answers that may be kept instead of computed again.
        compensate: Let the mean of dropped inputs stand in for them; the learner sees it.
        minimum: How many units every axis keeps at least.
        seed: Of random partitions, k-means and the order of windows.
    """

    base: str = "flap"
    shards: int = 4
    rank: str = "raw"
    denoise: bool = False
    partition: str = "thresholds"
    bins: int = 4
    switch: str = "blend"
    switch_most: float = 0.25
    instead: str = "peaks"
    cross: bool = True
    start: str = "best"
    steps: int = 40
    windows: int = 2
    every: int = 10
    held_out: float = 0.25
    lr: float = 0.1
    width: float = 0.05
    width_few: float = 0.1
    most: float = 0.95
    loss: str = "kl"
    memory: float = 3.0
    compensate: bool = True
    minimum: int = 1
    seed: int = 0


def build(settings: Settings) -> "GPrune":
    """The method, its settings checked.

    Raises:
        ValueError: If a setting has no such value.
    """
    known = {"base": BASES, "rank": SCALES, "partition": PARTITIONS, "switch": SWITCHES, "instead": INSTEAD}
    for name, values in {**known, "start": STARTS, "loss": ("kl", "cross_entropy")}.items():
        if (value := getattr(settings, name)) not in values:
            raise ValueError(f"gprune: {name} is one of {', '.join(values)}; got {value!r}")
    if min(settings.shards, settings.windows, settings.every) < 1 or settings.steps < 0:
        raise ValueError("gprune: shards, windows and every are at least 1, steps at least 0")
    if settings.shards < 2 and (settings.denoise or settings.switch == "halves"):
        raise ValueError("gprune: telling noise from sensitivity takes shards=2 or more")
    if not (0 < settings.most < 1 and 0 < settings.held_out < 1 and min(settings.width, settings.width_few) > 0):
        raise ValueError("gprune: most and held_out lie between 0 and 1, width and width_few above 0")
    return GPrune(settings, Comparison(settings.memory, settings.loss))


@dataclass(frozen=True)
class GPrune:
    """Measure, form modules, learn their shares, cut (``regrow.method.Method``)."""

    settings: Settings
    compare: Comparison
    sources: int = 3

    @property
    def needs(self) -> frozenset[Need]:
        """Weights, activations for means, and what the base metric needs."""
        return frozenset({Need.WEIGHTS, Need.ACTIVATIONS, scoring.METRICS[BASES[self.settings.base].metric][1]})

    @property
    def shards(self) -> int:
        """Parts of each source."""
        return self.settings.shards

    @property
    def training(self) -> Training | None:
        """The learning stage, unless it is switched off."""
        s = self.settings
        if not s.steps:
            return None
        # What the modules of a layer have in common learns beside what tells them apart: it hears all of them.
        groups = lambda state: [Group(("logits", "shared"), s.lr)]  # noqa: E731
        return Training(s.steps, min(s.every, s.steps), groups, self._batches, self._loss)

    def init(self, axes: AxisGraph, budget: Budget) -> State:
        """Nothing but the budget, once it is known that it can be met.

        Raises:
            ValueError: If not.
        """
        units = scoring.scorable(axes, payers(axes, budget))
        ranked(axes, scoring.random(axes, units=units), budget, minimum=self.settings.minimum)
        if alien := next((axis for axis in units if axis.mark is not Mark.NEUTRAL), None):
            raise ValueError(
                f"gprune masks units by 0 or their mean; {alien.key!r} is {alien.mark}: leave --mark neutral"
            )
        one = {axis.key: torch.zeros(axis.size, dtype=torch.int64) for axis in units}
        costs, removed = module_costs(axes, one, 1, budget)
        ratios(torch.zeros(1, dtype=torch.float64), costs, removed, most=self.settings.most)
        return State(budget)

    def propose(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> tuple[Plan | None, State]:
        """Form modules and start; then keep the best allocation so far; after the last step, the plan.

        Raises:
            ValueError: If there are too few sources, or what was measured is not finite.
        """
        if state.scores is not None:
            return None, state
        if self.settings.compensate:
            state = replace(state, budget=compensating(model, axes, state.budget))
        stage = self._judged if state.tensors else self._begun
        state = stage(model, axes, evidence, state)
        if evidence.step < self.settings.steps:
            return None, state
        return self._finished(model, axes, evidence, state)

    def _begun(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> State:
        """Stages 1 to 3, and the start of the fourth."""
        s, budget = self.settings, state.budget
        evidence.progress(0, 1, "forming modules")
        seen = _measured(s, model, axes, budget, evidence)
        among, first = spaces(seen.units, parts=4), seen.views[0]
        modules = _partition(s, first, among)
        trusted = reliability(
            s.switch, among, modules, first.scores.values, first.spread, seen.halves, most=s.switch_most
        )
        masks = _masks(s, model, seen, modules, trusted.trust, _instead(s, model, axes, seen), among)
        labels = [{key: row[view] for key, row in masks.modules.items()} for view in range(len(seen.views))]
        priced = [module_costs(axes, one, len(modules), budget) for one in labels]
        costs, removed = torch.stack([each for each, _ in priced]), priced[0][1]
        robust = within(first.spread.sigma, seen.spaces, lambda sigma: (sigma <= sigma.median()).double())
        fixed = {**masks.tensors(), **{f"robust:{key}": value for key, value in robust.items()}, "costs": costs}
        state = replace(state, tensors=fixed, values={"removed": removed, "metric": first.scores.metric})
        tried = STARTS[:3] if s.start == "best" else (s.start,)
        kept = {name: self._started(name, model, axes, evidence, state, seen) for name in tried}
        given = {name: masks.given(units) for name, units in kept.items() if name == tried[0] or units != kept["base"]}
        judge, losses = bool(s.steps) or len(tried) > 1, {}
        for i, (name, one) in enumerate(given.items() if judge else ()):
            evidence.progress(i, len(given), f"judging the start {name}")
            losses[name] = self._held(model, axes, evidence, state, one)
        start = min(losses, key=lambda name: losses[name]) if judge else s.start
        share = given[start]
        logits = torch.logit((share / s.most).clamp(0.02, 0.98))
        learned = {"logits": logits, "shared": logits.new_zeros(len(among))}
        base = kept.get("base") or self._started("base", model, axes, evidence, state, seen)
        return replace(
            state,
            tensors={**fixed, **learned, "home": torch.tensor(modules.spaces), "best": share},
            values={**state.values, "best_loss": losses.get(start), "best_step": 0, "start": start},
            findings={
                **_findings(seen, among, modules, trusted, costs[0], share),
                "starts": losses,
                "history": [{"step": 0, "held_out": losses[start]}] if judge else [],
                "robust_among_cut": {"base": share_of(robust, base)},
                "notes": list(evidence.notes),
            },
        )

    def _started(
        self, how: str, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State, seen: "_Measured"
    ) -> Mapping[str, tuple[int, ...]]:
        """Axis key → the units kept at the start of learning."""
        s, masks = self.settings, Masks.of(state.tensors)
        if how != "curvature":
            base, scores = BASES[s.base], seen.views[0].scores.values
            allocate = allocation(base.allocation) if how == "base" else uniform
            outer = {"base": base.spare, "inner": OUTER}.get(how, (0.0, 0.0))
            outer = (0.0, 0.0) if state.budget.regular else outer  # every block gives alike
            spared = [axis for axis in inner(seen.units, *outer) if how != "inner" or axis.size >= FEW]
            try:
                some = {axis.key: scores[axis.key] for axis in spared}
                kept = allocate(axes, some, state.budget, minimum=s.minimum)
            except BudgetError:  # what is spared has to give, too
                kept = allocate(axes, scores, state.budget, minimum=s.minimum)
            return {key: kept.get(key, tuple(range(len(row)))) for key, row in scores.items()}
        worth = least_curvature(
            model, axes, self._teaching(evidence), seen.units, masks, state.tensors["costs"][0], seed=s.seed
        )
        return ranked(axes, worth, state.budget, minimum=s.minimum)

    def _judged(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> State:
        """Keep the present shares if they do better on held-out text than any before."""
        share = self._ratios(state).detach()
        loss = self._held(model, axes, evidence, state, share)
        row = {"step": evidence.step, "held_out": loss}
        state = replace(state, findings={**state.findings, "history": [*state.findings["history"], row]})
        if not loss < state.values["best_loss"]:
            return state
        better = {"best_loss": loss, "best_step": evidence.step}
        return replace(state, tensors={**state.tensors, "best": share}, values={**state.values, **better})

    def _finished(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> tuple[Plan, State]:
        """Cut what lies below its module's share; the ranking by distance from it meets the budget to the unit."""
        s, budget, pooled = self.settings, state.budget, evidence.pooled()
        self.compare.forget()
        share = state.tensors["best"]
        masks = Masks.of(state.tensors)
        scores = Scores(masks.margins(share), f"gprune/{state.values['metric']}", evidence.sources, pooled.tokens)
        every = ranked(axes, scores, budget, minimum=s.minimum)
        kept = {key: keep for key, keep in every.items() if len(keep) < axes[key].size}
        means = scoring.means(model, axes, kept, pooled) if s.compensate else {}
        origin = {"method": "gprune", "settings": asdict(s), **budget.record(), **told(scores)}
        origin |= {"notes": list(evidence.notes)} if evidence.notes else {}
        rows = [
            {**row, "learned": float(one), "given": float(last)}
            for row, one, last in zip(state.findings["modules"], share, masks.given(every), strict=True)
        ]
        robust = share_of({key: state.tensors[f"robust:{key}"] for key in every}, every)
        findings = {
            **state.findings,
            "modules": rows,
            "best_step": state.values["best_step"],
            "robust_among_cut": {**state.findings["robust_among_cut"], "gprune": robust},
        }
        return Plan.keeping(axes, kept, means=means, origin=origin), replace(state, scores=scores, findings=findings)

    def _ratios(self, state: State, view: int = 0) -> Tensor:
        logits = state.tensors["logits"] + state.tensors["shared"].index_select(0, state.tensors["home"])
        return ratios(logits, state.tensors["costs"][view], state.values["removed"], most=self.settings.most)

    def _loss(self, model: nn.Module, axes: AxisGraph, batch: Batch, view: int, state: State) -> Tensor:
        masks = Masks.of(state.tensors)
        return self.compare(model, axes, batch, masks.gates(self._ratios(state, view), view), masks.filled(view))

    def _held(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State, share: Tensor) -> float:
        """The mean loss over sources on held-out windows, cut to the budget just as the plan would be."""
        masks, losses = Masks.of(state.tensors), []
        for i, source in enumerate(evidence.data.values()):
            view, batches = self._view(i), source.held_out(self.settings.held_out)[1]
            kept = ranked(axes, masks.margins(share, view), state.budget, minimum=self.settings.minimum)
            gates = {
                key: torch.zeros(axes[key].size).index_fill(0, torch.tensor(kept[key]), 1.0) for key in masks.places
            }
            with torch.no_grad():
                found = [self.compare(model, axes, batch, gates, masks.filled(view)) for batch in batches]
            losses.append(float(torch.stack(found).mean()))
        return sum(losses) / len(losses)

    def _view(self, source: int) -> int:
        """Which orders the windows of a source are looked at with."""
        return source + 1 if self.settings.cross else 0

    def _teaching(self, evidence: Evidence) -> list[tuple[Batch, int]]:
        """Every teaching window, with its view."""
        rows = [source.held_out(self.settings.held_out)[0] for source in evidence.data.values()]
        return [(batch, self._view(i)) for i, row in enumerate(rows) for batch in row]

    def _batches(self, evidence: Evidence, step: int) -> Sequence[tuple[Batch, int]]:
        """The windows of a step, each with its view."""
        s = self.settings
        sources = [source.held_out(s.held_out)[0] for source in evidence.data.values()]
        return [(batch, self._view(i)) for i, batch in drawn(sources, s.windows, step, s.seed)]


@dataclass(frozen=True)
class _Measured:
    """What was measured: with all sources first, then without each (if they are looked at like that)."""

    units: tuple[Axis, ...]
    spaces: tuple[Space, ...]
    views: tuple[View, ...]
    weights_only: Scores
    halves: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None


def _measured(s: Settings, model: nn.Module, axes: AxisGraph, budget: Budget, evidence: Evidence) -> _Measured:
    units = scoring.scorable(axes, payers(axes, budget))
    weights, among, sums = scoring.weights_of(model), spaces(units), evidence.statistics

    def score(statistics: Statistics | None) -> Scores:
        return BASES[s.base].score(weights, axes, statistics, units)

    seen = views(sums, score, among, scale=s.rank, denoise=s.denoise, without_each=s.cross)
    return _Measured(units, among, tuple(seen), score(None), halves(sums, score))


def _masks(
    s: Settings,
    model: nn.Module,
    seen: _Measured,
    modules: Modules,
    trust: Tensor,
    instead: Sequence[Mapping[str, Tensor]],
    among: Sequence[Space],
) -> Masks:
    """The modules and the orders in them, by all sources and without each."""
    # A source must not have a say in the modules it is judged by, as far as these have counterparts without it.
    others = seen.views[1:] if s.partition != "profiles" else ()
    every = [modules, *(_partition(s, one, among).numbered_as(modules, among) for one in others)]
    every += [modules] * (len(seen.views) - len(every))
    places = [
        ordered(m, trust, one.scores.values, other) for m, one, other in zip(every, seen.views, instead, strict=True)
    ]
    filled = [name for name in seen.views[0].pooled.moments if s.compensate and scoring.takes_constant(model, name)]
    return Masks(
        {key: torch.stack([one.labels[key] for one in every]) for key in modules.labels},
        {key: torch.stack([one[key] for one in places]) for key in modules.labels},
        {name: torch.stack([one.pooled.moments[name].mean for one in seen.views]) for name in filled},
        torch.tensor([s.width_few if among[i].pooled else s.width for i in modules.spaces]).double(),
    )


def _partition(s: Settings, seen: View, among: Sequence[Space]) -> Modules:
    return partition(s.partition, among, seen.scores.values, seen.ranks, seen.spread, bins=s.bins, seed=s.seed)


def _instead(s: Settings, model: nn.Module, axes: AxisGraph, seen: _Measured) -> list[Mapping[str, Tensor]]:
    """What orders the modules that are switched, in each view."""
    if s.instead == "mean_rank":
        return [view.spread.mean for view in seen.views]
    path = scoring.PATHS.get(s.instead)
    found = path(scoring.weights_of(model), axes, units=seen.units) if path else seen.weights_only
    return [found.values] * len(seen.views)


def _findings(
    seen: _Measured, among: Sequence[Space], modules: Modules, trusted: Reliability, costs: Tensor, start: Tensor
) -> dict[str, Any]:
    """What the method saw, as tables for the report."""
    first = seen.views[0]
    several = next(iter(first.ranks.shards.values())).shape[1] > 1
    rows = modules.table(
        among,
        sensitivity=modules.mean(first.spread.sigma),
        activity=modules.mean(within(first.scores.values, among, scoring.percentile)),
        unreliability=trusted.unreliability,
        trust=trusted.trust,
        cost=costs,
        start=start,
    )
    sources, table = list(first.ranks.sources), spectrum(first.ranks, seen.spaces) if several else []
    return {"sources": sources, "spectrum": table, "modules": rows}
