"""Recover a network whose last change of shape was a cut, whether a run folder or given in Python, on every rank."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from regrow import store
from regrow.core.amounts import parse_bytes
from regrow.core.axes import AxisGraph
from regrow.core.names import names_code
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.process_memory import reset_peak
from regrow.core.progress import Progress, silent
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import ALONE, Parallel
from regrow.evaluation import Perplexity
from regrow.jobs.inputs import SourceHalves, SourceSpecs, check_stored, describe_sources, fill_generated, read_sources
from regrow.jobs.measuring import log_pairs, measure_run
from regrow.jobs.models import DTYPES, load_model
from regrow.jobs.prune_settings import model_spec, source_specs
from regrow.jobs.recording import Clock, Invocation, Record, Recorder, RunStart
from regrow.jobs.recovering import LastCut, find_cut, log_differences, recover
from regrow.jobs.same_inputs import check_same_inputs, check_same_settings
from regrow.jobs.streamed import needs_of_model, start_streaming
from regrow.jobs.streamed_recovery import StreamedRecovery, plan_recovery, predict_recovery
from regrow.methods import MethodKind, find_method
from regrow.methods.recovery import RecoveryTask
from regrow.nets import Loaded
from regrow.nets.devices import check_precision, choose_device
from regrow.settings.declaration import check_settings
from regrow.settings.recover import CLOSED_FORM, Settings
from regrow.store.ledger import with_branches_of
from regrow.store.run_folder import RunFolder
from regrow.streaming.opening import open_network
from regrow.streaming.requirements import MemoryPlan, MemoryTerms, record_peak
from regrow.surgery import verify
from regrow.tracing import trace


@dataclass(frozen=True)
class RecoverInputs:
    """What a run recovers, and on which data."""

    dense: Loaded
    loaded: Loaded
    axes: AxisGraph
    plan: Plan
    data: SourceHalves
    evaluated: str = "float32"
    objective: Objective | None = None  # what the network is trained for; `None`: what fits the labels
    specs: SourceSpecs | None = None  # the sources of the data; `None`: they have no names
    known: tuple[Path, ...] = ()
    # The measurements of the networks before and after the cut; `None`: these are measured
    measured: Sequence[dict[str, Any]] | None = None
    call: dict[str, object] | None = None
    streamed: StreamedRecovery | None = None  # both networks one block at a time; `None`: they are in memory
    memory: MemoryTerms | MemoryPlan | None = None  # what the run needs of a limit of memory; `None`: there is none


def carry_out(
    settings: Settings,
    inputs: Callable[[Clock], RecoverInputs],
    recorder: Recorder,
    parallel: Parallel = ALONE,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Recover a network whose last change of shape was a cut, and record it. An interrupted run is resumed."""
    check_settings(settings)
    method = find_method(MethodKind.RECOVERY, settings.by)
    method.made(settings.by, settings.recovery_settings)
    taken = method.defaults({*settings.recovery_settings, "seed"})
    identity = {"verb": "recover", "settings": asdict(settings), "defaults": taken}
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
        data, specs = opened.data, opened.specs
        if specs and data.pending:
            data = fill_generated(
                data,
                specs,
                dense,
                folder=record.path if record.kept else None,
                known=opened.known,
                progress=progress,
                ranks=ranks,
                weights=streamed.dense.weights.sums() if streamed else None,
            )
        sources = describe_sources(specs, data) if specs else None
        record.update(notes=list(dense.notes), sources=sources)
        _record_cut(record, opened, progress)
        pair = streamed.start(record.path) if streamed else None
        with clock.stage("recover"):
            task = RecoveryTask(
                loaded.model,
                dense.model,
                opened.axes,
                opened.plan,
                data.calibration,
                settings.seed,
                progress=progress,
                objective=opened.objective,
                parallel=parallel,
                streamed=pair,
            )
            origin, changed = dense.origin.record(), settings.recovery_settings
            row = recover(record, task, settings.by, changed, origin=origin, number=number, precision=precision)
        if record.kept:
            outside = streamed.outside(loaded, pair.changed) if streamed and pair else None
            with clock.stage("save"):
                store.write_model(loaded, record.path, outside=outside)
        if record.measured and (ranks.leads or loaded.tokenizer is not None):
            with clock.stage("evaluate"):
                _measure_recovered(record, opened, data, number, ranks, progress)
        record.update(memory=record_peak(opened.memory) if opened.memory else None)
        recorder.finish(record, clock.seconds)
        return row


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
        data,
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
    """Record the cut, and the measurements of the networks before and after it."""
    if inputs.call is not None and isinstance(record, RunFolder) and not len(record.ledger):
        record.ledger.append(inputs.plan)  # the ledger begins with the cut that is made up for
        record.update(parent={**record.run()["parent"], "plans": 1})
    recoveries = 0
    for row in inputs.measured or ():
        recoveries += row["what"] == "recovery"
        if row["what"] in ("perplexity", "choice", "size", "paired", "verify", "recovery"):
            record.log(**{**({"round": recoveries} if recoveries > 1 else {}), **row})
    if inputs.measured is None and record.kept:
        loaded = inputs.loaded
        cut = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)

        def measure(network: Loaded, axes: AxisGraph, name: str) -> dict[str, Perplexity]:
            return measure_run(record, network, axes, inputs.data, name, progress, objective=inputs.objective)

        before = measure(inputs.dense, inputs.axes, "dense")
        proof = verify(inputs.dense.model, inputs.axes, inputs.plan)
        record.log("verify", **asdict(proof), dtype="float64")
        log_pairs(record, before, measure(loaded, cut, "pruned"), {})


