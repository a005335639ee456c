"""Prune a network, whether named on the command line or given in Python, whole or block by block, on every rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from regrow import evaluation
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget, Timing
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.process_memory import reset_peak
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import broadcast_record
from regrow.jobs import measuring
from regrow.jobs import pruning as prune
from regrow.jobs.calibration import calibrate, open_journal, write_scores
from regrow.jobs.cutting import WholeNetwork
from regrow.jobs.generated import count_generated, fill_generated
from regrow.jobs.inputs import SourceHalves, describe_sources, read_sources
from regrow.jobs.later_plans import LaterPlan, check_later_plans
from regrow.jobs.models import load_model
from regrow.jobs.prune_settings import budget_of, model_spec, record_defaults, seeded_settings, source_specs
from regrow.jobs.reconstruction import check_amount, check_reconstruction, choose_sources
from regrow.jobs.recording import Clock, NoRecorder, Record, Recorder, RunStart, record_command, record_plan
from regrow.jobs.recovering import broadcast_recovered, check_recovery, log_differences, recover
from regrow.jobs.same_inputs import check_same_inputs, check_same_settings
from regrow.jobs.shared_work import SharedWork
from regrow.jobs.streamed_run import PrunedNetwork, open_streamed
from regrow.methods.pruning.pruner import Pruner, check_objective, plan_cut, with_modules
from regrow.nets import Loaded
from regrow.nets.loaded import check_same_files
from regrow.nets.precision import autocasting, check_precision
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.prune import Settings
from regrow.store.run_folder import RunFolder, WritePage
from regrow.streaming.requirements import MemoryPlan, record_peak
from regrow.training import tune


@dataclass(frozen=True)
class PruneInputs:
    """What a run prunes, and on which data.

    Args:
        network: The network.
        axes: Its axes.
        data: The data for calibration and evaluation.
        read: Returns calibration data of another amount: (tokens over all sources, generated windows) → sources.
        load_dense: Loads the network before the cut once more, for a recovery.
        objective: What the network is trained for; ``None``: what fits the labels.
        lenient: Whether the data for evaluation are those for calibration, whose labels need not fit.
        describe: Returns what is recorded of the data.
        call: What the result depends on besides settings, for a call from Python.
        memory: How the run stays within a limit of memory; ``None``: there is none.
        timing: The measured times of the network, if they are known.
    """

    network: PrunedNetwork
    axes: AxisGraph
    data: SourceHalves
    read: Callable[[int, Tensor | None], Sequence[Source]]
    load_dense: Callable[[], Loaded] | None = None
    objective: Objective | None = None
    lenient: bool = False
    describe: Callable[[SourceHalves], list[dict[str, object]] | None] = lambda data: None
    call: dict[str, object] | None = None
    memory: MemoryPlan | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class PruneResult:
    """The result of a pruning run.

    Args:
        plan: The plan.
        loaded: The cut network; without numbers, if it was read one block at a time.
        folder: The finished run folder; ``None``: nothing was recorded.
        warnings: What a user must know of the data.
    """

    plan: Plan
    loaded: Loaded
    folder: RunFolder | None
    warnings: tuple[str, ...] = ()


def carry_out(
    settings: Settings,
    inputs: Callable[[Clock], PruneInputs],
    recorder: Recorder,
    ranks: ProcessRank = SINGLE,
    *,
    shared: SharedWork | None = None,
    progress: Progress = silent,
    cuts: bool = True,
) -> PruneResult:
    """Prune a network, and record it.

    All mistakes in the settings and inputs are found before anything is recorded. An interrupted run with the same
    settings is resumed where the recorder has its folder.

    Args:
        settings: The settings of the run.
        inputs: Opens the network and the data, and times that.
        recorder: Where the run is recorded: rank 0 has a folder, or nothing is kept.
        ranks: The processes that share the run; all of them call this with the same settings.
        shared: What earlier runs of this process, which differ in method and keep alone, need not do again; gets what
            this one does. The result is the same. Later runs that it names are checked before this one begins.
        progress: Called with (steps done, steps in all, what is being done).
        cuts: Whether the network is cut; otherwise the run ends with the plan.

    Raises:
        ValueError: If a setting, the model, or a source is not usable; says which, and the remedy.
    """
    check_settings(settings)
    method, budget = prune.build_pruner(settings.method, seeded_settings(settings)), budget_of(settings)
    check_recovery(settings.recover, settings.sources)
    check_reconstruction(settings, several=ranks.several)
    identity = {"verb": "prune", "settings": record_settings(settings), "defaults": record_defaults(settings)}
    recorded, clock, shared = recorder.check(identity), Clock(None), shared or SharedWork()
    reset_peak()
    opened = inputs(clock)
    budget = replace(budget, timing=opened.timing)
    network, model = opened.network, opened.network.loaded.model
    check_precision(model, settings.precision)
    check_amount(settings, opened.data, opened.read, text=network.loaded.tokenizer is not None)
    axes = with_modules(method, model, opened.axes)
    check_same_inputs(ranks, [network.identity], opened.data)
    with clock.stage("time"):
        budget = prune.with_timing(model, axes, budget, known=recorded.get("timing"), progress=progress)
    prune.check_pruning(method, axes, budget, opened.data.calibration)
    check_objective(method, (), opened.objective)
    check_later_plans(
        [LaterPlan.of(later) for later in shared.later], model, axes, budget.timing, opened.data.calibration
    )
    shared.later = ()
    with recorder.begin(RunStart(identity, network.loaded, network.outside, opened.call)) as record:
        clock.folder = record
        network.use_folder(record.path)
        job = _PruneRun(settings, method, budget, opened, record, ranks, shared, clock, progress)
        data = job.generate()
        job = replace(job, data=data)
        timing = budget.timing.record() if budget.timing else None
        record.update(sources=opened.describe(data), timing=timing)
        plan, notes = job.plan(axes)
        if cuts:
            notes += job.cut(axes, plan)
        if opened.memory:
            record.update(memory=record_peak(opened.memory))
        return PruneResult(plan, network.loaded, recorder.finish(record, clock.seconds) if cuts else None, notes)


@dataclass(frozen=True)
class _PruneRun:
    """The data that the parts of a pruning run share."""

    settings: Settings
    method: Pruner
    budget: Budget
    inputs: PruneInputs
    record: Record
    ranks: ProcessRank
    shared: SharedWork
    clock: Clock
    progress: Progress
    data: SourceHalves = field(default=SourceHalves((), ()))

    @property
    def network(self) -> PrunedNetwork:
        """The network, as it is now."""
        return self.inputs.network

    def generate(self) -> SourceHalves:
        """Return the data with the text that the network generates, if that is a source."""
        data, settings, shared = self.inputs.data, self.settings, self.shared
        if not data.pending:
            return data
        with self.clock.stage("generate"):
            data = fill_generated(
                data,
                source_specs(settings),
                self.network.loaded,
                count_generated(settings),
                self.record.path if self.record.kept else None,
                known=() if shared.generated is None else (shared.generated,),
                progress=self.progress,
                ranks=self.ranks,
            )
        shared.generated = data.generated
        return data

    def measure(self, axes: AxisGraph, name: str) -> dict[str, evaluation.Perplexity]:
        """Measure and log the network in its present state, under a name."""
        ranks = self.network.evaluators(self.ranks)
        if ranks is None:
            return {}
        with self.clock.stage("evaluate"):
            return measuring.measure_run(
                self.record,
                self.network.loaded,
                axes,
                self.data.evaluation,
                self.data.seen,
                name,
                self.progress,
                precision=self.settings.precision,
                objective=self.inputs.objective,
                lenient=self.inputs.lenient,
                network=self.network.visits,
                ranks=ranks,
                known=self.shared.dense if name == "dense" else None,
            )

    def plan(self, axes: AxisGraph) -> tuple[Plan, tuple[str, ...]]:
        """Calibrate, choose the units that stay on rank 0, and return the plan and notes on the data."""
        network, record, progress, settings = self.network, self.record, self.progress, self.settings
        forward = partial(autocasting, network.loaded.model, settings.precision)
        with self.clock.stage("calibrate"), torch.enable_grad(), forward():
            evidence, key = calibrate(
                network,
                axes,
                self.method,
                self.data.calibration,
                record,
                units=self.budget.units(axes),
                batch_size=settings.batch_size,
                objective=self.inputs.objective,
                shared=self.shared,
                ranks=self.ranks,
                progress=progress,
            )
        if not self.ranks.leads:
            return Plan.from_json(broadcast_record(self.ranks)), ()
        weights = self.shared.columns.over(network.parameters())
        with self.clock.stage("plan"), torch.enable_grad():
            with forward():
                cut = plan_cut(
                    self.method,
                    network.loaded.model,
                    axes,
                    self.budget,
                    evidence,
                    weights=weights,
                    checkpoint=open_journal(record, key),
                    header=lambda: {"key": key},
                    progress=progress,
                    visits=network.visits,
                    objective=self.inputs.objective,
                )
            if cut.plan.notes:
                record.update(notes=[*network.loaded.notes, *cut.plan.notes])
            if record.kept:
                write_scores(record, weights, axes, cut.plan, cut.scores, evidence)
            if cut.findings:
                record.write_findings(settings.method, cut.findings)
        broadcast_record(self.ranks, cut.plan.to_json())
        return cut.plan, evidence.notes

    def cut(self, axes: AxisGraph, plan: Plan) -> tuple[str, ...]:
        """Cut the network, repair it, measure it before and after, and save it; return what a user must know."""
        settings, network, record, stage = self.settings, self.network, self.record, self.clock.stage
        if not self.ranks.leads and network.loaded.tokenizer is None:
            return ()  # rank 0 needs no help
        dense, fitted = self.measure(axes, "dense"), {}
        after = network.cut(
            record,
            axes,
            plan,
            proof=settings.proof,
            fits=settings.reconstruct,
            ranks=self.ranks,
            stage=stage,
            progress=self.progress,
        )
        record_plan(record, plan, axes, after)
        if settings.reconstruct:
            fitted = self.measure(after, "cut")
            text = network.loaded.tokenizer is not None
            with stage("reconstruct"):
                sources = choose_sources(settings, self.data, self.inputs.read, text=text)
                network.reconstruct(record, axes, plan, sources, settings.reconstruct_settings, self.progress)
        note = self._tune(plan)
        if record.kept:
            with stage("save"):
                network.save(record)
        pruned = self.measure(after, "pruned")
        measuring.log_budget(record, network.loaded.model, axes, after, self.budget)
        measuring.log_pairs(record, dense, pruned, fitted)
        if note:
            record.update(notes=[*record.run().get("notes", ()), note])
        if settings.recover:
            with stage("recover"):
                if self.ranks.leads:
                    self._recover(axes, plan)
                broadcast_recovered(self.ranks, network.loaded.model)
            log_differences(record, self.measure(after, "recovered"))
        return (note,) if note else ()

    def _tune(self, plan: Plan) -> str:
        """Train the network, if that is wanted, and measure the statistics of BatchNorms again."""
        settings, model = self.settings, self.network.loaded.model
        trains = settings.finetune and self.network.loaded.tokenizer is None
        if not trains and not tune.find_running(model):
            return ""
        with self.clock.stage("tune"), autocasting(model, settings.precision):
            for source in self.data.calibration if trains else ():
                tune.finetune(model, source, epochs=settings.finetune, seed=settings.seed, progress=self.progress)
            return tune.recalibrate_changed(model, plan, self.data.calibration)

    def _recover(self, axes: AxisGraph, plan: Plan) -> None:
        """Recover the cut model with the help of the dense one, which is loaded again, and save it."""
        settings, loaded, record = self.settings, self.network.loaded, self.record
        assert self.inputs.load_dense is not None
        dense, texts = self.inputs.load_dense(), self.inputs.read(settings.recover_tokens, self.data.generated)
        check_same_files(loaded, dense)
        recover(
            record,
            loaded.model,
            dense,
            axes,
            plan,
            texts,
            settings.recover,
            seed=settings.seed,
            precision=settings.precision,
            progress=self.progress,
        )
        self.network.save(record)


def open_named(
    settings: Settings,
    clock: Clock,
    *,
    code: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
    ranks: ProcessRank = SINGLE,
    shared: SharedWork | None = None,
    progress: Progress = silent,
) -> PruneInputs:
    """Open the network and the data that settings name.

    Args:
        settings: The settings of the run.
        clock: Times the stages ``load`` and ``trace``.
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code: the
            recorded name is never imported.
        memory: How much memory the run may use, such as ``4GiB``: a network that does not fit is read one block at a
            time, with the same result. Empty: it is loaded whole.
        announce: Called with one line that says how the run stays within that memory.
        ranks: The processes that share the run.
        shared: What earlier runs of this process have opened.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If the model or a source is not usable; says which, and the remedy.
    """
    spec, shared = model_spec(settings), shared or SharedWork()
    check_same_settings(ranks, settings, memory)
    streamed = None
    with clock.stage("load"):
        if memory:
            streamed, shared.memory = open_streamed(settings, memory, announce, ranks, shared)
        network = streamed or WholeNetwork(load_model(spec, progress, code))
        loaded = network.loaded
        check_precision(loaded.model, settings.precision)
        data = read_sources(source_specs(settings), loaded)
    with clock.stage("trace"):
        axes = streamed.opened.axes if streamed else shared.trace(loaded)
    return PruneInputs(
        network,
        axes,
        data,
        lambda tokens, generated: read_sources(source_specs(settings, tokens), loaded, generated).calibration,
        partial(load_model, spec, progress, code),
        describe=partial(describe_sources, source_specs(settings)),
        memory=shared.memory,
    )


def plan_named(
    settings: Settings,
    progress: Progress = silent,
    *,
    code: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Return the plan that a pruning run would make, and record nothing; arguments are as for :func:`open_named`."""
    inputs = partial(open_named, settings, code=code, memory=memory, announce=announce, progress=progress)
    return carry_out(settings, inputs, NoRecorder(), progress=progress, cuts=False).plan


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
    """Prune the model that settings name, as ``regrow prune`` does, and return the folder; all ranks call this.

    Args:
        settings: The settings of the run.
        out: The run folder, which rank 0 writes: new, empty, or of this very run.
        progress: Called with (steps done, steps in all, what is being done).
        code: As for :func:`open_named`.
        track: The name of a tracker that gets every measurement, too; empty: none.
        memory: As for :func:`open_named`.
        announce: As for :func:`open_named`.
        ranks: The processes that share the work.
        shared: As for :func:`carry_out`.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: As :func:`carry_out`.
    """
    shared = shared or SharedWork()
    recorder = record_command(
        settings,
        settings.model,
        out,
        code=code,
        memory=memory,
        track=track,
        undo=settings.undo,
        write_page=write_page,
        ranks=ranks,
    )
    inputs = partial(
        open_named, settings, code=code, memory=memory, announce=announce, ranks=ranks, shared=shared, progress=progress
    )
    return carry_out(settings, inputs, recorder, ranks, shared=shared, progress=progress).folder or RunFolder(Path(out))
