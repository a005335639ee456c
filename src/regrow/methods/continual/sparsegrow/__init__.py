"""SparseGrow: continual learning with a network that is widened late in a task.

Zhao, Saxena, Cao, Liu, Song: SparseGrow (arXiv 2408.10566). **Reconstructed**: the paper's body was not available. Its
abstracts name the parts (data-driven sparse layer expansion late in a task, initialised on data; sparse training by
learned thresholds; freezing by gradient gating); their form follows the public code of its predecessor AdaptCL
(arXiv 2207.11005) and of Dynamic Sparse Training. What neither settles is a setting, and its default is ours.

A task, for weights W with thresholds t and the entries M that earlier tasks own:

1. train on  loss + α Σ exp(−t), with W ∘ [|W| ≥ t or M] in the place of W; the gate preconditions every step;
2. when the last ``late_phase`` of its epochs begin, widen every hidden axis that is short of free capacity by
   ``width`` of its initial size: new units read a fraction ``density`` of their inputs, point (among these) to what is
   new and away from the inputs that earlier tasks fed their layer, and are scaled to the spread of the old outputs on
   the present data; their outgoing weights are 0 at first; their penalty is ``new_unit_penalty`` times as strong;
3. at its end set entries below their threshold to 0, own the remaining ones, and reset t to 0.

The default gate ``kronecker`` multiplies a layer's step Δ by  (1 + s A ⊗ (B + d))⁻¹,  with A the second moments of its
inputs in earlier tasks and B those of the gradients of its outputs, and pulls the layer back to its parameters at the
end of the last task by a proximal step in the same directions (:mod:`regrow.protection`); the damping d is ours. No
examples are stored, directions that earlier tasks did not use stay free, and widening adds such directions. The gate
``hard`` restores protected entries after each step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from regrow.allocation.levels import apply_threshold, margin
from regrow.allocation.widening import growable_axes, plan_growth, producing_weights
from regrow.core.axes import Axis
from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import class_loss
from regrow.core.plan import Fill, Plan
from regrow.core.tasks import first_examples, mask_classes
from regrow.methods.continual.sparsegrow.state import SparseGrowState
from regrow.protection.factors import add_factors
from regrow.protection.growth import direct_new_units, extend_anchor, fit_to_task, weigh_new_units
from regrow.protection.guards import apply_guards, build_guards, settle_guards
from regrow.scoring.gradients import evaluation_mode
from regrow.settings.constraints import CheckedSettings, Count, Fraction, NonNegative, OneOf, Range
from regrow.surgery.new_units import sparsify_new_units
from regrow.training.hooks import add_to_replay_memory, copy_parameters, draw_from_replay_memory, inputs_of, name_inputs
from regrow.training.learner import (
    Boundary,
    Context,
    Event,
    Learner,
    Loss,
    Replacements,
    Step,
    Stream,
    make_mask,
    set_train_mode,
)

COLLAPSED = 0.01  # the thresholds of a weight are reset to 0 where at most this fraction of its entries is kept
CITATION = "Zhao et al., SparseGrow (arXiv 2408.10566); reconstructed; gate: Kao et al. (2021), Ritter et al. (2018)"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of SparseGrow: growth, thresholds, the gate that protects earlier tasks, and an optional memory.

    Args:
        grow: When axes are widened: ``always``: once in every task, wherever some capacity is used; ``short``: where
            free capacity runs short; ``never``.
        late_phase: The fraction of a task's epochs, at its end, that forms the late phase; growth comes at its start.
        min_free: Under ``grow=short``, an axis grows if less than this fraction of the weights that compute it
            (``kronecker``: and read it) is free.
        width: The number of new units of an axis, as a fraction of its initial size.
        multiple: Numbers of new units are multiples of this.
        cap: The largest allowed size of the network, as a multiple of its initial parameters, at least 1.
        density: The fraction of their inputs that new units read at first.
        fit: Whether new units are scaled to the spread of the old ones, on data.
        threshold: ``dst``: one per unit, trained by the loss; ``adaptcl``: one per layer, trained by the penalty alone;
            ``none``: no weight is masked.
        alpha: α, the strength of the penalty Σ exp(−t), which raises thresholds.
        new_unit_penalty: The factor on the penalty for new units, where they have thresholds of their own (``dst``).
        gate: ``kronecker``: layers move little where earlier tasks used them; ``hard``: owned entries are frozen.
        strength: The strength of the gate ``kronecker``.
        pull: Under that gate, the strength of a penalty in the same directions, around the parameters of earlier tasks.
        damping: Under that gate, the importance of a hidden unit that earlier tasks did not use, as a part of the mean.
        group_norm_damping: The part of the mean second moment that new units get behind a norm such as GroupNorm.
        samples: The number of examples of each task on which the gate is estimated.
        every: The gate is applied to the joint change of this many steps.
        directions: Under that gate, where new units point: ``data``: to differences of inputs of the present task, away
            from those of earlier tasks; ``projected``: at random, away from those; ``random``.
        memory: The number of examples of earlier tasks that are stored and replayed; the paper's abstracts name none.
        strength_factor: With a memory, in class-incremental learning, the factor on the gate's strength, which then
            leaves the output layer alone: old classes must give way to new ones, and the memory limits how far. 1: the
            gate is as strong as without a memory.
        asymmetric_loss: With a memory, in class-incremental learning, whether the loss on the current batch is computed
            over the classes of its task only (ER-ACE, arXiv 2104.05025).
        lr: Learning rate of the thresholds.
        seed: Seed of the new units' weights.
    """

    grow: Annotated[str, OneOf("short", "always", "never")] = "always"
    late_phase: Fraction = 0.3
    min_free: Fraction = 0.3
    width: Fraction = 0.125
    multiple: Count = 8
    cap: Annotated[float, Range(1)] = 1.5
    density: Fraction = 0.5
    fit: bool = True
    threshold: Annotated[str, OneOf("dst", "adaptcl", "none")] = "dst"
    alpha: float = 1e-4
    new_unit_penalty: float = 10.0
    gate: Annotated[str, OneOf("kronecker", "hard", "none")] = "kronecker"
    strength: NonNegative = 2.0
    pull: NonNegative = 0.5
    damping: NonNegative = 0.1
    group_norm_damping: NonNegative = 0.1
    samples: Count = 2000
    every: Count = 4
    directions: Annotated[str, OneOf("data", "projected", "random")] = "data"
    memory: Annotated[int, Range(0)] = 0
    strength_factor: Fraction = 0.01
    asymmetric_loss: bool = True
    lr: float = 0.01
    seed: Annotated[int, Range(0)] = 0


