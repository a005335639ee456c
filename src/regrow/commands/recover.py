"""``regrow recover``: recover a pruned model in a run folder of its own, measured on the pruning run's windows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regrow import store
from regrow.amounts import parse_bytes
from regrow.axes import AxisGraph
from regrow.axes.inventory import inventory
from regrow.commands import prune_settings as pruning_run
from regrow.commands.clock import Clock
from regrow.commands.generated import check_stored, fill_generated
from regrow.commands.inputs import SourceHalves, count_windows, describe_sources, read_sources
from regrow.commands.last_cut import LastCut, find_cut
from regrow.commands.measuring import evaluate_text, measure
from regrow.commands.models import load_model
from regrow.commands.parents import check_room, describe_stage, start_from
from regrow.commands.peak_memory import PeakMemory
from regrow.commands.recovering import log_differences, recover, share_recovery
from regrow.commands.recovery_memory import MemoryTerms, predict_recovery
from regrow.commands.same_inputs import check_same_inputs, check_same_settings
from regrow.commands.streamed_recovery import StreamedRecovery, open_recovery
from regrow.commands.trackers import tracking
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import ALONE, Parallel
from regrow.ledger import with_branches_of
from regrow.methods import MethodKind, find_method
from regrow.nets import Loaded
from regrow.nets.devices import choose_device
from regrow.nets.precision import autocasting, check_precision
from regrow.process_memory import read_peak, reset_peak
from regrow.progress import Progress, silent
from regrow.references import names_code
from regrow.run_folder import RunFolder, WritePage
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.recover import CLOSED_FORM, Settings
from regrow.settings.words import command_line
from regrow.streaming.requirements import MemoryPlan
from regrow.tracing import trace


def run(
    settings: Settings,
    out: str | Path,
    progress: Progress = silent,
    *,
    code: str = "",
    track: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
    parallel: Parallel = ALONE,
    write_page: WritePage | None = None,
) -> RunFolder:
    """Recover the model of a finished run, whose last change of shape was a cut, into a new folder.

    The dense model is the copy that the pruning run kept, or is loaded as in that run; sources and evaluation windows
    are the same, and the measurements of the dense and the pruned model are copied. An interrupted call is resumed.

    Args:
        settings: The settings of the recovery; those about the pruning run are read from its folder.
        out: The new run folder: new, empty, or of this very run.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the dense model, if that is the user's own code: the recorded name
            is never imported.
        track: The name of a tracker that gets every measurement, too; empty: none.
        memory: How much memory the run may use, such as ``4GiB``; empty: any. If it is predicted to need more, one that
            trains is refused, and any other reads the networks one block at a time, with the same result.
        announce: Called with one line that says what the run needs of that memory.
        parallel: The processes that train together; this one is rank 0, and the others call :func:`share`.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If the network was not cut, or changed its shape since, or a setting or ``code`` does not fit.
    """
    check_settings(settings)
    find_method(MethodKind.RECOVERY, settings.by).made(settings.by, settings.recovery_settings)
    source = RunFolder.open(settings.run)
    cut = find_cut(source, code)
    measured, origin, wanted = cut.folder.metrics(), cut.settings, _complete(settings, source, cut)
    if settings.by == "bias":
        _check_untrained(settings, source, cut, wanted)
    taken = find_method(MethodKind.RECOVERY, settings.by).defaults({*wanted.recovery_settings, "seed"})
    identity: dict[str, Any] = {"verb": "recover", "settings": record_settings(wanted), "defaults": taken}
    RunFolder.check(out, **identity)
    check_same_settings(parallel.ranks, settings)
    needs, streamed = _plan_memory(settings, source, cut, memory, announce)
    clock, precision = Clock(None), settings.precision or origin.precision
    with clock.stage("load"):
        dense, loaded = streamed.models() if streamed else _load_models(source, cut, parallel.ranks, progress, code)
        check_precision(loaded.model, precision)
        kinds = _read_data(settings, cut, source, loaded, streamed)
        axes = streamed.dense.axes if streamed else _trace_dense(dense, cut)
        cut.plan.check(axes)
    check_same_inputs(parallel.ranks, [] if streamed else [dense.model, loaded.model], kinds)
    check_room(settings.run, loaded, out, undo=settings.undo)
    words = (*(("--code", code) if code else ()), *(("--memory", memory) if memory else ()), "--out", str(out))
    with tracking(RunFolder.create(out, **identity, command=command_line(settings, *words)), track) as folder:
        clock.folder = folder
        start_from(folder, settings.run, loaded, undo=settings.undo)
        kinds = _generate(kinds, cut, settings, dense, parallel.ranks, progress, folder.path, source.path, streamed)
        folder.update(notes=list(dense.notes), sources=describe_sources(pruning_run.source_specs(origin), kinds))
        _copy_measurements(measured, folder)
        number = len(wanted.before) + 1
        with clock.stage("recover"):
            chosen: Any = {"settings": settings.recovery_settings, "seed": settings.seed, "precision": precision}
            pair = streamed.start(folder) if streamed else None
            more: Any = {"number": number, "progress": progress, "parallel": parallel, "streamed": pair}
            recover(folder, loaded.model, dense, axes, cut.plan, kinds.calibration, settings.by, **chosen, **more)
        with clock.stage("save"):
            outside = streamed.outside(loaded, pair.changed) if streamed and pair else None
            store.write_model(loaded, folder.path, outside=outside)
        with clock.stage("evaluate"):
            after = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
            folder.write_axes(*([row.record() for row in inventory(one)] for one in (axes, after)))
            network = streamed.recovered(loaded, after, folder) if streamed else None
            with autocasting(loaded.model, origin.precision):  # as the models before it were evaluated
                given = folder, loaded, after, kinds.evaluation, kinds.seen, "recovered", progress
                perplexities = measure(*given, recoveries=number, ranks=parallel.ranks, network=network)
            log_differences(folder, perplexities, number)
        peak = PeakMemory(needs.limit, needs.needed, read_peak()).record() if needs else None
        return folder.finish(write_page, seconds=clock.seconds, stage=describe_stage(folder), memory=peak)


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
    progress: Progress = silent,
    folder: Path | None = None,
    source: Path | None = None,
    streamed: StreamedRecovery | None = None,
) -> SourceHalves:
    """Return the data with text that the dense model generates, as far as earlier run folders have none of it."""
    specs = pruning_run.source_specs(cut.settings, settings.tokens)
    given: Any = {"known": (cut.folder.path, *([source] if source else [])), "progress": progress, "ranks": ranks}
    given["weights"] = streamed.dense.weights.sums() if streamed and kinds.pending else None
    return fill_generated(kinds, specs, dense, count_windows(specs.tokens, specs.seq_len), folder, **given)


def _plan_memory(
    settings: Settings, source: RunFolder, cut: LastCut, memory: str, announce: Callable[[str], None]
) -> tuple[MemoryTerms | MemoryPlan | None, StreamedRecovery | None]:
    """Predict and announce what a recovery needs of a limit of memory, if there is one; open it block by block."""
    if not memory:
        return None, None
    reset_peak()
    terms = predict_recovery(settings, source.path, cut, parse_bytes(memory))
    if terms.needed > terms.limit and settings.by in CLOSED_FORM:
        streamed = open_recovery(settings, source, cut, terms, announce)
        return streamed.plan, streamed
    terms.check(f"recovery by {settings.by}")
    announce(str(terms))
    return terms, None


def share(settings: Settings, parallel: Parallel, *, code: str = "") -> None:
    """Train and measure the share of this rank in a recovery that rank 0 leads.

    Args:
        settings: The settings of the recovery, the same on all ranks.
        parallel: The processes that train together.
        code: As for :func:`run`.

    Raises:
        ValueError: As :func:`run`.
    """
    check_settings(settings)
    source = RunFolder.open(settings.run)
    cut = find_cut(source, code)
    check_same_settings(parallel.ranks, settings)
    dense, loaded = _load_models(source, cut, parallel.ranks, silent, code)
    kinds = read_sources(pruning_run.source_specs(cut.settings, settings.tokens), loaded)
    axes = _trace_dense(dense, cut)
    check_same_inputs(parallel.ranks, [dense.model, loaded.model], kinds)
    kinds = _generate(kinds, cut, settings, dense, parallel.ranks)
    more: Any = {"settings": settings.recovery_settings, "seed": settings.seed, "parallel": parallel}
    precision = settings.precision or cut.settings.precision
    given = loaded.model, dense, axes, cut.plan, kinds.calibration, settings.by
    share_recovery(*given, **more, precision=precision)
    if loaded.tokenizer is not None:
        with autocasting(loaded.model, cut.settings.precision):
            for _ in evaluate_text(loaded, kinds.evaluation, "recovered", ranks=parallel.ranks):
                pass


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


def _copy_measurements(rows: Sequence[dict[str, Any]], folder: RunFolder) -> None:
    """Copy the measurements of the source run into the run that recovers it."""
    recoveries = 0
    for row in rows:
        recoveries += row["what"] == "recovery"
        if row["what"] in ("perplexity", "choice", "size", "paired", "verify", "recovery"):
            folder.log(**{**({"round": recoveries} if recoveries > 1 else {}), **row})


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


def _load_models(
    source: RunFolder, cut: LastCut, ranks: ProcessRank, progress: Progress, code: str
) -> tuple[Loaded, Loaded]:
    """Load the model before the cut, and the one to recover."""
    spec = pruning_run.model_spec(cut.settings)
    if ranks.several:  # each takes a GPU of its own, whichever the pruning run had
        spec = replace(spec, device=str(choose_device(spec.device.partition(":")[0], ranks)))
    own = replace(spec, name=str(source.path))
    if cut.before:
        recorded = str(cut.folder.run().get("input", ""))
        dense = load_model(replace(spec, name=str(cut.before), input=spec.input or recorded), progress, code)
        dense = replace(dense, origin=replace(dense.origin, name=Path(spec.name).name))
    else:
        dense = load_model(spec, progress, "" if names_code(spec.name) else code)
    loaded = load_model(own, progress, code)
    return dense, replace(dense, model=loaded.model, files=(*dense.files, *loaded.files))
