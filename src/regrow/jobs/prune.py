"""Prune a network, whether named on the command line or given in Python, whole or block by block, on every rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow import evaluation
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget, Timing
from regrow.core.errors import InputError, ResourceError
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.process_memory import reset_peak
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import broadcast_record
from regrow.jobs import measuring, pruning
from regrow.jobs.calibration import calibrate, open_journal, write_scores
from regrow.jobs.cutting import WholeNetwork
from regrow.jobs.inputs import SourceHalves, describe_sources, fill_generated, read_sources
from regrow.jobs.models import load_model
from regrow.jobs.prune_settings import budget_of, model_spec, record_defaults, seeded_settings, source_specs
from regrow.jobs.recording import ActiveRun, Clock, Invocation, NoRecorder, Recorder, RunStart, record_plan
from regrow.jobs.recovering import (
    broadcast_recovered,
    check_amount,
    check_reconstruction,
    check_recovery,
    choose_sources,
    count_generated,
    log_differences,
    recover,
)
from regrow.jobs.same_inputs import check_same_inputs, check_same_settings
from regrow.jobs.shared_work import SharedWork
from regrow.jobs.streamed_run import PrunedNetwork, open_streamed
from regrow.methods.pruning.pruner import Pruner, PruningRun, check_objective, plan_cut, with_modules
from regrow.methods.recovery import RecoveryTask
from regrow.nets import Loaded
from regrow.nets.devices import autocasting, check_precision
from regrow.nets.loaded import check_same_files
from regrow.settings.declaration import check_settings
from regrow.settings.prune import Settings
from regrow.store.run_folder import RunFolder
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
            this one does. The result is the same.
        progress: Called with (steps done, steps in all, what is being done).
        cuts: Whether the network is cut; otherwise the run ends with the plan.

    Raises:
        ValueError: If a setting, the model, or a source is not usable; says which, and the remedy.
    """
    clock, shared = Clock(None), shared or SharedWork()
    job = prepare(settings, inputs, recorder, ranks, clock, shared=shared, progress=progress)
    network, axes, text = job.inputs.network, job.axes, job.inputs.network.loaded.tokenizer is not None
    with recorder.begin(RunStart(job.identity, network.loaded, network.outside, job.inputs.call)) as record:
        clock.folder = record
        network.use_folder(record.path)
        active = ActiveRun(record, ranks, clock, progress)
        job = replace(job, data=job.generate(active))
        timing = job.budget.timing.record() if job.budget.timing else None
        record.update(sources=job.inputs.describe(job.data), timing=timing)
        plan, notes = job.plan(active)
        if cuts and (ranks.leads or text):  # rank 0 needs no help with other data
            dense = job.measure(active, axes, "dense")
            after = network.cut(active, axes, plan, proof=settings.proof, fits=settings.reconstruct)
            record_plan(record, plan, axes, after)
            notes += job.repair(active, after, plan, dense)
        if job.inputs.memory:
            record.update(memory=record_peak(job.inputs.memory))
        return PruneResult(plan, network.loaded, recorder.finish(record, clock.seconds) if cuts else None, notes)


def prepare(
    settings: Settings,
    inputs: Callable[[Clock], PruneInputs],
    recorder: Recorder,
    ranks: ProcessRank,
    clock: Clock,
    *,
    shared: SharedWork,
    progress: Progress = silent,
) -> "PruneJob":
    """Open the network and the data, and find all mistakes in them and in the settings; arguments as :func:`carry_out`.

    Raises:
        ValueError: As :func:`carry_out`.
    """
    check_settings(settings)
    method = pruning.build_pruner(settings.method, seeded_settings(settings))
    check_recovery(settings.recover, settings.sources)
    check_reconstruction(settings, several=ranks.several)
    identity = {"verb": "prune", "settings": asdict(settings), "defaults": record_defaults(settings)}
    recorded = recorder.check(identity)
    reset_peak()
    opened = inputs(clock)
    model, text = opened.network.loaded.model, opened.network.loaded.tokenizer is not None
    check_precision(model, settings.precision)
    check_amount(settings, opened.data, opened.read, text=text)
    axes = with_modules(method, model, opened.axes)
    check_same_inputs(ranks, [opened.network.identity], opened.data)
    budget = replace(budget_of(settings), timing=opened.timing)
    with clock.stage("time"):
        budget = pruning.with_timing(model, axes, budget, known=recorded.get("timing"), progress=progress)
    pruning.check_pruning(method, axes, budget, opened.data.calibration)
    check_objective(method, (), opened.objective)
    return PruneJob(settings, identity, method, budget, opened, axes, shared, opened.data)


