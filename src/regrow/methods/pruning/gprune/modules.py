"""Settings of GPrune and its stages 1 to 3: rank changes between sources, modules of similar units, and their order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from regrow.allocation.ranked import soft_step
from regrow.core.axes import Axis
from regrow.core.scores import Scores, Statistics, merged
from regrow.methods.pruning.pruner import PruningTask
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.metrics import BASES, peak_to_peak
from regrow.scoring.modules import PARTITIONS, SWITCHES, Modules, Reliability, partition, rank_in_modules
from regrow.scoring.spaces import Space, View, percentile, spaces, spectrum, views, within
from regrow.scoring.weights import scorable
from regrow.settings.constraints import CheckedSettings, OneOf, Range

STARTS = ("base", "inner", "uniform")
"""The allocations from which learning may start."""
INSTEAD = ("peaks", "weights")
"""The metrics that order switched modules."""


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``gprune``: base metric, partition into modules, learning of the pruning ratios, compensation.

    Args:
        base: The base method, whose metric and allocation are used: ``flap`` (WIFV), ``wanda_sp``, ``llm_pruner``
            (Taylor), ``magnitude`` or ``fisher``.
        shards: The number of parts into which each source is split, so that the report can tell how far ranks vary
            between sources from sampling noise.
        partition: How units are grouped into modules: ``thresholds``, ``random`` or ``layer``; see
            :mod:`regrow.scoring.modules`.
        switch: Which modules are ordered without activations: ``blend``, ``even``, ``unreliable``, ``never``,
            ``always`` or ``reversed``; see :mod:`regrow.scoring.modules`.
        switch_most: The largest fraction of units that ``unreliable`` and ``reversed`` may switch.
        instead: The metric that orders switched modules: ``peaks`` (peak to peak of a unit's rows) or ``weights`` (the
            weight-only part of the base metric).
        scores_from: ``pooled``: units are scored on all sources together; the name of a source: on that one alone (on
            the next one, where that one is left out), while sensitivity and the means of dropped inputs are of all.
        cross: Whether each source is trained and judged with the order and the means of the other sources alone, as if
            it were a text domain that calibration never saw.
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
        minimum: The smallest number of units that stay in an axis.
        seed: Seed of random partitions and of the order of windows.
    """

    base: Annotated[str, OneOf(*BASES)] = "flap"
    shards: Annotated[int, Range(1)] = 4
    partition: Annotated[str, OneOf(*PARTITIONS)] = "thresholds"
    switch: Annotated[str, OneOf(*SWITCHES)] = "blend"
    switch_most: Annotated[float, Range(0, 1)] = 0.25
    instead: Annotated[str, OneOf(*INSTEAD)] = "peaks"
    scores_from: str = "pooled"
    cross: bool = True
    start: Annotated[str, OneOf(*STARTS, "best")] = "best"
    steps: Annotated[int, Range(0)] = 40
    windows: Annotated[int, Range(1)] = 2
    every: Annotated[int, Range(1)] = 10
    held_out: Annotated[float, Range(0, 1, above=True, below=True)] = 0.25
    lr: Annotated[float, Range(0, above=True)] = 0.1
    width: Annotated[float, Range(0, above=True)] = 0.05
    width_few: Annotated[float, Range(0, above=True)] = 0.1
    most: Annotated[float, Range(0, 1, above=True, below=True)] = 0.95
    memory: Annotated[float, Range(0)] = 3.0
    compensate: bool = True
    minimum: Annotated[int, Range(1)] = 1
    seed: int = 0


