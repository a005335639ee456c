"""``regrow search``: search a space for a network of a given size, retrain it, and test it, in a run folder."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from regrow import evaluation
from regrow.allocation.stages import MemoryStages
from regrow.amounts import Measure, format_bytes
from regrow.axes import AxisGraph
from regrow.candidates import Staged
from regrow.commands import latencies, spaces, stage_memory
from regrow.commands.example_inputs import record_input
from regrow.commands.history import read_history
from regrow.commands.parents import check_room, describe_stage, start_from
from regrow.commands.pareto import write_network, write_passed
from regrow.commands.retraining import retrain
from regrow.commands.same_inputs import check_same_settings, check_same_tasks
from regrow.commands.search_inputs import Parts, Retraining, SearchInputs, read_inputs, read_parts, trace_examples
from regrow.commands.search_record import SearchRecord
from regrow.commands.searching import build_method, measure_statistics, select_known, train_space
from regrow.commands.starting import check_outputs, find_start
from regrow.commands.targets import find_granularities
from regrow.commands.trackers import tracking
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.exchange import broadcast_record
from regrow.distributed.parallel import Parallel
from regrow.evaluation import Latency, fastest_pass
from regrow.evaluation.continual import mean_score
from regrow.methods import MethodKind, find_method
from regrow.methods.search.assembly import Search
from regrow.methods.search.state import SearchState
from regrow.nets.loaded import Origin
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder, WritePage
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.search import Settings, parse_search_target
from regrow.settings.words import command_line
from regrow.sources import Batch, moved
from regrow.surgery import UndoStore
from regrow.tasks import Task, first_examples, input_shape
from regrow.training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from regrow.training.fit import finish
from regrow.training.learner import Context
from regrow.training.resuming import broadcast_start
from regrow.training.state import TrainState

GIVEN = ("target", "measure", "stages", "seed")
"""Names of method settings that the run sets from its own settings."""


def run(
    settings: Settings,
    out: str | Path,
    progress: Progress = silent,
    *,
    code: str = "",
    track: str = "",
    ranks: ProcessRank = SINGLE,
    write_page: WritePage | None = None,
) -> RunFolder:
    """Search, retrain the found network, test it, and write a run folder; an interrupted run is resumed.

    Args:
        settings: The settings of the run.
        out: The run folder: new, empty, or of this very run.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code: the
            recorded name is never imported.
        track: The name of a tracker that gets every measurement, too; empty: none.
        ranks: The processes that train together; this one is rank 0, and the others call ``share_searching.share``.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If a setting, the data or the target is not usable; says which, and the remedy.
    """
    check_settings(settings)
    check_same_settings(ranks, settings)
    RunFolder.check(out, verb="search", settings=record_settings(settings))
    start = find_start(settings.space, settings.data, settings.input, code, progress)
    inputs = read_inputs(settings, start, ranks)
    parts = read_parts(inputs.data)
    _check_cutout(inputs.retraining, parts)
    model, origin, plan = build_space(inputs, parts.search)
    model.to(inputs.device)
    axes = trace_examples(model, parts.search, parts.kwargs)
    batch = Batch((first_examples(parts.search.train, inputs.batch_size).inputs,)).to(inputs.device)
    example = moved(first_examples(parts.test, 1).inputs, inputs.device)
    started = RunFolder.open_unfinished(out)
    place = started.path if started else Path(out)
    begun = (place / CHECKPOINT).is_file()
    timed_target = parse_search_target(inputs.target).measure == Measure.TIME
    table = latencies.read_or_measure(place, model, batch, begun) if timed_target else None
    broadcast_record(ranks, asdict(table) if table else None)
    check_same_tasks(ranks, model, parts.tasks)
    search = build_search(inputs, model, axes, plan, table)
    search.check(Context(model, axes, parts.search, epochs=inputs.epochs, seed=inputs.seed, objective=inputs.objective))
    defaults = {n: v for n, v in search.settings.items() if n not in {*inputs.method_settings, *GIVEN}}
    identity: dict[str, Any] = {"verb": "search", "settings": record_settings(settings), "defaults": defaults}
    if start:
        check_room(settings.space, start, out, undo=settings.undo)
    words = (*(("--code", code) if code else ()), "--out", str(out))
    with tracking(RunFolder.create(out, **identity, command=command_line(settings, *words)), track) as folder:
        if start:
            start_from(folder, settings.space, start, undo=settings.undo)
            folder.update(notes=list(start.notes) or None, **record_input(start))
        if plan is not None:
            folder.log("stages", **asdict(plan))
        if table:
            latencies.write(folder.path, table)
        begun_at = time.perf_counter()
        result, result_origin = _search(folder, inputs, parts, model, axes, origin, search, progress, ranks)
        seconds = {"search": round(time.perf_counter() - begun_at, 3)}
        write_network(result, folder.path / "found", result_origin, inputs.start)
        accuracy = mean_score(result, parts.search.test, inputs.objective)
        folder.log("found", accuracy=accuracy, **evaluation.dense(result, example))
        begun_at = time.perf_counter()
        trained = retrain(folder, inputs.retraining, parts, result, progress, ranks) if inputs.retraining else result
        write_network(trained, folder.path, result_origin, inputs.start)
        if table:
            folder.log("latency", whole=table.total, found=fastest_pass(trained, batch) / 1e6)
        size = evaluation.dense(trained, example)
        accuracy = mean_score(trained, parts.test, inputs.objective)
        folder.log("test", accuracy=accuracy, images=len(parts.test), **size)
        seconds["retrain"] = round(time.perf_counter() - begun_at, 3)
        return folder.finish(write_page, seconds=seconds, stage=describe_stage(folder))


def _search(
    folder: RunFolder,
    inputs: SearchInputs,
    parts: Parts,
    model: nn.Module,
    axes: AxisGraph,
    origin: Origin,
    search: Search,
    progress: Progress,
    ranks: ProcessRank,
) -> tuple[nn.Module, Origin]:
    """Run or resume the search; return the found network as a plain network, and the record of how to build it."""
    place, undo, state = folder.path / CHECKPOINT, UndoStore(), TrainState(search.learner.state)
    history = read_history(folder, "commit") if folder.resumed and place.is_file() else None
    broadcast_start(ranks, history, place)
    if history:
        model, axes, state = read_checkpoint(place, model, axes, search.learner.state, history, undo)
    folder.own_ledger.truncate(len(state.plans))
    if state.learner.recomputed:
        cast(Staged, model).recomputed = True
    watch = stage_memory.MemoryWatch(search, inputs.memory, inputs.batch_size)
    watch.rows.update(state.learner.memory)
    record = SearchRecord(folder, len(folder.own_ledger))

    def write_rows(now: TrainState[SearchState], unfinished: int = 0) -> None:
        record.write(now)
        stages = [*watch.rows.values()]
        for i, one in enumerate(stages[: len(stages) - unfinished]):
            folder.log("memory", number=i, **asdict(one))

    def write(now: TrainState[SearchState], context: Context) -> None:
        if now.epoch:
            write_passed(folder, search, now, context, inputs.batch_size, origin, inputs.start)
        write_rows(now, unfinished=1)  # the last stage may turn out to need more memory
        recomputed = bool(search.rules.space.ends) and cast(Staged, model).recomputed
        own = replace(now.learner, memory=dict(watch.rows), recomputed=recomputed)
        write_checkpoint(place, model, replace(now, learner=own), undo, logged=record.events)

    context = end_context(inputs, parts, model, axes, undo)
    more: dict[str, Any] = {"state": state, "checkpoint": write, "log": record.log, "progress": progress}
    if inputs.memory:
        more["around"] = watch
    fitted = train_space(search, context, inputs.schedule, **more, parallel=Parallel(ranks, by_rows=True))
    write_rows(fitted.state)
    done = len(fitted.state.plans)
    context = replace(context, model=fitted.model, axes=fitted.axes, log=record.log)
    fitted, last = finish(search.learner, fitted, context)
    for plan in last[max(0, len(folder.own_ledger) - done) :]:
        folder.own_ledger.append(plan)
    write_rows(replace(fitted.state, plans=(), events=()))
    found, found_origin = spaces.extract_network(fitted.model, origin)
    measure_statistics(found, context, inputs.batch_size)
    return found, found_origin


def end_context(inputs: SearchInputs, parts: Parts, model: nn.Module, axes: AxisGraph, undo: UndoStore) -> Context:
    """Return the context at the end of a search.

    Args:
        inputs: The inputs of the search.
        parts: Its data.
        model: The network.
        axes: Its present axes.
        undo: The store of what plans removed.
    """
    at: dict[str, Any] = {"seed": inputs.seed, "undo": undo, "objective": inputs.objective}
    return Context(model, axes, parts.search, 0, inputs.epochs, inputs.epochs, **at)


def _check_cutout(retraining: Retraining | None, parts: Parts) -> None:
    side = retraining.cutout if retraining else 0
    if side and side >= (most := min(input_shape(parts.test)[1:])):
        raise ValueError(f"--cutout {side} of pictures of {most} pixels: take 0, for none, to {most - 1}")


def build_space(inputs: SearchInputs, task: Task) -> tuple[nn.Module, Origin, MemoryStages | None]:
    """Return the search space as a network with random weights, its origin, and its stages under a memory budget.

    Args:
        inputs: The inputs of the search.
        task: The data of the search.
    """
    if inputs.start:
        spaces.refuse_stages(inputs.space, inputs.stages, inputs.memory)
        if inputs.start.tokenizer is None:
            check_outputs(inputs.start, task, 1 + max(task.classes))
        return inputs.start.model, inputs.start.origin, None
    entry = find_method(MethodKind.SEARCH, inputs.method)
    measure = parse_search_target(inputs.target).measure
    given = {"measure": str(measure), "levels": find_granularities(measure)}
    search: Search = entry.made(inputs.method, select_known(entry, given) | dict(inputs.method_settings))
    return spaces.build_network(
        inputs.space,
        task,
        stages=inputs.stages,
        memory=inputs.memory,
        batch_size=inputs.batch_size,
        stride=inputs.stride,
        seed=inputs.seed,
        stage_share=search.stage_share,
        masked=search.masked,
    )


def build_search(
    inputs: SearchInputs,
    model: nn.Module,
    axes: AxisGraph,
    plan: MemoryStages | None = None,
    table: Latency | None = None,
) -> Search:
    """Return the search method of a run, with the target, granularities and stages that follow from its inputs.

    Args:
        inputs: The inputs of the search.
        model: The whole space as a network.
        axes: The axes of the space.
        plan: The stages, if a memory budget sets them.
        table: The measured latencies (:func:`regrow.commands.latencies.read_or_measure`), for a target in ms.

    Raises:
        ValueError: If there is no such method, a setting of it is wrong, or it does not search in the planned stages.
    """
    given: dict[str, Any] = {"seed": inputs.seed, "epochs": inputs.epochs}
    search = build_method(inputs.method, inputs.method_settings, model, axes, inputs.target, table=table, **given)
    space = search.rules.space
    if plan is not None and space.ends != plan.ends:
        ends = ", ".join(str(end + 1) for end in plan.ends)
        raise ValueError(
            f"within {format_bytes(inputs.memory)}, stages end at parts {ends}, and {inputs.method} does not search in "
            "these: give more --memory or none, or a method and settings that do"
        )
    return search
