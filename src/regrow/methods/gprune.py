"""GPrune-LLM: rank units only among units that behave alike over kinds of text, and learn what each such group gives.

Reconstructed from the abstracts: the paper's formulas could not be obtained, every formula and default here is ours.
A wrapper around a base metric: (1) how far does a unit's rank move between sources; (2) modules of units of like
sensitivity and strength; (3) modules that are sensitive and weak are ordered by the base metric's weight-only factor;
(4) the share each module gives up is learned under the exact budget: the order in a module is fixed, masks are
straight-through, the loss is the divergence from the dense network, and the best allocation on held-out text is kept,
the base method's own among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow import scoring
from regrow.allocation import Cost, allocation, ranked, ratios, soft_step
from regrow.axes import Axis, AxisGraph
from regrow.method import Budget, Evidence, Group, Need, State, Training
from regrow.plan import Plan
from regrow.pruner import told
from regrow.scores import Scores, Statistics
from regrow.scoring.partition import Modules, partition
from regrow.scoring.reliability import ordered, reliability
from regrow.scoring.sensitivity import Ranks, Sensitivity, ranks, sensitivity, spectrum
from regrow.scoring.spaces import Space, spaces, within
from regrow.sources import Batch, Source, logits_in
from regrow.surgery.gate import gated

CITATION = "Liu et al., GPrune-LLM, 2026, arXiv:2603.13418 (reconstructed from the abstracts; no code was published)"


@dataclass(frozen=True)
class Base:
    """What is wrapped: a metric, how it is made comparable between axes, and the allocation its method uses."""

    metric: str
    allocation: str
    options: Mapping[str, Any] = field(default_factory=dict)


BASES: Mapping[str, Base] = {
    "flap": Base("wifv", "ranked", {"pool": "standardised"}),
    "wanda_sp": Base("wanda_sp", "uniform", {"pool": "standardised"}),
    "llm_pruner": Base("taylor", "uniform"),
    "magnitude": Base("magnitude", "uniform"),
}

INSTEAD = ("weights", "norms", "peaks", "through", "mean_rank")


@dataclass(frozen=True)
class Settings:
    """Settings of ``gprune``.

    Args:
        base: The metric and start: ``flap`` (WIFV), ``wanda_sp``, ``llm_pruner`` (Taylor) or ``magnitude``.
        shards: Into how many parts each source is split, to tell sensitivity from sampling noise.
        rank: ``raw``: sensitivity of percentile ranks; ``probit``: of their normal quantiles.
        denoise: Take the noise within sources out of the sensitivity.
        partition: ``grid``, ``quantiles``, ``profiles``, ``thresholds``, ``random`` or ``layer``.
        bins: How many modules ``quantiles`` and ``profiles`` make of each layer.
        switch: ``unreliable``, ``both``, ``weak``, ``halves``, ``blend``, ``never``, ``always`` or ``reversed``.
        switch_most: The largest share of units that ``unreliable`` and ``reversed`` may switch.
        instead: What orders switched modules: ``weights`` (the base metric's weight-only factor), ``norms`` (product of
            norms), ``peaks`` (peak to peak), ``through`` (norm of the map through a unit), ``mean_rank`` over sources.
        start: Where learning starts: ``base`` (the base method's own allocation), ``uniform``, or ``best`` of both on
            held-out text.
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
    partition: str = "grid"
    bins: int = 4
    switch: str = "unreliable"
    switch_most: float = 0.25
    instead: str = "weights"
    start: str = "best"
    steps: int = 100
    windows: int = 2
    every: int = 20
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
    for name, value, known in (
        ("base", settings.base, tuple(BASES)),
        ("instead", settings.instead, INSTEAD),
        ("start", settings.start, ("base", "uniform", "best")),
        ("loss", settings.loss, ("kl", "cross_entropy")),
    ):
        if value not in known:
            raise ValueError(f"gprune: {name} is one of {', '.join(known)}; got {value!r}")
    if min(settings.shards, settings.windows, settings.every) < 1 or settings.steps < 0:
        raise ValueError("gprune: shards, windows and every are at least 1, steps at least 0")
    return GPrune(settings)


@dataclass(frozen=True)
class GPrune:
    """Measure, form modules, learn their shares, cut (``regrow.method.Method``)."""

    settings: Settings
    sources: int = 3
    _dense: dict[int, tuple[Batch, Tensor]] = field(default_factory=dict, compare=False, repr=False)

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
        groups = lambda state: [Group(("logits",), s.lr)]  # noqa: E731
        return Training(s.steps, min(s.every, s.steps), groups, self._batches, self._loss)

    def init(self, axes: AxisGraph, budget: Budget) -> State:
        """Nothing but the budget, once it is known that it can be met.

        Raises:
            ValueError: If not.
        """
        units = scoring.scorable(axes, axes.units(budget.only, budget.exclude, budget.marks))
        ranked(axes, scoring.random(axes, units=units), budget, minimum=self.settings.minimum)
        one = Modules({axis.key: torch.zeros(axis.size, dtype=torch.int64) for axis in units}, ("",), (0,))
        costs, removed = _costs(axes, units, one, budget)
        ratios(torch.zeros(1, dtype=torch.float64), costs, removed, most=self.settings.most)
        return State(budget)

    def propose(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> tuple[Plan | None, State]:
        """Form modules and start; then keep the best allocation so far; after the last step, the plan.

        Raises:
            ValueError: If there are too few sources, or what was measured is not finite.
        """
        if state.scores is not None:
            return None, state
        state = (
            self._judged(model, axes, evidence, state) if state.tensors else self._begun(model, axes, evidence, state)
        )
        if evidence.step < self.settings.steps:
            return None, state
        return self._finished(model, axes, evidence, state)

    def _begun(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> State:
        """Stages 1 to 3, and the start of the fourth."""
        s, budget = self.settings, state.budget
        seen = _measured(s, model, axes, budget, evidence)
        among = spaces(seen.units, parts=4)
        modules = partition(
            s.partition, among, seen.scores.values, seen.ranks, seen.sensitivity, bins=s.bins, seed=s.seed
        )
        trusted = reliability(
            s.switch, among, modules, seen.scores.values, seen.sensitivity, seen.halves, most=s.switch_most
        )
        places = ordered(modules, trusted.trust, seen.scores.values, _instead(s, model, axes, seen))
        costs, removed = _costs(axes, seen.units, modules, budget)
        base = allocation(BASES[s.base].allocation)(axes, seen.scores, budget, minimum=s.minimum)
        robust = within(seen.sensitivity.sigma, seen.spaces, lambda sigma: (sigma <= sigma.median()).double())
        shares = {"base": _shares(modules, base), "uniform": torch.full_like(costs, removed / float(costs.sum()))}
        tensors = {
            **{f"place:{key}": value for key, value in places.items()},
            **{f"module:{key}": value for key, value in modules.labels.items()},
            **{f"robust:{key}": value for key, value in robust.items()},
            **({f"fill:{name}": m.mean.clone() for name, m in seen.pooled.moments.items()} if s.compensate else {}),
            "costs": costs,
            "width": torch.tensor([s.width_few if among[i].pooled else s.width for i in modules.spaces]).double(),
        }
        state = replace(state, tensors=tensors, values={"removed": removed, "metric": seen.scores.metric})
        tried = {name: shares[name] for name in (("base", "uniform") if s.start == "best" else (s.start,))}
        judged = {
            name: self._held(model, axes, evidence, state, share) if s.steps or len(tried) > 1 else 0.0
            for name, share in tried.items()
        }
        start = min(judged, key=lambda name: judged[name])
        logits = torch.logit((tried[start] / s.most).clamp(0.02, 0.98))
        return replace(
            state,
            tensors={**tensors, "logits": logits, "best": tried[start]},
            values={**state.values, "best_loss": judged[start], "best_step": 0, "start": start},
            findings=_findings(seen, among, modules, trusted.unreliability, trusted.trust, costs, tried[start])
            | {
                "starts": judged,
                "history": [{"step": 0, "held_out": judged[start]}],
                "robust_among_cut": {"base": _robust(robust, base)},
                "notes": list(evidence.notes),
            },
        )

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
        share = state.tensors["best"]
        margins = {key: place - share[label] for key, place, label in _units(state)}
        scores = Scores(margins, f"gprune/{state.values['metric']}", evidence.sources, pooled.tokens)
        every = ranked(axes, scores, budget, minimum=s.minimum)
        kept = {key: keep for key, keep in every.items() if len(keep) < axes[key].size}
        means = scoring.means(model, axes, kept, pooled) if s.compensate else {}
        origin = {"method": "gprune", "settings": asdict(s), **budget.record(), **told(scores)}
        final = _shares(Modules({key: label for key, _, label in _units(state)}, ("",) * len(share), ()), every)
        rows = [
            {**row, "learned": float(one), "given": float(last)}
            for row, one, last in zip(state.findings["modules"], share, final, strict=True)
        ]
        robust = _robust({key: state.tensors[f"robust:{key}"] for key in margins}, every)
        findings = {
            **state.findings,
            "modules": rows,
            "best_step": state.values["best_step"],
            "robust_among_cut": {**state.findings["robust_among_cut"], "gprune": robust},
        }
        return Plan.keeping(axes, kept, means=means, origin=origin), replace(state, scores=scores, findings=findings)

    def _ratios(self, state: State) -> Tensor:
        return ratios(state.tensors["logits"], state.tensors["costs"], state.values["removed"], most=self.settings.most)

    def _loss(self, model: nn.Module, axes: AxisGraph, batch: Batch, state: State) -> Tensor:
        return self._divergence(model, axes, batch, state, self._ratios(state))

    def _divergence(self, model: nn.Module, axes: AxisGraph, batch: Batch, state: State, share: Tensor) -> Tensor:
        """How far the network with these shares cut is from the dense one (or from the text) on a batch."""
        width = state.tensors["width"]
        gates = {key: soft_step(place, share[label], width[label]).float() for key, place, label in _units(state)}
        fills = {name[5:]: fill for name, fill in state.tensors.items() if name.startswith("fill:")}
        dense = self._answers(model, batch) if self.settings.loss == "kl" else None
        with gated(model, axes, gates, fills):
            logits = logits_in(model(*batch.args, **batch.kwargs))
        if dense is None:
            return scoring.cross_entropy(logits, _labels(batch))
        said = F.log_softmax(logits.float(), -1).flatten(0, -2)
        return F.kl_div(said, dense.flatten(0, -2), log_target=True, reduction="batchmean")

    def _answers(self, model: nn.Module, batch: Batch) -> Tensor:
        """The dense network's log-probabilities, kept for the next time while there is room."""
        if id(batch) in self._dense:
            return self._dense[id(batch)][1]
        with torch.no_grad():
            answers = F.log_softmax(logits_in(model(*batch.args, **batch.kwargs)).float(), -1)
        used = sum(kept.nbytes for _, kept in self._dense.values())
        if used + answers.nbytes <= self.settings.memory * 2**30:
            self._dense[id(batch)] = (batch, answers)
        return answers

    def _held(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State, share: Tensor) -> float:
        """The mean loss on held-out windows."""
        batches = [batch for source in evidence.data.values() for batch in _split(source, self.settings.held_out)[1]]
        with torch.no_grad():
            return sum(float(self._divergence(model, axes, batch, state, share)) for batch in batches) / len(batches)

    def _batches(self, evidence: Evidence, step: int) -> Sequence[Batch]:
        """The windows of a step: all teaching windows in a drawn order, the sources in turn, then in another order."""
        s = self.settings
        sources = [_split(source, s.held_out)[0] for source in evidence.data.values()]
        found = []
        for i in range(step * s.windows, (step + 1) * s.windows):
            batches, turn = sources[i % len(sources)], i // len(sources)
            order = torch.randperm(
                len(batches), generator=torch.Generator().manual_seed(s.seed * 65537 + turn // len(batches))
            )
            found.append(batches[int(order[turn % len(batches)])])
        return found


@dataclass(frozen=True)
class _Seen:
    """What was measured: scores on everything, ranks by source, and their spread."""

    units: tuple[Axis, ...]
    pooled: Statistics
    scores: Scores
    weights_only: Scores
    halves: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    spaces: tuple[Space, ...]
    ranks: Ranks
    sensitivity: Sensitivity


def _measured(s: Settings, model: nn.Module, axes: AxisGraph, budget: Budget, evidence: Evidence) -> _Seen:
    units = scoring.scorable(axes, axes.units(budget.only, budget.exclude, budget.marks))
    weights, base = scoring.weights_of(model), BASES[s.base]
    metric: Callable[..., Scores] = scoring.METRICS[base.metric][0]

    def score(statistics: Statistics | None) -> Scores:
        found = metric(weights, axes, statistics, units=units, **base.options)
        return found if base.options else scoring.normalise(found, "zscore")

    by_source = {
        name: (score(_sum(shards)), [score(one) for one in shards]) for name, shards in evidence.statistics.items()
    }
    pooled = evidence.pooled()
    halves = [[shard for shards in evidence.statistics.values() for shard in shards[i::2]] for i in (0, 1)]
    one, other = (score(_sum(half)).values if half else {} for half in halves)
    among = spaces(units)
    found = ranks(by_source, among, s.rank)
    spread = sensitivity(found, denoise=s.denoise)
    return _Seen(units, pooled, score(pooled), score(None), (one, other), among, found, spread)


def _sum(shards: Sequence[Statistics]) -> Statistics:
    total = shards[0]
    for shard in shards[1:]:
        total = total + shard
    return total


def _instead(s: Settings, model: nn.Module, axes: AxisGraph, seen: _Seen) -> Mapping[str, Tensor]:
    """What orders the modules that are switched."""
    weights = scoring.weights_of(model)
    match s.instead:
        case "norms":
            return scoring.product_of_norms(weights, axes, units=seen.units).values
        case "peaks":
            return scoring.peak_to_peak(weights, axes, units=seen.units).values
        case "through":
            return scoring.through(weights, axes, units=seen.units).values
        case "mean_rank":
            return seen.sensitivity.mean
    return seen.weights_only.values


def _costs(axes: AxisGraph, units: Sequence[Axis], modules: Modules, budget: Budget) -> tuple[Tensor, float]:
    """What the units of each module cost together at present sizes, and what has to go."""
    cost = Cost(axes, budget.measure)
    one = {axis.key: float(cost.total - cost({axis.key: axis.size - 1})) for axis in units}
    costs = torch.zeros(len(modules), dtype=torch.float64)
    for key, labels in modules.labels.items():
        costs += torch.bincount(labels, minlength=len(modules)) * one[key]
    return costs, cost.total * (1 - budget.keep)


def _shares(modules: Modules, kept: Mapping[str, Sequence[int]]) -> Tensor:
    """What share of each module's units a choice of units gives up."""
    gone = {key: torch.ones(len(labels), dtype=torch.float64) for key, labels in modules.labels.items()}
    for key, ones in gone.items():
        ones[list(kept[key])] = 0
    return modules.mean(gone)


def _robust(robust: Mapping[str, Tensor], kept: Mapping[str, Sequence[int]]) -> float:
    """The share of distribution-robust units (sensitivity at most the median) among those cut."""
    gone = [flags[sorted(set(range(len(flags))) - set(kept[key]))] for key, flags in robust.items()]
    return float(torch.cat(gone).mean()) if any(len(part) for part in gone) else 0.0


def _units(state: State) -> list[tuple[str, Tensor, Tensor]]:
    """(axis key, place of each unit in its module, module of each unit)."""
    return [
        (name[6:], place, state.tensors[f"module:{name[6:]}"])
        for name, place in state.tensors.items()
        if name.startswith("place:")
    ]


def _split(source: Source, held_out: float) -> tuple[list[Batch], list[Batch]]:
    """The windows that teach and those that judge; at least one of each, the same one where there is but one."""
    n = max(1, round(len(source.batches) * held_out))
    batches = list(source.batches)
    return batches[:-n] or batches, batches[-n:]


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise ValueError("gprune: loss=cross_entropy needs labels; use loss=kl")
    return batch.labels


def _findings(
    seen: _Seen,
    among: Sequence[Space],
    modules: Modules,
    unreliability: Tensor,
    trust: Tensor,
    costs: Tensor,
    start: Tensor,
) -> dict[str, Any]:
    """What the method saw, as tables for the report."""
    several = next(iter(seen.ranks.shards.values())).shape[1] > 1
    active = modules.mean(within(seen.scores.values, among, scoring.percentile))
    sigma, sizes = modules.mean(seen.sensitivity.sigma), torch.bincount(torch.cat(list(modules.labels.values())))
    return {
        "sources": list(seen.ranks.sources),
        "spectrum": spectrum(seen.ranks, seen.spaces) if several else [],
        "modules": [
            {
                "name": modules.names[i],
                "space": among[modules.spaces[i]].keys[0],
                "label": among[modules.spaces[i]].label,
                "units": int(sizes[i]),
                "sensitivity": float(sigma[i]),
                "activity": float(active[i]),
                "unreliability": float(unreliability[i]),
                "trust": float(trust[i]),
                "cost": float(costs[i]),
                "start": float(start[i]),
            }
            for i in range(len(modules))
        ],
    }
