"""The memory of a search's stages: predicted from shapes, kept within a budget, and measured in the search itself."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from regrow.allocation.stages import MemoryBudgetError, Peak
from regrow.amounts import format_bytes
from regrow.candidates import Prefix, Staged
from regrow.evaluation import Live, predict_memory, prefix_peaks, training
from regrow.evaluation.memory import peak_meter
from regrow.learner import Stand
from regrow.methods.search.searcher import Searcher
from regrow.sources import Batch

MASKS, WEIGHT, LEVEL = 1.02, 60, {"operations": 8, "filters": 14, "weights": 22}
"""How much more a step needs with masks than without, as far as tensors are counted: a share, and bytes per weight;
and of these some for each level that is searched."""


def left_of(method: Searcher) -> float:
    """The share of its operations that a part is taken to have once it was searched: what stays, and what regrows.

    A stage has a goal for the size of all levels together. Where none of them is that of operations, these stay; else
    they are taken to bear it, and what they do not is seen when the next stage begins.
    """
    if "operations" not in method.searched:
        return 1.0
    own = getattr(method, "settings", None)
    share, regrow = getattr(own, "share", 1.0), getattr(own, "regrow", 0.0)
    return float(share + regrow * (1 - share))


def planned(method: Searcher, prefix: Callable[[int, int], Prefix], batch: Batch) -> Peak:
    """(first part that is whole, last part that runs) → the most bytes that searching there needs."""
    plain = prefix_peaks(prefix, batch, _step())

    def peak(first: int, last: int) -> int:
        with torch.device("meta"):
            many = prefix(first, last).many()
        return _masked(method, plain(first, last), many)

    return peak


def foretold(method: Searcher, at: Stand, batch: Batch) -> int:
    """The most bytes that a search needs from now on, as the network stands; nothing of it runs."""
    net = Prefix(at.model, method.last)
    cut = sum(one.untyped_storage().nbytes() for one in method.undo.contents().values())
    return _masked(method, predict_memory(net, batch, _step()).peak, net.many()) + cut


def _step() -> Callable[[nn.Module, Batch], Any]:
    return training(partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def _masked(method: Searcher, plain: int, weights: int) -> int:
    # Where levels cannot be chosen, a step may do other things besides: DARTS takes gradients twice.
    levels = getattr(getattr(method, "settings", None), "levels", LEVEL)
    return int(MASKS * plain) + (WEIGHT + sum(LEVEL[level] for level in levels)) * weights


@dataclass
class Watch:
    """Keeps each stage of a search within a budget, and measures it: two steps at its start, or when masks first learn.

    What it finds it writes down in ``learner.values``, where it is stored: ``memory``, a row per stage, and
    whether parts are ``recomputed``.

    Args:
        learner: What searches.
        budget: In bytes.
        size: Examples per step.
    """

    learner: Searcher
    budget: int
    size: int
    predicted: dict[int, int] = field(default_factory=dict)
    """Stage that began in this process → what was foretold then, in bytes."""

    def __call__(self, at: Stand, number: int) -> AbstractContextManager[None]:
        """What a step is taken inside.

        Args:
            at: Where the network stands.
            number: Of the step in its epoch.

        Raises:
            MemoryBudgetError: If the stage needs more than there is, though parts are computed anew.
        """
        stage = self.learner.values["stage"]
        if stage and stage not in self.predicted:
            self.predicted[stage] = self._fitted(at, stage)
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

    def _fitted(self, at: Stand, stage: int) -> int:
        """What a stage needs; with its parts computed anew from now on, where that is more than there is."""
        train, net = at.task.train, cast(Staged, at.model)
        batch = Batch((train.inputs[: self.size],), labels=train.labels[: self.size])
        needed = foretold(self.learner, at, batch)
        if needed > self.budget and not net.recomputed:
            self.learner.values["recomputed"] = net.recomputed = True
            needed = foretold(self.learner, at, batch)
        if needed > self.budget:
            raise MemoryBudgetError(
                f"{format_bytes(self.budget)} of memory do not suffice: stage {stage + 1} needs {format_bytes(needed)} "
                f"({needed} bytes), as earlier ones left the network and with parts computed anew. What they found is "
                "kept, but cannot go on with another budget: search anew, with more --memory or a smaller --batch-size",
                needed,
                self.learner.last,
            )
        return needed

    @contextmanager
    def _measured(self, at: Stand, row: dict[str, Any]) -> Iterator[None]:
        gone = self.learner.undo.contents().values()
        live = Live([*at.model.parameters(), *at.model.buffers(), *gone])
        resident = peak_meter(next(at.model.parameters()).device)
        with live:
            yield
        extra = resident()
        row |= {"held": live.held, "peak": live.peak, "resident": None if extra is None else extra + live.held}
        row |= {"predicted": self.predicted.get(row["stage"]), "recomputed": cast(Staged, at.model).recomputed}
        before = self.rows.get(f"{row['stage']}", row)
        if before["epoch"] < row["epoch"] or before["peak"] <= row["peak"]:
            self.rows[f"{row['stage']}"] = row
