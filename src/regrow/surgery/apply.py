"""Apply a plan to a model in memory, once it is proved; :mod:`regrow.streaming.cut` does that block by block."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from regrow.core.axes import AxisGraph, size_of
from regrow.core.plan import Plan, PlanError
from regrow.surgery.carry import ProposedChange, commit, plan_resizing, prepare
from regrow.surgery.drop import restore_branches, without_branches
from regrow.surgery.insert import with_inserted_blocks
from regrow.surgery.output_comparison import (
    RELATIVE_BOUND,
    check_own_run,
    max_difference,
    max_magnitude,
    run_whole_pair,
)
from regrow.surgery.proof import check_blocks, describe_difference
from regrow.surgery.undo_store import UndoStore
from regrow.tracing.capture import Capture, capture, holds_numbers
from regrow.tracing.interception import without_garbage_collection
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.model_state import describe_code, state_of
from regrow.tracing.readings import Recording, record_readings
from regrow.tracing.steps import with_new_constants
from regrow.tracing.trial import Rehearsal, rehearse


def apply(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    *,
    optimizers: Sequence[Optimizer] = (),
    undo: UndoStore | None = None,
) -> tuple[nn.Module, AxisGraph]:
    """Change a model's shape by a plan, after proving on a copy that the result is right: all of the plan, or nothing.

    Parameters, buffers and the integers that modules hold are cut and widened; where an axis size is a divisor, its
    change is folded into the gain next to it; tied tensors stay tied; where the plan gives means of dropped inputs,
    they are added to a bias. Branches that are dropped are replaced by placeholder modules; blocks that are inserted
    must give their input unchanged, and the network is traced anew. Everything is computed and tried on a copy first:
    on fake tensors, the cut network must run the same operations on the same operands with the same constants; in
    float64 it must compute what the masked one does, on blocks of each class (:mod:`regrow.surgery.proof`), or as a
    whole where there are none. Then the model is changed, in place, and its own forward pass must give what the
    recording of the planned network gives; otherwise the model is restored.

    Args:
        model: The traced model; changed in place.
        axes: Its axes, as :func:`regrow.trace` or the last ``apply`` returned them.
        plan: The units to cut, add and restore, and the branches to drop and restore.
        optimizers: The optimizers of the model's parameters; their state is cut and widened too. New and restored
            entries start with first moment 0 and the mean second moment of their neighbours.
        undo: The undo store: gets the weights that are cut, and must have those that are restored.

    Returns:
        The same model, and its axes after the change. Parameters that changed are new ones; they keep their gradients
        (0 for new entries), memory format and Python attributes.

    Raises:
        PlanError: If the plan does not fit the model, the model does not run as planned, an optimizer cannot follow, a
            parameter that would change has a gradient hook, or inference mode is on. Nothing is changed then.

    >>> import torch
    >>> from regrow.tracing import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> axes = trace(net, torch.ones(1, 4))
    >>> net, axes = apply(net, axes, Plan.keeping(axes, {"0.weight:0": range(3)}))
    >>> net[0].weight.shape, net[2].in_features, axes["0.weight:0"].size
    (torch.Size([3, 4]), 3, 3)
    """
    if torch.is_inference_mode_enabled():
        raise PlanError("apply would make weights that no gradient can reach in inference mode; use torch.no_grad()")
    check_plan(model, axes, plan)
    if plan.insert:
        with with_inserted_blocks(model, axes, plan, optimizers, undo) as (new_axes, rest, kept):
            return apply(model, new_axes, rest, undo=kept)
    if plan.back:
        return restore_branches(model, axes, plan, optimizers, undo)
    if plan.drop:
        with without_branches(model, axes, plan, optimizers, undo) as (new_axes, rest, kept):
            return apply(model, check_own_run(model, new_axes), rest, optimizers=optimizers, undo=kept)
    if undo is None and (lost := next((key for key, change in plan.changes.items() if change.restore), "")):
        raise PlanError(
            f"axis {lost!r}: what its restored units held is in no undo store; give the one that was there when they "
            "were cut, apply(..., undo=undo), or add new units: Plan.growing"
        )
    if all(change.idle for change in plan.changes.values()):
        return model, axes
    ready = prepare(model, axes, plan, undo)
    rehearsal = rehearse_plan(model, axes, plan)
    known = replace(axes, steps=with_new_constants(axes.steps, rehearsal.planned), recording=None)
    if holds_numbers(model, axes.example):
        if axes.decisions is None:
            recording = record_present(model, axes, rehearsal.present)
            check_blocks(ProposedChange(ready, recording, rehearsal.planned))
            known = replace(known, recording=Recording(rehearsal.planned, recording.reads, recording.code))
        else:
            _check_whole_network(model, axes, plan)
    return commit(model, known, ready, optimizers, undo, partial(check_own_run, model))


def rehearse_plan(model: nn.Module, axes: AxisGraph, plan: Plan) -> Rehearsal:
    """Run the planned network on a copy of fake tensors; return the recordings, or raise ``PlanError`` if it fails."""
    with without_garbage_collection():
        return rehearse(model, axes, plan_resizing(model, axes, plan))


def record_present(model: nn.Module, axes: AxisGraph, present: Capture | None) -> Recording:
    """Return a recording of the network as it is now, with the dimensions in which its operations read axes.

    ``present``: its operations if they were just recorded; ``None``: ``axes.recording`` if that still fits, else anew.
    """
    example, recording = cast_example(axes.example, model), axes.recording
    if recording is None:
        fresh = record_readings(model, axes, example)
        return Recording(fresh.capture, fresh.reads, describe_code(model))
    if present is None and not recording.fits(model, example):
        present = capture(model, example, tracer=axes.tracer)
    # A new walk would not see axes of which one unit is left, so the dimensions that are read stay.
    return recording if present is None else Recording(present, recording.reads, describe_code(model))


def _check_whole_network(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """Raise ``PlanError`` unless the masked network and its cut copy agree as a whole, in float64.

    This is for networks in which data decide what runs. Plans that restore units are not compared: no plan of the
    present network cuts those.
    """
    if any(change.restore for change in plan.changes.values()):
        return
    masked, shrunk, _ = run_whole_pair(model, axes, plan, cast_example(axes.example, model), True, ())
    if not (distance := max_difference(masked, shrunk)) <= RELATIVE_BOUND * max_magnitude(masked):
        raise PlanError(describe_difference(distance, max_magnitude(masked)))


def check_plan(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """Raise :class:`PlanError` unless the plan fits the axes, and every tensor of the model has the shape they say."""
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a regrow.Plan, got a {type(plan).__name__}; for example Plan.keeping(axes, ...)")
    plan.check(axes)
    sizes, state = axes.sizes(), state_of(model)
    for name, dims in axes.shapes.items():
        expected = tuple(size_of(dim, sizes) for dim in dims)
        if name not in state:
            raise PlanError(f"the model has no tensor {name!r}; trace it again")
        if tuple(state[name].shape) != expected:
            raise PlanError(
                f"{name} has shape {tuple(state[name].shape)}, its axes say {expected}; trace the model again"
            )
