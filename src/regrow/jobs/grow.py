"""Grow a network such that its outputs do not change, whether named on the command line or given in Python."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn

from regrow import store
from regrow.allocation.widening import plan_insertions, plan_widening
from regrow.core.axes import AxisGraph, Example
from regrow.core.errors import RefusedError, first_line
from regrow.core.objectives import Objective
from regrow.core.plan import Change, Fill, Plan
from regrow.core.sources import preserve_random_state
from regrow.jobs.forward_outputs import (
    NetworkState,
    compute_outputs,
    measure_change,
    measure_relative_change,
    vary_example,
    warm_caches,
)
from regrow.jobs.inputs import SourceHalves, SourceSpecs, complete_data, read_sources
from regrow.jobs.measuring import EvaluationData, measure_network
from regrow.jobs.models import ModelSpec, load_model, trace_loaded
from regrow.jobs.recording import ActiveRun, Invocation, RunStart
from regrow.nets import Loaded
from regrow.nets.devices import autocasting, check_precision
from regrow.settings.declaration import check_settings
from regrow.settings.grow import Settings
from regrow.store.run_folder import RunFolder
from regrow.surgery import apply, verify
from regrow.surgery.output_comparison import shallow_copy
from regrow.surgery.runner import Results
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.stacks import find_stacks, insert_copies
from regrow.training.tune import find_added_entries, measure_mean_loss, train_grown

# The largest change of an output in the model's own precision, relative to the largest output, that is kept.
MAX_CHANGE = 1e-3
# The largest relative change behind blocks that give their input unchanged: every operation gets the same numbers.
MAX_IDENTITY_CHANGE = 1e-7
OTHER_STACK = "name other stacks in blocks, or widen it with mlp, heads or channels"
AS_BEFORE = "the network is as it was"


@dataclass(frozen=True)
class GrowInputs:
    """What a run grows, and on which data it is trained and measured."""

    loaded: Loaded
    axes: AxisGraph
    data: SourceHalves  # trained on the calibration halves, measured on the evaluation halves
    objective: Objective | None = None  # what the network is trained for; `None`: what fits the labels
    specs: SourceSpecs | None = None  # the sources of the data; `None`: they have no names
    python_call: dict[str, object] | None = None  # what the result depends on besides settings, for a call from Python


@dataclass(frozen=True)
class GrowResult:
    """The result of a growth run."""

    plan: Plan
    model: nn.Module  # the network that was given, grown in place
    warnings: tuple[str, ...]  # which axes cannot be widened, and why


def grow_network(settings: Settings, open_inputs: Callable[[ActiveRun], GrowInputs], run: ActiveRun) -> GrowResult:
    """Grow a network in place such that its outputs do not change, train it if there are steps, and record the run.

    ``open_inputs``: called once, after the settings are checked. Mistakes in the settings and inputs raise before
    anything is written. An interrupted run with the same settings is resumed where the recorder has its folder. If
    outputs change by more than rounding, the network is restored and RefusedError is raised.
    """
    check_settings(settings)
    identity = {"verb": "grow", "settings": asdict(settings)}
    run.recorder.check(identity)
    opened = open_inputs(run)
    loaded, axes = opened.loaded, opened.axes
    with run.stage("plan"):
        plan, notes = plan_growth(loaded.model, axes, settings)
    with run.begin(RunStart(identity, loaded, python_call=opened.python_call)) as record:
        data = complete_data(run, opened.data, opened.specs, loaded)
        record.update(notes=[*loaded.notes, *notes])
        _grow(settings, replace(opened, data=data), run, plan)
        run.finish()
    return GrowResult(plan, loaded.model, notes)


def _grow(settings: Settings, inputs: GrowInputs, run: ActiveRun, plan: Plan) -> None:
    """Grow the network in place, train it, and save it; measure it before and after. After an error it is restored."""
    loaded, axes, record = inputs.loaded, inputs.axes, run.record
    data = EvaluationData(inputs.data, inputs.objective, settings.precision)
    with run.stage("evaluate"):
        measure_network(run, loaded, axes, data, "before")
    state = NetworkState.of(loaded.model)
    try:
        with preserve_random_state():
            grown, proof = _grow_checked(run, loaded.model, axes, plan, in_float64=record.is_kept)
    except BaseException:
        state.restore()
        raise
    run.record_plan(plan, axes, grown)
    if proof:
        record.log("verify", proof)
    if settings.steps:
        with run.stage("train"):
            _train(settings, inputs, run, plan)
    if record.is_kept:
        with run.stage("save"):
            store.write_model(loaded, record.path)
    with run.stage("evaluate"):
        measure_network(run, loaded, grown, data, "after")


def plan_growth(model: nn.Module, axes: AxisGraph, settings: Settings) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan of a growth, and notes on axes that the settings name and that cannot be widened, with reasons.

    Nothing is changed. Raises ValueError if the settings ask for no growth, or for an impossible one.
    """
    settings.check_growth()
    parts, named, blocks = settings.parse_parts(), settings.parse_axes(), settings.parse_stacks()
    fill = Fill(settings.fill, settings.seed)
    widened = plan_widening(axes, parts, named)
    with preserve_random_state():
        insert = plan_insertions(find_stacks(model, axes), blocks) if blocks else {}
    changes = {}
    for key, units in widened.grow.items():
        axis = axes[key]
        changes[key] = Change(axis.size, tuple(range(axis.size)), axis.slots, axis.ids, grow=units, fill=fill)
    origin: dict[str, Any] = {"method": "grow", **{part: str(increase) for part, increase in parts.items()}}
    for field, increases in (("axis", named), ("blocks", blocks)):
        if increases:
            origin[field] = {name: str(increase) for name, increase in increases.items()}
    plan = Plan(changes, origin={**origin, "fill": settings.fill}, insert=insert)
    plan.check(axes)
    reasons: dict[str, list[str]] = {}
    for key, reason in widened.refused.items():
        reasons.setdefault(reason, []).append(key)
    notes = []
    for reason, (first, *others) in reasons.items():
        if others:
            notes.append(f"{1 + len(others)} axes keep their width ({first}, …): {reason}")
        else:
            notes.append(f"1 axis keeps its width ({first}): {reason}")
    return plan, tuple(notes)


