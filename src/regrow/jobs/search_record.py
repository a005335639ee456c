"""What a search records in the folder of its run, each thing once, and what it returns."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from torch import nn

from regrow import store
from regrow.core.amounts import short
from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan
from regrow.core.tables import Table, format_html, format_text
from regrow.evaluation.continual import mean_score
from regrow.jobs.recording import Record
from regrow.jobs.search_inputs import SearchInputs, measure_statistics
from regrow.jobs.spaces import extract_network
from regrow.jobs.stage_memory import MemoryWatch
from regrow.methods.search.assembly import Search
from regrow.methods.search.space import copy_state
from regrow.methods.search.state import SearchState
from regrow.nets.loaded import Origin
from regrow.store.run_folder import RunFolder
from regrow.surgery import UndoStore
from regrow.tracing.meta_copy import clone_model
from regrow.training.fit import Fitted, finish
from regrow.training.learner import Context
from regrow.training.state import TrainState

FOLDER = "front"
"""The folder of the networks that a search passed on the way to its target, a Pareto front."""


@dataclass
class SearchRecord:
    """Collects the rows of a search, and writes what it has reached: plans, changes of shape, rows and memory.

    Args:
        record: The run.
        watch: What measures the memory of the stages.
        rows: The rows of this process: kind and values.
        plans: How many plans are in the ledger.
        events: How many changes of shape were written.
        written: How many rows were written.
    """

    record: Record
    watch: MemoryWatch
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    plans: int = 0
    events: int = 0
    written: int = 0

    def log(self, kind: str, /, **row: Any) -> None:
        """Take a row, which :meth:`write` writes with the state that it belongs to.

        Args:
            kind: The kind of row.
            **row: The values.
        """
        if kind != "status":
            self.rows.append((kind, row))

    def of(self, kind: str) -> tuple[dict[str, Any], ...]:
        """Return the rows of a kind.

        Args:
            kind: The kind of row.
        """
        return tuple(row for name, row in self.rows if name == kind)

    def write(self, now: TrainState[Any], *, unfinished: int = 0) -> None:
        """Write what is new since the last call.

        Args:
            now: The state of the search.
            unfinished: How many of the last stages may turn out to need more memory.
        """
        if isinstance(self.record, RunFolder):
            for plan in now.plans[self.plans :]:
                self.record.own_ledger.append(plan)
        for i in range(self.events, len(now.events)):
            self.record.log("commit", number=i, **now.events[i])
        for kind, row in self.rows[self.written :]:
            self.record.log(kind, **row)
        self.plans, self.events, self.written = len(now.plans), len(now.events), len(self.rows)
        stages = [*self.watch.rows.values()]
        for i, stage in enumerate(stages[: len(stages) - unfinished]):
            self.record.log("memory", number=i, **asdict(stage))


@dataclass(frozen=True)
class SearchResult:
    """The network that a search found.

    Args:
        model: The network, without any part of the method: the one that was given, changed in place.
        axes: Its axes.
        plans: Every change of shape, in order.
        measure: What the target counts: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        target: The largest allowed size.
        before: The size before the search.
        size: The size now.
        saved: ``operations``, ``filters`` and ``weights`` → how much of the size each of them saved.
        metric: The name of the score, such as ``accuracy``.
        score: The score on the validation data; higher is better.
        rows: One row per epoch: validation score (``accuracy``), size, allowed size, kept fractions.
    """

    model: nn.Module
    axes: AxisGraph
    plans: tuple[Plan, ...]
    measure: str
    target: float
    before: float
    size: float
    saved: Mapping[str, float]
    metric: str
    score: float
    rows: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        return format_text([self._table()], self._summary())

    def _repr_html_(self) -> str:
        """Return the sizes as an HTML table, for notebooks."""
        return format_html([self._table()], self._summary())

    def _table(self) -> Table:
        rows = [(name, short(value)) for name, value in self.saved.items() if value]
        return Table("", ("removed", self.measure), rows, (1,))

    def _summary(self) -> str:
        sizes = f"{short(self.before)} → {short(self.size)} {self.measure} (target {short(self.target)})"
        return f"{sizes}, validation {self.metric} {self.score:.3f}"


def write_passed(
    folder: RunFolder, search: Search, state: TrainState[SearchState], context: Context, inputs: SearchInputs
) -> None:
    """Write the network that the masks keep at the end of an epoch of the last stage to ``front/EPOCH``.

    Args:
        folder: The run folder; a row with the network's size and validation accuracy is logged.
        search: The method; its state is not changed.
        state: The state of the search at the end of the epoch.
        context: The network at the end of the epoch.
        inputs: What is searched.
    """
    space, own = search.space, state.learner
    if not search.shrinks or space.part(own.stage) != space.part(-1) or not search.trains(own, context):
        return
    sizes: list[float] = []

    def log(kind: str, /, **row: Any) -> None:
        if kind == "levels":
            sizes.append(row["size"])

    model, epoch = clone_model(context.model), context.epoch + 1
    there = replace(context, model=model, epoch=epoch, undo=UndoStore(), log=log)
    learner = replace(search.learner, plan=partial(_finalize, search))
    fitted, _ = finish(learner, Fitted(model, context.axes, replace(state, learner=copy_state(own))), there)
    net, origin = extract_network(fitted.model, inputs.origin, in_place=inputs.in_place)
    measure_statistics(net, context, inputs.schedule.batch_size)
    write_network(net, folder.path / FOLDER / f"{epoch:04d}", origin, inputs)
    accuracy = mean_score(net, context.task.test, context.objective)
    counts = {"parameters": sum(p.numel() for p in net.parameters())}
    counts["nonzero"] = sum(int(p.count_nonzero()) for p in net.parameters())
    folder.log("front", epoch=epoch, size=sizes[-1], accuracy=accuracy, **counts)


def _finalize(search: Search, state: SearchState, context: Context) -> Any:
    return search.finalize(state, context, inf)


def write_network(model: nn.Module, folder: Path, origin: Origin, inputs: SearchInputs) -> None:
    """Write a network that a search left into a folder, with the tokenizer of the network that it started from.

    Args:
        model: The network.
        folder: The folder.
        origin: The record of how to build the network.
        inputs: What was searched.
    """
    start = inputs.start
    store.write_model(replace(start, model=model, origin=origin) if start else model, folder, origin=origin)
