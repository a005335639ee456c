"""The learner of SparseGrow: thresholds, gates, growth and an optional memory as hooks of the training loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.allocation.levels import apply_threshold, margin
from regrow.allocation.widening import growable_axes, growth, makers
from regrow.core.axes import Axis
from regrow.core.axes.axis import AxisTensor
from regrow.core.plan import Fill, Plan
from regrow.core.sources import Batch
from regrow.core.tasks import among
from regrow.methods.continual.sparsegrow import gate
from regrow.methods.continual.sparsegrow.settings import Settings, SparseGrowState
from regrow.scoring.factors import join_bias, part
from regrow.surgery import fit_new_units
from regrow.surgery.new_units import new_units, sparsify_new_units, split_entries
from regrow.training.hooks import draw_rows, freeze_norms, offer_rows
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


def build(settings: Settings) -> Learner[SparseGrowState]:
    """Return the learner that trains with SparseGrow."""
    return Learner(
        SparseGrowState(),
        parametrize=partial(_mask, settings),
        loss=partial(_compute_loss, settings),
        project=partial(_mask_gradients, settings),
        after_step=partial(_restrict_step, settings),
        plan=partial(_plan_growth, settings),
        boundary=partial(_react, settings),
        classes_only=True,
    )


def _react(s: Settings, state: SparseGrowState, context: Context, boundary: Boundary) -> SparseGrowState:
    set_train_mode(state, context, boundary)
    match boundary.event:
        case Event.TASK_START:
            return _freeze(s, state if context.number else _start(s, state, context), context)
        case Event.EPOCH_START if s.norms == "freeze" and context.number:
            freeze_norms(context.model)
        case Event.PLAN_APPLIED if boundary.plan and boundary.plan.origin.get("method") == "sparsegrow":
            return _initialise_new_units(s, state, context, boundary.plan)
        case Event.RESUME | Event.PLAN_APPLIED:  # a plan from elsewhere
            return _freeze(s, state, context)
        case Event.EPOCH_END:
            gate.apply_gates(state, context)
            return replace(state, kept={**state.kept, **_describe_thresholds(state, context)})
        case Event.TASK_END:
            return _end_task(s, state, context)
    return state


def _start(s: Settings, state: SparseGrowState, context: Context) -> SparseGrowState:
    """Initialise thresholds and ownership at the start of the first task, when nothing is owned."""
    units, threshold = 1 if s.threshold == "dst" else 0, {}
    for name in context.weights if s.threshold != "none" else ():
        zeros = torch.zeros(context.parameters()[name].shape[:units], device=context.device)
        threshold[name] = AxisTensor(zeros, context.axes.shapes[name][:units], s.lr)
    owned = {name: flags_along(context, name) for name in context.parameters()}
    return replace(state, base=context.axes.sizes(), owned=owned, threshold=threshold)


def _thresholded(state: SparseGrowState, context: Context) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield the name of each weight with a threshold, the weight, its threshold, and which entries of it stay."""
    parameters = context.parameters()
    for name in context.weights:
        if name in state.threshold:
            weight, threshold = parameters[name], state.threshold[name].values.detach()
            kept = (margin(weight.detach(), threshold) >= 0) | state.owned[name].values
            yield name, weight, threshold, kept


def _mask(s: Settings, state: SparseGrowState, context: Context) -> Replacements:
    """W ∘ [|W| ≥ t or owned] in the place of W."""
    if not context.training:
        return Replacements()
    if s.threshold == "dst":
        parameters = context.parameters()
        return Replacements(
            {
                name: apply_threshold(parameters[name], state.threshold[name].values, state.owned[name].values)
                for name in context.weights
            }
        )
    with (
        torch.no_grad()
    ):  # as in AdaptCL's code: what is pruned is 0 at once, and the loss does not train the threshold
        for _, weight, _, kept in _thresholded(state, context):
            weight.mul_(kept)
    return Replacements()


def _has_memory_of_classes(s: Settings, context: Context) -> bool:
    """Whether a memory holds examples of classes that came before."""
    return bool(s.memory) and context.classes is not None


