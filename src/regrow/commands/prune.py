"""``regrow prune``: calibrate, plan, cut, measure and save, in a run folder that can be resumed."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from regrow import evaluation, store
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.commands import measuring
from regrow.commands import pruning as prune
from regrow.commands.calibration import calibrate, open_journal
from regrow.commands.clock import Clock
from regrow.commands.cutting import CutRun, record_plan
from regrow.commands.example_inputs import record_input
from regrow.commands.generated import count_generated, fill_generated, generate_in_run
from regrow.commands.inputs import SourceHalves, describe_sources, read_sources
from regrow.commands.later_plans import LaterPlan, check_later_plans
from regrow.commands.models import load_model
from regrow.commands.parents import check_room, describe_stage, start_from
from regrow.commands.prune_settings import budget_of, model_spec, record_defaults, seeded_settings, source_specs
from regrow.commands.reconstruction import check_amount, check_reconstruction, choose_sources
from regrow.commands.recovering import broadcast_recovered, check_recovery, log_differences, recover
from regrow.commands.same_inputs import check_same_inputs
from regrow.commands.score_summary import write_scores
from regrow.commands.shared_work import SharedWork
from regrow.commands.streamed import StreamedRun, open_streamed
from regrow.commands.streamed_reconstruction import StreamedReconstruction
from regrow.commands.trackers import tracking
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.exchange import broadcast_record, everywhere
from regrow.methods.pruning.pruner import Pruner, plan_cut, with_modules
from regrow.nets import Loaded
from regrow.nets.loaded import check_same_files
from regrow.nets.precision import autocasting, check_precision
from regrow.plan import Plan
from regrow.process_memory import reset_peak
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder, WritePage
from regrow.scoring import weights_of
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.prune import Settings
from regrow.settings.words import command_line
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.requirements import record_peak
from regrow.tracing import trace
from regrow.training import tune


@dataclass(frozen=True)
class _PruneJob:
    """The data that the parts of a pruning run share."""

    settings: Settings
    folder: RunFolder
    loaded: Loaded
    kinds: SourceHalves
    clock: Clock
    progress: Progress
    code: str = ""
    streamed: StreamedRun | None = None
    ranks: ProcessRank = SINGLE
    shared: SharedWork = field(default_factory=SharedWork)

    def measure(
        self, axes: AxisGraph, name: str, network: StreamedNetwork | None = None, ranks: ProcessRank | None = None
    ) -> dict[str, evaluation.Perplexity]:
        """Measure and log the model in its present state, under a name."""
        kinds = self.kinds
        loaded = self.loaded if network is None else replace(self.loaded, model=network.model)
        with self.clock.stage("evaluate"), autocasting(loaded.model, self.settings.precision):
            given = self.folder, loaded, axes, kinds.evaluation, kinds.seen, name, self.progress
            known = self.shared.dense if name == "dense" else None
            return measuring.measure(*given, network=network, ranks=ranks or self.ranks, known=known)


def plan_only(
    settings: Settings,
    progress: Progress = silent,
    *,
    code: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Return the plan that a pruning run would make, without a run folder.

    Args:
        settings: The settings of the run.
        progress: Called with (steps done, steps in all, what is being done).
        code: As for :func:`run`.
        memory: As for :func:`run`.
        announce: As for :func:`run`.

    Raises:
        ValueError: As :func:`run`.
    """
    check_settings(settings)
    method = prune.build_pruner(settings.method, seeded_settings(settings))
    budget = budget_of(settings)
    streamed, _ = open_streamed(memory, settings, model_spec(settings), method, announce)
    loaded = streamed.opened.loaded if streamed else load_model(model_spec(settings), progress, code)
    kinds = read_sources(source_specs(settings), loaded)
    axes = streamed.opened.axes if streamed else trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    axes = with_modules(method, loaded.model, axes)
    budget = prune.with_timing(loaded.model, axes, budget, progress=progress)
    prune.check_pruning(method, axes, budget, kinds.calibration)
    kinds = fill_generated(kinds, source_specs(settings), loaded, count_generated(settings), progress=progress)
    temporary = TemporaryDirectory(prefix="regrow-") if streamed else nullcontext("")
    with autocasting(loaded.model, settings.precision), temporary as place:
        visits = streamed.with_results(Path(place)).network() if streamed else None
        given = loaded.model, axes, method, kinds.calibration, progress, settings.batch_size
        evidence = prune.collect_evidence(*given, budget.units(axes), visits=visits)
        weights = streamed.opened.weights.parameters() if streamed else None
        basis = method, loaded.model, axes, budget, evidence
        return plan_cut(*basis, weights=weights, progress=progress, visits=visits).plan


