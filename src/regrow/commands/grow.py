"""``regrow grow``: widen or deepen a model such that its outputs do not change, compare them, and save."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow import store
from regrow.axes import AxisGraph
from regrow.axes.inventory import inventory
from regrow.commands.clock import Clock
from regrow.commands.example_inputs import record_input
from regrow.commands.generated import fill_generated
from regrow.commands.growing import GrowthSpec, plan_growth
from regrow.commands.growth import CheckedGrowth, GrowthData
from regrow.commands.inputs import SourceHalves, SourceSpecs, count_windows, describe_sources, read_sources
from regrow.commands.measuring import measure
from regrow.commands.models import ModelSpec, load_model
from regrow.commands.parents import check_room, describe_stage, start_from
from regrow.commands.trackers import tracking
from regrow.commands.training_memory import plan_growth_memory
from regrow.nets import Loaded
from regrow.nets.precision import autocasting, check_precision
from regrow.plan import Plan
from regrow.process_memory import reset_peak
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder, WritePage
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.grow import Settings
from regrow.settings.words import command_line
from regrow.streaming.requirements import record_peak
from regrow.tracing import trace
from regrow.training.grown import GrowthTraining


@dataclass(frozen=True)
class _GrowJob:
    """The data that the parts of a growth run share."""

    settings: Settings
    folder: RunFolder
    loaded: Loaded
    kinds: SourceHalves
    clock: Clock
    progress: Progress

    def measure(self, axes: AxisGraph, name: str) -> None:
        """Measure and log the model in its present state, under a name."""
        with self.clock.stage("evaluate"), autocasting(self.loaded.model, self.settings.precision):
            measure(self.folder, self.loaded, axes, self.kinds.evaluation, self.kinds.seen, name, self.progress)


def plan_only(settings: Settings, progress: Progress = silent, *, code: str = "") -> tuple[Plan, AxisGraph]:
    """Return the plan that a growth run would carry out, and the axes of the model, without a run folder.

    Args:
        settings: The settings of the run.
        progress: Called with (steps done, steps in all, what is being done).
        code: As for :func:`run`.

    Raises:
        ValueError: As :func:`run`.
    """
    check_settings(settings)
    spec = spec_of(settings)
    loaded = load_model(_model(settings), progress, code)
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    plan, _ = plan_growth(loaded.model, axes, spec)
    return plan, axes


def run(
    settings: Settings,
    out: str | Path,
    progress: Progress = silent,
    *,
    code: str = "",
    track: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
    write_page: WritePage | None = None,
) -> RunFolder:
    """Grow a model and write a run folder with model, plan and measurements.

    All mistakes in the settings are found before the folder is made; an interrupted run with the same settings is
    resumed.

    Args:
        settings: The settings of the run.
        out: The run folder: new, empty, or of this very run.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code: the
            recorded name is never imported.
        track: The name of a tracker that gets every measurement, too; empty: none.
        memory: How much memory the run may use, such as ``4GiB``: what it needs is predicted once the model is loaded,
            and the run is refused if that is more. Empty: it is not predicted.
        announce: Called with one line that says what the run needs of that memory.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If a setting, the model or a source is not usable, or nothing of the wanted kind can grow; says
            which, and the remedy.
        RefusedError: If the outputs change by more than rounding; no model is saved then.
    """
    check_settings(settings)
    settings.check_training()
    spec = spec_of(settings)
    identity: dict[str, Any] = {"verb": "grow", "settings": record_settings(settings)}
    RunFolder.check(out, **identity)
    clock = Clock(None)
    reset_peak()
    with clock.stage("load"):
        loaded = load_model(_model(settings), progress, code)
        check_precision(loaded.model, settings.precision)
        specs = _sources(settings)
        kinds = read_sources(specs, loaded)
    with clock.stage("trace"):
        progress(0, 1, "tracing")
        axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    with clock.stage("plan"):
        plan, notes = plan_growth(loaded.model, axes, spec)
        needs = plan_growth_memory(settings, loaded, axes, plan, memory, announce)
    check_room(settings.model, loaded, out, undo=settings.undo)
    words = (*(("--code", code) if code else ()), *(("--memory", memory) if memory else ()), "--out", str(out))
    with tracking(RunFolder.create(out, **identity, command=command_line(settings, *words)), track) as folder:
        clock.folder = folder
        start_from(folder, settings.model, loaded, undo=settings.undo)
        with clock.stage("generate") if kinds.pending else nullcontext():
            windows = count_windows(specs.tokens, specs.seq_len)
            kinds = fill_generated(kinds, specs, loaded, windows, folder.path, progress=progress)
        folder.update(notes=[*loaded.notes, *notes], sources=describe_sources(specs, kinds), **record_input(loaded))
        _grown(_GrowJob(settings, folder, loaded, kinds, clock, progress), axes, plan)
        peak = record_peak(needs) if needs else None
        return folder.finish(write_page, seconds=clock.seconds, stage=describe_stage(folder), memory=peak)


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


def _grown(job: _GrowJob, axes: AxisGraph, plan: Plan) -> None:
    """Compare the outputs before and after the growth, grow the model, save it, and measure it."""
    settings, folder, loaded, clock = job.settings, job.folder, job.loaded, job.clock
    job.measure(axes, "before")
    grown, proof = CheckedGrowth(loaded.model, axes, plan, settings.proof, clock.stage, job.progress).carry_out()
    folder.own_ledger.replace(plan)
    folder.write_axes([row.record() for row in inventory(axes)], [row.record() for row in inventory(grown)])
    folder.log("verify", **proof)
    if settings.steps:
        with clock.stage("train"):
            training = GrowthTraining(settings.steps, settings.lr, settings.train == "new", settings.seed)
            data = GrowthData(job.kinds.calibration, training, settings.precision)
            data.train(loaded.model, axes, plan, folder, job.progress)
    with clock.stage("save"):
        store.write_model(loaded, folder.path)
    job.measure(grown, "after")
