"""Where a run is recorded: in a folder that can be resumed, or nowhere."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.distributed import SINGLE, ProcessRank
from regrow.jobs.models import describe_input
from regrow.jobs.parents import describe_stage, record_parent
from regrow.nets import Loaded
from regrow.settings.words import format_command_line
from regrow.store.errors import StoreError
from regrow.store.run_folder import RunFolder, WritePage
from regrow.store.weights import OutsideTensors
from regrow.training.state import TrainState

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class RunStart:
    """What a run starts from; it is recorded, and an interrupted run is resumed only by one with the same."""

    identity: Mapping[str, Any]  # `verb`, `settings` and `defaults` of `run.json`
    loaded: Loaded | None  # the network before the run; `None`: it is new
    outside: OutsideTensors | None = None  # the tensors of a network without numbers; `None`: the network has them
    # What the result of a call from Python depends on besides settings, as JSON data; `None`: a command
    python_call: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Unrecorded:
    """The recorder and the record of a run without a folder: a null object, which keeps nothing.

    ``wants_measurements``: whether quality is measured all the same, by a rank that shares the work of rank 0.
    """

    wants_measurements: bool = False
    path: Path = Path()  # a temporary folder, once it has begun
    is_kept: ClassVar[bool] = False

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``{}``: there is no earlier run."""
        return {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator["Unrecorded"]:
        """Context manager: yield a record with a temporary folder, deleted after the block."""
        with TemporaryDirectory(prefix="regrow-") as folder:
            yield replace(self, path=Path(folder))

    def finish(self, record: "Record", seconds: Mapping[str, float]) -> None:
        """Do nothing."""

    def read_record(self) -> dict[str, Any]:
        """Return ``{}``: there is no ``run.json``."""
        return {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return ``[]``: no rows are kept."""
        return []

    def update(self, **fields: object) -> None:
        """Do nothing."""

    def log(
        self, what: str, row: Mapping[str, object] | None = None, /, *, number: int | None = None, **values: object
    ) -> None:
        """Do nothing."""


UNRECORDED = Unrecorded()
# What a run writes while it is carried out: its folder, or nothing.
Record = RunFolder | Unrecorded


@dataclass(frozen=True)
class FolderRecorder:
    """Makes the folder of a run, or resumes the run in it, and completes it at the end."""

    out: str | Path  # the run folder
    model: str  # the model that the run starts from, by name or as a folder
    command: str  # the command line or call, as users repeat it
    undo: bool = True  # whether the model is copied into the folder before the run
    write_page: WritePage | None = None  # writes `report.html` at the end; `None`: no page

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``run.json`` of the interrupted run with this identity, ``{}`` if none; StoreError for another run."""
        interrupted = RunFolder.check(self.out, identity)
        return interrupted.read_record() if interrupted else {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Context manager: make or resume the run's folder, copy the model that it starts from, and yield the folder.

        After an error before anything was measured, the files of a new run are deleted. Raises StoreError if the folder
        holds another run, or that of a call with other data, loss or weights.
        """
        loaded = start.loaded
        with RunFolder.create(self.out, **start.identity, command=self.command) as folder:
            recorded = folder.read_record().get("python")
            if recorded is None and start.python_call is not None:
                folder.update(python=start.python_call)
            elif recorded is not None and recorded != start.python_call:
                difference = describe_difference(recorded, start.python_call or {})
                raise StoreError(
                    f"{self.out} holds another run: {difference}; give what the interrupted call had (a network of the "
                    "same seed, loaders with shuffle=False), or choose another folder"
                )
            if folder.resumed:
                logging.getLogger("regrow").info("resuming the run in %s", self.out)
            try:
                if loaded is not None:
                    record_parent(folder, self.model, loaded, undo=self.undo, outside=start.outside)
                    folder.update(notes=list(loaded.notes), **describe_input(loaded))
                yield folder
            except Exception:
                folder.discard_unmeasured()
                raise

    def finish(self, record: Record, seconds: Mapping[str, float]) -> RunFolder:
        """Complete ``run.json``, write the page, and move all to the final folder, which is returned.

        ``record``: the folder, in which the network must be saved; ``seconds``: stage of the run → time spent.
        """
        assert isinstance(record, RunFolder)
        return record.finish(self.write_page, seconds=seconds, stage=describe_stage(record))


# What begins and completes the record of a run.
Recorder = FolderRecorder | Unrecorded


@dataclass
class ActiveRun:
    """A run while it is carried out: where it is recorded, the processes that share it, and seconds per stage."""

    recorder: Recorder = UNRECORDED
    ranks: ProcessRank = SINGLE
    progress: Progress = silent
    record: Record = UNRECORDED  # that of the recorder, once the run has begun
    seconds: dict[str, float] = field(default_factory=dict)  # stage → seconds spent in this process

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context manager: announce a stage, add the seconds that its block takes to those of ``name``, record them."""
        self.progress(0, 1, {"plan": "planning", "distil": "distilling"}.get(name, f"{name.removesuffix('e')}ing"))
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
        self.record.update(seconds=self.seconds)

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Context manager: begin or resume the record, which is yielded and is ``record`` from then on."""
        self.progress(0, 1, "preparing")
        with self.recorder.begin(start) as self.record:
            yield self.record

    def finish(self) -> RunFolder | None:
        """Complete the record by :meth:`FolderRecorder.finish`; return the finished folder, ``None`` without one."""
        return self.recorder.finish(self.record, self.seconds)

    def record_plan(self, plan: Plan, before: AxisGraph, after: AxisGraph) -> None:
        """Write the run's only plan to ``ledger.json``, replacing an earlier attempt's, and axes to ``axes.json``."""
        if isinstance(self.record, RunFolder):
            self.record.own_ledger.replace(plan)
            self.record.write_axes(before, after)


@dataclass(frozen=True)
class Invocation:
    """How a command is called, besides its settings."""

    out: str | Path = ""  # the run folder, or the file that an export writes
    code: str = ""  # the user's function that builds the network, `pkg.mod:fn`
    memory: str = ""  # how much memory the run may use, such as `4GiB`; empty: any
    ranks: ProcessRank = SINGLE  # the processes that share the run; all of them call the command
    announce: Callable[[str], None] = lambda line: None  # called with lines for the user
    progress: Progress = silent
    write_page: WritePage | None = None  # writes `report.html`, at the end of the run; `None`: no page

    def start_run(self, settings: "DataclassInstance", model: str, *, undo: bool) -> ActiveRun:
        """Return a run, not begun yet, on network ``model``; rank 0 records it in ``out``, with a copy if ``undo``."""
        recorder: Recorder = Unrecorded(wants_measurements=True)
        if self.ranks.leads:
            options = {"--code": self.code, "--memory": self.memory, "--out": str(self.out)}
            words = [word for name, value in options.items() if value for word in (name, value)]
            command = format_command_line(settings, *words)
            recorder = FolderRecorder(self.out, model, command, undo, self.write_page)
        return ActiveRun(recorder, self.ranks, self.progress)


def describe_difference(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Return in words the first entry in which two mappings, which must differ, do so.

    >>> describe_difference({"loss": "L1Loss", "data": {"a": "1"}}, {"loss": "L1Loss", "data": {"a": "2"}})
    'data a was 1, here 2'
    """
    name = next(name for name in {**recorded, **present} if recorded.get(name) != present.get(name))
    was, now = recorded.get(name), present.get(name)
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return f"{name} {describe_difference(was, now)}"
    return f"{name} was {was}, here {now}"


def read_history(folder: Record, events: str = "growth") -> TrainState[None]:
    """Return the plans, scores, sizes and events that a run recorded, which its checkpoint does not repeat.

    ``events``: the kind of metrics rows that tell of events. Without a folder there are none. Raises StoreError if rows
    of tasks are missing.
    """
    if not isinstance(folder, RunFolder):
        return TrainState(None)
    metrics = folder.metrics()
    tasks = [dict(row) for row in metrics if row["what"] == "task"]
    for i, row in enumerate(tasks):
        if row["task"] != i:
            raise StoreError(
                f"{folder.path / 'metrics.jsonl'}: row {i + 1} of the kind 'task' is of task {row['task']}, not {i}; "
                "restore it"
            )
    rows = tuple(tuple(nan if share is None else share for share in row.pop("accuracy", ())) for row in tasks)
    sizes = tuple({name: value for name, value in row.items() if name not in ("what", "name")} for row in tasks)
    changes = tuple({k: v for k, v in row.items() if k != "what"} for row in metrics if row["what"] == events)
    return TrainState(None, rows=rows, plans=folder.own_ledger.plans(), events=changes, sizes=sizes)