def build(settings: Settings) -> Learner[SparseGrowState]:
    """Return the learner that trains with SparseGrow."""
    return Learner(
        SparseGrowState(),
        parametrize=partial(_mask, settings),
        loss=partial(_compute_loss, settings),
        project=_protect_gradients,
        after_step=partial(_restrict_step, settings),
        plan=partial(_plan_growth, settings),
        boundary=partial(_react, settings),
        classes_only=True,
        lr=0.05 if settings.gate == "kronecker" else 0.01,
    )


def _react(s: Settings, state: SparseGrowState, context: Context, boundary: Boundary) -> SparseGrowState:
    """Hook ``boundary``: start or end a task, prepare gates, initialise new units; in place, and in the new state."""
    set_train_mode(state, context, boundary)
    match boundary.event:
        case Event.TASK_START:
            return _prepare_guards(s, state if context.number else _start(s, state, context), context)
        case Event.PLAN_APPLIED if boundary.plan:
            if boundary.plan.origin.get("method") == "sparsegrow":
                _initialise_new_units(s, state, context, boundary.plan)
            weigh_new_units(state.factors, context, share=s.group_norm_damping)
            return _prepare_guards(s, replace(state, anchor=extend_anchor(state.anchor, context, boundary)), context)
        case Event.RESUME:
            return _prepare_guards(s, state, context)
        case Event.EPOCH_END:
            state = _apply_guards(s, state, context)
            settle_guards(state.guards, context.model)
        case Event.TASK_END:
            return _end_task(s, state, context)
    return state


def _start(s: Settings, state: SparseGrowState, context: Context) -> SparseGrowState:
    """Return the state at the start of the first task: initial sizes of axes, thresholds 0, and no entry is owned."""
    dims = 1 if s.threshold == "dst" else 0  # one threshold per unit, or per weight
    threshold = {}
    for name in context.weights if s.threshold != "none" else ():
        zeros = torch.zeros(context.parameters()[name].shape[:dims], device=context.device)
        threshold[name] = AxisTensor(zeros, context.axes.shapes[name][:dims], s.lr)
    owned = {name: make_mask(context, name) for name in context.parameters()}
    return replace(state, base=context.axes.sizes(), owned=owned, threshold=threshold)


