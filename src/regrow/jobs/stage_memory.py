"""The memory of a search's stages: predicted from shapes, kept within a budget, and measured during the search."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from regrow.allocation.stages import MemoryBudgetError, Peak
from regrow.core.amounts import format_bytes
from regrow.core.candidates import Prefix, Staged
from regrow.core.sources import Batch, device_of
from regrow.core.tasks import first_examples, pack_batch
from regrow.evaluation import Live, predict_memory, prefix_peaks, training
from regrow.evaluation.memory import peak_meter
from regrow.methods.search.assembly import Search
from regrow.methods.search.state import SearchState, StageMemory
from regrow.training.learner import Context

MASKS, WEIGHT, GRANULARITY = 1.02, 60, {"operations": 8, "filters": 14, "weights": 22}
"""The memory of a step with masks, relative to one without: a factor, and additional bytes per weight; and further
bytes per weight for each granularity that is searched."""


def predict_peaks(masked: Collection[str], prefix: Callable[[int, int], Prefix], batch: Batch) -> Peak:
    """Return a function (first part that is complete, last part that runs) → the predicted peak of a stage in bytes.

    Args:
        masked: The granularities whose masks need memory in a step.
        prefix: Returns the part of the network that runs in a stage.
        batch: The batch of a training step.
    """
    plain = prefix_peaks(prefix, batch, _step())

    def peak(first: int, last: int) -> int:
        with torch.device("meta"):
            many = prefix(first, last).many()
        return _add_masks(masked, plain(first, last), many)

    return peak


def predict_stage(search: Search, state: SearchState, context: Context, batch: Batch) -> int:
    """Predict the peak memory of the current stage in bytes, without running the network.

    Args:
        search: The method.
        state: The state of the search.
        context: The network.
        batch: The batch of a training step.
    """
    net = Prefix(context.model, search.space.part(state.stage))
    removed = context.undo.contents().values() if context.undo else ()
    cut = sum(one.untyped_storage().nbytes() for one in removed)
    return _add_masks(search.masked, predict_memory(net, batch, _step()).peak, net.many()) + cut


def _step() -> Callable[[nn.Module, Batch], Any]:
    return training(partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def _add_masks(masked: Collection[str], plain: int, weights: int) -> int:
    return int(MASKS * plain) + (WEIGHT + sum(GRANULARITY[one] for one in masked)) * weights


@dataclass
class MemoryWatch:
    """Keeps each stage of a search within a memory budget, and measures steps of it with and without masks trained.

    Args:
        search: The method.
        budget: The budget in bytes; 0: none, and nothing is measured.
        size: Examples per step.
        rows: Stage → its measured memory.
        predictions: Stage that started in this process → its predicted peak, in bytes.
    """

    search: Search
    budget: int
    size: int
    rows: dict[str, StageMemory] = field(default_factory=dict)
    predictions: dict[int, int] = field(default_factory=dict)

    def __call__(self, state: SearchState, context: Context, step: int) -> AbstractContextManager[None]:
        """Return a context manager around a training step, which measures two steps per stage, with and without masks.

        Args:
            state: The state of the search.
            context: The network.
            step: The number of the step in its epoch.

        Raises:
            MemoryBudgetError: If the stage needs more than the budget, even with recomputed parts.
        """
        if not self.budget:
            return nullcontext()
        stage = state.stage
        if stage and stage not in self.predictions:
            self.predictions[stage] = self._fit(state, context)
        if step > 1:
            return nullcontext()
        row, trains = self.rows.get(f"{stage}"), self.search.trains(state, context)
        if row is None or row.epoch == context.epoch + 1 or trains > row.joint:
            return self._measure(context, stage, trains)
        return nullcontext()

    def _fit(self, state: SearchState, context: Context) -> int:
        """Return a stage's predicted peak in bytes; turn recomputation on if it exceeds the budget."""
        train, net = context.task.train, cast(Staged, context.model)
        first = first_examples(train, self.size)
        batch = pack_batch(first.inputs, first.labels)
        needed = predict_stage(self.search, state, context, batch)
        if needed > self.budget and not net.recomputed:
            net.recomputed = True
            needed = predict_stage(self.search, state, context, batch)
        if needed > self.budget:
            raise MemoryBudgetError(
                f"{format_bytes(self.budget)} of memory do not suffice: stage {state.stage + 1} needs "
                f"{format_bytes(needed)} ({needed} bytes), as earlier ones left the network and with parts computed "
                "anew. What they found is kept, but cannot go on with another budget: search anew, with more --memory "
                "or a smaller --batch-size",
                needed,
                self.search.space.part(state.stage),
            )
        return needed

    @contextmanager
    def _measure(self, context: Context, stage: int, trains: bool) -> Iterator[None]:
        removed = context.undo.contents().values() if context.undo else ()
        live = Live([*context.model.parameters(), *context.model.buffers(), *removed])
        resident = peak_meter(device_of(context.model))
        with live:
            yield
        extra = resident()
        row = StageMemory(
            stage,
            context.epoch + 1,
            trains,
            live.held,
            live.peak,
            None if extra is None else extra + live.held,
            self.predictions.get(stage),
            cast(Staged, context.model).recomputed,
        )
        before = self.rows.get(f"{stage}", row)
        if before.epoch < row.epoch or before.peak <= row.peak:
            self.rows[f"{stage}"] = row
