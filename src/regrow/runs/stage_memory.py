"""The memory of a search's stages: predicted from shapes, and measured in the search itself."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from regrow.allocation.stages import Peak
from regrow.candidates import Prefix
from regrow.evaluation import Live, prefix_peaks, training
from regrow.evaluation.memory import peak_meter
from regrow.learner import Stand
from regrow.searcher import Searcher
from regrow.sources import Batch

MASKS, WEIGHT, LEVEL = 1.02, 60, {"operations": 8, "filters": 14, "weights": 22}
"""How much more a step needs with masks than without, as far as tensors are counted: a share, and bytes per weight;
and of these some for each level that is searched."""


def planned(method: Searcher, prefix: Callable[[int, int], Prefix], batch: Batch) -> Peak:
    """(first part that is whole, last part that runs) → the most bytes that searching there needs."""
    plain = prefix_peaks(prefix, batch, _step())

    def peak(first: int, last: int) -> int:
        with torch.device("meta"):
            many = prefix(first, last).many()
        return _masked(method, plain(first, last), many)

    return peak


def _step() -> Callable[[nn.Module, Batch], Any]:
    return training(partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def _masked(method: Searcher, plain: int, weights: int) -> int:
    return int(MASKS * plain) + (WEIGHT + sum(LEVEL[level] for level in method.searched)) * weights


@dataclass
class Watch:
    """Measures each stage of a search: two steps at its start, or when masks first learn.

    What it finds it writes down in ``learner.values``, where it is stored: ``memory``, a row per stage.

    Args:
        learner: What searches.
    """

    learner: Searcher

    def __call__(self, at: Stand, number: int) -> AbstractContextManager[None]:
        """What a step is taken inside.

        Args:
            at: Where the network stands.
            number: Of the step in its epoch.
        """
        stage = self.learner.values["stage"]
        if number > 1:
            return nullcontext()
        row, joint = self.rows.get(f"{stage}"), self.learner.joint(at)
        if row is None or row["epoch"] == at.epoch + 1 or joint > row["joint"]:
            return self._measured(at, {"stage": stage, "epoch": at.epoch + 1, "joint": joint})
        return nullcontext()

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Stage → what was measured of it, as JSON data."""
        found: dict[str, dict[str, Any]] = self.learner.values.setdefault("memory", {})
        return found

    @contextmanager
    def _measured(self, at: Stand, row: dict[str, Any]) -> Iterator[None]:
        gone = self.learner.attic.contents().values()
        live = Live([*at.model.parameters(), *at.model.buffers(), *gone])
        resident = peak_meter(next(at.model.parameters()).device)
        with live:
            yield
        extra = resident()
        row |= {"held": live.held, "peak": live.peak, "resident": None if extra is None else extra + live.held}
        before = self.rows.get(f"{row['stage']}", row)
        if before["epoch"] < row["epoch"] or before["peak"] <= row["peak"]:
            self.rows[f"{row['stage']}"] = row