def _mask(s: Settings, state: SparseGrowState, context: Context) -> Replacements:
    """Hook ``parametrize``: W ∘ [|W| ≥ t or owned] in training, returned (DST) or written into W; else nothing."""
    if not context.training:
        return Replacements()
    if s.threshold == "dst":
        masked = {}
        for name, parameter in context.parameters().items():
            if name in state.threshold:
                masked[name] = apply_threshold(parameter, state.threshold[name].values, state.unmasked[name])
        return Replacements(masked)
    with torch.no_grad():  # as in AdaptCL's code: what is pruned is 0 at once, and the loss trains no threshold
        for thresholded in state.thresholded(context):
            thresholded.weight.mul_(thresholded.kept)
    return Replacements()


def _replays_classes(s: Settings, context: Context) -> bool:
    """Whether examples are replayed in class-incremental learning: ``context.classes`` limits predictions."""
    return bool(s.memory) and context.classes is not None


def _compute_loss(s: Settings, state: SparseGrowState, context: Context, step: Step) -> Loss:
    """Hook ``loss``: cross-entropy + α Σ exp(−t) + that of replayed examples; ``aux``: whether there were any."""
    batch = step.batch
    classes = context.task_classes if s.asymmetric_loss and _replays_classes(s, context) else None
    loss = class_loss(mask_classes(context.logits(batch.inputs), classes), batch.labels)
    n = len(batch) if context.number else 0
    rows = draw_from_replay_memory(state.rows, state.seen, state.recalled, context, s.memory, n)
    if rows:
        loss = loss + class_loss(context.replay_logits(inputs_of(rows), rows["labels"]), rows["labels"])
    if state.threshold:
        penalty = torch.exp(-torch.cat([threshold.values.flatten() for threshold in state.threshold.values()]))
        if state.old and s.threshold == "dst":
            old = torch.cat([state.old[name].values for name in state.threshold])
            penalty = penalty * torch.where(old, 1.0, s.new_unit_penalty)
        loss = loss + s.alpha * penalty.sum()
    return Loss(loss, bool(rows))


def _protect_gradients(state: SparseGrowState, context: Context, step: Step) -> SparseGrowState:
    """Hook ``project``: set the gradients of entries in ``state.frozen`` to 0, in place."""
    for name, (is_frozen, _) in state.frozen.items():
        if (gradient := context.model.get_parameter(name).grad) is not None:
            gradient.masked_fill_(is_frozen, 0.0)
    return state


def _restrict_step(s: Settings, state: SparseGrowState, context: Context, step: Step) -> SparseGrowState:
    """Hook ``after_step``: apply the gates when due, restore frozen entries, both in place, and fill the memory."""
    state = replace(state, steps=state.steps + 1, unguarded=state.unguarded + 1, lr=step.lr)
    if state.unguarded == s.every:
        state = _apply_guards(s, state, context)
    with torch.no_grad():
        for name, (is_frozen, value) in state.frozen.items():
            parameter = context.model.get_parameter(name)
            torch.where(is_frozen, value, parameter, out=parameter)
    state = replace(state, recalled=state.recalled + step.aux)
    if not s.memory or context.epoch:
        return state
    rows = {**name_inputs(step.batch.inputs), "labels": step.batch.labels}
    memory = add_to_replay_memory(state.rows, state.seen, context, s.memory, rows)
    return replace(state, rows=memory, seen=state.seen + len(step.batch))


def _plan_growth(s: Settings, state: SparseGrowState, context: Context) -> tuple[Plan | None, SparseGrowState]:
    """Hook ``plan``: at the start of the late phase, widen axes short of free weights; reset collapsed thresholds.

    An axis that ``cap`` does not let grow is left out. ``None`` without an axis to widen. Resetting is in place.
    """
    if context.plans_applied:  # the hook is called until there is no plan
        return None, state
    with torch.no_grad():
        for thresholded in state.thresholded(context):
            if float(thresholded.kept.double().mean()) <= COLLAPSED:
                thresholded.threshold.zero_()
    late_start = context.epochs - max(1, round(s.late_phase * context.epochs))
    if s.grow == "never" or context.epoch != late_start:
        return None, state
    free = {axis: _free_share(s, state, axis, context) for axis in growable_axes(context.axes)}
    limit = 1.0 if s.grow == "always" else s.min_free  # always: wherever any capacity is used
    exhausted = sorted((axis for axis in free if free[axis] < limit), key=lambda axis: free[axis])
    if not (added := plan_growth(context.axes, exhausted, state.base, share=s.width, multiple=s.multiple, cap=s.cap)):
        return None, state
    old = {}  # all True now; new units get False when the plan is applied, which tells them apart
    for name in context.weights:
        ones = torch.ones(len(context.parameters()[name]), dtype=torch.bool, device=context.device)
        old[name] = AxisTensor(ones, context.axes.shapes[name][:1])  # along the output dimension
    fill = Fill("zero_out", seed=s.seed)
    return Plan.growing(context.axes, added, fill, origin={"method": "sparsegrow"}), replace(state, old=old)