def run(
    settings: Settings,
    out: str | Path,
    progress: Progress = silent,
    *,
    code: str = "",
    track: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
    ranks: ProcessRank = SINGLE,
    shared: SharedWork | None = None,
    write_page: WritePage | None = None,
) -> RunFolder:
    """Prune a model and write a run folder with model, plan and measurements.

    All mistakes in the settings are found before the folder is made; an interrupted run with the same settings is
    resumed.

    Args:
        settings: The settings of the run.
        out: The run folder: new, empty, or of this very run.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code: the
            recorded name is never imported.
        track: The name of a tracker that gets every measurement, too; empty: none.
        memory: How much memory the run may use, such as ``4GiB``: a network that does not fit is read one block at a
            time, with the same result. Empty: it is loaded whole.
        announce: Called with one line that says how the run stays within that memory.
        ranks: The processes that share the work; this one is rank 0, and the others call ``share_pruning.share``.
        shared: What earlier runs of this process, which differ in method and keep alone, need not do again; gets what
            this one does. The result is the same. Later runs that it names are checked before this one begins.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If a setting, the model, or a source is not usable; says which, and the remedy.
    """
    check_settings(settings)
    method = prune.build_pruner(settings.method, seeded_settings(settings))
    budget = budget_of(settings)
    check_recovery(settings.recover, settings.sources)
    check_reconstruction(settings, several=ranks.several)
    recorded = {"settings": record_settings(settings), "defaults": record_defaults(settings)}
    identity: dict[str, Any] = {"verb": "prune", **recorded}
    RunFolder.check(out, **identity)
    clock, shared = Clock(None), shared or SharedWork()
    later = [LaterPlan.of(one) for one in shared.later]
    reset_peak()
    with clock.stage("load"):
        given = memory, settings, model_spec(settings), method, announce
        streamed, shared.memory = open_streamed(*given, earlier=shared.memory, ranks=ranks, later=later)
        loaded = streamed.opened.loaded if streamed else load_model(model_spec(settings), progress, code)
        check_precision(loaded.model, settings.precision)
        kinds = read_sources(source_specs(settings), loaded)
        check_amount(settings, loaded, kinds)
    with clock.stage("trace"):
        axes = streamed.opened.axes if streamed else shared.trace(loaded)
        axes = with_modules(method, loaded.model, axes)
    check_same_inputs(ranks, [streamed.opened.weights if streamed else loaded.model], kinds)
    with clock.stage("time"):
        budget = _with_timing(loaded, axes, budget, Path(out), progress)
    prune.check_pruning(method, axes, budget, kinds.calibration)
    check_later_plans(later, loaded.model, axes, budget.timing, kinds.calibration)
    shared.later = ()
    check_room(settings.model, loaded, out, undo=settings.undo)
    words = (*(("--code", code) if code else ()), *(("--memory", memory) if memory else ()), "--out", str(out))
    with tracking(RunFolder.create(out, **identity, command=command_line(settings, *words)), track) as folder:
        clock.folder = folder
        streamed = streamed.with_results(folder.path) if streamed else None
        outside = streamed.unchanged() if streamed else None
        start_from(folder, settings.model, loaded, undo=settings.undo, outside=outside)
        kinds = generate_in_run(settings, kinds, loaded, clock, shared, progress, ranks)
        job = _PruneJob(settings, folder, loaded, kinds, clock, progress, code, streamed, ranks, shared)
        _record_inputs(job, budget)
        plan = _make_plan(job, axes, method, budget)
        broadcast_record(ranks, {"plan": plan.to_json(), "folder": str(folder.path.resolve())})
        _cut(job, axes, plan, budget)
        if shared.memory:
            folder.update(memory=record_peak(shared.memory))
        return folder.finish(write_page, seconds=clock.seconds, stage=describe_stage(folder))


def _with_timing(loaded: Loaded, axes: AxisGraph, budget: Budget, out: Path, progress: Progress) -> Budget:
    """Return the budget with the times of the model; a resumed run keeps those recorded, since they decide the plan."""
    begun = RunFolder.open_unfinished(out)
    known = begun.run().get("timing") if begun else None
    return prune.with_timing(loaded.model, axes, budget, known=known, progress=progress)


def _record_inputs(job: _PruneJob, budget: Budget) -> None:
    """Record what the run starts from: notes on the model, the sources, the example input, and times."""
    sources = describe_sources(source_specs(job.settings), job.kinds)
    job.folder.update(notes=list(job.loaded.notes), sources=sources, **record_input(job.loaded))
    if budget.timing:
        job.folder.update(timing=budget.timing.record())