@dataclass(frozen=True)
class PruneJob:
    """A pruning run whose settings and inputs are checked."""

    settings: Settings
    identity: Mapping[str, Any]
    method: Pruner
    budget: Budget
    inputs: PruneInputs
    axes: AxisGraph
    shared: SharedWork
    data: SourceHalves

    def generate(self, run: ActiveRun) -> SourceHalves:
        """Return the data with the text that the network generates, if that is a source."""
        if not self.data.pending:
            return self.data
        with run.clock.stage("generate"):
            data = fill_generated(
                self.data,
                source_specs(self.settings),
                self.inputs.network.loaded,
                count_generated(self.settings),
                run.record.path if run.record.kept else None,
                known=() if self.shared.generated is None else (self.shared.generated,),
                progress=run.progress,
                ranks=run.ranks,
            )
        self.shared.generated = data.generated
        return data

    def measure(self, run: ActiveRun, axes: AxisGraph, name: str) -> dict[str, evaluation.Perplexity]:
        """Measure and log the network in its present state, under a name."""
        network = self.inputs.network
        ranks = network.evaluators(run.ranks)
        if ranks is None:
            return {}
        with run.clock.stage("evaluate"):
            return measuring.measure_run(
                run.record,
                network.loaded,
                axes,
                self.data,
                name,
                run.progress,
                precision=self.settings.precision,
                objective=self.inputs.objective,
                lenient=self.inputs.lenient,
                network=network.visits,
                ranks=ranks,
                known=self.shared.dense if name == "dense" else None,
            )

    def plan(self, run: ActiveRun) -> tuple[Plan, tuple[str, ...]]:
        """Calibrate, choose the units that stay on rank 0, and return the plan and notes on the data."""
        network, settings, axes = self.inputs.network, self.settings, self.axes
        forward = partial(autocasting, network.loaded.model, settings.precision)
        with run.clock.stage("calibrate"), torch.enable_grad(), forward():
            evidence, key = calibrate(
                run,
                network,
                axes,
                self.method,
                self.data.calibration,
                units=self.budget.units(axes),
                batch_size=settings.batch_size,
                objective=self.inputs.objective,
                shared=self.shared,
            )
        if not run.ranks.leads:
            return Plan.from_json(broadcast_record(run.ranks)), ()
        weights = self.shared.columns.over(network.parameters())
        with run.clock.stage("plan"), torch.enable_grad():
            with forward():
                cut = plan_cut(
                    self.method,
                    network.loaded.model,
                    axes,
                    self.budget,
                    evidence,
                    objective=self.inputs.objective,
                    run=PruningRun(
                        checkpoint=open_journal(run.record, key),
                        header=lambda: {"key": key},
                        progress=run.progress,
                        visits=network.visits,
                        weights=weights,
                    ),
                )
            if cut.plan.notes:
                run.record.update(notes=[*network.loaded.notes, *cut.plan.notes])
            if run.record.kept:
                write_scores(run.record, weights, axes, cut.plan, cut.scores, evidence)
            if cut.findings:
                run.record.write_findings(settings.method, cut.findings)
        broadcast_record(run.ranks, cut.plan.to_json())
        return cut.plan, evidence.notes

    def repair(
        self, run: ActiveRun, after: AxisGraph, plan: Plan, dense: Mapping[str, evaluation.Perplexity]
    ) -> tuple[str, ...]:
        """Repair the cut network as the settings say, save and measure it; return what a user must know."""
        settings, network, record, clock = self.settings, self.inputs.network, run.record, run.clock
        fitted: Mapping[str, evaluation.Perplexity] = {}
        if settings.reconstruct:
            fitted = self.measure(run, after, "cut")
            text = network.loaded.tokenizer is not None
            with clock.stage("reconstruct"):
                sources = choose_sources(settings, self.data, self.inputs.read, text=text)
                network.reconstruct(run, self.axes, plan, sources, settings.reconstruct_settings)
        note = self._tune(run, plan)
        if record.kept:
            with clock.stage("save"):
                network.save(record)
        pruned = self.measure(run, after, "pruned")
        measuring.log_budget(record, network.loaded.model, self.axes, after, self.budget)
        measuring.log_pairs(record, dense, pruned, fitted)
        if note:
            record.update(notes=[*record.run().get("notes", ()), note])
        if settings.recover:
            with clock.stage("recover"):
                if run.ranks.leads:
                    self._recover(run, plan)
                broadcast_recovered(run.ranks, network.loaded.model)
            log_differences(record, self.measure(run, after, "recovered"))
        return (note,) if note else ()

    def _tune(self, run: ActiveRun, plan: Plan) -> str:
        """Train the network, if that is wanted, and measure the statistics of BatchNorms again."""
        settings, model, text = self.settings, self.inputs.network.loaded.model, self.inputs.network.loaded.tokenizer
        trains = settings.finetune and text is None
        if not trains and not tune.find_running(model):
            return ""
        with run.clock.stage("tune"), autocasting(model, settings.precision):
            for source in self.data.calibration if trains else ():
                tune.finetune(model, source, epochs=settings.finetune, seed=settings.seed, progress=run.progress)
            return tune.recalibrate_changed(model, plan, self.data.calibration)

    def _recover(self, run: ActiveRun, plan: Plan) -> None:
        """Recover the cut model with the help of the dense one, which is loaded again, and save it."""
        settings, loaded, record = self.settings, self.inputs.network.loaded, run.record
        assert self.inputs.load_dense is not None
        dense, texts = self.inputs.load_dense(), self.inputs.read(settings.recover_tokens, self.data.generated)
        check_same_files(loaded, dense)
        task = RecoveryTask(loaded.model, dense.model, self.axes, plan, texts, settings.seed, progress=run.progress)
        recover(record, task, settings.recover, origin=dense.origin.record(), precision=settings.precision)
        self.inputs.network.save(record)


