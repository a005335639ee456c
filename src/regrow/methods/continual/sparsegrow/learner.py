"""The learner of SparseGrow: thresholds, gates, growth and an optional memory as hooks of the training loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.allocation.thresholds import apply_threshold, margin
from regrow.allocation.widening import growable_axes, growth, makers
from regrow.core.axes import Axis
from regrow.core.axes.axis import AxisTensor
from regrow.core.plan import Fill, Plan
from regrow.core.sources import Batch, device_of
from regrow.core.tasks import among
from regrow.methods.continual.sparsegrow import gate
from regrow.methods.continual.sparsegrow.settings import Settings
from regrow.methods.continual.sparsegrow.state import SparseGrowState
from regrow.scoring.factors import join_bias, part
from regrow.surgery import fit_new_units
from regrow.surgery.new_units import new_units, sparsify_new_units, split_entries
from regrow.training import reservoir
from regrow.training.learner import (
    Boundary,
    Context,
    Event,
    Learner,
    Loss,
    Replacements,
    Step,
    flags_along,
    set_train_mode,
)
from regrow.training.norms import freeze_norms


def build(settings: Settings) -> Learner[SparseGrowState]:
    """Return the learner that trains with SparseGrow.

    Args:
        settings: Its settings.
    """

    def mask(state: SparseGrowState, context: Context) -> Replacements:
        return _mask(state, context, settings) if context.training else Replacements()

    def compute_loss(state: SparseGrowState, context: Context, step: Step) -> Loss:
        return _compute_loss(state, context, step, settings)

    def mask_gradients(state: SparseGrowState, context: Context, step: Step) -> SparseGrowState:
        return _mask_gradients(state, context) if settings.gate != "none" and context.number else state

    def restrict_step(state: SparseGrowState, context: Context, step: Step) -> SparseGrowState:
        return _restrict_step(state, context, step, settings)

    def plan(state: SparseGrowState, context: Context) -> tuple[Plan | None, SparseGrowState]:
        return _plan_growth(state, context, settings) if not context.applied else (None, state)

    def react(state: SparseGrowState, context: Context, boundary: Boundary) -> SparseGrowState:
        set_train_mode(state, context, boundary)
        match boundary.event:
            case Event.TASK_START:
                return _freeze(_start_task(state, context, settings), context, settings)
            case Event.RESUME:
                return _freeze(state, context, settings)
            case Event.EPOCH_START if settings.norms == "freeze" and context.number:
                freeze_norms(context.model)
            case Event.PLAN_APPLIED if boundary.plan and boundary.plan.origin.get("method") == "sparsegrow":
                return _initialise_new_units(state, context, boundary.plan, settings)
            case Event.PLAN_APPLIED:  # a plan from elsewhere
                return _freeze(state, context, settings)
            case Event.EPOCH_END:
                gate.apply_gates(state, context)
                return replace(state, kept=_describe_thresholds(state, context, settings))
            case Event.TASK_END:
                return _end_task(state, context, settings)
        return state

    return Learner(
        SparseGrowState(),
        parametrize=mask,
        loss=compute_loss,
        project=mask_gradients,
        after_step=restrict_step,
        plan=plan,
        boundary=react,
        classes_only=True,
    )


def _thresholded_weights(context: Context, settings: Settings) -> tuple[str, ...]:
    return context.weights if settings.threshold != "none" else ()


def _start_task(state: SparseGrowState, context: Context, settings: Settings) -> SparseGrowState:
    """Initialise thresholds and ownership at the start of the first task, when nothing is owned."""
    if context.number:
        return state
    units = 1 if settings.threshold == "dst" else 0
    return replace(
        state,
        base=context.axes.sizes(),
        owned={name: flags_along(context, name) for name in context.parameters()},
        threshold={
            name: AxisTensor(
                torch.zeros(context.parameters()[name].shape[:units], device=device_of(context.model)),
                context.axes.shapes[name][:units],
                settings.lr,
            )
            for name in _thresholded_weights(context, settings)
        },
    )


def _mask(state: SparseGrowState, context: Context, settings: Settings) -> Replacements:
    """W ∘ [|W| ≥ t or owned] in the place of W."""
    parameters, values = context.parameters(), {}
    for name in _thresholded_weights(context, settings):
        weight, threshold, owned = parameters[name], state.threshold[name].values, state.owned[name].values
        if settings.threshold == "dst":
            values[name] = apply_threshold(weight, threshold, owned)
        else:  # as in AdaptCL's code: what is pruned is 0 at once, and the loss does not train the threshold
            with torch.no_grad():
                weight.mul_((margin(weight, threshold) >= 0) | owned)
    return Replacements(values)


def _has_memory_of_classes(context: Context, settings: Settings) -> bool:
    """Whether a memory holds examples of classes that came before."""
    return bool(settings.memory) and context.classes is not None


def _compute_loss(state: SparseGrowState, context: Context, step: Step, settings: Settings) -> Loss:
    """Return the cross-entropy + α Σ exp(−t), with a larger α for new units, plus the loss on replayed examples."""
    batch = step.batch
    own = context.task_classes if settings.asymmetric_loss and _has_memory_of_classes(context, settings) else None
    loss, rows = F.cross_entropy(among(context.logits(batch.inputs), own), batch.labels), {}
    if settings.memory:
        rows = reservoir.draw(state.memory, context, settings.memory, len(batch))
        if rows:
            loss = loss + F.cross_entropy(context.replay_logits(rows["inputs"], rows["labels"]), rows["labels"])
    for name in _thresholded_weights(context, settings):
        each = torch.exp(-state.threshold[name].values)
        if each.dim() and (old := state.old.get(name)) is not None:
            each = each * torch.where(old.values, 1.0, settings.new_unit_penalty)
        loss = loss + settings.alpha * each.sum()
    return Loss(loss, bool(rows))


def _mask_gradients(state: SparseGrowState, context: Context) -> SparseGrowState:
    """Frozen entries get no gradient."""
    parameters = context.parameters()
    for name, (held, _) in state.frozen.items():
        if (gradient := parameters[name].grad) is not None:
            gradient.masked_fill_(held, 0.0)
    return state


def _restrict_step(state: SparseGrowState, context: Context, step: Step, settings: Settings) -> SparseGrowState:
    """Apply the gates, and restore what momentum and weight decay changed of frozen entries; fill the memory."""
    parameters = context.parameters()
    state = replace(state, steps=state.steps + 1)
    if state.gates and state.steps % settings.every == 0:
        gate.apply_gates(state, context)
    with torch.no_grad():
        for name, (held, value) in state.frozen.items():
            torch.where(held, value, parameters[name], out=parameters[name])
    if not settings.memory:
        return state
    memory = replace(state.memory, recalled=state.recalled + bool(step.aux))
    if not context.epoch:
        rows = {"inputs": step.batch.inputs, "labels": step.batch.labels}
        memory = reservoir.offer(memory, context, settings.memory, rows)
    inputs, labels = memory.rows.get("inputs"), memory.rows.get("labels")
    return replace(state, inputs=inputs, labels=labels, seen=memory.seen, recalled=memory.recalled)


def _describe_thresholds(state: SparseGrowState, context: Context, settings: Settings) -> dict[str, dict[str, float]]:
    """Return the mean threshold of every weight, and the fraction of its entries above it or owned."""
    rows = dict(state.kept)
    for name in _thresholded_weights(context, settings):
        threshold = state.threshold[name].values.detach()
        kept = (margin(context.parameters()[name].detach(), threshold) >= 0) | state.owned[name].values
        row = {"threshold": float(threshold.mean()), "density": float(kept.double().mean())}
        rows[name] = {what: round(value, 6) for what, value in row.items()}
    return rows


def _plan_growth(state: SparseGrowState, context: Context, settings: Settings) -> tuple[Plan | None, SparseGrowState]:
    """Plan to widen the axes that are short of free weights, at the start of the late phase."""
    _reset_high_thresholds(state, context, settings)
    first = context.epochs - max(1, round(settings.late_phase * context.epochs))
    if settings.grow == "never" or context.epoch != first:
        return None, state
    free = {axis: _free_share(state, axis, context, settings) for axis in growable_axes(context.axes)}
    limit = 1.0 if settings.grow == "always" else settings.min_free
    short = sorted((axis for axis in free if free[axis] < limit), key=lambda axis: free[axis])
    wanted = growth(context.axes, short, state.base, share=settings.width, multiple=settings.multiple, cap=settings.cap)
    if not wanted:
        return None, state
    old = {
        name: AxisTensor(
            torch.ones(len(parameter := context.parameters()[name]), dtype=torch.bool, device=parameter.device),
            context.axes.shapes[name][:1],
        )
        for name in context.weights
    }
    fill = Fill("zero_out", seed=settings.seed)
    return Plan.growing(context.axes, wanted, fill, origin={"method": "sparsegrow"}), replace(state, old=old)


def _initialise_new_units(state: SparseGrowState, context: Context, plan: Plan, settings: Settings) -> SparseGrowState:
    """Make new units sparse, turn them away from earlier tasks, and give them the spread of the old ones."""
    unread = split_entries(context.model, context.axes, new_units(context.model, context.axes, plan))[1]
    sparsify_new_units(context.model, context.axes, plan, settings.density, context.generator(2))
    gate.weigh_new_units(state, context, settings.group_norm_damping)
    state = _freeze(state, context, settings)
    if settings.project_new_units:
        gate.silence_new_units(context, state.gates, {name: one.values for name, one in state.old.items()})
        for entries in unread:
            zeros = torch.zeros_like(entries.of(context.parameters()[entries.name].detach()))
            entries.set(context.model, zeros)
    if settings.fit:
        examples = context.task.train.batches(256, seed=context.generator(3).initial_seed())
        batches = [Batch((one.inputs,)) for one in examples][:4]
        with _masked(state, context, settings):
            fit_new_units(context.model, context.axes, plan, batches)
    return _freeze(state, context, settings)


def _end_task(state: SparseGrowState, context: Context, settings: Settings) -> SparseGrowState:
    """Set what is below its threshold to 0, own the rest, start thresholds again."""
    owned_by_name = {name: one.values for name, one in state.owned.items()}
    with torch.no_grad():
        for name, parameter in context.parameters().items():
            owned = owned_by_name[name]
            if name in state.threshold:
                threshold = state.threshold[name].values
                parameter.mul_((margin(parameter, threshold) >= 0) | owned)
                threshold.zero_()
            new = parameter != 0 if name in context.weights else torch.ones_like(owned)
            if context.classes is not None and name in context.head:
                new[len(context.classes) :] = False  # rows of classes to come stay free
                new[: len(context.classes)] &= context.classes.to(new.device).view(-1, *[1] * (new.dim() - 1))
            owned |= new
    if settings.gate == "kronecker":
        state = gate.add_factors(state, context, settings.samples)
    shares = {name: round(float(owned_by_name[name].double().mean()), 4) for name in context.weights}
    context.log("task", owned=shares, free=dict(state.free), kept=dict(state.kept))
    return replace(state, old={}, frozen={}, gates={}, last={})


def _freeze(state: SparseGrowState, context: Context, settings: Settings) -> SparseGrowState:
    """Decide what is not trained in this task, and through which gates the rest is."""
    if not context.number or settings.gate == "none":
        return replace(state, frozen={}, gates={})
    relief = settings.strength_factor if _has_memory_of_classes(context, settings) else 1.0
    alone = context.head if relief < 1 else ()
    gates, last, free = {}, dict(state.last), state.free
    if settings.gate == "kronecker":
        gates = gate.build_gates(state, context, settings.strength * relief, settings.damping)
        gates = {name: one for name, one in gates.items() if name not in alone}
        last = {name: join_bias(context.model, name) for name in gates}
        free = {name: round(one.free, 4) for name, one in gates.items()}
    gated = {which for name in gates for which in part(context.model, name, last[name])}
    frozen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parameter in context.parameters().items():
        if name in gated or name in alone:
            continue
        held = state.owned[name].values
        if bool(held.any()):
            frozen[name] = held, parameter.detach().clone()
    return replace(state, frozen=frozen, gates=gates, last=last, free=free)


def _reset_high_thresholds(state: SparseGrowState, context: Context, settings: Settings) -> None:
    """Set the thresholds of a weight back to 0 if they leave next to nothing of it."""
    for name in _thresholded_weights(context, settings):
        threshold = state.threshold[name].values
        kept = (margin(context.parameters()[name].detach(), threshold) >= 0) | state.owned[name].values
        if float(kept.double().mean()) <= 0.01:
            with torch.no_grad():
                threshold.zero_()


def _free_share(state: SparseGrowState, axis: Axis, context: Context, settings: Settings) -> float:
    """Return the fraction of an axis's weights that is free: that may be trained, or that may still be owned."""
    if settings.gate == "kronecker":
        near = [state.gates[slot.name].free for slot in axis.slots if slot.name in state.gates]
        return min(near, default=1.0)
    shares = []
    for name in makers(axis, context.axes):
        weight, owned = context.parameters()[name].detach(), state.owned[name].values
        above = margin(weight, state.threshold[name].values) >= 0 if settings.threshold != "none" else weight != 0
        shares.append(((above & (weight != 0)) | owned).double().mean())
    return 1 - float(torch.stack(shares).mean())


@contextmanager
def _masked(state: SparseGrowState, context: Context, settings: Settings) -> Iterator[None]:
    """Inside, weights below their thresholds are 0."""
    parameters, held = context.parameters(), dict[str, tuple[Tensor, Tensor]]()
    with torch.no_grad():
        for name in _thresholded_weights(context, settings):
            weight = parameters[name]
            kept = (margin(weight, state.threshold[name].values) >= 0) | state.owned[name].values
            held[name] = kept, weight.clone()
            weight.mul_(kept)
    yield
    with torch.no_grad():
        for name, (kept, value) in held.items():
            weight = parameters[name]
            torch.where(kept, weight, value, out=weight)