def _compute_loss(s: Settings, state: SparseGrowState, context: Context, step: Step) -> Loss:
    """Return the cross-entropy + α Σ exp(−t), with a larger α for new units, plus the loss on replayed examples."""
    batch = step.batch
    classes = context.task_classes if s.asymmetric_loss and _has_memory_of_classes(s, context) else None
    loss = F.cross_entropy(among(context.logits(batch.inputs), classes), batch.labels)
    rows = draw_rows(state.rows, state.seen, state.recalled, context, s.memory, len(batch))
    if rows:
        loss = loss + F.cross_entropy(context.replay_logits(rows["inputs"], rows["labels"]), rows["labels"])
    for name in context.weights:
        if name in state.threshold:
            each = torch.exp(-state.threshold[name].values)
            if each.dim() and (old := state.old.get(name)) is not None:
                each = each * torch.where(old.values, 1.0, s.new_unit_penalty)
            loss = loss + s.alpha * each.sum()
    return Loss(loss, bool(rows))


def _mask_gradients(s: Settings, state: SparseGrowState, context: Context, step: Step) -> SparseGrowState:
    """Frozen entries get no gradient."""
    parameters = context.parameters()
    for name, (held, _) in state.frozen.items():
        if (gradient := parameters[name].grad) is not None:
            gradient.masked_fill_(held, 0.0)
    return state


def _restrict_step(s: Settings, state: SparseGrowState, context: Context, step: Step) -> SparseGrowState:
    """Apply the gates, and restore what momentum and weight decay changed of frozen entries; fill the memory."""
    parameters = context.parameters()
    state = replace(state, steps=state.steps + 1)
    if state.gates and state.steps % s.every == 0:
        gate.apply_gates(state, context)
    with torch.no_grad():
        for name, (held, value) in state.frozen.items():
            torch.where(held, value, parameters[name], out=parameters[name])
    if not s.memory:
        return state
    state = replace(state, recalled=state.recalled + step.aux)
    if context.epoch:
        return state
    rows = {"inputs": step.batch.inputs, "labels": step.batch.labels}
    stored = offer_rows(state.rows, state.seen, context, s.memory, rows)
    return replace(state, inputs=stored["inputs"], labels=stored["labels"], seen=state.seen + len(step.batch))


def _describe_thresholds(state: SparseGrowState, context: Context) -> dict[str, dict[str, float]]:
    """Return the mean threshold of every weight, and the fraction of its entries above it or owned."""
    return {
        name: {"threshold": round(float(threshold.mean()), 6), "density": round(float(kept.double().mean()), 6)}
        for name, _, threshold, kept in _thresholded(state, context)
    }


def _plan_growth(s: Settings, state: SparseGrowState, context: Context) -> tuple[Plan | None, SparseGrowState]:
    """Plan to widen the axes that are short of free weights, at the start of the late phase."""
    if context.applied:
        return None, state
    with torch.no_grad():
        for _, _, threshold, kept in _thresholded(state, context):
            if float(kept.double().mean()) <= 0.01:  # next to nothing is left of the weight
                threshold.zero_()
    first = context.epochs - max(1, round(s.late_phase * context.epochs))
    if s.grow == "never" or context.epoch != first:
        return None, state
    free = {axis: _free_share(s, state, axis, context) for axis in growable_axes(context.axes)}
    limit = 1.0 if s.grow == "always" else s.min_free
    short = sorted((axis for axis in free if free[axis] < limit), key=lambda axis: free[axis])
    wanted = growth(context.axes, short, state.base, share=s.width, multiple=s.multiple, cap=s.cap)
    if not wanted:
        return None, state
    old = {}
    for name in context.weights:
        parameter = context.parameters()[name]
        flags = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
        old[name] = AxisTensor(flags, context.axes.shapes[name][:1])
    fill = Fill("zero_out", seed=s.seed)
    return Plan.growing(context.axes, wanted, fill, origin={"method": "sparsegrow"}), replace(state, old=old)


