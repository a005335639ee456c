"""Grow a network such that its outputs do not change, whether named on the command line or given in Python."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from regrow import store
from regrow.core.axes import AxisGraph
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.process_memory import reset_peak
from regrow.core.progress import Progress, silent
from regrow.jobs.generated import fill_generated
from regrow.jobs.growing import GrowthSpec, plan_growth
from regrow.jobs.growth import CheckedGrowth, GrowthData
from regrow.jobs.inputs import SourceHalves, SourceSpecs, count_windows, describe_sources, read_sources
from regrow.jobs.measuring import measure_run
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.recording import Clock, Invocation, Record, Recorder, RunStart, record_plan
from regrow.jobs.training_memory import plan_growth_memory
from regrow.nets import Loaded
from regrow.nets.precision import check_precision
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.grow import Settings
from regrow.store.run_folder import RunFolder
from regrow.streaming.requirements import MemoryTerms, record_peak
from regrow.tracing import trace
from regrow.training.grown import GrowthTraining


@dataclass(frozen=True)
class GrowInputs:
    """What a run grows, and on which data it is trained and measured.

    Args:
        loaded: The network.
        axes: Its axes.
        data: The data for training and evaluation.
        objective: What the network is trained for; ``None``: what fits the labels.
        lenient: Whether the data for evaluation are those for training, whose labels need not fit.
        describe: Returns what is recorded of the data.
        call: What the result depends on besides settings, for a call from Python.
        predict: Returns what a plan needs of a limit of memory, or refuses it; ``None``: there is no limit.
    """

    loaded: Loaded
    axes: AxisGraph
    data: SourceHalves
    objective: Objective | None = None
    lenient: bool = False
    describe: Callable[[SourceHalves], list[dict[str, object]] | None] = lambda data: None
    call: dict[str, object] | None = None
    predict: Callable[[Plan], MemoryTerms | None] = lambda plan: None


@dataclass(frozen=True)
class GrowResult:
    """The result of a growth run.

    Args:
        plan: The plan.
        axes: The axes before the growth.
        model: The network, grown unless only the plan was made.
        folder: The finished run folder; ``None``: nothing was recorded.
        warnings: Which axes cannot be widened.
    """

    plan: Plan
    axes: AxisGraph
    model: nn.Module
    folder: RunFolder | None
    warnings: tuple[str, ...] = ()


def carry_out(
    settings: Settings,
    inputs: Callable[[Clock], GrowInputs],
    recorder: Recorder,
    *,
    progress: Progress = silent,
    grows: bool = True,
) -> GrowResult:
    """Grow a network such that its outputs do not change, train it if there are steps, and record it.

    All mistakes in the settings and inputs are found before anything is recorded. An interrupted run with the same
    settings is resumed where the recorder has its folder.

    Args:
        settings: The settings of the run.
        inputs: Opens the network and the data, and times that.
        recorder: Where the run is recorded.
        progress: Called with (steps done, steps in all, what is being done).
        grows: Whether the network is grown; otherwise the run ends with the plan.

    Raises:
        ValueError: If a setting, the model or a source is not usable, or nothing of the wanted kind can grow; says
            which, and the remedy.
        RefusedError: If the outputs change by more than rounding; the network is as it was then.
    """
    check_settings(settings)
    spec, identity = spec_of(settings), {"verb": "grow", "settings": record_settings(settings)}
    recorder.check(identity)
    clock = Clock(None)
    reset_peak()
    opened = inputs(clock)
    loaded, axes, data = opened.loaded, opened.axes, opened.data
    with clock.stage("plan"):
        plan, notes = plan_growth(loaded.model, axes, spec)
        if not grows:
            return GrowResult(plan, axes, loaded.model, None, (*notes,))
        needs = opened.predict(plan)
    with recorder.begin(RunStart(identity, loaded, call=opened.call)) as record:
        clock.folder = record
        if data.pending:
            with clock.stage("generate"):
                specs = _sources(settings)
                windows = count_windows(specs.tokens, specs.seq_len)
                data = fill_generated(data, specs, loaded, windows, record.path, progress=progress)
        record.update(notes=[*loaded.notes, *notes], sources=opened.describe(data))
        _grow(settings, replace(opened, data=data), record, plan, clock, progress)
        if needs:
            record.update(memory=record_peak(needs))
        return GrowResult(plan, axes, loaded.model, recorder.finish(record, clock.seconds), (*notes,))


def _grow(settings: Settings, inputs: GrowInputs, record: Record, plan: Plan, clock: Clock, progress: Progress) -> None:
    """Grow the network, train it, and save it; measure it before and after."""
    loaded, axes = inputs.loaded, inputs.axes

    def measure(axes: AxisGraph, name: str) -> None:
        with clock.stage("evaluate"):
            measure_run(
                record,
                loaded,
                axes,
                inputs.data.evaluation,
                inputs.data.seen,
                name,
                progress,
                precision=settings.precision,
                objective=inputs.objective,
                lenient=inputs.lenient,
            )

    measure(axes, "before")
    proof = settings.proof and record.kept
    grown, row = CheckedGrowth(loaded.model, axes, plan, proof, clock.stage, progress).carry_out()
    record_plan(record, plan, axes, grown)
    if row:
        record.log("verify", **row)
    if settings.steps:
        with clock.stage("train"):
            training = GrowthTraining(settings.steps, settings.lr, settings.train == "new", settings.seed)
            data = GrowthData(inputs.data.calibration, training, settings.precision, inputs.objective)
            data.train(loaded.model, axes, plan, record, progress)
    if record.kept:
        with clock.stage("save"):
            store.write_model(loaded, record.path)
    measure(grown, "after")


def open_named(settings: Settings, invocation: Invocation, clock: Clock) -> GrowInputs:
    """Open the network and the data that settings name.

    Args:
        settings: The settings of the run.
        invocation: How the command was called.
        clock: Times the stages ``load`` and ``trace``.

    Raises:
        ValueError: If the model or a source is not usable; says which, and the remedy.
    """
    with clock.stage("load"):
        loaded = load_model(_model(settings), invocation.progress, invocation.code)
        check_precision(loaded.model, settings.precision)
        specs = _sources(settings)
        data = read_sources(specs, loaded)
    with clock.stage("trace"):
        invocation.progress(0, 1, "tracing")
        axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)

    def predict(plan: Plan) -> MemoryTerms | None:
        return plan_growth_memory(settings, loaded, axes, plan, invocation.memory, invocation.announce)

    return GrowInputs(loaded, axes, data, describe=partial(describe_sources, specs), predict=predict)


def run(settings: Settings, invocation: Invocation) -> RunFolder:
    """Grow the model that settings name, as ``regrow grow`` does, and return the folder.

    Args:
        settings: The settings of the run.
        invocation: How the command was called.

    Raises:
        ValueError: As :func:`carry_out`.
    """
    settings.check_training()
    recorder = invocation.recorder(settings, settings.model, undo=settings.undo)
    carry_out(settings, partial(open_named, settings, invocation), recorder, progress=invocation.progress)
    return RunFolder(Path(invocation.out))


def spec_of(settings: Settings) -> GrowthSpec:
    """Return how much a run grows its model.

    Args:
        settings: The settings of the run.
    """
    return GrowthSpec.parse(
        {"mlp": settings.mlp, "heads": settings.heads, "channels": settings.channels},
        settings.named(),
        settings.stacks(),
        fill=settings.fill,
        seed=settings.seed,
        round_to=settings.round_to,
        regular=settings.regular,
    )


def _model(settings: Settings) -> ModelSpec:
    sources = (*settings.on, *settings.sources)
    return ModelSpec(settings.model, settings.dtype, settings.device, settings.input, sources)


def _sources(settings: Settings) -> SourceSpecs:
    amounts = settings.eval_tokens, settings.seq_len
    return SourceSpecs(*amounts, settings.on, settings.sources, settings.tokens, settings.seed)