def _make_plan(job: _PruneJob, axes: AxisGraph, method: Pruner, budget: Budget) -> Plan:
    """Calibrate, choose the units that stay, and return the plan."""
    folder, loaded, progress = job.folder, job.loaded, job.progress
    passes = partial(autocasting, loaded.model, job.settings.precision)
    network = job.streamed.network() if job.streamed else None
    weights = job.shared.columns.over(network.weights.parameters() if network else weights_of(loaded.model))
    with job.clock.stage("calibrate"), passes():
        given = folder, loaded, axes, method, job.kinds.calibration, progress
        more: Any = {"network": network, "ranks": job.ranks, "batch_size": job.settings.batch_size}
        more["units"] = budget.units(axes)
        evidence, key = calibrate(*given, **more, shared=job.shared)
    with job.clock.stage("plan"):
        saved: Any = {**open_journal(folder, key), "weights": weights, "visits": network}
        with passes():
            cut = plan_cut(method, loaded.model, axes, budget, evidence, **saved, progress=progress)
        if cut.plan.notes:
            folder.update(notes=[*loaded.notes, *cut.plan.notes])
        write_scores(folder, weights, axes, cut.plan, cut.scores, evidence)
        if cut.findings:
            folder.write_findings(job.settings.method, cut.findings)
    return cut.plan


def _cut(job: _PruneJob, axes: AxisGraph, plan: Plan, budget: Budget) -> None:
    """Cut the model, measure it before and after, save it, and recover it if that is asked for."""
    settings, folder, loaded, kinds, clock = job.settings, job.folder, job.loaded, job.kinds, job.clock
    if job.streamed:
        _cut_streamed(job, job.streamed, axes, plan, budget)
        return
    cut = CutRun(
        loaded,
        kinds.calibration,
        settings.precision,
        folder,
        job.measure,
        settings.proof,
        settings.reconstruct_settings if settings.reconstruct else None,
        lambda: choose_sources(settings, loaded, kinds),
        partial(_finetune, job) if settings.finetune and loaded.tokenizer is None else None,
        clock.stage,
        job.progress,
    )
    traced, (axes, _) = axes, cut.carry_out(axes, plan, budget)
    if settings.recover:
        with clock.stage("recover"):
            _recover(job, traced, plan)
            if loaded.tokenizer is not None:  # evaluations of text are shared
                broadcast_recovered(job.ranks, loaded.model)
        log_differences(folder, job.measure(axes, "recovered"))


def _cut_streamed(job: _PruneJob, streamed: StreamedRun, axes: AxisGraph, plan: Plan, budget: Budget) -> None:
    """Do what :func:`_cut` does for a network that is larger than memory."""
    folder, proof = job.folder, job.settings.proof
    before = job.measure(axes, "dense", streamed.network())
    fit = StreamedReconstruction(streamed, folder, job.settings.dtype) if job.settings.reconstruct else None
    with job.clock.stage("apply"):
        place: Any = {"place": fit.place if fit else None, "progress": job.progress}
        cut = streamed.cut(folder, plan, proof=proof, ranks=job.ranks, **place)
        record_plan(folder, plan, axes, cut.axes)
    network, first = None, {}
    if fit:
        first = job.measure(cut.axes, "cut", cut.network(fit.place, streamed.results))
        with job.clock.stage("reconstruct"):
            sources = choose_sources(job.settings, job.loaded, job.kinds)
            network = fit.write(axes, plan, sources, job.settings.reconstruct_settings, job.progress)
    broadcast_record(job.ranks, {one.name: one.stat().st_size for one in sorted(folder.path.glob("*.safetensors"))})
    shared = job.ranks if everywhere(job.ranks, True) else SINGLE  # whether the other ranks see these files
    after = job.measure(cut.axes, "pruned", network or cut.network(folder.path, streamed.results), shared)
    measuring.log_budget(folder, cut.loaded.model, axes, cut.axes, budget)
    measuring.log_pairs(folder, before, after, first)


def _finetune(job: _PruneJob) -> None:
    for source in job.kinds.calibration:
        epochs, seed = job.settings.finetune, job.settings.seed
        tune.finetune(job.loaded.model, source, epochs=epochs, seed=seed, progress=job.progress)


def _recover(job: _PruneJob, traced: AxisGraph, plan: Plan) -> None:
    """Recover the cut model with the help of the dense one, which is loaded again, and save it."""
    settings, folder, loaded, progress = job.settings, job.folder, job.loaded, job.progress
    specs = source_specs(settings, settings.recover_tokens)
    texts = read_sources(specs, loaded, job.kinds.generated).calibration
    dense, by, seed = load_model(model_spec(settings), progress, job.code), settings.recover, settings.seed
    check_same_files(loaded, dense)
    more: Any = {"precision": settings.precision, "progress": progress}
    recover(folder, loaded.model, dense, traced, plan, texts, by, seed=seed, **more)
    store.write_model(loaded, folder.path)
