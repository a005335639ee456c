"""Where a run is recorded: in a folder that can be resumed, or nowhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.distributed import SINGLE, ProcessRank
from regrow.jobs.models import record_input
from regrow.jobs.parents import check_room, describe_stage, start_from
from regrow.jobs.trackers import tracking
from regrow.nets import Loaded
from regrow.settings.words import command_line
from regrow.store.errors import StoreError
from regrow.store.run_folder import RunFolder, WritePage
from regrow.store.weights import OutsideTensors
from regrow.training.state import History

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class EmptyRecord:
    """A run of which nothing is kept; a stand-in for :class:`regrow.store.run_folder.RunFolder`.

    Args:
        path: A temporary folder.
        measured: Whether quality is measured: on another rank, which shares the work of rank 0.
    """

    path: Path
    measured: bool = False
    kept: ClassVar[bool] = False

    def run(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return nothing."""
        return []

    def update(self, **fields: object) -> None:
        """Do nothing."""

    def log(self, what: str, *, number: int | None = None, **values: object) -> None:
        """Do nothing."""

    def write_axes(self, before: AxisGraph, after: AxisGraph) -> None:
        """Do nothing."""

    def write_scores(self, metric: str, axes: Mapping[str, Mapping[str, object]]) -> None:
        """Do nothing."""

    def write_findings(self, method: str, findings: Mapping[str, object]) -> None:
        """Do nothing."""


Record = RunFolder | EmptyRecord
"""A run while it is carried out."""