def _initialise_new_units(s: Settings, state: SparseGrowState, context: Context, plan: Plan) -> SparseGrowState:
    """Make new units sparse, turn them away from earlier tasks, and give them the spread of the old ones."""
    unread = split_entries(context.model, context.axes, new_units(context.model, context.axes, plan))[1]
    sparsify_new_units(context.model, context.axes, plan, s.density, context.generator(2))
    gate.weigh_new_units(state, context, s.group_norm_damping)
    state = _freeze(s, state, context)
    if s.project_new_units:
        gate.silence_new_units(context, state.gates, {name: one.values for name, one in state.old.items()})
        for entries in unread:
            zeros = torch.zeros_like(entries.of(context.parameters()[entries.name].detach()))
            entries.set(context.model, zeros)
    if s.fit:
        examples = context.task.train.batches(256, seed=context.generator(3).initial_seed())
        batches = [Batch((one.inputs,)) for one in examples][:4]
        with _masked(state, context):
            fit_new_units(context.model, context.axes, plan, batches)
    return _freeze(s, state, context)


def _end_task(s: Settings, state: SparseGrowState, context: Context) -> SparseGrowState:
    """Set what is below its threshold to 0, own the rest, start thresholds again."""
    owned_by_name = {name: one.values for name, one in state.owned.items()}
    with torch.no_grad():
        for _, weight, threshold, kept in _thresholded(state, context):
            weight.mul_(kept)
            threshold.zero_()
    for name, parameter in context.parameters().items():
        owned = owned_by_name[name]
        new = parameter.detach() != 0 if name in context.weights else torch.ones_like(owned)
        if context.classes is not None and name in context.head:
            new[len(context.classes) :] = False  # rows of classes to come stay free
            new[: len(context.classes)] &= context.classes.to(new.device).view(-1, *[1] * (new.dim() - 1))
        owned |= new
    if s.gate == "kronecker":
        state = gate.add_factors(state, context, s.samples)
    shares = {name: round(float(owned_by_name[name].double().mean()), 4) for name in context.weights}
    context.log("task", owned=shares, free=dict(state.free), kept=dict(state.kept))
    return replace(state, old={}, frozen={}, gates={}, last={})


def _freeze(s: Settings, state: SparseGrowState, context: Context) -> SparseGrowState:
    """Decide what is not trained in this task, and through which gates the rest is."""
    if not context.number or s.gate == "none":
        return replace(state, frozen={}, gates={})
    relief = s.strength_factor if _has_memory_of_classes(s, context) else 1.0
    alone = context.head if relief < 1 else ()
    gates, last, free = {}, dict(state.last), state.free
    if s.gate == "kronecker":
        gates = gate.build_gates(state, context, s.strength * relief, s.damping)
        gates = {name: one for name, one in gates.items() if name not in alone}
        last = {name: join_bias(context.model, name) for name in gates}
        free = {name: round(one.free, 4) for name, one in gates.items()}
    gated = {which for name in gates for which in part(context.model, name, last[name])}
    frozen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parameter in context.parameters().items():
        held = state.owned[name].values
        if name not in gated and name not in alone and bool(held.any()):
            frozen[name] = held, parameter.detach().clone()
    return replace(state, frozen=frozen, gates=gates, last=last, free=free)


def _free_share(s: Settings, state: SparseGrowState, axis: Axis, context: Context) -> float:
    """Return the fraction of an axis's weights that is free: that may be trained, or that may still be owned."""
    if s.gate == "kronecker":
        near = [state.gates[slot.name].free for slot in axis.slots if slot.name in state.gates]
        return min(near, default=1.0)
    shares = []
    for name in makers(axis, context.axes):
        weight, used = context.parameters()[name].detach(), state.owned[name].values
        above = weight != 0
        if s.threshold != "none":
            above &= margin(weight, state.threshold[name].values) >= 0
        shares.append((above | used).double().mean())
    return 1 - float(torch.stack(shares).mean())


@contextmanager
def _masked(state: SparseGrowState, context: Context) -> Iterator[None]:
    """Inside, weights below their thresholds are 0."""
    with torch.no_grad():
        before = [(weight, kept, weight.clone()) for _, weight, _, kept in _thresholded(state, context)]
        for weight, kept, _ in before:
            weight.mul_(kept)
    yield
    with torch.no_grad():
        for weight, kept, value in before:
            torch.where(kept, weight, value, out=weight)
