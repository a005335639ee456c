"""The part of the other ranks in a learning run of several processes: they train, and write nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from regrow.commands.learn_inputs import build_network, read_inputs, trace_network, train_tasks
from regrow.commands.same_inputs import check_same_settings, check_same_tasks
from regrow.commands.starting import load_start
from regrow.commands.task_sequences import fit_tasks, read_sequence, read_tasks
from regrow.distributed import ProcessRank
from regrow.distributed.exchange import broadcast_record
from regrow.distributed.parallel import Parallel
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.learn import Settings
from regrow.store.run_record import convert_settings
from regrow.training.resuming import receive_start


def announce_run(
    ranks: ProcessRank, settings: Settings, run: Path, old: tuple[str, ...], recorded: object = None
) -> None:
    """Tell the other ranks, which call :func:`share`, what is learned.

    Args:
        ranks: The processes; this one is rank 0.
        settings: The settings of the run, with all sequences of tasks.
        run: The folder of the run.
        old: The sequences that the run had before.
        recorded: The record of their tasks, if it replaces data that are missing.
    """
    message = {"settings": record_settings(settings), "run": str(run.resolve()), "old": list(old), "tasks": recorded}
    broadcast_record(ranks, message)


def announce_end(ranks: ProcessRank) -> None:
    """Tell the other ranks, which call :func:`share`, that nothing is left to learn.

    Args:
        ranks: The processes; this one is rank 0.
    """
    broadcast_record(ranks)


def share(ranks: ProcessRank, settings: Settings | None, *, code: str = "") -> None:
    """Train with rank 0, which leads the run.

    Args:
        ranks: The processes; this one is not rank 0.
        settings: The settings of a new run, the same on all ranks; ``None``: rank 0 adds tasks to a run.
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code.

    Raises:
        ValueError: If a setting, the network or a sequence is not usable; says which, and the remedy.
    """
    if settings:
        check_settings(settings)
        check_same_settings(ranks, settings)
    message: dict[str, Any] | None = broadcast_record(ranks)
    if message is None:
        return
    run = None if settings else Path(message["run"])
    settings = settings or convert_settings(message["settings"], Settings)
    start = load_start(settings.model, settings.tasks, settings.input, run=run, code=code)
    inputs, old = read_inputs(settings, start, ranks), tuple(message["old"])
    tasks = read_tasks(replace(inputs.tasks, sequences=old), message["tasks"])
    if added := settings.tasks[len(old) :]:
        more = (task for spec in added for task in read_sequence(spec, inputs.tasks))
        tasks = fit_tasks([*tasks, *more], inputs.tasks)
    model, _ = build_network(inputs, tasks)
    axes = trace_network(inputs, model, tasks)
    check_same_tasks(ranks, model, tasks)
    model, axes, state = receive_start(ranks, model, axes, inputs.learner.state)
    train_tasks(inputs, tasks, model, axes, state, Parallel(ranks, by_rows=True))
