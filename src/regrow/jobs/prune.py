"""Prune a network, whether named on the command line or given in Python, whole or block by block, on every rank."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regrow import evaluation
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.errors import InputError, ResourceError
from regrow.core.plan import Plan
from regrow.core.process_memory import reset_peak
from regrow.core.sources import Source
from regrow.distributed.parallel import broadcast_record
from regrow.jobs.calibration import PruneInputs, SharedWork, calibrate, write_scores
from regrow.jobs.inputs import check_same_inputs, check_same_settings, complete_data, read_sources
from regrow.jobs.measuring import EvaluationData, log_budget, log_pairs, measure_run
from regrow.jobs.memory_needs import open_to_prune
from regrow.jobs.models import load_model, trace_loaded
from regrow.jobs.pruning import (
    budget_of,
    check_pruning,
    count_calibration,
    count_generated,
    count_tokens,
    model_spec,
    pruner_of,
    record_defaults,
    source_specs,
    with_timing,
)
from regrow.jobs.recording import ActiveRun, Invocation, RunStart
from regrow.jobs.run_networks import StreamedRun, WholeNetwork
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Pruner, PruningRun, check_objective, plan_cut, with_modules
from regrow.nets import Loaded
from regrow.nets.devices import autocasting, check_precision
from regrow.settings.declaration import check_settings
from regrow.settings.prune import RECONSTRUCTION, Settings, complete_reconstruction
from regrow.store.ledger import read_plan
from regrow.store.run_folder import RunFolder
from regrow.store.tensors import open_checkpoint
from regrow.streaming.requirements import record_peak
from regrow.training import tune
from regrow.training.state import FORMAT

Perplexities = Mapping[str, evaluation.Perplexity]


@dataclass(frozen=True)
class PruneResult:
    """The result of a pruning run."""

    plan: Plan
    loaded: Loaded  # the cut network; without numbers, if it was read one block at a time
    warnings: tuple[str, ...] = ()  # what a user must know of the data


def carry_out(
    settings: Settings,
    inputs: Callable[[ActiveRun], PruneInputs],
    run: ActiveRun,
    *,
    shared: SharedWork | None = None,
    cuts: bool = True,
) -> PruneResult:
    """Prune a network, and record it; all mistakes in the settings and inputs are found before that.

    An interrupted run with the same settings is resumed where the recorder has its folder. All processes of the run
    call this. ``inputs`` opens the network and the data; ``shared`` is what earlier runs of this process, which differ
    in method and keep alone, need not do again. Without ``cuts`` the run ends with the plan.
    """
    job = prepare(settings, inputs, run, shared or SharedWork())
    network, axes = job.inputs.network, job.inputs.axes
    with run.begin(RunStart(job.identity, network.loaded, network.outside, job.inputs.call)) as record:
        network.use_folder(record.path)
        job = job.with_generated()
        record.update(timing=job.budget.timing.record() if job.budget.timing else None)
        plan, notes = job.plan()
        if cuts and (run.ranks.leads or network.loaded.tokenizer is not None):  # rank 0 needs no help with other data
            dense = job.measure(axes, "dense")
            after = network.cut(run, axes, plan, proof=settings.proof, fits=settings.reconstruct)
            run.record_plan(plan, axes, after)
            notes += job.repair(after, plan, dense)
        if job.inputs.memory:
            record.update(memory=record_peak(job.inputs.memory))
        if cuts:
            run.finish()
        return PruneResult(plan, network.loaded, notes)


def prepare(
    settings: Settings, inputs: Callable[[ActiveRun], PruneInputs], run: ActiveRun, shared: SharedWork
) -> "PruneJob":
    """Open the network and the data, and find all mistakes in them and in the settings."""
    check_settings(settings)
    method = pruner_of(settings)
    check_reconstruction(settings, several=run.ranks.several)
    identity = {"verb": "prune", "settings": asdict(settings), "defaults": record_defaults(settings)}
    recorded = run.recorder.check(identity)
    reset_peak()
    opened = inputs(run)
    model, budget = opened.network.loaded.model, replace(budget_of(settings), timing=opened.timing)
    check_precision(model, settings.precision)
    job = PruneJob(settings, identity, method, budget, opened, shared, run)
    job.check_data()
    axes = with_modules(method, model, opened.axes)
    check_same_inputs(run.ranks, [opened.network.identity], opened.data)
    with run.stage("time"):
        budget = with_timing(model, axes, budget, known=recorded.get("timing"), progress=run.progress)
    check_pruning(method, axes, budget, opened.data.calibration)
    check_objective(method, (), opened.objective)
    return replace(job, budget=budget, inputs=replace(opened, axes=axes))


def check_reconstruction(settings: Settings, *, several: bool = False) -> None:
    """Raise ValueError unless the reconstruction of a run, of ``several`` processes, can be done."""
    if settings.reconstruct:
        fit = complete_reconstruction(settings.reconstruct_settings, settings.sources)
        find_method(MethodKind.RECOVERY, RECONSTRUCTION).made(RECONSTRUCTION, fit)
        if several:
            raise InputError("--reconstruct runs in one process; leave out --reconstruct, or start without torchrun")


@dataclass(frozen=True)
class PruneJob:
    """A pruning run whose settings and inputs are checked."""

    settings: Settings
    identity: Mapping[str, Any]
    method: Pruner
    budget: Budget
    inputs: PruneInputs
    shared: SharedWork
    run: ActiveRun

    def check_data(self) -> None:
        """Raise InputError if there is too little data to reconstruct on."""
        settings, calibration = self.settings, self.inputs.data.calibration
        if not settings.reconstruct:
            return
        if not calibration:
            raise InputError("reconstruct fits on data, and there are none; give --source news, or data= in Python")
        left_out = complete_reconstruction(settings.reconstruct_settings, ())["choose_on"] == "left_out_source"
        if left_out and len(calibration) > 1:
            return  # the ridge is not chosen on a held-out part of each source
        for source in self._fitted_sources():
            if len(source) < 2:
                raise InputError(
                    f"source {source.name!r} has {len(source)} batches, and reconstruct holds one out; give more data "
                    "(a larger --reconstruct-tokens), or a second source"
                )

    def with_generated(self) -> "PruneJob":
        """Return the job with the text that the network generates, if that is a source."""
        inputs, shared = self.inputs, self.shared
        known, n = () if shared.generated is None else (shared.generated,), count_generated(self.settings)
        data = complete_data(self.run, inputs.data, inputs.specs, inputs.network.loaded, n, known=known)
        shared.generated = data.generated
        return replace(self, inputs=replace(inputs, data=data))

    def measure(self, axes: AxisGraph, name: str) -> Perplexities:
        """Measure and log the network in its present state, under a name."""
        inputs, network = self.inputs, self.inputs.network
        ranks = network.evaluators(self.run.ranks)
        if ranks is None:
            return {}
        data = EvaluationData(inputs.data, inputs.objective, self.settings.precision, inputs.lenient)
        known = self.shared.dense if name == "dense" else None
        with self.run.stage("evaluate"):
            run = replace(self.run, ranks=ranks)
            return measure_run(run, network.loaded, axes, data, name, network=network.visits, known=known)

    def plan(self) -> tuple[Plan, tuple[str, ...]]:
        """Calibrate, choose the units that stay on rank 0, and return the plan and notes on the data."""
        run, inputs, settings, shared = self.run, self.inputs, self.settings, self.shared
        model, axes, record = inputs.network.loaded.model, inputs.axes, run.record
        forward = partial(autocasting, model, settings.precision)
        with run.stage("calibrate"), torch.enable_grad(), forward():
            units = self.budget.units(axes)
            evidence, key = calibrate(run, inputs, self.method, units, settings.batch_size, shared)
        if not run.ranks.leads:
            return read_plan(json.loads(broadcast_record(run.ranks))), ()
        weights = shared.columns.over(inputs.network.parameters())
        checkpoint = record.path / "statistics" / "learned.safetensors" if record.kept else None
        with run.stage("plan"), torch.enable_grad():
            if checkpoint:
                open_checkpoint(checkpoint, key, FORMAT)
            with forward():
                cut = plan_cut(
                    self.method,
                    model,
                    axes,
                    self.budget,
                    evidence,
                    objective=inputs.objective,
                    run=PruningRun(
                        checkpoint=checkpoint,
                        header=lambda: {"key": key},
                        progress=run.progress,
                        visits=inputs.network.visits,
                        weights=weights,
                    ),
                )
            if cut.plan.notes:
                record.update(notes=[*inputs.network.loaded.notes, *cut.plan.notes])
            if isinstance(record, RunFolder):
                write_scores(record, weights, axes, cut.plan, cut.scores, evidence)
                if cut.findings:
                    record.write_findings(settings.method, cut.findings)
        broadcast_record(run.ranks, cut.plan.to_json())
        return cut.plan, evidence.notes

    def repair(self, after: AxisGraph, plan: Plan, dense: Perplexities) -> tuple[str, ...]:
        """Repair the cut network as the settings say, save and measure it; return what a user must know."""
        run, settings, network, record = self.run, self.settings, self.inputs.network, self.run.record
        axes, model = self.inputs.axes, network.loaded.model
        fitted: Perplexities = {}
        if settings.reconstruct:
            fitted = self.measure(after, "cut")
            with run.stage("reconstruct"):
                network.reconstruct(run, axes, plan, self._fitted_sources(), settings.reconstruct_settings)
        notes = self._tune(plan)
        if record.kept:
            with run.stage("save"):
                network.save(record)
        pruned = self.measure(after, "pruned")
        log_budget(record, model, axes, after, self.budget)
        log_pairs(record, fitted, pruned, {"of": ["cut", "pruned"]})
        log_pairs(record, dense, pruned)
        if notes:
            record.update(notes=[*record.run().get("notes", ()), *notes])
        return notes

    def _tune(self, plan: Plan) -> tuple[str, ...]:
        """Train the network, if that is wanted, and measure the statistics of BatchNorms again."""
        settings, loaded, calibration = self.settings, self.inputs.network.loaded, self.inputs.data.calibration
        trains = settings.finetune and loaded.tokenizer is None
        if not trains and not tune.find_running(loaded.model):
            return ()
        with self.run.stage("tune"), autocasting(loaded.model, settings.precision):
            for source in calibration if trains else ():
                tune.finetune(
                    loaded.model, source, epochs=settings.finetune, seed=settings.seed, progress=self.run.progress
                )
            note = tune.recalibrate_changed(loaded.model, plan, calibration)
        return (note,) if note else ()

    def _fitted_sources(self) -> Sequence[Source]:
        """Return the data that layers are fitted on; data without names are all."""
        data, loaded = self.inputs.data, self.inputs.network.loaded
        tokens = count_tokens(self.settings, loaded.tokenizer is not None)
        if self.inputs.specs is None or tokens == count_calibration(self.settings):
            return data.calibration
        return read_sources(source_specs(self.settings, tokens), loaded, data.generated).calibration


def open_named(settings: Settings, invocation: Invocation, shared: SharedWork, run: ActiveRun) -> PruneInputs:
    """Open the network and the data that settings name; a network that is too large is read one block at a time."""
    check_same_settings(run.ranks, settings, invocation.memory)
    network: WholeNetwork | StreamedRun | None = None
    axes = shared.axes
    with run.stage("load"):
        if invocation.memory:
            opened, shared.memory = open_to_prune(settings, invocation, shared.memory)
            if shared.memory.streams:
                network, axes = StreamedRun(opened, shared.memory), opened.axes
        network = network or WholeNetwork(load_model(model_spec(settings), invocation.progress, invocation.code))
        loaded, specs = network.loaded, source_specs(settings)
        check_precision(loaded.model, settings.precision)
        data = read_sources(specs, loaded)
    with run.stage("trace"):
        if axes is None:
            axes = trace_loaded(loaded)
    if isinstance(network, WholeNetwork):
        shared.axes = axes
    return PruneInputs(network, axes, data, specs, memory=shared.memory)


def plan_named(settings: Settings, invocation: Invocation) -> Plan:
    """Return the plan that a pruning run would make, and record nothing."""
    inputs = partial(open_named, settings, invocation, SharedWork())
    return carry_out(settings, inputs, ActiveRun(progress=invocation.progress), cuts=False).plan


def check_plans(plans: Mapping[str, Settings], invocation: Invocation, shared: SharedWork) -> None:
    """Raise an error that names the plan unless all plans of one calibration can be made; nothing is recorded."""
    for name, settings in plans.items():
        inputs = partial(open_named, settings, invocation, shared)
        try:
            prepare(settings, inputs, ActiveRun(ranks=invocation.ranks), shared)
        except ValueError as error:
            kind = ResourceError if isinstance(error, ResourceError) else InputError
            raise kind(f"{name}: {error}") from error


def run(settings: Settings, invocation: Invocation, shared: SharedWork | None = None) -> RunFolder:
    """Prune the model that settings name, as ``regrow prune`` does, and return the folder."""
    shared = shared or SharedWork()
    inputs = partial(open_named, settings, invocation, shared)
    carry_out(settings, inputs, invocation.start(settings, settings.model, undo=settings.undo), shared=shared)
    return RunFolder(Path(invocation.out))
