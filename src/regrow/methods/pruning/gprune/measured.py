"""Measured allocation: how much of each axis is cut follows from divergences on left-out sources, in forward passes.

Each source is measured with the order and the means of the other sources. After the levels of each axis alone, cost is
exchanged between axes as long as that improves the whole network; at the end the result is compared with the starts on
held-out windows, each of which counts once, and the best of them is taken.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.allocation import module_costs, rank
from regrow.allocation.measured import Curves, Trial, exchange, fit_curves, improves, propose_exchange
from regrow.methods.pruning.gprune.masks import Masks
from regrow.methods.pruning.gprune.modules import Measurement
from regrow.methods.pruning.gprune.settings import Settings
from regrow.methods.pruning.pruner import Kept, PruningTask
from regrow.methods.pruning.replay import Outputs, Predictions, Replay, choose_lowest, shorten
from regrow.sources import Batch
from regrow.store.errors import StoreError
from regrow.store.tensors import read_header, write_tensors
from regrow.surgery.gate import gates_of
from regrow.training.checkpoint import FORMAT

SECONDS = 30.0
"""The longest time between two checkpoints, in seconds."""
MORE = 0.25
"""The fraction of an axis that is cut in addition, to measure the marginal divergence in the pruned network."""

Order = Callable[[int], Mapping[str, Tensor]]
"""Function: number of a view → axis key → the score of each unit; the units with the lowest are cut."""


@dataclass(frozen=True)
class MeasuredAllocation:
    """What was measured, and the order of units that was chosen.

    Args:
        name: ``measured``, or the start that was better on held-out windows.
        order: The order of units that is cut.
        losses: The mean divergence of each start and of ``measured`` on held-out windows.
        levels: One row per axis: pruning ratios and divergences, and the pruning ratio chosen.
        trials: The exchanges that were judged.
        seconds: The seconds of each part.
    """

    name: str
    order: Order
    losses: Mapping[str, float]
    levels: Sequence[Mapping[str, Any]]
    trials: Sequence[Trial]
    seconds: Mapping[str, float]


def measure_allocation(
    s: Settings, task: PruningTask, masks: Masks, measured: Measurement, starts: Mapping[str, Tensor]
) -> MeasuredAllocation:
    """Measure the divergence of each axis at some levels, exchange cost between axes, and compare with the starts.

    Args:
        s: The settings.
        task: The network and the measurements.
        masks: The modules and the order in each, in one view per left-out source.
        measured: The scores, in the same views.
        starts: Name → the pruning ratio of each module, ``[modules]``.
    """
    search = _AllocationSearch(s, task, masks, cutting_places(masks, measured))
    began = time.monotonic()
    at, each = search.levels()
    typical = [one.mean(1).tolist() for one in each]
    divergences = [search.by_source(one).amax(1).tolist() for one in each] if s.risk == "worst" else typical
    curves, means = fit_curves(at, divergences), fit_curves(at, typical)
    seconds = {"levels": time.monotonic() - began}
    few = len(task.evidence.data)
    offset, trials = exchange(
        torch.zeros(len(at), dtype=torch.float64),
        lambda offset: search.propose(curves.scaled(offset), means.scaled(offset)),
        lambda offset, many: search.losses(search.order(curves.scaled(offset)), search.judged[:many]),
        rounds=s.exchanges,
        windows=sorted({few, few * s.exchange_windows}),
    )
    seconds["exchanges"] = time.monotonic() - began - sum(seconds.values())
    orders: dict[str, Order] = {name: search.margins(share) for name, share in starts.items()}
    orders["measured"] = search.order(curves.scaled(offset))
    judged = {name: search.losses(one, search.held_out) for name, one in orders.items()}
    losses = {name: float(one.mean()) for name, one in judged.items()}
    seconds["comparison"] = time.monotonic() - began - sum(seconds.values())
    search.journal.write()
    best = choose_lowest({name: losses[name] for name in starts})
    best = "measured" if improves(judged[best], judged["measured"], s.margin) else best
    chosen = [search.ratios(search.keep(orders[name](0))) for name in ("measured", best)]
    rows = [
        {"axis": key, "levels": list(at[i]), "divergences": list(divergences[i]), "means": list(typical[i])}
        | {"measured": chosen[0][i], "chosen": chosen[1][i], "offset": float(offset[i])}
        for i, key in enumerate(search.places)
    ]
    return MeasuredAllocation(best, orders[best], losses, rows, trials, seconds)


def cutting_places(masks: Masks, measured: Measurement) -> dict[str, Tensor]:
    """Return the place of each unit in the order in which its axis is cut, in (0, 1), ``[views, size]``.

    It is the order of the base scores in which the units of each module have exchanged places among themselves, so that
    they are in the order of their module: at any level as many units of each module are cut as by the base scores.

    Args:
        masks: The modules and the order in each.
        measured: The scores, in the same views.
    """
    result = {}
    for key, labels in masks.modules.items():
        rows = []
        for view, label in enumerate(labels):
            size = label.shape[0]
            base = torch.empty(size, dtype=torch.float64)
            base[torch.argsort(measured.views[view].scores[key], stable=True)] = (
                torch.arange(size) + 0.5
            ).double() / size
            place = torch.empty_like(base)
            for module in label.unique():
                mine = torch.nonzero(label == module).flatten()
                order = mine[torch.argsort(masks.places[key][view][mine], stable=True)]
                place[order] = base[mine].sort().values
            rows.append(place)
        result[key] = torch.stack(rows)
    return result


@dataclass(frozen=True, eq=False)
class _Window:
    """A batch, the view under which it is masked, and what the dense network predicts on it."""

    batch: Batch
    view: int
    dense: Predictions


@dataclass(eq=False)
class _Journal:
    """The results of measurements in the order in which they were made: a resumed search reads them again."""

    task: PruningTask
    rows: list[list[float]] = field(default_factory=list)
    read: int = 0
    written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        path = self.task.checkpoint
        if path is not None and path.is_file():
            try:
                self.rows = [[float(one) for one in row] for row in read_header(path, FORMAT)["divergences"]]
            except (StoreError, KeyError, TypeError, ValueError):
                self.rows = []

    def take(self, total: int, what: str, make: Callable[[], list[float]]) -> list[float]:
        """Return the next result: the recorded one, or else a new one, of about ``total``."""
        if self.read == len(self.rows):
            try:
                self.task.progress(min(self.read, total - 1), total, what)
                self.rows.append(make())
            except KeyboardInterrupt:
                self.write()
                raise
            if time.monotonic() - self.written > SECONDS:
                self.write()
        self.read += 1
        return self.rows[self.read - 1]

    def write(self) -> None:
        """Write the results to the checkpoint."""
        if self.task.checkpoint is not None:
            write_tensors(self.task.checkpoint, {}, {**self.task.header(), "divergences": self.rows}, FORMAT)
        self.written = time.monotonic()


class _AllocationSearch:
    """The measurements on the network that the search needs."""

    def __init__(self, s: Settings, task: PruningTask, masks: Masks, places: Mapping[str, Tensor]) -> None:
        self.s, self.task, self.masks, self.places = s, task, masks, places
        self.journal = _Journal(task)
        sources = [source.held_out(s.held_out) for source in task.evidence.data.values()]
        self.replay = Replay.of(task.model, task.axes, shorten(sources[0][0][0], s.level_tokens), s.memory / 3)
        self.blocks = {key: self.replay.first_block(key) for key in places}
        one = {key: torch.full((task.axes[key].size,), i) for i, key in enumerate(places)}
        self.costs, removed = module_costs(task.axes, one, len(places), task.budget)
        self.ratio = min(0.9, removed / float(self.costs.sum()))
        self.near = self._windows([part[0][: s.level_windows] for part in sources], s.level_tokens)
        self.judged = self._windows([part[0][: s.exchange_windows] for part in sources])
        self.held_out = self._windows([part[1] for part in sources], repeat=False)
        self.total = len(places) * (s.levels + s.exchanges) + 6 * s.exchanges + 5

    def _windows(self, sources: Sequence[Sequence[Batch]], tokens: int = 0, *, repeat: bool = True) -> list[_Window]:
        """Return windows of the sources in turn, those of shorter sources repeated; fewer tokens of each if asked."""
        result = []
        for turn in range(max(map(len, sources))):
            for i, batches in enumerate(sources):
                if turn >= len(batches) and not repeat:
                    continue
                batch = shorten(batches[turn % len(batches)], tokens)
                view = i + 1 if self.s.cross else 0
                result.append(_Window(batch, view, Predictions.of(self.replay.run(batch, {}, {}))))
        return result

    def order(self, curves: Curves) -> Order:
        """Return the order of units by their marginal divergence per cost."""
        return lambda view: curves.scores({key: place[view] for key, place in self.places.items()}, self.costs)

    def margins(self, share: Tensor) -> Order:
        """Return the order of units by how far they are above the pruning ratio of their module."""
        return lambda view: self.masks.margins(share, view)

    def keep(self, scores: Mapping[str, Tensor]) -> Kept:
        """Return the units that stay within the budget."""
        return rank(self.task.axes, scores, self.task.budget, minimum=self.s.minimum)

    def ratios(self, kept: Kept) -> list[float]:
        """Return the fraction of each axis that is cut."""
        return [1 - len(kept[key]) / self.task.axes[key].size for key in self.places]

    def gates(self, order: Order, windows: Sequence[_Window]) -> dict[int, dict[str, Tensor]]:
        """Return the masks of the axes that are cut, by view."""
        return {view: self._gates(self.keep(order(view))) for view in dict.fromkeys(one.view for one in windows)}

    def losses(self, order: Order, windows: Sequence[_Window]) -> Tensor:
        """Return the divergence of the network on each window, ``[windows]``."""

        def measure() -> list[float]:
            gates = self.gates(order, windows)
            return [
                w.dense.divergence(self.replay.run(w.batch, gates[w.view], self.masks.filled(w.view))) for w in windows
            ]

        return torch.tensor(self._take("judging allocations", measure), dtype=torch.float64)

    def by_source(self, losses: Tensor) -> Tensor:
        """Return the mean over the windows of each source, ``[..., sources]``, of losses ``[..., windows]``."""
        sources = len(self.task.evidence.data)
        return losses.unflatten(-1, (-1, sources)).mean(-2)

    def levels(self) -> tuple[list[list[float]], list[Tensor]]:
        """Return the pruning ratios at which each axis alone is measured, and the divergences ``[levels, windows]``."""
        at: list[list[float]] = []
        result: list[Tensor] = []
        cached: list[Outputs | None] = []
        for key in self.places:
            size = self.task.axes[key].size
            counts = {min(max(1, round(self.ratio * 2**i * size)), max(1, size - 1)) for i in range(self.s.levels)}
            at.append([count / size for count in sorted(counts)])

            def measure(key: str = key, ratios: Sequence[float] = at[-1]) -> list[float]:
                if not cached:
                    cached.extend(self.replay.record([w.batch for w in self.near], [({}, {})] * len(self.near))[1])
                return [loss for ratio in ratios for loss in self._alone(key, ratio, cached)]

            losses = torch.tensor(self._take(f"measuring {key}", measure), dtype=torch.float64)
            result.append(losses.view(len(at[-1]), -1))
        return at, result

    def propose(self, curves: Curves, means: Curves) -> Tensor:
        """Return the exchange that the marginal divergences in the pruned network suggest, beside the means of axes."""
        order, windows = self.order(curves), self.near
        now = torch.tensor(self.ratios(self.keep(order(0))), dtype=torch.float64)
        sizes = torch.tensor([self.task.axes[key].size for key in self.places], dtype=torch.float64)
        more = (MORE * sizes).round().clamp_min(1) / sizes
        other = torch.where(now + more > 0.95, now - more, now + more).clamp_min(0)
        base: list[Any] = []
        rises = []
        for i, key in enumerate(self.places):

            def measure(key: str = key, ratio: float = float(other[i])) -> list[float]:
                if not base:
                    gates = self.gates(order, windows)
                    masks = [(gates[w.view], self.masks.filled(w.view)) for w in windows]
                    logits, outputs = self.replay.record([w.batch for w in windows], masks)
                    losses = [w.dense.divergence(one) for w, one in zip(windows, logits, strict=True)]
                    base.extend((gates, outputs, losses))
                return self._instead(key, ratio, *base)

            rises.append(self._take(f"measuring {key} in the pruned network", measure))
        sign = torch.where(other > now, 1.0, -1.0)
        rise = torch.tensor(rises, dtype=torch.float64) * sign[:, None]
        return propose_exchange(means.rise(now, other) * sign, rise)

    def _alone(self, key: str, ratio: float, cached: Sequence[Outputs | None]) -> list[float]:
        """Return the divergence on each window if one axis alone is cut."""
        losses = []
        for w, outputs in zip(self.near, cached, strict=True):
            gate = (self.places[key][w.view] > ratio).float()
            logits = self.replay.run(w.batch, {key: gate}, self.masks.filled(w.view), outputs, self.blocks[key])
            losses.append(w.dense.divergence(logits))
        return losses

    def _instead(
        self,
        key: str,
        ratio: float,
        gates: Mapping[int, Mapping[str, Tensor]],
        cached: Sequence[Outputs | None],
        before: Sequence[float],
    ) -> list[float]:
        """Return the rise of the divergence on each window if an axis of the pruned network is cut to another ratio."""
        rises = []
        for w, outputs, loss in zip(self.near, cached, before, strict=True):
            other = {**gates[w.view], key: (self.places[key][w.view] > ratio).float()}
            logits = self.replay.run(w.batch, other, self.masks.filled(w.view), outputs, self.blocks[key])
            rises.append(w.dense.divergence(logits) - loss)
        return rises

    def _gates(self, kept: Kept) -> dict[str, Tensor]:
        axes = self.task.axes
        return gates_of(axes, {key: kept[key] for key in self.places if len(kept[key]) < axes[key].size})

    def _take(self, what: str, make: Callable[[], list[float]]) -> list[float]:
        return self.journal.take(self.total, what, make)


def tables_of(result: MeasuredAllocation) -> dict[str, Any]:
    """Return the tables of a measured allocation for the report, as JSON data.

    Args:
        result: The measured allocation.
    """
    return {
        "allocation": result.name,
        "levels": [dict(row) for row in result.levels],
        "exchanges": [asdict(trial) for trial in result.trials],
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
    }
