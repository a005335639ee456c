"""Prune a network, whether named on the command line or given in Python, whole or block by block, on every rank."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from regrow import evaluation
from regrow.core.amounts import Measure
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.errors import InputError, RefusedError, ResourceError
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.process_memory import reset_peak
from regrow.core.sources import Source
from regrow.distributed import SINGLE
from regrow.distributed.parallel import broadcast_record
from regrow.jobs.forward_outputs import NetworkState
from regrow.jobs.inputs import (
    SourceHalves,
    SourceSpecs,
    check_same_inputs,
    check_same_settings,
    complete_data,
    read_sources,
)
from regrow.jobs.measuring import EvaluationData, log_budget, log_pairs, log_speed, measure_network
from regrow.jobs.memory_needs import open_to_prune
from regrow.jobs.models import load_model, trace_loaded
from regrow.jobs.pruning_inputs import (
    calibrate,
    check_pruning,
    explain_too_little,
    make_budget,
    make_model_spec,
    make_pruner,
    make_source_specs,
    read_training_text,
    take_for_fit,
    with_timing,
)
from regrow.jobs.recording import ActiveRun, Invocation, RunStart
from regrow.jobs.recovery_steps import reconstruct, recover
from regrow.jobs.run_networks import BlockwiseNetwork, PrunedNetwork, WholeNetwork
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Pruner, PruningContext, check_objective, plan_cut, with_droppable_modules
from regrow.methods.recovery import RecoveryTask
from regrow.nets import Loaded
from regrow.nets.devices import autocasting, check_precision, choose_precision
from regrow.settings.declaration import check_settings
from regrow.settings.prune import (
    DISTILLATION,
    REST_SECONDS,
    Settings,
    choose_defaults,
    describe_choice,
    explain_training,
    make_reconstruction_settings,
)
from regrow.store.errors import StoreError
from regrow.store.ledger import read_plan
from regrow.store.run_folder import RunFolder
from regrow.store.tensors import open_checkpoint
from regrow.streaming.requirements import MemoryPlan
from regrow.tracing.meta_copy import copy_model
from regrow.training import tune
from regrow.training.state import FORMAT


@dataclass(frozen=True)
class PruneInputs:
    """What a run prunes, and on which data."""

    settings: Settings  # with all that was left open chosen
    network: PrunedNetwork
    axes: AxisGraph
    data: SourceHalves  # calibrated on one half, and evaluated on the other
    specs: SourceSpecs | None = None  # the sources of the data; `None`: they have no names
    taught_on: Sequence[Source] = ()  # the data on which the cut network is trained, if settings say so
    objective: Objective | None = None  # what the network is trained for; `None`: what fits the labels
    python_call: dict[str, object] | None = None  # what the result depends on besides settings, for a call from Python
    memory: MemoryPlan | None = None  # how the run stays within a limit of memory; `None`: there is none


@dataclass(frozen=True)
class PruneResult:
    """The result of a pruning run."""

    plan: Plan
    loaded: Loaded  # the cut network; without numbers, if it was read one block at a time
    warnings: tuple[str, ...] = ()  # what a user must know of the data


def prune_network(
    settings: Settings, open_inputs: Callable[[ActiveRun], PruneInputs], run: ActiveRun, *, cuts: bool = True
) -> PruneResult:
    """Prune a network, in place if it is in memory, and record the run; an interrupted one is resumed from its folder.

    ``open_inputs``: called once, after the settings are checked; mistakes in these and in the inputs raise before
    anything is written. All processes of the run call this. Without ``cuts`` the run ends with the plan.
    """
    check_settings(settings)
    make_budget(settings)
    if settings.method:
        make_pruner(settings)  # raises for what it does not know, before anything is loaded
    recorded = run.recorder.check({"verb": "prune", "asked": asdict(settings)})
    reset_peak()
    opened = open_inputs(run)
    asked, settings, network, data = settings, opened.settings, opened.network, opened.data
    method, budget = make_pruner(settings), make_budget(settings)
    model = network.loaded.model
    check_precision(model, settings.precision)
    left_out: tuple[str, ...] = ()
    if settings.reconstruct and (batches := sum(map(len, data.calibration))) < 2:
        problem = f"reconstruct fits on data of which it holds a part out, and there are {batches} batches"
        if asked.reconstruct:
            raise InputError(f"{problem}; give more data")
        settings = replace(settings, reconstruct=False)
        left_out = (f"{problem}, so it was left out; give smaller batches",)
    if settings.distil and (problem := explain_too_little(opened.taught_on)):
        if explain_training(asked):
            raise InputError(
                f"{problem} for distil={settings.distil:,} tokens; give more, or leave distil and time out"
            )
        settings = replace(settings, distil=0)
    defaults = find_method(MethodKind.PRUNING, settings.method).defaults({*settings.method_settings, "seed"})
    if settings.reconstruct:
        fit = find_method(MethodKind.RECOVERY, "refit").defaults({}) | make_reconstruction_settings(settings.sources)
        defaults |= {f"reconstruct {name}": value for name, value in fit.items()}
    if settings.distil:
        training = find_method(MethodKind.RECOVERY, "distil").defaults({}) | DISTILLATION
        defaults |= {f"distil {name}": value for name, value in training.items()}
    identity = {"verb": "prune", "settings": asdict(settings), "defaults": defaults, "asked": asdict(asked)}
    axes = with_droppable_modules(method, model, opened.axes)
    check_same_inputs(run.ranks, [network.opened.weights if isinstance(network, BlockwiseNetwork) else model], data)
    with run.stage("time"):
        budget = with_timing(model, axes, budget, recorded=recorded.get("timing"), progress=run.progress)
    check_pruning(method, axes, budget, data.calibration)
    check_objective(method, (), opened.objective)
    with run.begin(RunStart(identity, network.loaded, network.outside, opened.python_call)) as record:
        network.use_folder(record.path)
        data = complete_data(run, data, opened.specs, network.loaded)
        record.update(timing=budget.timing.record() if budget.timing else None)
        choice = describe_choice(asked, settings)
        if choice:
            record.update(notes=[*network.loaded.notes, choice, *left_out])
        opened = replace(opened, settings=settings, axes=axes, data=data)
        job = PruneJob(settings, method, budget, opened, run, must_fit=bool(asked.reconstruct), choice=choice)
        plan, notes = job.plan()
        is_text = opened.specs is not None and network.loaded.tokenizer is not None  # which can be counted
        if cuts and choice and is_text and settings.reconstruct and "calibrate" not in recorded.get("seconds", ()):
            job.announce_minutes_left()
        if cuts and (run.ranks.leads or network.loaded.tokenizer is not None):  # rank 0 needs no help with other data
            notes += job.cut(plan)
        if opened.memory:
            record.update(memory=opened.memory.record())
        if cuts:
            run.finish()
        return PruneResult(plan, network.loaded, (*left_out, *notes))


@dataclass(frozen=True)
class PruneJob:
    """A pruning run whose settings and inputs are checked."""

    settings: Settings
    method: Pruner
    budget: Budget  # with the measured times, if it is in milliseconds
    inputs: PruneInputs
    run: ActiveRun  # begun
    must_fit: bool  # whether layers that cannot be reconstructed are an error, since the user asked for it
    choice: str  # what was chosen for the user, as options; empty: nothing

    def plan(self) -> tuple[Plan, tuple[str, ...]]:
        """Measure on the calibration data, choose the units that stay; return the plan, and notes for the user.

        All ranks call this and get the plan that rank 0 makes; notes, about the data, are on rank 0.
        """
        run, inputs, settings = self.run, self.inputs, self.settings
        model, axes, record = inputs.network.loaded.model, inputs.axes, run.record
        forward = partial(autocasting, model, settings.precision)
        with run.stage("calibrate"), torch.enable_grad(), forward():  # a caller in Python may have gradients off
            sources, objective = inputs.data.calibration, inputs.objective
            units, size = self.budget.units(axes), settings.batch_size or 1
            evidence, key = calibrate(run, inputs.network, sources, axes, self.method, units, size, objective)
        if not run.ranks.leads:
            return read_plan(json.loads(broadcast_record(run.ranks))), ()
        checkpoint = record.path / "statistics" / "learned.safetensors" if record.is_kept else None
        with run.stage("plan"), torch.enable_grad():
            if checkpoint:
                open_checkpoint(checkpoint, key, FORMAT)
            context = PruningContext(
                checkpoint=checkpoint,
                checkpoint_header=lambda: {"key": key},
                progress=run.progress,
                block_runner=inputs.network.streamed,
                weights=inputs.network.parameters(),
            )
            with forward():
                objective = inputs.objective
                cut = plan_cut(self.method, model, axes, self.budget, evidence, objective=objective, context=context)
            if cut.plan.notes:
                record.update(notes=[*record.read_record().get("notes", ()), *cut.plan.notes])
            if cut.findings and isinstance(record, RunFolder):
                record.write("findings.json", {"method": settings.method, **cut.findings})
        plan = replace(cut.plan, origin={**cut.plan.origin, "chosen": self.choice}) if self.choice else cut.plan
        broadcast_record(run.ranks, plan.to_json())
        return plan, evidence.notes

    def announce_minutes_left(self) -> None:
        """Announce what was chosen, and how long the rest of the run will take, as its calibration took so long."""
        halves, taught_on = self.inputs.data, self.inputs.taught_on
        calibrated, trained = (sum(source.tokens for source in data) for data in (halves.calibration, taught_on))
        rest, training = REST_SECONDS[self.settings.method]
        minutes = self.run.seconds["calibrate"] * (rest + training * trained / calibrated) / 60
        logging.getLogger("regrow").info("%s; about %.0f min left", self.choice, max(1, minutes))

    def cut(self, plan: Plan) -> tuple[str, ...]:
        """Apply a plan to the network, reconstruct and train as settings say, save and measure it; return notes."""
        run, settings, network, record = self.run, self.settings, self.inputs.network, self.run.record
        axes, model = self.inputs.axes, network.loaded.model
        before = self._measure(axes, "dense")
        unreconstructed: dict[str, evaluation.Perplexity] = {}
        fit_notes: tuple[str, ...] = ()
        # Weights are shared: a cut makes new ones, which alone are fitted. Vectors are copied: biases are fitted.
        # Training changes all.
        dense = None
        if settings.reconstruct or settings.distil:
            dense = copy_model(model, lambda x: x if x.dim() > 1 and not settings.distil else x.detach().clone())
        state = None if dense is None or settings.distil else NetworkState.of(model)
        after = network.cut(run, axes, plan)
        run.record_plan(plan, axes, after)
        if dense is not None and settings.reconstruct:
            if self.must_fit:  # the user wants to see what it gains
                with tune.keep_statistics(model):
                    tune.recalibrate_changed(model, plan, self.inputs.data.calibration)
                    unreconstructed = self._measure(after, "cut")
            sources = self.inputs.data.calibration
            if network.loaded.tokenizer is None:
                sources = tuple(map(take_for_fit, sources))
            with run.stage("reconstruct"), _restoring(model, dense, state):
                try:
                    task = RecoveryTask(model, dense, axes, plan, sources, progress=run.progress)
                    reconstruct(task, record=record, precision=settings.precision)
                except ValueError as error:  # not of a full disk, say, which must not change a result
                    if self.must_fit or isinstance(error, StoreError | ResourceError | RefusedError):
                        raise
                    fit_notes = (f"layers were not reconstructed: {error}",)
        if dense is not None and settings.distil:
            self._distil(dense, plan)
        notes = (*fit_notes, *self._tune(plan))
        if record.is_kept:
            with run.stage("save"):
                network.save(record)
        pruned = self._measure(after, "pruned")
        log_budget(record, network.loaded.model, axes, after, self.budget)
        if dense is not None and record.is_kept and self.budget.measure != Measure.TIME:
            tokens = settings.seq_len if network.loaded.tokenizer is not None and settings.sources else 0
            with run.stage("time"):
                log_speed(record, dense, network.loaded.model, axes, tokens, settings.precision)
        log_pairs(record, unreconstructed, pruned, {"of": ["cut", "pruned"]})
        log_pairs(record, before, pruned)
        if notes:
            record.update(notes=[*record.read_record().get("notes", ()), *notes])
        return notes

    def _distil(self, dense: nn.Module, plan: Plan) -> None:
        """Train the cut network in place to predict what the network before the cut predicts, or resume that."""
        run, settings, loaded = self.run, self.settings, self.inputs.network.loaded
        task = RecoveryTask(loaded.model, dense, self.inputs.axes, plan, self.inputs.taught_on, settings.seed)
        task = replace(task, objective=self.inputs.objective, progress=run.progress)
        origin = loaded.origin.record()
        with run.stage("distil"), torch.enable_grad():
            row = recover(run.record, task, "distil", DISTILLATION, origin=origin, precision=settings.precision)
        run.record.log("distillation", row)

    def _measure(self, axes: AxisGraph, name: str) -> dict[str, evaluation.Perplexity]:
        """Log size and quality of the network in its present state, as model ``name``; return source → perplexity."""
        inputs, network, run = self.inputs, self.inputs.network, self.run
        if not network.is_shared:
            if not run.ranks.leads:
                return {}
            run = replace(run, ranks=SINGLE)
        settings = self.settings
        data = EvaluationData(inputs.data, inputs.objective, settings.precision, settings.batch_size or 1)
        with self.run.stage("evaluate"):
            return measure_network(run, network.loaded, axes, data, name, network=network.streamed)

    def _tune(self, plan: Plan) -> tuple[str, ...]:
        """Fine-tune the network in place if the settings say so, remeasure BatchNorms that changed; return notes."""
        settings, loaded, calibration = self.settings, self.inputs.network.loaded, self.inputs.data.calibration
        epochs, seed, progress = settings.finetune, settings.seed, self.run.progress
        with self.run.stage("tune"), autocasting(loaded.model, settings.precision):
            if epochs:
                schedule = replace(tune.FINETUNING, seed=seed)
                tune.finetune(loaded.model, calibration, epochs=epochs, schedule=schedule, progress=progress)
            note = tune.recalibrate_changed(loaded.model, plan, calibration)
        return (note,) if note else ()


@contextmanager
def _restoring(model: nn.Module, dense: nn.Module, state: NetworkState | None) -> Iterator[None]:
    """Context manager that restores the network before the cut, with the vectors of ``dense``, after an error."""
    try:
        yield
    except BaseException:
        if state is not None:
            state.restore()
            with torch.no_grad():
                for name, value in dense.named_parameters():
                    if (own := model.get_parameter(name)).data_ptr() != value.data_ptr():
                        own.copy_(value)
        raise


def open_named(settings: Settings, invocation: Invocation, run: ActiveRun) -> PruneInputs:
    """Open the network, one block at a time if it exceeds ``--memory``, trace it, and open the data of the settings."""
    check_same_settings(run.ranks, settings, invocation.memory)
    if invocation.memory:
        settings = choose_defaults(settings, "text, in parts")
    elif run.ranks.several and settings.reconstruct is None:
        settings = replace(settings, reconstruct=False, precision=settings.precision or "float32")
    if run.ranks.several and not settings.method and settings.distil is None and settings.time == "minutes":
        settings = replace(settings, distil=0)
    if (option := explain_training(settings)) and (invocation.memory or run.ranks.several):
        raise InputError(
            f"{option} runs in one process without --memory; use `regrow recover RUN --by distil` after it"
        )
    if settings.reconstruct and (invocation.memory or run.ranks.several):
        raise InputError(
            "--reconstruct runs in one process without --memory; leave it out, and use `regrow recover RUN --by refit`"
        )
    network: WholeNetwork | BlockwiseNetwork
    memory, axes = None, None
    with run.stage("load"):
        if invocation.memory:
            opened, memory = open_to_prune(settings, invocation)
        if memory is not None and memory.streams:
            network, axes = BlockwiseNetwork(opened, memory), opened.axes
        else:
            network = WholeNetwork(load_model(make_model_spec(settings), invocation.progress, invocation.code))
            kind = "text" if network.loaded.tokenizer is not None else "examples" if settings.sources else "no data"
            if kind == "text" and not (settings.method or settings.precision or settings.target.startswith("ms")):
                settings = replace(settings, precision=choose_precision(network.loaded.model))
            settings = choose_defaults(settings, kind, sum(map(Tensor.numel, network.loaded.model.parameters())))
        if settings.finetune and (network.loaded.tokenizer is not None or not settings.sources):
            remedy = "take --time hour" if network.loaded.tokenizer is not None else "give --source"
            raise InputError(
                f"--finetune {settings.finetune} trains image models on --source; leave it out, or {remedy}"
            )
        specs = make_source_specs(settings)
        data = read_sources(specs, network.loaded)
        taught_on: Sequence[Source] = ()
        if settings.distil:
            taught_on = read_training_text(settings, network.loaded, data.calibration)
    with run.stage("trace"):
        axes = trace_loaded(network.loaded) if axes is None else axes
    return PruneInputs(settings, network, axes, data, specs, taught_on, memory=memory)


def plan_named(settings: Settings, invocation: Invocation) -> Plan:
    """Return the plan that a pruning run with these settings would make; nothing is cut or recorded."""
    open_inputs = partial(open_named, settings, invocation)
    return prune_network(settings, open_inputs, ActiveRun(progress=invocation.progress), cuts=False).plan


def prune_named(settings: Settings, invocation: Invocation) -> RunFolder:
    """Prune the model that settings name, as ``regrow prune`` does, and return the finished folder."""
    open_inputs = partial(open_named, settings, invocation)
    prune_network(settings, open_inputs, invocation.start_run(settings, settings.model, undo=settings.undo))
    return RunFolder(Path(invocation.out))