def _grow_checked(
    run: ActiveRun, model: nn.Module, axes: AxisGraph, plan: Plan, *, in_float64: bool
) -> tuple[AxisGraph, dict[str, Any]]:
    """Grow a network in place; return the axes afterwards, and the ``verify`` row of ``metrics.jsonl``.

    ``in_float64``: verify the plan in float64 as well, before it is applied. Raises RefusedError if outputs change;
    then the model may have grown. On the meta device nothing is compared, and the row is ``{}``.
    """
    if any(x.is_meta for x in model.parameters()):
        _, after = apply(model, axes, plan)
        return after, {}
    example, *others = vary_example(cast_example(axes.example, model))
    warm_caches(model, example)
    reference = compute_outputs(model, example)
    before = [(example, reference)]
    for other in others:
        with suppress(Exception):  # a size that the network does not take
            before.append((other, compute_outputs(model, other)))
    if not reference:
        raise RefusedError("what the network returns has no tensor that could be compared; let it return tensors")
    exact = 0.0
    if plan.insert:  # on accelerators, sums may differ from run to run
        noise = 3 * measure_relative_change(reference, _run_grown(model, example))
        exact = max(MAX_IDENTITY_CHANGE, min(noise, MAX_CHANGE))
    for path in plan.insert:
        _check_stack(model, plan, path, before, exact)
    row: dict[str, Any] = {}
    if in_float64:
        with run.stage("verify"):
            result = verify(model, axes, plan)
            row = {**asdict(result), "dtype": "float64"}
            if not result.ok:
                raise _make_change_error(result.max_abs_diff, result.bound, "float64")
    with run.stage("apply"):
        _, after = apply(model, axes, plan)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    share = MAX_CHANGE * (1 if dtype in ("float32", "float64") else 100) if plan.changes else exact
    measured = [measure_change(outputs, _run_grown(model, x)) for x, outputs in before]
    for change, largest in measured:
        if not change <= share * (largest or 1.0):
            raise _make_change_error(change, share * largest, dtype)
    change, largest = measured[0]
    row = row or {"max_abs_diff": change, "bound": share * largest, "ok": True, "dtype": dtype}
    return after, row | {"output_change": change, "relative_change": change / (largest or 1.0), "output_dtype": dtype}


