"""Recover a network whose last change of shape was a cut, whether a run folder or given in Python, on every rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from regrow import store
from regrow.core.amounts import parse_bytes
from regrow.core.axes import AxisGraph
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.process_memory import reset_peak
from regrow.core.progress import Progress, silent
from regrow.core.references import names_code
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import ALONE, Parallel
from regrow.jobs import prune_settings as pruning_run
from regrow.jobs.generated import check_stored, fill_generated
from regrow.jobs.inputs import SourceHalves, count_windows, describe_sources, read_sources
from regrow.jobs.last_cut import LastCut, find_cut
from regrow.jobs.measuring import measure_run
from regrow.jobs.models import load_model
from regrow.jobs.recording import Clock, Invocation, Record, Recorder, RunStart
from regrow.jobs.recovering import log_differences, recover
from regrow.jobs.recovery_memory import predict_recovery
from regrow.jobs.same_inputs import check_same_inputs, check_same_settings
from regrow.jobs.streamed_recovery import StreamedRecovery, open_recovery
from regrow.methods import MethodKind, find_method
from regrow.nets import Loaded
from regrow.nets.devices import choose_device
from regrow.nets.precision import check_precision
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.recover import CLOSED_FORM, Settings
from regrow.store.ledger import with_branches_of
from regrow.store.run_folder import RunFolder
from regrow.streaming.requirements import MemoryPlan, MemoryTerms, record_peak
from regrow.tracing import trace


@dataclass(frozen=True)
class RecoverInputs:
    """What a run recovers, and on which data.

    Args:
        dense: The network before the cut.
        loaded: The network after the cut.
        axes: The axes of the dense network.
        plan: The plan of the cut.
        data: The data to learn from, and for evaluation.
        evaluated: The precision in which the networks before were evaluated.
        objective: What the network is trained for; ``None``: what fits the labels.
        generate: Returns the data with the text that the dense network generates; gets the run.
        measured: The measurements of the networks before and after the cut; ``None``: only their sizes are measured.
        describe: Returns what is recorded of the data.
        call: What the result depends on besides settings, for a call from Python.
        streamed: Both networks one block at a time; ``None``: they are in memory.
        memory: What the run needs of a limit of memory; ``None``: there is none.
    """

    dense: Loaded
    loaded: Loaded
    axes: AxisGraph
    plan: Plan
    data: SourceHalves
    evaluated: str = "float32"
    objective: Objective | None = None
    generate: Callable[[SourceHalves, Record], SourceHalves] = lambda data, record: data
    measured: Sequence[dict[str, Any]] | None = None
    describe: Callable[[SourceHalves], list[dict[str, object]] | None] = lambda data: None
    call: dict[str, object] | None = None
    streamed: StreamedRecovery | None = None
    memory: MemoryTerms | MemoryPlan | None = None


@dataclass(frozen=True)
class RecoverResult:
    """The result of a recovery.

    Args:
        row: What the method returned, with ``by``, ``tokens`` and ``seconds``.
        folder: The finished run folder; ``None``: nothing was recorded.
    """

    row: dict[str, Any]
    folder: RunFolder | None


def carry_out(
    settings: Settings,
    inputs: Callable[[Clock], RecoverInputs],
    recorder: Recorder,
    parallel: Parallel = ALONE,
    *,
    progress: Progress = silent,
) -> RecoverResult:
    """Recover a network whose last change of shape was a cut, and record it. An interrupted run is resumed.

    Args:
        settings: The settings of the run.
        inputs: Opens the networks and the data, and times that.
        recorder: Where the run is recorded: rank 0 has a folder, or nothing is kept.
        parallel: The processes that train together; all of them call this.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If a setting, a network or the data are not usable; says which, and the remedy.
    """
    check_settings(settings)
    method = find_method(MethodKind.RECOVERY, settings.by)
    method.made(settings.by, settings.recovery_settings)
    taken = method.defaults({*settings.recovery_settings, "seed"})
    identity = {"verb": "recover", "settings": record_settings(settings), "defaults": taken}
    recorder.check(identity)
    clock, ranks, number = Clock(None), parallel.ranks, len(settings.before) + 1
    with clock.stage("load"):
        opened = inputs(clock)
        dense, loaded, streamed = opened.dense, opened.loaded, opened.streamed
        precision = settings.precision or opened.evaluated
        check_precision(loaded.model, precision)
        opened.plan.check(opened.axes)
    check_same_inputs(ranks, [] if streamed else [dense.model, loaded.model], opened.data)
    with recorder.begin(RunStart(identity, loaded, call=opened.call)) as record:
        clock.folder = record
        data = opened.generate(opened.data, record)
        record.update(notes=list(dense.notes), sources=opened.describe(data))
        _record_cut(record, opened, progress)
        pair = streamed.start(record.path) if streamed else None
        with clock.stage("recover"):
            row = recover(
                record,
                loaded.model,
                dense,
                opened.axes,
                opened.plan,
                data.calibration,
                settings.by,
                settings=settings.recovery_settings,
                seed=settings.seed,
                number=number,
                precision=precision,
                objective=opened.objective,
                progress=progress,
                parallel=parallel,
                streamed=pair,
            )
        if record.kept:
            outside = streamed.outside(loaded, pair.changed) if streamed and pair else None
            with clock.stage("save"):
                store.write_model(loaded, record.path, outside=outside)
        if record.measured and (ranks.leads or loaded.tokenizer is not None):
            with clock.stage("evaluate"):
                _measure_recovered(record, opened, data, number, ranks, progress)
        record.update(memory=record_peak(opened.memory) if opened.memory else None)
        return RecoverResult(row, recorder.finish(record, clock.seconds))


def _measure_recovered(
    record: Record, inputs: RecoverInputs, data: SourceHalves, number: int, ranks: ProcessRank, progress: Progress
) -> None:
    """Log size and quality of the recovered network, and how far it is from the networks before."""
    loaded, streamed = inputs.loaded, inputs.streamed
    after = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    record.write_axes(inputs.axes, after)
    perplexities = measure_run(
        record,
        loaded,
        after,
        data.evaluation,
        data.seen,
        "recovered",
        progress,
        precision=inputs.evaluated,  # as the models before it were evaluated
        objective=inputs.objective,
        network=streamed.recovered(loaded, after, record.path) if streamed else None,
        ranks=ranks,
        recoveries=number,
    )
    log_differences(record, perplexities, number)


def _record_cut(record: Record, inputs: RecoverInputs, progress: Progress) -> None:
    """Record what is known of the networks before and after the cut; where nothing is, their sizes."""
    if inputs.call is not None and isinstance(record, RunFolder) and not len(record.ledger):
        record.ledger.append(inputs.plan)  # the ledger begins with the cut that is made up for
        record.update(parent={**record.run()["parent"], "plans": 1})
    if inputs.measured is not None:
        _copy_measurements(inputs.measured, record)
    elif record.kept:
        loaded = inputs.loaded
        cut = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
        for network, axes, name in ((inputs.dense, inputs.axes, "dense"), (loaded, cut, "pruned")):
            measure_run(record, network, axes, (), frozenset(), name, progress)


def run(settings: Settings, invocation: Invocation, *, fsdp: bool = False) -> RunFolder:
    """Recover the model of a finished run, as ``regrow recover`` does, and return the folder.

    The dense model is the copy that the pruning run kept, or is loaded as in that run; sources and evaluation windows
    are the same, and the measurements of the dense and the pruned model are copied.

    Args:
        settings: The settings of the recovery; those about the pruning run are read from its folder.
        invocation: How the command was called. A run that is predicted to need more memory is refused if it trains; any
            other reads the networks one block at a time, with the same result.
        fsdp: Whether networks and training state are sharded among the processes.

    Raises:
        ValueError: If the network was not cut, or changed its shape since, or a setting or ``code`` does not fit.
    """
    check_settings(settings)
    find_method(MethodKind.RECOVERY, settings.by).made(settings.by, settings.recovery_settings)
    source, ranks, progress = RunFolder.open(settings.run), invocation.ranks, invocation.progress
    cut = find_cut(source, invocation.code)
    measured, complete = cut.folder.metrics(), _complete(settings, source, cut)
    if settings.by == "bias":
        _check_untrained(settings, source, cut, complete)

    def open_inputs(clock: Clock) -> RecoverInputs:
        check_same_settings(ranks, settings)
        needs, streamed = _plan_memory(settings, source, cut, invocation)
        dense, loaded = streamed.models() if streamed else _load_models(source, cut, invocation)
        data = _read_data(settings, cut, source, loaded, streamed)
        return RecoverInputs(
            dense,
            loaded,
            streamed.dense.axes if streamed else _trace_dense(dense, cut),
            cut.plan,
            data,
            cut.settings.precision,
            generate=lambda data, record: _generate(
                data, cut, settings, dense, ranks, progress, record, source, streamed
            ),
            measured=measured,
            describe=partial(describe_sources, pruning_run.source_specs(cut.settings)),
            streamed=streamed,
            memory=needs,
        )

    recorder = invocation.recorder(settings, settings.run, undo=settings.undo)
    carry_out(complete, open_inputs, recorder, Parallel(ranks, fsdp), progress=progress)
    return RunFolder(Path(invocation.out))


def _read_data(
    settings: Settings, cut: LastCut, source: RunFolder, loaded: Loaded, streamed: StreamedRecovery | None
) -> SourceHalves:
    """Read the data; without the dense model in memory, all text that it generates must be in earlier run folders."""
    specs = pruning_run.source_specs(cut.settings, settings.tokens)
    kinds = read_sources(specs, loaded)
    if streamed and kinds.pending:
        known, windows = (cut.folder.path, source.path), count_windows(specs.tokens, specs.seq_len)
        check_stored(kinds, specs, streamed.dense.loaded, windows, known, streamed.dense.weights.sums())
    return kinds


def _generate(
    kinds: SourceHalves,
    cut: LastCut,
    settings: Settings,
    dense: Loaded,
    ranks: ProcessRank,
    progress: Progress,
    record: Record,
    source: RunFolder,
    streamed: StreamedRecovery | None,
) -> SourceHalves:
    """Return the data with text that the dense model generates, as far as earlier run folders have none of it."""
    specs = pruning_run.source_specs(cut.settings, settings.tokens)
    return fill_generated(
        kinds,
        specs,
        dense,
        count_windows(specs.tokens, specs.seq_len),
        record.path if record.kept else None,
        known=(cut.folder.path, source.path),
        progress=progress,
        ranks=ranks,
        weights=streamed.dense.weights.sums() if streamed and kinds.pending else None,
    )


def _plan_memory(
    settings: Settings, source: RunFolder, cut: LastCut, invocation: Invocation
) -> tuple[MemoryTerms | MemoryPlan | None, StreamedRecovery | None]:
    """Predict and announce what a recovery needs of a limit of memory, if there is one; open it block by block."""
    if not invocation.memory:
        return None, None
    reset_peak()
    terms = predict_recovery(settings, source.path, cut, parse_bytes(invocation.memory))
    if terms.needed > terms.limit and settings.by in CLOSED_FORM:
        streamed = open_recovery(settings, source, cut, terms, invocation.announce)
        return streamed.plan, streamed
    terms.check(f"recovery by {settings.by}")
    invocation.announce(str(terms))
    return terms, None


def _trace_dense(dense: Loaded, cut: LastCut) -> AxisGraph:
    """Return the axes of the dense network, with its modules if the cut dropped some."""
    axes = trace(dense.model, *dense.example.args, **dense.example.kwargs)
    return with_branches_of([cut.plan], dense.model, axes)


def _check_untrained(settings: Settings, source: RunFolder, cut: LastCut, wanted: Settings) -> None:
    """Raise ValueError if the network was trained since its cut, which may have moved its biases."""
    if wanted.before or cut.folder.path != source.path or cut.settings.reconstruct:
        fitted = ["reconstruction"] if cut.settings.reconstruct else []
        moved = ", ".join((*fitted, *wanted.before)) or source.run()["verb"]
        raise ValueError(
            f"{settings.run} was trained by {moved} since its cut, which may have moved its biases; "
            "bias comes first, on the pruned run"
        )


def _copy_measurements(rows: Sequence[dict[str, Any]], record: Record) -> None:
    """Copy the measurements of the source run into the run that recovers it."""
    recoveries = 0
    for row in rows:
        recoveries += row["what"] == "recovery"
        if row["what"] in ("perplexity", "choice", "size", "paired", "verify", "recovery"):
            record.log(**{**({"round": recoveries} if recoveries > 1 else {}), **row})


def _complete(settings: Settings, source: RunFolder, cut: LastCut) -> Settings:
    """Return the settings, completed from the folder of the run to recover and the cut behind it."""
    data = cut.folder.run()
    known = data["settings"]
    inner = known if data["verb"] == "prune" else known["pruning"]
    before = [*known["before"], known["by"]] if data["verb"] == "recover" else [inner["recover"]]
    done = tuple(name for name in before if name)
    method, keep = "+".join([inner["method"], *done, settings.by]), inner["keep"]
    name = source.path.resolve().name
    return replace(settings, run=name, pruning=inner, before=done, model=inner["model"], method=method, keep=keep)


def _load_models(source: RunFolder, cut: LastCut, invocation: Invocation) -> tuple[Loaded, Loaded]:
    """Load the model before the cut, and the one to recover."""
    spec, ranks, code = pruning_run.model_spec(cut.settings), invocation.ranks, invocation.code
    if ranks.several:  # each takes a GPU of its own, whichever the pruning run had
        spec = replace(spec, device=str(choose_device(spec.device.partition(":")[0], ranks)))
    own = replace(spec, name=str(source.path))
    if cut.before:
        recorded = str(cut.folder.run().get("input", ""))
        dense = load_model(replace(spec, name=str(cut.before), input=spec.input or recorded), invocation.progress, code)
        dense = replace(dense, origin=replace(dense.origin, name=Path(spec.name).name))
    else:
        dense = load_model(spec, invocation.progress, "" if names_code(spec.name) else code)
    loaded = load_model(own, invocation.progress, code)
    return dense, replace(dense, model=loaded.model, files=(*dense.files, *loaded.files))
