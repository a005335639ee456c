"""A pruning run: everything around one cut, in a folder that tells what happened and can be resumed."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regrow import evaluation, nets, store
from regrow.allocation.inventory import inventory
from regrow.amounts import Measure, Target
from regrow.axes import AxisGraph, Mark
from regrow.budget import Budget
from regrow.commands import measuring
from regrow.commands import pruning as prune
from regrow.commands.calibration import calibrated
from regrow.commands.checks import PRUNE, check_settings
from regrow.commands.clock import Clock
from regrow.commands.example_inputs import asked_input, noted_input
from regrow.commands.folder import RunFolder, WritePage
from regrow.commands.inputs import Kinds, described, sources_of
from regrow.commands.record import convert_settings, set_words
from regrow.commands.recovering import check_recovery, compared, recovered
from regrow.commands.scored import write_scores
from regrow.errors import InputError, RefusedError
from regrow.method import Method, State
from regrow.methods import entry, recovery_entry
from regrow.nets import Loaded
from regrow.nets.code import check_code
from regrow.nets.devices import usable_device
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.references import names_code
from regrow.surgery import apply, verify
from regrow.tracing import trace
from regrow.training import loop, tune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Settings:
    """Everything that a pruning run depends on; ``run.json`` holds exactly this.

    Args:
        model: What :func:`regrow.nets.load` takes.
        method: One of ``regrow.methods.METHODS``.
        method_settings: Its settings, where they differ from the defaults.
        keep: The fraction of the measure that stays; ``None`` if there is a target.
        measure: ``params``, ``macs``, ``bytes``, ``kv_cache`` or ``ms``.
        target: So much may stay instead, like ``bytes=200M`` or ``kv_cache=50M@4096``.
        regular: One width per kind of axis in all blocks.
        sources: Kinds of text (``news``) or ``NAME=PATH``; for image models ``digits`` or ``NAME=FOLDER``.
        unseen: Further kinds, on which the result is only evaluated.
        only: Patterns: cut only axes all of whose tensors match one.
        exclude: Patterns: leave out axes with a tensor that matches.
        marks: Which kinds of axes to cut; ``folded`` takes in a residual width under root-mean-square norms.
        round_to: Sizes left are multiples of this.
        seed: Which windows of the sources are drawn, and the seed of methods that have one.
        dtype: What the model is loaded in; empty: as it is stored.
        device: Where it runs.
        input: The shape of the input it is traced with, like ``1x3x32x32``; empty: that of its source's images, or a
            guess.
        tokens: Calibration tokens per source (images: how many of them).
        eval_tokens: Evaluation tokens per source.
        seq_len: Tokens per window.
        finetune: Epochs of fine-tuning after the cut (image models).
        recover: One of ``regrow.methods.RECOVERIES``, for after the cut; empty: none.
        recover_tokens: How many tokens that learns from, of all sources together (images: how many of them).
        proof: Verify on the model that masked = shrunk.
    """

    model: str
    method: str = "flap"
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    keep: float | None = 0.8
    measure: str = "params"
    target: str = ""
    regular: bool = False
    sources: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    marks: tuple[str, ...] = ("neutral",)
    round_to: int = 1
    seed: int = 0
    dtype: str = ""
    device: str = "cpu"
    input: str = ""
    tokens: int = 4096
    eval_tokens: int = 2048
    seq_len: int = 256
    finetune: int = 0
    recover: str = ""
    recover_tokens: int = 32768
    proof: bool = True

    def __post_init__(self) -> None:
        if self.target and isinstance(self.target, str):
            object.__setattr__(self, "keep", None)
            object.__setattr__(self, "measure", str(Target.parse(self.target).measure))

    def check(self) -> None:
        """Assert that settings are of their types, in their ranges, and known by name.

        Raises:
            ValueError: Naming the first that is not.
        """
        check_settings(self, PRUNE)
        if self.dtype and self.dtype not in DTYPES:
            raise InputError(
                f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}; leave it out to keep the model's own"
            )
        usable_device(self.device)

    def record(self) -> dict[str, Any]:
        """What ``run.json`` holds; settings that came later only where they are used, so that older runs go on."""
        default = Settings(self.model)
        return {name: v for name, v in asdict(self).items() if name not in _LATER or v != getattr(default, name)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], code: str = "") -> "Settings":
        """The settings that a ``run.json`` holds.

        Args:
            values: What it says.
            code: The function ``pkg.mod:fn`` that builds the model, where the user's own code does: a recorded name
                is never imported.

        Raises:
            ModelError: If the run needs the user's code and got none, or got some and needs none.
        """
        check_code(str(values.get("model")), names_code(str(values.get("model"))), code)
        values = {**values, "model": code} if code else values
        if not isinstance(values.get("model"), str):
            raise InputError("the settings of the run name no model; restore run.json")
        made = convert_settings(values, cls)
        made.check()
        return made

    def learning_from(self, tokens: int) -> "Settings":
        """The same, with as many calibration tokens as a recovery may use, shared among the sources."""
        return replace(self, tokens=tokens // max(1, len(self.sources)))

    def budget(self) -> Budget:
        """How much may stay, and which axes may pay for it."""
        marks = frozenset(map(Mark, self.marks))
        target = Target.parse(self.target) if self.target else None
        much = 1.0 if self.keep is None else self.keep
        rest = self.only, self.exclude, marks, self.round_to, self.regular, target
        return Budget(much, Measure(self.measure), *rest)

    def command(self, out: str) -> str:
        """The command line that does this run again."""
        default = Settings(self.model)
        words = ["regrow", "prune", self.model, "--method", self.method]
        words += ["--target", self.target] if self.keep is None else ["--keep", f"{self.keep:g}"]
        for spec in self.sources:
            words += ["--source", spec]
        for flag in ("unseen", "only", "exclude"):
            for pattern in getattr(self, flag):
                words += [f"--{flag}", pattern]
        for mark in self.marks if self.marks != default.marks else ():
            words += ["--mark", mark]
        words += set_words(self.method_settings)
        for name, flag in _FLAGS.items():
            if getattr(self, name) != getattr(default, name) and not (name == "measure" and self.target):
                words += [flag, str(getattr(self, name))]
        words += [flag for flag, on in (("--regular", self.regular), ("--no-verify", not self.proof)) if on]
        return shlex.join([*words, "--out", out])


_LATER = frozenset({"target", "input", "regular", "recover", "recover_tokens"})
_FLAGS = {
    "measure": "--measure",
    "round_to": "--round",
    "seed": "--seed",
    "dtype": "--dtype",
    "device": "--device",
    "input": "--input",
    "tokens": "--tokens",
    "eval_tokens": "--eval-tokens",
    "seq_len": "--seq-len",
    "finetune": "--finetune",
    "recover": "--recover",
    "recover_tokens": "--recover-tokens",
}


@dataclass(frozen=True)
class _Job:
    """What the parts of a run share."""

    settings: Settings
    folder: RunFolder
    loaded: Loaded
    kinds: Kinds
    clock: Clock
    progress: Progress

    def measure(self, axes: AxisGraph, name: str) -> dict[str, evaluation.Perplexity]:
        """Measure the model as it is now, under a name."""
        kinds = self.kinds
        with self.clock.stage("evaluate"):
            return measuring.measure(self.folder, self.loaded, axes, kinds.evaluation, kinds.seen, name, self.progress)


def plan_only(settings: Settings, progress: Progress = silent) -> Plan:
    """The plan that a run would make, and nothing else.

    Raises:
        ValueError: As :func:`run`.
    """
    settings.check()
    method = prune.built(settings.method, _seeded(settings))
    budget = settings.budget()
    loaded = load_model(settings, progress)
    kinds = sources_of(settings, loaded)
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    budget = prune.timed(loaded.model, axes, budget, progress=progress)
    state = prune.begun(axes, method, budget, kinds.calibration)
    evidence = prune.measured(loaded.model, axes, method, kinds.calibration, progress)
    return loop.proposed(loaded.model, axes, method, evidence, state, progress=progress)[0]


def run(
    settings: Settings, out: str | Path, progress: Progress = silent, *, write_page: WritePage | None = None
) -> RunFolder:
    """Prune a model and leave a run folder behind: model, plan, measurements.

    Everything that can be wrong with the settings is found before the folder is made; an interrupted run with the same
    settings goes on where it was.

    Args:
        settings: What to do.
        out: The run folder; new, empty, or of this very run.
        progress: Called as work goes on.
        write_page: Called with the complete folder, right before it takes its place.

    Raises:
        ValueError: If a setting, the model, or a source is not usable; says which, and the remedy.
    """
    settings.check()
    method = prune.built(settings.method, _seeded(settings))
    budget = settings.budget()
    check_recovery(settings.recover, settings.sources)
    told: dict[str, Any] = {"verb": "prune", "settings": settings.record(), "defaults": _defaults(settings)}
    RunFolder.check(out, **told)
    clock = Clock(None)
    with clock.stage("load"):
        loaded = load_model(settings, progress)
        kinds = sources_of(settings, loaded)
    with clock.stage("trace"):
        axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    with clock.stage("time"):
        begun = RunFolder.started(out)
        known = begun.run().get("timing") if begun else None
        budget = prune.timed(loaded.model, axes, budget, known=known, progress=progress)
    state = prune.begun(axes, method, budget, kinds.calibration)
    with RunFolder.create(out, **told, command=settings.command(str(out))) as folder:
        clock.folder = folder
        folder.update(notes=list(loaded.notes), sources=described(settings, kinds), **noted_input(loaded))
        if budget.timing:  # another measurement would be another plan
            folder.update(timing=budget.timing.record())
        job = _Job(settings, folder, loaded, kinds, clock, progress)
        plan = _planned(job, axes, method, state)
        _pruned(job, axes, plan, budget)
        return folder.finish(write_page, seconds=clock.seconds)


def _planned(job: _Job, axes: AxisGraph, method: Method, state: State) -> Plan:
    """Calibrate, and plan the cut."""
    folder, loaded, progress = job.folder, job.loaded, job.progress
    with job.clock.stage("calibrate"):
        evidence, key = calibrated(folder, loaded, axes, method, job.kinds.calibration, progress)
        if evidence.notes:
            folder.update(notes=[*loaded.notes, *evidence.notes])
    with job.clock.stage("plan"):
        keep = partial(folder.save_learned, key=key)
        done = folder.learned(state, key=key)
        plan, state = loop.proposed(
            loaded.model, axes, method, evidence, state, done=done, on_done=keep, progress=progress
        )
        if state.scores is not None:
            write_scores(folder, loaded, axes, plan, state.scores, evidence)
        if state.findings:
            folder.write_findings(job.settings.method, state.findings)
    return plan


def _pruned(job: _Job, axes: AxisGraph, plan: Plan, budget: Budget) -> None:
    """Cut, measured before and after, and save; recover, if that is asked for."""
    settings, folder, loaded, kinds, clock = job.settings, job.folder, job.loaded, job.kinds, job.clock
    before = job.measure(axes, "dense")
    if settings.proof:
        with clock.stage("verify"):
            job.progress(0, 1, "proving that masked = shrunk")
            _prove(folder, loaded, axes, plan)
    rows = [row.record() for row in inventory(axes)]
    with clock.stage("apply"):
        traced, (_, axes) = axes, apply(loaded.model, axes, plan)
        if not len(folder.ledger):
            folder.ledger.append(plan)
        folder.write_axes(rows, [row.record() for row in inventory(axes)])
    if loaded.tokenizer is None and kinds.calibration:
        with clock.stage("tune"):
            _tuned(settings, loaded, kinds, job.progress)
    with clock.stage("save"):
        store.write_model(loaded, folder.path)
    after = job.measure(axes, "pruned")
    measuring.counted(folder, loaded.model, traced, axes, budget)
    for name in before.keys() & after.keys():
        pair = evaluation.paired(before[name], after[name])
        folder.log("paired", source=name, delta_nll=pair.mean, se=pair.error)
    if settings.recover:
        with clock.stage("recover"):
            _recovered(settings, folder, loaded, traced, plan, job.progress)
        compared(folder, job.measure(axes, "recovered"))


def load_model(settings: Settings, progress: Progress = silent) -> Loaded:
    """The model that settings name, in the dtype they name.

    Raises:
        ValueError: If it cannot be loaded.
    """
    settings.check()
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    given = asked_input(settings.model, settings.input, (*settings.sources, *settings.unseen))
    return nets.load(settings.model, dtype=dtype, device=settings.device, **given, progress=progress)


def _defaults(settings: Settings) -> dict[str, Any]:
    """What the method, and the recovery after it, take for granted."""
    taken = entry(settings.method).defaults({*settings.method_settings, "seed"})
    more = recovery_entry(settings.recover).defaults({"seed"}) if settings.recover else {}
    return taken | {f"{settings.recover} {name}": value for name, value in more.items()}


def _seeded(settings: Settings) -> dict[str, Any]:
    """The method's settings; a method with a seed takes the run's, unless it was given its own."""
    has_seed = "seed" in getattr(entry(settings.method).settings, "__dataclass_fields__", {})
    return {**({"seed": settings.seed} if has_seed else {}), **settings.method_settings}


def _prove(folder: RunFolder, loaded: Loaded, axes: AxisGraph, plan: Plan) -> None:
    result = verify(loaded.model, axes, plan)
    folder.log("verify", **asdict(result), dtype="float64")
    if not result.ok:
        raise RefusedError(
            f"the plan does not hold on this model: masked and shrunk differ by {result.max_abs_diff:.3g} in float64, "
            f"the bound is {result.bound:.3g}; no model was saved, please report this one"
        )


def _tuned(settings: Settings, loaded: Loaded, kinds: Kinds, progress: Progress) -> None:
    if settings.finetune:
        steps = lambda done, total, loss: progress(done, total, f"fine-tuning, loss {loss:.3f}")  # noqa: E731
        for source in kinds.calibration:
            tune.finetune(loaded.model, source, epochs=settings.finetune, seed=settings.seed, progress=steps)
    tune.recalibrate(loaded.model, kinds.calibration)


def _recovered(
    settings: Settings, folder: RunFolder, loaded: Loaded, traced: AxisGraph, plan: Plan, progress: Progress
) -> None:
    """Recover the cut model with the help of the dense one, which is loaded again, and save it."""
    texts = sources_of(settings.learning_from(settings.recover_tokens), loaded).calibration
    dense, by, seed = load_model(settings, progress), settings.recover, settings.seed
    recovered(folder, loaded.model, dense, traced, plan, texts, by, seed=seed, progress=progress)
    store.write_model(loaded, folder.path)
