"""Run a masked network and its cut copy as a whole, where they have no blocks that could be compared.

These are networks in which data decide which operations run, declared axes, and plans that drop branches.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Decision, Example
from regrow.core.plan import Plan, PlanError
from regrow.surgery.carry import carry_out
from regrow.surgery.compensate import bias_of, check_bias, mean_contribution
from regrow.surgery.runner import Answers, Runner, floats, loader, masking
from regrow.surgery.undo_store import UndoStore
from regrow.tracing.capture import Capture, TraceError, capture, evaluating, first_line, holds_numbers
from regrow.tracing.meta_copy import cast_example, copy_model, map_tensors
from regrow.tracing.model_state import preserve_state
from regrow.tracing.own_run import CastsToDouble, as_double, compare_with_recording, made_in_double
from regrow.tracing.readings import readings

Decisions = tuple[Decision, ...] | None


def run_whole_pair(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    example: Example,
    double: bool,
    decisions: Decisions,
    carried: Callable[[nn.Module, AxisGraph, Plan], tuple[nn.Module, AxisGraph]] = carry_out,
) -> tuple[Answers, Answers, Decisions]:
    """Run the masked network and its cut copy; return the outputs of both, and their data-dependent decisions."""
    widened = _widened(model, axes) if double else shallow_copy(model)
    example = map_tensors(example, as_double) if double else example
    whole = mask_units(widened, axes, plan) if axes.declared else widened
    taken, masked, orders = decisions, [], []
    if axes.recorded == "not":
        masked = _run(whole, example, double, None)
    else:
        # With zeros in the weights of declared axes, the network needs a recording of its own.
        with made_in_double(double), CastsToDouble() if double and decisions is not None else nullcontext():
            recorded = readings(whole, axes, example, decisions)
        declared = {slot.name for key in axes.declared if key in plan.changes for slot in axes[key].consumers()}
        means = {name: row for name, row in plan.means.items() if name not in declared}
        keep = {key: change.keep for key, change in plan.changes.items()}
        mask = masking(
            recorded.capture, recorded.reads, recorded.sizes, keep, means, recorded.compared, plan.drop.values()
        )
        runner = Runner(recorded.capture, recorded.given, loader(whole), double, mask)
        runner.run_until()
        taken, masked, orders = recorded.capture.decisions, runner.answers, runner.orders
    cut, _ = carried(shallow_copy(widened), axes, plan)
    try:
        shrunk = _run(cut, example, double, taken, orders)
    except Exception as error:
        raise PlanError(f"the plan cannot be carried out: the network does not run: {error}") from error
    return masked, shrunk, taken


def _widened(model: nn.Module, axes: AxisGraph) -> nn.Module:
    """Return a copy in float64; norms that take the epsilon of their precision keep that of the model's precision."""
    wide = copy_model(model, lambda x: x.detach().double() if x.is_floating_point() else x.detach().clone())
    for fold in axes.folds:
        path, _, name = fold.epsilon.partition(":")
        if name and getattr(wide.get_submodule(path), name) is None:
            setattr(wide.get_submodule(path), name, fold.value)
    return wide


def shallow_copy(model: nn.Module) -> nn.Module:
    """Return a copy that shares the parameters' values: a cut makes new tensors and leaves the old ones unchanged."""
    return replace_parameters(model, {})


def _run(
    model: nn.Module, example: Example, double: bool, decisions: Decisions, orders: Iterable[Tensor] = ()
) -> Answers:
    outside = preserve_state(model, outside=True)
    with outside, made_in_double(double), CastsToDouble() if double else nullcontext():
        if decisions is not None:
            return [*capture(model, example, decisions, orders).values]
        with evaluating(model), torch.no_grad():
            return floats(model(*example.args, **example.kwargs))


def trial_error(model: nn.Module, axes: AxisGraph, plan: Plan, undo: UndoStore | None) -> str:
    """Return the error of applying a plan to a copy and running that on the example; empty if it runs."""
    example = cast_example(axes.example, model)
    changed, _ = carry_out(shallow_copy(model), axes, plan, undo=copy.copy(undo))
    try:
        with evaluating(changed), torch.no_grad(), torch.random.fork_rng(), preserve_state(changed, outside=True):
            changed(*copy.deepcopy(example.args), **copy.deepcopy(dict(example.kwargs)))
    except Exception as error:
        return f"the network does not run at that size: {first_line(error)}"
    return ""


def mask_units(model: nn.Module, axes: AxisGraph, plan: Plan) -> nn.Module:
    """Return a full-size copy in which the weights that consume dropped units of declared axes are 0 there.

    Where the plan has means, their contribution is added to the bias of the layer.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    made: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for key in axes.declared:
        if key not in plan.changes:
            continue
        dropped = list(plan.changes[key].dropped)
        for slot in axes[key].consumers():
            name = axes.ties.get(slot.name, slot.name)
            value = made.setdefault(name, state[name].detach().clone())
            value.index_fill_(slot.dim, slot.positions(axes[key].size)[dropped].flatten().to(value.device), 0)
            if slot.name in plan.means:
                dim, old = check_bias(model, axes, slot.name)
                lost = mean_contribution(state[name].detach(), dim, plan.means[slot.name]).to(state[name].dtype)
                biases[bias_of(slot.name)] = lost if old is None else old.detach() + lost
    changed = replace_parameters(model, {id(state[name]): value for name, value in made.items()})
    for name, value in biases.items():
        path, _, leaf = name.rpartition(".")
        setattr(changed.get_submodule(path), leaf, nn.Parameter(value))
    return changed


def replace_parameters(model: nn.Module, values: Mapping[int, Tensor]) -> nn.Module:
    """Return a copy that shares parameters with the model, except some; buffers and other tensors are copied."""

    def made(tensor: Tensor) -> Tensor:
        own = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
        return values.get(id(tensor), own)

    return copy_model(model, made)


class NotAsRecordedError(PlanError):
    """Raised for a changed network whose own forward pass differs from its recording."""


def check_own_run(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the axes of a changed network after comparing its own forward pass with its recording.

    Where that cannot be done, the result says so (``unproven``).
    """
    if not holds_numbers(model, axes.example):
        return replace(axes, unproven="the network or its example has no numbers")
    example = cast_example(axes.example, model)
    if axes.decisions is not None:
        recorded = record_run(model, example)
    elif axes.recording is not None:
        recorded = axes.recording.capture
    else:
        return axes  # declared axes: the network itself was run
    return replace(axes, unproven=check_recording(model, recorded, example))


def record_run(model: nn.Module, example: Example) -> Capture:
    """Return a recording of a changed network in which data decide which operations run."""
    try:
        with preserve_state(model, entries=True):
            return capture(model, example, ())
    except TraceError as error:
        raise NotAsRecordedError(f"the plan cannot be carried out: {error}") from error


def check_recording(model: nn.Module, recorded: Capture, example: Example) -> str:
    """Compare a changed network's own forward pass with its recording; return why that could not be done, or ``""``."""
    try:
        result = compare_with_recording(model, recorded, example)
    except Exception as error:
        problem = f"the network does not run: {first_line(error)}"
        raise NotAsRecordedError(f"the plan cannot be carried out: {problem}; plan other sizes") from error
    if result.problem:
        raise NotAsRecordedError(
            f"the plan cannot be carried out: {result.problem}; leave the axes of that module out of the plan"
        )
    return result.unproven
