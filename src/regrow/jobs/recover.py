"""Recover a network whose last change of shape was a cut, whether a run folder or given in Python, on every rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from regrow import store
from regrow.core.axes import AxisGraph
from regrow.core.names import names_function
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.process_memory import reset_peak
from regrow.distributed import SINGLE
from regrow.distributed.parallel import Parallel
from regrow.evaluation import Perplexity
from regrow.jobs.inputs import (
    SourceHalves,
    SourceSpecs,
    check_generated_stored,
    check_same_inputs,
    check_same_settings,
    complete_data,
    read_sources,
)
from regrow.jobs.measuring import EvaluationData, log_pairs, measure_network, round_column
from regrow.jobs.memory_needs import open_to_recover
from regrow.jobs.models import load_model, trace_loaded
from regrow.jobs.pruning_inputs import make_model_spec, make_source_specs
from regrow.jobs.recording import ActiveRun, Invocation, Record, RunStart
from regrow.jobs.recovery_steps import LastCut, find_last_cut, recover
from regrow.jobs.run_networks import StreamedRecovery
from regrow.methods import MethodKind, find_method
from regrow.methods.recovery import RecoveryTask, check_divisible
from regrow.nets import Loaded
from regrow.nets.devices import check_precision, choose_device
from regrow.settings.declaration import check_settings
from regrow.settings.recover import CLOSED_FORM, Settings
from regrow.store.ledger import with_branches_of
from regrow.store.run_folder import RunFolder
from regrow.streaming.requirements import MemoryPlan
from regrow.surgery import verify


@dataclass(frozen=True)
class RecoverInputs:
    """What a run recovers, and on which data."""

    dense: Loaded  # the network before the cut
    loaded: Loaded  # the network to recover
    axes: AxisGraph  # those before the cut
    plan: Plan  # that of the cut
    data: SourceHalves  # recovered on the calibration halves, measured on the evaluation halves
    evaluation_precision: str = "float32"  # as in the pruning run, so that measurements can be compared
    objective: Objective | None = None  # what the network is trained for; `None`: what fits the labels
    specs: SourceSpecs | None = None  # the sources of the data; `None`: they have no names
    text_folders: tuple[Path, ...] = ()  # run folders that may have the text that the model generates
    # The measurements of the networks before and after the cut; `None`: these are measured
    rows: Sequence[dict[str, Any]] | None = None
    python_call: dict[str, object] | None = None  # what the result depends on besides settings, for a call from Python
    streamed: StreamedRecovery | None = None  # both networks one block at a time; `None`: they are in memory
    memory: MemoryPlan | None = None  # what the run needs of a limit of memory; `None`: there is none


def recover_network(
    settings: Settings, open_inputs: Callable[[ActiveRun], RecoverInputs], run: ActiveRun
) -> dict[str, Any]:
    """Recover a network after a cut, in place if it is in memory, and record the run; an interrupted one is resumed.

    All processes of the run call this, and train together. Returns the method's summary, with ``tokens`` and
    ``seconds``. Mistakes in the settings and inputs (``open_inputs`` is called once) raise before anything is written.
    """
    check_settings(settings)
    method = find_method(MethodKind.RECOVERY, settings.by)
    method.create(settings.by, settings.recovery_settings)
    defaults = method.defaults({*settings.recovery_settings, "seed"})
    identity = {"verb": "recover", "settings": asdict(settings), "defaults": defaults}
    run.recorder.check(identity)
    with run.stage("load"):
        opened = open_inputs(run)
        dense, loaded, streamed = opened.dense, opened.loaded, opened.streamed
        precision = settings.precision or opened.evaluation_precision
        check_precision(loaded.model, precision)
        opened.plan.check(opened.axes)
        check_divisible(opened.data.calibration)
    check_same_inputs(run.ranks, [] if streamed else [dense.model, loaded.model], opened.data)
    with run.begin(RunStart(identity, loaded, python_call=opened.python_call)) as record:
        weights = streamed.dense.weights.sums() if streamed and opened.data.has_pending_text else None
        data = complete_data(run, opened.data, opened.specs, dense, others=opened.text_folders, weights=weights)
        record.update(notes=list(dense.notes))
        _record_cut(run, opened)
        pair = streamed.open_pair(record.path) if streamed else None
        with run.stage("recover"):
            task = RecoveryTask(loaded.model, dense.model, opened.axes, opened.plan, data.calibration, settings.seed)
            task = replace(task, objective=opened.objective, streamed=pair)
            task = replace(task, progress=run.progress, parallel=Parallel(run.ranks))
            origin, number = dense.origin.record(), len(settings.before) + 1
            passes = "float32" if settings.by in CLOSED_FORM else precision
            summary = recover(record, task, settings.by, settings.recovery_settings, origin=origin, precision=passes)
            record.log("recovery", {"by": settings.by, **summary, **round_column(number)})
        if record.is_kept:
            outside = streamed.outside(loaded, pair.changed) if streamed and pair else None
            with run.stage("save"):
                store.write_model(loaded, record.path, outside=outside)
        if record.wants_measurements and (run.ranks.leads or loaded.tokenizer is not None):
            with run.stage("evaluate"):
                _measure_recovered(run, replace(opened, data=data), number)
        record.update(memory=opened.memory.record() if opened.memory else None)
        run.finish()
        return summary


def _measure_recovered(run: ActiveRun, inputs: RecoverInputs, number: int) -> None:
    """Log size and quality after recovery ``number`` (from 1), and differences from the networks before; write axes."""
    loaded, streamed, record = inputs.loaded, inputs.streamed, run.record
    after = trace_loaded(loaded)
    if isinstance(record, RunFolder):
        record.write_axes(inputs.axes, after)
    network = streamed.open_recovered(loaded, after, record.path) if streamed else None
    data = EvaluationData(inputs.data, inputs.objective, inputs.evaluation_precision)
    perplexities = measure_network(run, loaded, after, data, "recovered", network=network, recoveries=number)
    _log_differences(record, perplexities, number)


def _log_differences(record: Record, perplexities: Mapping[str, Perplexity], number: int) -> None:
    """Log the paired differences in log-perplexity, recovered minus pruned and minus dense, of sources both measured.

    ``perplexities``: source → that of the recovered model, after recovery ``number`` (from 1); others are in the run.
    """
    rows = {(row["model"], row["source"]): row for row in record.metrics() if row["what"] == "perplexity"}
    for name, after in perplexities.items():
        for model in ("pruned", "dense"):  # a page takes the last: what is left of the damage
            row = rows.get((model, name), {})
            nll = row.get("nll_per_window", [])
            if row.get("tokens") == sum(after.tokens) and len(nll) == len(after.nll) and None not in nll:
                before = Perplexity(name, tuple(nll), after.tokens, after.bytes, after.origin)
                log_pairs(record, {name: before}, {name: after}, {"of": [model, "recovered"], **round_column(number)})


def _record_cut(run: ActiveRun, inputs: RecoverInputs) -> None:
    """Log measurements before and after the cut, ``inputs.rows`` or made now; in a call from Python, also the plan."""
    record = run.record
    if inputs.python_call is not None and isinstance(record, RunFolder) and not len(record.ledger):
        record.ledger.append(inputs.plan)  # the ledger begins with the cut that is made up for
        record.update(parent={**record.read_record()["parent"], "plans": 1})
    recoveries = 0
    for row in inputs.rows or ():
        recoveries += row["what"] == "recovery"
        if row["what"] in ("perplexity", "choice", "size", "paired", "verify", "recovery"):
            record.log(row["what"], {**round_column(recoveries), **row})
    if inputs.rows is None and record.is_kept:
        dense, loaded = inputs.dense, inputs.loaded
        cut = trace_loaded(loaded)
        data, alone = EvaluationData(inputs.data, inputs.objective), replace(run, ranks=SINGLE)
        before = measure_network(alone, dense, inputs.axes, data, "dense")
        proof = verify(dense.model, inputs.axes, inputs.plan)
        record.log("verify", **asdict(proof), dtype="float64")
        log_pairs(record, before, measure_network(alone, loaded, cut, data, "pruned"))


def recover_named(settings: Settings, invocation: Invocation) -> RunFolder:
    """Recover the model of a finished run, as ``regrow recover`` does, and return the new folder.

    The dense model is the copy that the pruning run kept, or is loaded as in that run. Sources and evaluation windows
    are the same; measurements of the dense and the pruned model are copied. A run that is predicted to exceed its
    memory is refused if it trains; any other reads the networks one block at a time, with the same result.
    """
    source = RunFolder.open(settings.run)
    cut = find_last_cut(source, invocation.code)
    inherited = _complete_settings(settings, source, cut)
    open_inputs = partial(open_named, settings, invocation, source, cut)
    recover_network(inherited, open_inputs, invocation.start_run(settings, settings.run, undo=settings.undo))
    return RunFolder(Path(invocation.out))


def open_named(
    settings: Settings, invocation: Invocation, source: RunFolder, cut: LastCut, run: ActiveRun
) -> RecoverInputs:
    """Open the networks before and after ``cut``, the last of ``source``, by block if they exceed memory, and data."""
    check_same_settings(run.ranks, settings)
    memory, streamed = _open_streamed(settings, source, cut, invocation)
    dense, loaded = streamed.models() if streamed else _load_models(source, cut, invocation)
    if streamed:
        axes = streamed.dense.axes
    else:
        axes = trace_loaded(dense)
        axes = with_branches_of([cut.plan], dense.model, axes)  # of modules that the cut dropped
    specs, text_folders = make_source_specs(cut.settings, settings.tokens), (cut.folder.path, source.path)
    data = read_sources(specs, loaded)
    if streamed and data.has_pending_text:  # a network that is read block by block cannot generate
        check_generated_stored(specs, streamed.dense.loaded, text_folders, streamed.dense.weights.sums())
    inputs = RecoverInputs(
        dense, loaded, axes, cut.plan, data, cut.settings.precision, specs=specs, text_folders=text_folders
    )
    return replace(inputs, rows=cut.folder.metrics(), streamed=streamed, memory=memory)


def _open_streamed(
    settings: Settings, source: RunFolder, cut: LastCut, invocation: Invocation
) -> tuple[MemoryPlan | None, StreamedRecovery | None]:
    """Predict what a recovery needs of ``--memory``, and open both networks to be read by block if the plan says so.

    Returns ``None`` for the plan without a limit, and for the networks that fit.
    """
    if not invocation.memory:
        return None, None
    reset_peak()
    dense, small, plan = open_to_recover(settings, source, cut, invocation)
    if not plan.streams:
        return plan, None
    if cut.before:
        origin = replace(dense.loaded.origin, name=Path(cut.settings.model).name)
        dense = replace(dense, loaded=replace(dense.loaded, origin=origin))
    return plan, StreamedRecovery(dense, small, plan)


def _complete_settings(settings: Settings, source: RunFolder, cut: LastCut) -> Settings:
    """Return the settings with those fields filled in that tell of the pruning run and the recoveries since."""
    record = cut.folder.read_record()
    recorded = record["settings"]
    pruning, before = recorded, ()
    if record["verb"] != "prune":
        pruning, before = recorded["pruning"], (*recorded["before"], recorded["by"])
    return replace(
        settings,
        run=source.path.resolve().name,
        pruning=pruning,
        before=before,
        model=pruning["model"],
        method="+".join([pruning["method"], *before, settings.by]),
        keep=pruning["keep"],
    )


def _load_models(source: RunFolder, cut: LastCut, invocation: Invocation) -> tuple[Loaded, Loaded]:
    """Return the model before the cut, from ``before/`` if the run has that, and that of ``source``, to recover."""
    spec, ranks, code = make_model_spec(cut.settings), invocation.ranks, invocation.code
    if ranks.several:  # each takes a GPU of its own, whichever the pruning run had
        spec = replace(spec, device=str(choose_device(spec.device.partition(":")[0], ranks)))
    if cut.before:
        recorded = str(cut.folder.read_record().get("input", ""))
        dense = load_model(replace(spec, name=str(cut.before), input=spec.input or recorded), invocation.progress, code)
        dense = replace(dense, origin=replace(dense.origin, name=Path(spec.name).name))
    else:
        dense = load_model(spec, invocation.progress, "" if names_function(spec.name) else code)
    loaded = load_model(replace(spec, name=str(source.path)), invocation.progress, code)
    return dense, replace(dense, model=loaded.model, files=(*dense.files, *loaded.files))