def _check_stack(
    model: nn.Module, plan: Plan, path: str, before: Sequence[tuple[Example, Results]], share: float
) -> None:
    """Raise RefusedError if outputs of a copy with more blocks in one stack change by more than the ratio ``share``.

    ``path``: that of the stack, a list of like blocks; ``before``: examples and the outputs for each. New blocks give
    their input unchanged, so that every operation behind them gets the same numbers. ``model`` is not changed.
    """
    deeper = shallow_copy(model)
    try:
        insert_copies(deeper, path, plan.insert[path])
        worst = max(measure_relative_change(outputs, compute_outputs(deeper, x)) for x, outputs in before)
    except Exception as error:
        raise RefusedError(
            f"stack {path!r} cannot get further blocks: the network does not run with them: {first_line(error)}; "
            f"{OTHER_STACK}; {AS_BEFORE}"
        ) from None
    if not worst <= share:
        change = f"by up to {100 * worst:.2g} %" if isfinite(worst) else "their number or shape"
        raise RefusedError(
            f"stack {path!r} cannot get further blocks: outputs would change {change}, since the network uses states "
            f"between its blocks, how many there are, or random numbers; {OTHER_STACK}; {AS_BEFORE}"
        )


def _run_grown(model: nn.Module, example: Example) -> Results:
    """Return the outputs of a network that ran before it grew; RefusedError if it does not run any more."""
    try:
        return compute_outputs(model, example)
    except Exception as error:
        raise RefusedError(
            f"the grown network does not run on what the network ran on: {first_line(error)}; {AS_BEFORE}"
        ) from None


def _make_change_error(change: float, bound: float, dtype: str) -> RefusedError:
    """Return the error for a growth that changes outputs by ``change``, more than ``bound``, in precision ``dtype``."""
    return RefusedError(
        f"the growth changes the outputs by {change:.3g} in {dtype}, the bound is {bound:.3g}; {AS_BEFORE}, nothing "
        "is saved; please report this"
    )


def _train(settings: Settings, inputs: GrowInputs, run: ActiveRun, plan: Plan) -> None:
    """Train a grown network on the calibration halves, in place; log losses before and after if a folder records it."""
    model, sources, record = inputs.loaded.model, inputs.data.calibration, run.record
    added = find_added_entries(model, inputs.axes, plan)

    def measure_loss() -> float:
        if not record.is_kept:
            return 0.0
        run.progress(0, 1, "measuring the loss on the training data")
        with preserve_random_state(generator for source in sources for generator in source.generators):
            return measure_mean_loss(model, sources, inputs.objective)

    with autocasting(model, settings.precision):
        before = measure_loss()
        train_grown(
            model,
            sources,
            inputs.objective,
            steps=settings.steps,
            lr=settings.lr,
            seed=settings.seed,
            new=added if settings.train == "new" else None,
            progress=run.progress,
        )
        record.log(
            "training",
            loss_before=before,
            loss_after=measure_loss(),
            steps=settings.steps,
            train=settings.train,
            lr=settings.lr,
            parameters=sum(int(entries.sum()) for entries in added.values()),
        )


def open_named(settings: Settings, invocation: Invocation, run: ActiveRun) -> GrowInputs:
    """Open the network and the data that settings name, and trace it."""
    sources, progress = (*settings.on, *settings.sources), invocation.progress
    with run.stage("load"):
        spec = ModelSpec(settings.model, settings.dtype, settings.device, settings.input, sources)
        loaded = load_model(spec, progress, invocation.code)
        check_precision(loaded.model, settings.precision)
        specs = SourceSpecs(settings.eval_tokens, settings.seq_len, settings.on, settings.sources, settings.tokens)
        specs = replace(specs, seed=settings.seed, generated_tokens=settings.tokens)
        data = read_sources(specs, loaded)
    with run.stage("trace"):
        axes = trace_loaded(loaded)
    return GrowInputs(loaded, axes, data, specs=specs)


def grow_named(settings: Settings, invocation: Invocation) -> RunFolder:
    """Grow the model that settings name, as ``regrow grow`` does, and return the finished folder."""
    open_inputs = partial(open_named, settings, invocation)
    grow_network(settings, open_inputs, invocation.start_run(settings, settings.model, undo=settings.undo))
    return RunFolder(Path(invocation.out))


def plan_named(settings: Settings, invocation: Invocation) -> tuple[Plan, tuple[str, ...]]:
    """Open what settings name; return the plan of a growth, and notes on axes that cannot widen; nothing grows."""
    check_settings(settings)
    opened = open_named(settings, invocation, ActiveRun(progress=invocation.progress))
    return plan_growth(opened.loaded.model, opened.axes, settings)