def open_named(settings: Settings, invocation: Invocation, shared: SharedWork, clock: Clock) -> PruneInputs:
    """Open the network and the data that settings name.

    Args:
        settings: The settings of the run.
        invocation: How the command was called. A network that does not fit into its memory is read one block at a time,
            with the same result.
        shared: What earlier runs of this process have opened.
        clock: Times the stages ``load`` and ``trace``.

    Raises:
        ValueError: If the model or a source is not usable; says which, and the remedy.
    """
    spec, streamed = model_spec(settings), None
    load = partial(load_model, spec, invocation.progress, invocation.code)
    check_same_settings(invocation.ranks, settings, invocation.memory)
    with clock.stage("load"):
        if invocation.memory:
            streamed, shared.memory = open_streamed(settings, invocation, shared)
        network = streamed or WholeNetwork(load())
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
        load,
        describe=partial(describe_sources, source_specs(settings)),
        memory=shared.memory,
    )


def plan_named(settings: Settings, invocation: Invocation) -> Plan:
    """Return the plan that a pruning run would make, and record nothing.

    Args:
        settings: The settings of the run.
        invocation: How the command was called.
    """
    inputs = partial(open_named, settings, invocation, SharedWork())
    return carry_out(settings, inputs, NoRecorder(), progress=invocation.progress, cuts=False).plan


def check_plans(plans: Mapping[str, Settings], invocation: Invocation, shared: SharedWork) -> None:
    """Raise an error that names the plan unless all plans of one calibration can be made; nothing is recorded.

    Args:
        plans: Name of the plan → the settings of its run.
        invocation: How the command was called.
        shared: As for :func:`carry_out`.

    Raises:
        InputError: If a setting, or something that it names, is not usable.
        ResourceError: If the memory of this machine, or that of the run, is too little.
    """
    for name, settings in plans.items():
        inputs = partial(open_named, settings, invocation, shared)
        try:
            prepare(settings, inputs, NoRecorder(), invocation.ranks, Clock(None), shared=shared)
        except ValueError as error:
            kind = ResourceError if isinstance(error, ResourceError) else InputError
            raise kind(f"{name}: {error}") from error


def run(settings: Settings, invocation: Invocation, shared: SharedWork | None = None) -> RunFolder:
    """Prune the model that settings name, as ``regrow prune`` does, and return the folder.

    Args:
        settings: The settings of the run.
        invocation: How the command was called.
        shared: As for :func:`carry_out`.

    Raises:
        ValueError: As :func:`carry_out`.
    """
    shared = shared or SharedWork()
    recorder = invocation.recorder(settings, settings.model, undo=settings.undo)
    inputs = partial(open_named, settings, invocation, shared)
    carry_out(settings, inputs, recorder, invocation.ranks, shared=shared, progress=invocation.progress)
    return RunFolder(Path(invocation.out))
