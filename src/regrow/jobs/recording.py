"""Where a run is recorded: in a folder that can be resumed, or nowhere."""

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
from regrow.settings.words import command_line
from regrow.store.errors import StoreError
from regrow.store.run_folder import RunFolder, WritePage
from regrow.store.weights import OutsideTensors
from regrow.training.state import TrainState

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class RunStart:
    """What a run starts from."""

    identity: Mapping[str, Any]
    loaded: Loaded | None  # the network before the run; `None`: it is new
    outside: OutsideTensors | None = None
    # What the result of a call from Python depends on besides settings, as JSON data; `None`: a command
    python_call: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Unrecorded:
    """A run of which nothing is kept, as its recorder and its record: a stand-in for a folder.

    ``wants_measurements``: whether quality is measured, on another rank, which shares the work of rank 0.
    """

    wants_measurements: bool = False
    path: Path = Path()  # a temporary folder, once it has begun
    is_kept: ClassVar[bool] = False

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: there is no earlier run."""
        return {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator["Unrecorded"]:
        """Yield a record with a temporary folder."""
        with TemporaryDirectory(prefix="regrow-") as folder:
            yield replace(self, path=Path(folder))

    def finish(self, record: "Record", seconds: Mapping[str, float]) -> None:
        """Do nothing."""

    def read_record(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return nothing."""
        return []

    def update(self, **fields: object) -> None:
        """Do nothing."""

    def log(
        self, what: str, row: Mapping[str, object] | None = None, /, *, number: int | None = None, **values: object
    ) -> None:
        """Do nothing."""


UNRECORDED = Unrecorded()
Record = RunFolder | Unrecorded
"""A run while it is carried out."""


@dataclass(frozen=True)
class FolderRecorder:
    """Records a run in a folder, where the same run resumes."""

    out: str | Path
    model: str
    command: str
    undo: bool = True
    write_page: WritePage | None = None

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the interrupted run has recorded, if there is one."""
        begun = RunFolder.check(self.out, identity)
        return begun.read_record() if begun else {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Begin or resume the run inside the ``with`` block."""
        loaded = start.loaded
        with RunFolder.create(self.out, **start.identity, command=self.command) as folder:
            recorded = folder.read_record().get("python")
            if recorded is None and start.python_call is not None:
                folder.update(python=start.python_call)
            elif recorded is not None and recorded != start.python_call:
                difference = find_difference(recorded, start.python_call or {})
                raise StoreError(
                    f"{self.out} holds another run: {difference}; give what the interrupted call had (a network of the "
                    "same seed, loaders with shuffle=False), or choose another folder"
                )
            if loaded is not None:
                record_parent(folder, self.model, loaded, undo=self.undo, outside=start.outside)
                folder.update(notes=list(loaded.notes), **describe_input(loaded))
            yield folder

    def finish(self, record: Record, seconds: Mapping[str, float]) -> RunFolder:
        """Complete the run, whose network is saved; return its folder."""
        assert isinstance(record, RunFolder)
        return record.finish(self.write_page, seconds=seconds, stage=describe_stage(record))


Recorder = FolderRecorder | Unrecorded
"""Where a run is recorded."""


@dataclass
class ActiveRun:
    """A run while it is carried out: where it is recorded, the processes that share it, and seconds per stage."""

    recorder: Recorder = UNRECORDED
    ranks: ProcessRank = SINGLE
    progress: Progress = silent
    record: Record = UNRECORDED
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside the ``with`` block, and record it."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
        self.record.update(seconds=self.seconds)

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Begin or resume the record inside the ``with`` block."""
        with self.recorder.begin(start) as self.record:
            yield self.record

    def finish(self) -> RunFolder | None:
        """Complete the record, once the network is saved; return its folder, if there is one."""
        return self.recorder.finish(self.record, self.seconds)

    def record_plan(self, plan: Plan, before: AxisGraph, after: AxisGraph) -> None:
        """Record the only plan of a run, and the axes before and after it."""
        if isinstance(self.record, RunFolder):
            self.record.own_ledger.replace(plan)
            self.record.write_axes(before, after)


@dataclass(frozen=True)
class Invocation:
    """How a command is called, besides its settings."""

    out: str | Path = ""
    code: str = ""
    memory: str = ""  # how much memory the run may use, such as `4GiB`; empty: any
    ranks: ProcessRank = SINGLE  # the processes that share the run; all of them call the command
    announce: Callable[[str], None] = lambda line: None
    progress: Progress = silent
    write_page: WritePage | None = None

    def start_run(self, settings: "DataclassInstance", model: str, *, undo: bool) -> ActiveRun:
        """Return the run that starts from a network of this name; of several processes, rank 0 has the folder."""
        recorder: Recorder = Unrecorded(wants_measurements=True)
        if self.ranks.leads:
            options = {"--code": self.code, "--memory": self.memory, "--out": str(self.out)}
            command = command_line(settings, *(word for option in options.items() if option[1] for word in option))
            recorder = FolderRecorder(self.out, model, command, undo, self.write_page)
        return ActiveRun(recorder, self.ranks, self.progress)


def find_difference(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Return the first input in which a call differs from the interrupted one.

    >>> find_difference({"loss": "L1Loss", "data": {"a": "1"}}, {"loss": "L1Loss", "data": {"a": "2"}})
    'data a was 1, here 2'
    """
    name = next(name for name in {**recorded, **present} if recorded.get(name) != present.get(name))
    was, now = recorded.get(name), present.get(name)
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return f"{name} {find_difference(was, now)}"
    return f"{name} was {was}, here {now}"


def read_history(folder: Record, events: str = "growth") -> TrainState[None]:
    """Read the plans, the accuracy matrix, the task rows and the rows of changes of shape, for a run's checkpoint."""
    if not isinstance(folder, RunFolder):
        return TrainState(None)
    metrics = folder.metrics()
    tasks = [dict(row) for row in metrics if row["what"] == "task"]
    if wrong := [i for i, row in enumerate(tasks) if row["task"] != i]:
        raise StoreError(
            f"{folder.path / 'metrics.jsonl'}: row {wrong[0] + 1} of the kind 'task' is of task "
            f"{tasks[wrong[0]]['task']}, not {wrong[0]}; restore it"
        )
    rows = tuple(tuple(nan if share is None else share for share in row.pop("accuracy", ())) for row in tasks)
    sizes = tuple({name: value for name, value in row.items() if name not in ("what", "name")} for row in tasks)
    changes = tuple({k: v for k, v in row.items() if k != "what"} for row in metrics if row["what"] == events)
    return TrainState(None, rows=rows, plans=folder.own_ledger.plans(), events=changes, sizes=sizes)
