"""Learn tasks one after the other, whether named on the command line or given in Python, on every rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from regrow import store
from regrow.core.process_memory import reset_peak
from regrow.core.progress import Progress, silent
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import Parallel, broadcast_record
from regrow.jobs.learn_inputs import BegunRun, LearnInputs, open_named
from regrow.jobs.learning_record import LearningRecord, record_matrix
from regrow.jobs.recording import (
    Clock,
    FolderRecorder,
    Invocation,
    Record,
    Recorder,
    RunStart,
    read_history,
)
from regrow.jobs.same_inputs import check_same_tasks
from regrow.jobs.trackers import tracking
from regrow.methods import MethodKind, find_method, refuse_recorded_code
from regrow.nets.files import check_files
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.learn import Settings
from regrow.store.errors import StoreError
from regrow.store.replacing import clear_leftovers
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import check_repeatable, convert_settings
from regrow.streaming.requirements import record_peak
from regrow.training.checkpoint import CHECKPOINT, History, check_checkpoint, count_tasks, write_checkpoint
from regrow.training.continual import accuracy_matrix, untrained_accuracies
from regrow.training.continual import learn as train_tasks
from regrow.training.fit import Fitted
from regrow.training.learner import Context, write_replacements
from regrow.training.resuming import read_start
from regrow.training.state import TrainState


def carry_out(
    settings: Settings,
    inputs: Callable[[Clock], LearnInputs],
    recorder: "Recorder | ExtensionRecorder",
    ranks: ProcessRank = SINGLE,
    *,
    progress: Progress = silent,
) -> Fitted[Any]:
    """Learn tasks one after the other, and record it; return the network and what was measured.

    All mistakes in the settings and inputs are found before anything is recorded. An interrupted run is resumed.

    Args:
        settings: The settings of the run.
        inputs: Opens the network and the tasks, and times that.
        recorder: Where the run is recorded: rank 0 has a folder, or nothing is kept.
        ranks: The processes that train together; all of them call this.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If a setting, the network or a task is not usable; says which, and the remedy.
    """
    check_settings(settings)
    taken = find_method(MethodKind.CONTINUAL, settings.method).defaults({*settings.method_settings, "seed"})
    identity = {"verb": "learn", "settings": record_settings(settings), "defaults": taken}
    recorder.check(identity)
    clock = Clock(None)
    reset_peak()
    opened = inputs(clock)
    loaded, tasks, needs = opened.loaded, opened.tasks, opened.memory
    check_same_tasks(ranks, loaded.model, tasks)
    with recorder.begin(RunStart(identity, None if opened.new else loaded, call=opened.call)) as record:
        clock.folder = record
        record.update(sequence=opened.sequence)
        with clock.stage("learn"):
            fitted = _learn(opened, record, ranks, progress)
        fitted.model.eval()
        if record.kept:
            with clock.stage("save"):
                store.write_model(replace(loaded, model=fitted.model), record.path)
        if missing := [task.name for task in tasks if task.gone]:
            record.log("gone", tasks=missing)
        record.log("matrix", tasks=[task.name for task in tasks], **record_matrix(accuracy_matrix(fitted.state)))
        record.update(memory=record_peak(needs) if needs else None)
        recorder.finish(record, clock.seconds)
        return fitted


def _learn(inputs: LearnInputs, record: Record, ranks: ProcessRank, progress: Progress) -> Fitted[Any]:
    """Train the network on all tasks, or resume."""
    learner, tasks, schedule, history = inputs.learner, inputs.tasks, inputs.schedule, None
    file = record.path / (inputs.checkpoint or CHECKPOINT)
    if record.kept:
        file.parent.mkdir(exist_ok=True)
    if file.is_file():
        history = read_history(record) if isinstance(record, RunFolder) else History()
    model, axes, state = read_start(ranks, history, file, inputs.loaded.model, inputs.axes, learner.state)
    rows, parallel = LearningRecord(record, tasks), Parallel(ranks, by_rows=True)
    rows.resume(state)
    if inputs.untrained and 0 < len(state.before) < len(tasks):  # tasks have been added since
        before = untrained_accuracies(inputs.untrained().model, tasks, schedule, ranks)
        state = replace(state, before=state.before + before[len(state.before) :])

    def keep(now: TrainState[Any], context: Context) -> None:
        rows.write(now)
        if ranks.leads and inputs.checkpoint:
            write_checkpoint(file, context.model, now, logged=rows.events if record.kept else None)

    fitted = train_tasks(
        model, axes, tasks, learner, schedule, state=state, checkpoint=keep, progress=progress, parallel=parallel
    )
    write_replacements(learner, fitted.state.learner, Context(fitted.model, fitted.axes, tasks[-1], len(tasks) - 1))
    return fitted


def run(settings: Settings, invocation: Invocation) -> RunFolder:
    """Learn the tasks that settings name, as ``regrow learn`` does, and return the folder.

    Args:
        settings: The settings of the run.
        invocation: How the command was called.

    Raises:
        ValueError: As :func:`carry_out`.
    """

    def open_inputs(clock: Clock) -> LearnInputs:
        if invocation.ranks.leads and (begun := RunFolder.open_unfinished(invocation.out)):
            check_checkpoint(begun.path / CHECKPOINT, read_history(begun))
        return open_named(settings, invocation, clock)

    recorder = invocation.recorder(settings, settings.model, undo=settings.undo)
    carry_out(settings, open_inputs, recorder, invocation.ranks, progress=invocation.progress)
    return RunFolder(Path(invocation.out))


def extend(
    invocation: Invocation, more: Sequence[str], *, without_old: bool = False, total: int | None = None
) -> RunFolder:
    """Train the network of a run on further tasks, possibly much later and in another process; all ranks call this.

    A finished run does not change until they are learned. An interrupted call is resumed when it is repeated; a
    completed call is refused when it is repeated, unless ``total`` says that the same sequences come once more.

    Args:
        invocation: How the command was called; ``out`` is the folder of a run, finished or interrupted.
        more: Further sequences, as ``Settings.tasks``; empty to finish an interrupted call.
        without_old: Whether data of finished tasks may be missing; the network is then not evaluated on these.
        total: The number of sequences that the run has in the end; ``None``: its own and ``more``.

    Raises:
        ValueError: If the folder is no learning run, a sequence is not usable, or this very call was completed.
    """
    out, ranks = Path(invocation.out), invocation.ranks
    known = broadcast_record(ranks, _read_begun(out, tuple(more), total) if ranks.leads else None)
    if known is None:
        return RunFolder(out)
    (record, over, added), folder = known, RunFolder.open_unfinished(out) or RunFolder(out)
    was = convert_settings(record["settings"], Settings)
    settings = replace(was, tasks=(*was.tasks, *added))
    # Defaults of this version may differ from those with which the run was begun.
    whole = replace(settings, method_settings={**record["defaults"], **was.method_settings})
    begun = BegunRun(folder.path, was.tasks, over, without_old, record.get("sequence"))
    made = invocation.recorder(settings, was.model, undo=False)
    recorder = ExtensionRecorder(made, record, tuple(more)) if isinstance(made, FolderRecorder) else made
    inputs = partial(open_named, whole, invocation, begun=begun)
    carry_out(settings, inputs, recorder, ranks, progress=invocation.progress)
    return RunFolder(out)


@dataclass(frozen=True)
class ExtensionRecorder:
    """Records tasks that are added to a run in its folder, which does not change until they are learned.

    Args:
        folder: Records the run.
        known: The content of ``run.json`` before.
        more: The sequences of tasks that this call was given.
    """

    folder: FolderRecorder
    known: Mapping[str, Any]
    more: tuple[str, ...]

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the folder was checked when it was read."""
        return {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Open the run for writing inside the ``with`` block.

        Args:
            start: What it starts from.

        Raises:
            StoreError: If another process has changed it since it was read.
        """
        out, command = self.folder.out, self.folder.command
        with tracking(RunFolder.reopen(out), self.folder.track) as folder:
            if folder.run() != self.known:
                raise StoreError(f"{out} was changed by another process meanwhile; run this again")
            defaults = {**start.identity["defaults"], **self.known.get("defaults", {})}
            settings, more = start.identity["settings"], list(self.more) or None
            folder.update(settings=settings, defaults=defaults, command=command, finished=None, extension=more)
            yield folder

    def finish(self, record: Record, seconds: Mapping[str, float]) -> RunFolder:
        """Complete the run, as :meth:`FolderRecorder.finish`.

        Args:
            record: The run.
            seconds: Stage → the time that it took.
        """
        return self.folder.finish(record, seconds)


def _read_begun(
    out: Path, more: tuple[str, ...], total: int | None
) -> tuple[dict[str, Any], int, tuple[str, ...]] | None:
    """Return ``run.json``, the number of tasks that are over, and the sequences to add; ``None`` if all is learned."""
    if out.is_dir():
        check_files(out)
    clear_leftovers(out)
    folder = RunFolder.open_unfinished(out) or RunFolder.open(out)
    record = folder.run()
    if record["verb"] != "learn":
        raise StoreError(f"{out} holds a run of {record['verb']!r}; give the folder of `regrow learn`")
    check_repeatable(out, record)
    was = convert_settings(record["settings"], Settings)
    refuse_recorded_code(was.method, record["command"])
    check_checkpoint(folder.path / CHECKPOINT, read_history(folder))
    added = _added(record.get("extension"), was.tasks, more, total)
    if added or not record.get("finished") or folder.path != out:
        return record, count_tasks(folder.path / CHECKPOINT), added
    if more:
        raise StoreError(
            f"{out} has learned {', '.join(more)} by this very command; to learn the same once more, add "
            f"--total {len(was.tasks) + len(more)}"
        )
    return None


def _added(last: object, tasks: tuple[str, ...], more: tuple[str, ...], total: int | None) -> tuple[str, ...]:
    """Return the sequences that a call adds to those of a run: none if this very call, its last one, has added them."""
    if total is None:
        return () if last == list(more) else more
    if total == len(tasks) and tasks[len(tasks) - len(more) :] == more:
        return ()
    if total != len(tasks) + len(more):
        raise ValueError(
            f"total must be how many sequences of tasks the run has in the end, got {total}; it has {len(tasks)} and "
            f"{len(more)} are to come: --total {len(tasks) + len(more)}"
        )
    return more