@dataclass
class Clock:
    """Seconds spent in each stage of a run, written to the run folder after every stage.

    Args:
        folder: The run folder; ``None``: nothing is written.
        seconds: Stage → seconds so far.
    """

    folder: Record | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside the ``with`` block, and add it to the seconds of the stage.

        Args:
            name: The stage.
        """
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
        if self.folder:
            self.folder.update(seconds=self.seconds)


def record_plan(record: Record, plan: Plan, before: AxisGraph, after: AxisGraph) -> None:
    """Record the only plan of a run, and the axes before and after it.

    Args:
        record: The run.
        plan: The plan.
        before: The axes before it.
        after: The axes after it.

    Raises:
        StoreError: If the disk is full.
    """
    if isinstance(record, RunFolder):
        record.own_ledger.replace(plan)
    record.write_axes(before, after)


@dataclass(frozen=True)
class RunStart:
    """What a run starts from.

    Args:
        identity: ``verb``, ``settings`` and ``defaults``, as JSON data.
        loaded: The network before the run; ``None``: it is new.
        outside: Its tensors, where it has no numbers.
        call: What the result of a call from Python depends on besides settings, as JSON data; ``None``: a command.
    """

    identity: Mapping[str, Any]
    loaded: Loaded | None
    outside: OutsideTensors | None = None
    call: Mapping[str, object] | None = None


@dataclass(frozen=True)
class NoRecorder:
    """Keeps nothing of a run.

    Args:
        measured: Whether quality is measured: on another rank, which shares the work of rank 0.
    """

    measured: bool = False

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing."""
        return {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Yield a record without content, and a temporary folder."""
        with TemporaryDirectory(prefix="regrow-") as folder:
            yield EmptyRecord(Path(folder), self.measured)

    def finish(self, record: Record, seconds: Mapping[str, float]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class FolderRecorder:
    """Records a run in a folder, where the same run resumes.

    Args:
        out: The folder: new, empty, or of this very run.
        model: The network that the run starts from: the name that was given, or the class of a module.
        command: The command line, or the call, that repeats the run.
        track: The name of a tracker that gets every measurement, too; empty: none.
        undo: Whether the folder keeps a copy of the network that the run starts from.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.
    """

    out: str | Path
    model: str
    command: str
    track: str = ""
    undo: bool = True
    write_page: WritePage | None = None

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the interrupted run has recorded, if there is one.

        Args:
            identity: ``verb``, ``settings`` and ``defaults`` of the run.

        Raises:
            StoreError: If the folder holds something else.
        """
        RunFolder.check(self.out, **identity)
        begun = RunFolder.open_unfinished(self.out)
        return begun.run() if begun else {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Begin or resume the run inside the ``with`` block.

        Args:
            start: What it starts from.

        Raises:
            StoreError: If the folder holds something else, or a run with other inputs or weights.
        """
        loaded = start.loaded
        if loaded is not None:
            check_room(self.model, loaded, self.out, undo=self.undo)
        with tracking(RunFolder.create(self.out, **start.identity, command=self.command), self.track) as folder:
            recorded = folder.run().get("python")
            if recorded is None and start.call is not None:
                folder.update(python=start.call)
            elif recorded is not None and recorded != start.call:
                difference = find_difference(recorded, start.call or {})
                raise StoreError(f"{self.out} holds another run: {difference}, or choose another folder")
            if loaded is not None:
                start_from(folder, self.model, loaded, undo=self.undo, outside=start.outside)
                folder.update(notes=list(loaded.notes), **record_input(loaded))
            yield folder

    def finish(self, record: Record, seconds: Mapping[str, float]) -> RunFolder:
        """Complete the run, whose network is saved; return its folder.

        Args:
            record: The run.
            seconds: Stage → the time that it took.

        Raises:
            StoreError: If the disk is full; the run can be resumed.
        """
        assert isinstance(record, RunFolder)
        return record.finish(self.write_page, seconds=seconds, stage=describe_stage(record))


Recorder = FolderRecorder | NoRecorder
"""Where a run is recorded."""


@dataclass(frozen=True)
class ActiveRun:
    """A run while it is carried out.

    Args:
        record: Where it is recorded.
        ranks: The processes that share it.
        clock: Times its stages.
        progress: Called with (steps done, steps in all, what is being done).
    """

    record: Record
    ranks: ProcessRank
    clock: Clock
    progress: Progress


@dataclass(frozen=True)
class Invocation:
    """How a command is called, besides its settings.

    Args:
        out: The run folder, which rank 0 writes: new, empty, or of this very run.
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code: the
            recorded name is never imported.
        memory: How much memory the run may use, such as ``4GiB``; empty: any.
        track: The name of a tracker that gets every measurement, too; empty: none.
        ranks: The processes that share the run; all of them call the command.
        announce: Called with one line that says how the run stays within its memory.
        progress: Called with (steps done, steps in all, what is being done).
        write_page: Writes the report page into the complete folder, before it replaces ``out``.
    """

    out: str | Path = ""
    code: str = ""
    memory: str = ""
    track: str = ""
    ranks: ProcessRank = SINGLE
    announce: Callable[[str], None] = lambda line: None
    progress: Progress = silent
    write_page: WritePage | None = None

    def command(self, settings: "DataclassInstance") -> str:
        """Return the command line that repeats the run.

        Args:
            settings: The settings of the command.
        """
        options = {"--code": self.code, "--memory": self.memory, "--out": str(self.out)}
        return command_line(settings, *(word for option in options.items() if option[1] for word in option))

    def recorder(self, settings: "DataclassInstance", model: str, *, undo: bool) -> Recorder:
        """Return where the run is recorded: rank 0 has the folder.

        Args:
            settings: The settings of the command.
            model: The name of the network that the run starts from.
            undo: Whether the folder keeps a copy of that network.
        """
        if not self.ranks.leads:
            return NoRecorder(measured=True)
        return FolderRecorder(self.out, model, self.command(settings), self.track, undo, self.write_page)


def find_difference(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return the first input in which a call differs from the interrupted one, and the remedy.

    Args:
        recorded: What the interrupted call had, as JSON data.
        given: What this one has.

    >>> find_difference({"loss": "L1Loss"}, {"loss": "MSELoss"})
    'loss was L1Loss, here MSELoss; give what the interrupted call had'
    """
    name = next(name for name in {**recorded, **given} if recorded.get(name) != given.get(name))
    was, now = recorded.get(name), given.get(name)
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        part = next(part for part in {**was, **now} if was.get(part) != now.get(part))
        was, now = was.get(part), now.get(part)
        if name == "data" and was is not None and now is not None:
            return (
                f"the first batch of {part!r} differs (digest {was:.8}, here {now:.8}); the likely cause is a loader "
                "that shuffles: give prune, grow and recover a loader with shuffle=False"
            )
        name = f"{name} {part!r}"
    if name in ("weights", "dense"):
        whose = "weights" if name == "weights" else "weights of dense"
        return f"the {whose} differ (digest {was}, here {now}); build the network with the same seed"
    was, now = ("not given" if value is None else value for value in (was, now))
    return f"{name} was {was}, here {now}; give what the interrupted call had"


def read_history(folder: RunFolder, events: str = "growth") -> History:
    """Read the plans, the accuracy matrix, the task rows and the growth events of a run, for its checkpoint.

    Args:
        folder: The run folder.
        events: The kind of rows about changes of shape: ``"growth"`` (learning) or ``"commit"`` (search).

    Raises:
        StoreError: If a file is damaged.
    """
    metrics = folder.metrics()
    tasks = [dict(row) for row in metrics if row["what"] == "task"]
    if wrong := [i for i, row in enumerate(tasks) if row["task"] != i]:
        raise StoreError(
            f"{folder.path / 'metrics.jsonl'}: row {wrong[0] + 1} of the kind 'task' is of task "
            f"{tasks[wrong[0]]['task']}, not {wrong[0]}; restore it"
        )
    rows = [tuple(nan if share is None else share for share in row.pop("accuracy", ())) for row in tasks]
    sizes = [{name: value for name, value in row.items() if name not in ("what", "name")} for row in tasks]
    changes = [{k: v for k, v in row.items() if k != "what"} for row in metrics if row["what"] == events]
    return History(folder.own_ledger.plans(), rows, sizes, changes)