def _apply_guards(s: Settings, state: SparseGrowState, context: Context) -> SparseGrowState:
    """Shrink the change since guards were last applied, and pull parameters to their anchor, in place."""
    factor = s.strength_factor if _replays_classes(s, context) else 1.0
    gate, pull = s.strength * factor, state.lr * state.unguarded * s.pull * factor
    if state.unguarded:
        apply_guards(state.guards, context.model, gate=gate, pull=pull)
    return replace(state, unguarded=0)


def _initialise_new_units(s: Settings, state: SparseGrowState, context: Context, plan: Plan) -> None:
    """Make new units of ``plan`` sparse, point them off earlier inputs, and scale them, in place."""
    sparsify_new_units(context.model, context.axes, plan, s.density, context.generator(Stream.SPARSITY))
    if state.factors:
        direct_new_units(state.factors, context, plan, s.directions, s.strength)
    if s.fit:
        with _mask_temporarily(state, context):
            fit_to_task(context, plan)


def _end_task(s: Settings, state: SparseGrowState, context: Context) -> SparseGrowState:
    """Set weights below their thresholds to 0, own the others, and reset thresholds, in place; log the owned shares."""
    with torch.no_grad(), evaluation_mode(context.model):
        for thresholded in state.thresholded(context):
            thresholded.weight.mul_(thresholded.kept)
            thresholded.threshold.zero_()
        outputs = context.logits(first_examples(context.task.train, 1).inputs).shape[-1]
    for name, parameter in context.parameters().items():
        owned = state.owned[name].values
        used = parameter.detach() != 0 if name in context.weights else torch.ones_like(owned)
        if context.classes is not None and name in context.head and parameter.shape[:1] == (outputs,):
            used[len(context.classes) :] = False  # rows of classes to come stay free
            used[: len(context.classes)] &= context.classes.to(used.device).view(-1, *[1] * (used.dim() - 1))
        owned |= used
    if s.gate == "kronecker":
        state = replace(state, factors=add_factors(state.factors, context, s.samples), anchor=copy_parameters(context))
    shares = {name: round(float(state.owned[name].values.double().mean()), 4) for name in context.weights}
    context.log("task", owned=shares, free=dict(state.free))
    return replace(state, old={}, frozen={}, guards={})


def _prepare_guards(s: Settings, state: SparseGrowState, context: Context) -> SparseGrowState:
    """Return the state with what it derives for a task: guards (none in the first), frozen and unmasked entries."""
    parameters = context.parameters()
    unmasked = {name: state.owned[name].values.to(parameters[name]) for name in state.threshold}
    state = replace(state, frozen={}, guards={}, unmasked=unmasked)
    if not context.number or s.gate == "none":
        return state
    factor = s.strength_factor if _replays_classes(s, context) else 1.0
    unguarded = context.head if factor < 1 else ()
    guards = build_guards(state.factors, context, state.anchor, s.damping, skip=unguarded)
    free = {name: round(guard.free(s.strength * factor), 4) for name, guard in guards.items()}
    trained = {*unguarded, *(name for guard in guards.values() for name in guard.names)}
    frozen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parameter in parameters.items():
        if name not in trained and bool((owned := state.owned[name].values).any()):
            frozen[name] = owned, parameter.detach().clone()
    return replace(state, frozen=frozen, guards=guards, free=free)


def _free_share(s: Settings, state: SparseGrowState, axis: Axis, context: Context) -> float:
    """Return how free an axis is: its least ``state.free``, or (other gates) the share neither owned nor used."""
    if s.gate == "kronecker":
        return min((state.free[slot.name] for slot in axis.slots if slot.name in state.free), default=1.0)
    shares = []
    for name in producing_weights(axis, context.axes):
        weight = context.model.get_parameter(name).detach()
        used = weight != 0
        if s.threshold != "none":
            used &= margin(weight, state.threshold[name].values) >= 0
        shares.append((used | state.owned[name].values).double().mean())
    return 1 - float(torch.stack(shares).mean())


@contextmanager
def _mask_temporarily(state: SparseGrowState, context: Context) -> Iterator[None]:
    """Context manager in which weights below their thresholds are 0; afterwards they have their values again."""
    before = [(t.weight.detach(), t.kept, t.weight.detach().clone()) for t in state.thresholded(context)]
    for weight, kept, _ in before:
        weight.mul_(kept)
    try:
        yield
    finally:
        for weight, kept, value in before:
            torch.where(kept, weight, value, out=weight)
