"""Stages 1 to 3 of GPrune: rank changes between sources, modules of similar units, and the order within each module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regrow.core.axes import Axis
from regrow.core.scores import Scores, Statistics, merged
from regrow.methods.pruning.gprune.masks import Masks
from regrow.methods.pruning.gprune.settings import Settings
from regrow.methods.pruning.pruner import PruningTask
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.metrics import BASES, peak_to_peak
from regrow.scoring.modules import Modules, Reliability, partition, rank_in_modules
from regrow.scoring.spaces import Space, View, percentile, spaces, spectrum, views, within
from regrow.scoring.weights import readers, scorable

INACTIVE = 1e-3
"""A unit is inactive on a source if the root mean square of its inputs is at most this fraction of its axis's mean."""


@dataclass(frozen=True)
class Measurement:
    """The scores and ranks of all units, with all sources first, then (under ``cross``) without each source in turn.

    Args:
        units: The axes that are scored.
        spaces: The sets of axes whose units are ranked together.
        views: The scores and ranks, one view per choice of sources.
        weights_only: The scores of the base metric without activations.
        inactive: Axis key → which units are inactive on every source, ``[size]`` bool: their ranks do not vary either,
            but unlike robust units they do nothing on any source.
    """

    units: tuple[Axis, ...]
    spaces: tuple[Space, ...]
    views: tuple[View, ...]
    weights_only: Scores
    inactive: Mapping[str, Tensor]


def measure(s: Settings, task: PruningTask) -> Measurement:
    """Score and rank the units with all sources and, under ``cross``, without each source in turn.

    Args:
        s: The settings.
        task: The network and the measurements.

    Raises:
        ValueError: If there are too few sources, or a measurement is not finite.
    """
    units = tuple(scorable(task.axes, task.units))
    weights, among, sums = task.weights, spaces(units), task.evidence.statistics

    def score(statistics: Statistics | None) -> Scores:
        return BASES[s.base].score(weights, task.axes, statistics, units)

    seen = list(views(sums, score, among, without_each=s.cross))
    if s.scores_from != "pooled":
        names = _calibration_sources(s, tuple(sums))
        own = {name: score(merged(sums[name])) for name in dict.fromkeys(names)}
        seen = [replace(view, scores=own[name]) for view, name in zip(seen, names, strict=False)]
    return Measurement(units, among, tuple(seen), score(None), _inactive(task, units))


def _calibration_sources(s: Settings, sources: Sequence[str]) -> list[str]:
    """Return the source that scores units in each view: all sources, then without each in turn."""
    if s.scores_from not in sources:
        raise ValueError(
            f"scores_from must be pooled or a source, one of {', '.join(sources)}; got {s.scores_from!r}: name one of "
            "these"
        )
    after = sources[(sources.index(s.scores_from) + 1) % len(sources)]
    return [s.scores_from, *(after if name == s.scores_from else s.scores_from for name in sources)]


def _inactive(task: PruningTask, units: Sequence[Axis]) -> dict[str, Tensor]:
    """Return which units have inputs of almost 0 on every source, by axis key, ``[size]`` bool."""
    power: dict[str, list[Tensor]] = {axis.key: [] for axis in units}
    for shards in task.evidence.statistics.values():
        moments = merged(shards).moments
        each: dict[str, Tensor] = {}
        for reader in readers(task.axes, units):
            if reader.weight in moments:
                square = moments[reader.weight].square / moments[reader.weight].count
                mine = square[reader.positions(len(square))].mean(1)
                each[reader.axis] = each.get(reader.axis, 0) + mine
        for key, value in each.items():
            power[key].append(value <= INACTIVE**2 * value.mean())
    return {
        axis.key: torch.stack(power[axis.key]).all(0) if power[axis.key] else torch.zeros(axis.size, dtype=torch.bool)
        for axis in units
    }


def order_modules(
    s: Settings, task: PruningTask, seen: Measurement, modules: Modules, trust: Tensor, among: Sequence[Space]
) -> Masks:
    """Form the modules and order the units in each, with all sources and without each source in turn.

    Args:
        s: The settings.
        task: The network and the measurements.
        seen: The scores and ranks.
        modules: The modules formed with all sources.
        trust: The weight of the activation-based metric in the order of each module, 0 to 1, ``[modules]``.
        among: The sets of axes whose units form modules together.
    """
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
    """Partition the units into modules of similar sensitivity and score.

    Args:
        s: The settings, which name the kind of partition.
        seen: The scores, ranks and sensitivity.
        among: The sets of axes whose units form modules together.
    """
    return partition(s.partition, among, seen.scores.values, seen.spread, seed=s.seed)


def findings_of(
    seen: Measurement, among: Sequence[Space], modules: Modules, trusted: Reliability, costs: Tensor, start: Tensor
) -> dict[str, Any]:
    """Return tables for the report: the sources, the spectrum of rank changes, and one row per module.

    Args:
        seen: The scores and ranks.
        among: The sets of axes whose units form modules together.
        modules: The modules.
        trusted: How reliable the activation-based metric is in each module.
        costs: The cost of all units of each module, ``[modules]``.
        start: The pruning ratio of each module where learning starts, ``[modules]``.
    """
    first = seen.views[0]
    several = next(iter(first.ranks.shards.values())).shape[1] > 1
    rows = modules.table(
        among,
        sensitivity=modules.mean(first.spread.sigma),
        activity=modules.mean(within(first.scores.values, among, percentile)),
        inactive=modules.mean(seen.inactive),
        unreliability=trusted.unreliability,
        trust=trusted.trust,
        cost=costs,
        start=start,
    )
    sources, table = list(first.ranks.sources), spectrum(first.ranks, seen.spaces) if several else []
    return {"sources": sources, "spectrum": table, "modules": rows}