@dataclass(frozen=True)
class Masks:
    """Fixed orders of the units in their modules, in one view per ranking (by all sources; by all but one).

    Args:
        modules: Axis key → the module number of each unit, ``[views, size]`` int64.
        places: Axis key → the relative rank of each unit in its module, in (0, 1), lowest cut first, ``[views, size]``.
        fills: Name of a weight that reads units → the value that replaces each dropped input, ``[views, C]``; 0 for
            weights without an entry.
        width: The range of relative ranks around the ratio that has a gradient, ``[modules]``.
    """

    modules: Mapping[str, Tensor]
    places: Mapping[str, Tensor]
    fills: Mapping[str, Tensor]
    width: Tensor

    def margins(self, share: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Return each unit's relative rank minus its module's pruning ratio, by axis key; units below 0 are cut."""
        return {key: place[view] - share[self.modules[key][view]] for key, place in self.places.items()}

    def gates(self, share: Tensor, view: int) -> dict[str, Tensor]:
        """Return 1 for units that stay and 0 for units that are cut, by axis key, with a gradient to the ratios."""
        gates = {}
        for key, place in self.places.items():
            label = self.modules[key][view]
            gates[key] = soft_step(place[view], share.index_select(0, label), self.width[label]).float()
        return gates

    def filled(self, view: int) -> dict[str, Tensor]:
        """Return the values that replace dropped inputs, by name of the weight that reads them."""
        return {name: fill[view] for name, fill in self.fills.items()}

    def given(self, kept: Mapping[str, tuple[int, ...]]) -> Tensor:
        """Return the fraction of each module's units (first view) that a choice of units cuts."""
        labels = torch.cat([label[0] for label in self.modules.values()])
        gone = torch.ones(len(labels), dtype=torch.float64)
        start = 0
        for key, label in self.modules.items():
            gone[torch.tensor(kept[key], dtype=torch.int64) + start] = 0
            start += label.shape[1]
        count = torch.bincount(labels)
        return torch.zeros(len(count), dtype=torch.float64).index_add(0, labels, gone) / count


@dataclass(frozen=True)
class Measurement:
    """The scores and ranks of all units, with all sources first, then (under ``cross``) without each source in turn.

    Args:
        units: The axes that are scored.
        spaces: The sets of axes whose units are ranked together.
        views: The scores and ranks, one view per choice of sources.
        weights_only: The scores of the base metric without activations.
    """

    units: tuple[Axis, ...]
    spaces: tuple[Space, ...]
    views: tuple[View, ...]
    weights_only: Scores


def measure(s: Settings, task: PruningTask) -> Measurement:
    """Score and rank the units with all sources and, under ``cross``, without each source in turn."""
    units = tuple(scorable(task.axes, task.units))
    among, sums = spaces(units), task.evidence.statistics

    def score(statistics: Statistics | None) -> Scores:
        return BASES[s.base].score(task.weights, task.axes, statistics, units)

    seen = list(views(sums, score, among, without_each=s.cross))
    if s.scores_from != "pooled":
        names = _calibration_sources(s, tuple(sums))
        by_source = {name: score(merged(sums[name])) for name in dict.fromkeys(names)}
        seen = [replace(view, scores=by_source[name]) for view, name in zip(seen, names, strict=False)]
    return Measurement(units, among, tuple(seen), score(None))


def _calibration_sources(s: Settings, sources: Sequence[str]) -> list[str]:
    """Return the source that scores units in each view: all sources, then without each in turn."""
    if s.scores_from not in sources:
        raise ValueError(
            f"scores_from must be pooled or a source, one of {', '.join(sources)}; got {s.scores_from!r}: name one of "
            "these"
        )
    after = sources[(sources.index(s.scores_from) + 1) % len(sources)]
    return [s.scores_from, *(after if name == s.scores_from else s.scores_from for name in sources)]


def order_modules(
    s: Settings, task: PruningTask, seen: Measurement, modules: Modules, trust: Tensor, among: Sequence[Space]
) -> Masks:
    """Form the modules and order the units in each, with all sources and without each source in turn."""
    # A source must not have a say in the modules it is judged by, as far as these have counterparts without it.
    every = [modules, *(form_modules(s, one, among).numbered_as(modules, among) for one in seen.views[1:])]
    peaks = s.instead == "peaks"
    instead = peak_to_peak(task.weights, task.axes, units=seen.units) if peaks else seen.weights_only
    places = [
        rank_in_modules(m, trust, one.scores.values, instead.values) for m, one in zip(every, seen.views, strict=True)
    ]
    filled = constant_inputs(task.model, seen.views[0].pooled.moments) if s.compensate else ()
    return Masks(
        {key: torch.stack([one.labels[key] for one in every]) for key in modules.labels},
        {key: torch.stack([one[key] for one in places]) for key in modules.labels},
        {name: torch.stack([one.pooled.moments[name].mean for one in seen.views]) for name in filled},
        torch.tensor([s.width_few if among[i].pooled else s.width for i in modules.spaces]).double(),
    )


def form_modules(s: Settings, seen: View, among: Sequence[Space]) -> Modules:
    """Partition the units into modules of similar sensitivity and score."""
    return partition(s.partition, among, seen.scores.values, seen.spread, seed=s.seed)


def findings_of(
    seen: Measurement, among: Sequence[Space], modules: Modules, trusted: Reliability, costs: Tensor, start: Tensor
) -> dict[str, Any]:
    """Return tables for the report: the sources, the spectrum of rank changes, and one row per module."""
    first = seen.views[0]
    several = next(iter(first.ranks.shards.values())).shape[1] > 1
    rows = modules.table(
        among,
        sensitivity=modules.mean(first.spread.sigma),
        activity=modules.mean(within(first.scores.values, among, percentile)),
        unreliability=trusted.unreliability,
        trust=trusted.trust,
        cost=costs,
        start=start,
    )
    table = spectrum(first.ranks, seen.spaces) if several else []
    return {"sources": list(first.ranks.sources), "spectrum": table, "modules": rows}