def run(settings: Settings, invocation: Invocation, *, fsdp: bool = False) -> RunFolder:
    """Recover the model of a finished run, as ``regrow recover`` does, and return the folder.

    The dense model is the copy that the pruning run kept, or is loaded as in that run; sources and evaluation windows
    are the same, and the measurements of the dense and the pruned model are copied.
    """
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
        if streamed:
            axes = streamed.dense.axes
        else:
            axes = trace(dense.model, *dense.example.args, **dense.example.kwargs)
            axes = with_branches_of([cut.plan], dense.model, axes)  # of modules that the cut dropped
        specs, known = source_specs(cut.settings, settings.tokens), (cut.folder.path, source.path)
        data = read_sources(specs, loaded)
        if streamed and data.pending:  # a network that is read block by block cannot generate
            check_stored(specs, streamed.dense.loaded, known, streamed.dense.weights.sums())
        return RecoverInputs(
            dense,
            loaded,
            axes,
            cut.plan,
            data,
            cut.settings.precision,
            specs=specs,
            known=known,
            measured=measured,
            streamed=streamed,
            memory=needs,
        )

    recorder = invocation.recorder(settings, settings.run, undo=settings.undo)
    carry_out(complete, open_inputs, recorder, Parallel(ranks, fsdp), progress=progress)
    return RunFolder(Path(invocation.out))


def _plan_memory(
    settings: Settings, source: RunFolder, cut: LastCut, invocation: Invocation
) -> tuple[MemoryTerms | MemoryPlan | None, StreamedRecovery | None]:
    """Predict and announce what a recovery needs of a limit of memory, if there is one; open it block by block."""
    if not invocation.memory:
        return None, None
    reset_peak()
    terms = predict_recovery(settings, source.path, cut, parse_bytes(invocation.memory))
    if terms.needed > terms.limit and settings.by in CLOSED_FORM:
        streamed = _open_streamed(settings, source, cut, terms, invocation.announce)
        return streamed.plan, streamed
    terms.check(f"recovery by {settings.by}")
    invocation.announce(str(terms))
    return terms, None


def _open_streamed(
    settings: Settings, source: RunFolder, cut: LastCut, terms: MemoryTerms, announce: Callable[[str], None]
) -> StreamedRecovery:
    """Open the networks of a recovery that does not fit into its memory, and predict what it needs block by block."""
    spec = model_spec(cut.settings)
    dtype = DTYPES.get(spec.dtype)
    dense = open_network(str(cut.before or spec.name), dtype)
    if cut.before:
        origin = replace(dense.loaded.origin, name=Path(spec.name).name)
        dense = replace(dense, loaded=replace(dense.loaded, origin=origin))
    plan, lacking = plan_recovery(settings, cut, dense, terms)
    needs = {"recovery where the run dropped whole modules": bool(cut.plan.drop)}
    start_streaming(dense, plan, needs | needs_of_model(spec, cut.settings.precision, dense), announce)
    recovered = open_network(str(source.path), dtype)
    recovered.check_output()
    return StreamedRecovery(dense, recovered, plan, lacking)


def _check_untrained(settings: Settings, source: RunFolder, cut: LastCut, wanted: Settings) -> None:
    """Raise ValueError if the network was trained since its cut, which may have moved its biases."""
    if wanted.before or cut.folder.path != source.path or cut.settings.reconstruct:
        fitted = ["reconstruction"] if cut.settings.reconstruct else []
        moved = ", ".join((*fitted, *wanted.before)) or source.run()["verb"]
        raise ValueError(
            f"{settings.run} was trained by {moved} since its cut, which may have moved its biases; "
            "bias comes first, on the pruned run"
        )


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
    spec, ranks, code = model_spec(cut.settings), invocation.ranks, invocation.code
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
