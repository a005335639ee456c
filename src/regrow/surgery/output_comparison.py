"""Compare outputs: of the masked network and its cut copy, and of a changed network and its recording."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from math import inf

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Decision, Example
from regrow.core.plan import Plan, PlanError
from regrow.surgery.carry import carry_out
from regrow.surgery.runner import Answers, Runner, floats, loader, masking
from regrow.tracing.capture import Capture, TraceError, capture, holds_numbers, in_eval_mode, trim_error
from regrow.tracing.meta_copy import cast_example, copy_model, map_tensors
from regrow.tracing.model_state import preserve_state
from regrow.tracing.own_run import CastsToDouble, as_double, compare_with_recording, made_in_double
from regrow.tracing.readings import record_readings

# The largest float64 difference allowed, relative to the largest value that is compared
RELATIVE_BOUND = 1e-9

Decisions = tuple[Decision, ...] | None


def max_difference(ours: Answers, theirs: Answers) -> float:
    """Return the largest absolute difference of two networks' outputs; infinite if shapes differ or one is NaN."""
    return float(measure_difference(ours, theirs))


def measure_difference(ours: Answers, theirs: Answers) -> Tensor:
    """Return what :func:`max_difference` does as a tensor, so that the host does not wait for it, ``[]`` float64."""
    if len(ours) != len(theirs):
        return torch.tensor(inf, dtype=torch.float64)
    return _largest([_gap(x.double(), y.double()) for x, y in common_outputs(ours, theirs)])


def _gap(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape:
        return torch.tensor(inf, dtype=torch.float64)
    difference = (x - y).abs().masked_fill(x == y, 0.0)  # infinities are equal too
    return difference.masked_fill(difference.isnan(), inf).max()


def _largest(numbers: list[Tensor]) -> Tensor:
    if not numbers:
        return torch.zeros((), dtype=torch.float64)
    device = next((number.device for number in numbers if number.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([number.to(device) for number in numbers]).max()


def common_outputs(ours: Answers, theirs: Answers) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of outputs that both networks have and that are not empty."""
    both = zip(ours, theirs, strict=False)  # what gives another number of answers is told by their distance
    return [(x, y) for x, y in both if x is not None and y is not None and x.numel()]


def max_magnitude(answers: Answers) -> float:
    """Return the largest finite absolute value in a network's outputs; 0 if there is none."""
    return float(measure_magnitude(answers))


def measure_magnitude(answers: Answers) -> Tensor:
    """Return what :func:`max_magnitude` does as a tensor, so that the host does not wait for it, ``[]`` float64."""
    sizes = (x.abs() for x in answers if x is not None and x.numel())
    return _largest([x.masked_fill(~x.isfinite(), 0).max().double() for x in sizes])


def all_true(verdicts: list[Tensor]) -> bool:
    """Whether all of several verdicts are true; the host waits for the device once."""
    return not verdicts or bool(_largest([(~verdict).double() for verdict in verdicts]) == 0)


def run_whole_pair(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    example: Example,
    double: bool,
    decisions: Decisions,
    carried: Callable[[nn.Module, AxisGraph, Plan], tuple[nn.Module, AxisGraph]] = carry_out,
) -> tuple[Answers, Answers, Decisions]:
    """Run the masked network and its cut copy as a whole: where data decide what runs, and where branches are dropped.

    Returns:
        The outputs of both, and the data-dependent decisions of the masked network.
    """
    whole = _widened(model, axes) if double else shallow_copy(model)
    example = map_tensors(example, as_double) if double else example
    with made_in_double(double), CastsToDouble() if double and decisions is not None else nullcontext():
        known = record_readings(whole, axes, example, decisions)
    keep = {key: change.keep for key, change in plan.changes.items()}
    mask = masking(known.capture, known.reads, known.sizes, keep, plan.means, known.compared, plan.drop.values())
    runner = Runner(known.capture, known.given, loader(whole), double, mask)
    runner.run_until()
    cut, _ = carried(shallow_copy(whole), axes, plan)
    try:
        shrunk = _run(cut, example, double, known.capture.decisions, runner.orders)
    except Exception as error:
        raise PlanError(f"the plan cannot be carried out: the network does not run: {error}") from error
    return runner.answers, shrunk, known.capture.decisions


def _widened(model: nn.Module, axes: AxisGraph) -> nn.Module:
    """Return a copy in float64; norms that take the epsilon of their precision keep that of the model's precision."""
    wide = copy_model(model, lambda x: x.detach().double() if x.is_floating_point() else x.detach().clone())
    for fold in axes.folds:
        path, _, name = fold.epsilon.partition(":")
        if name and getattr(wide.get_submodule(path), name) is None:
            setattr(wide.get_submodule(path), name, fold.value)
    return wide


def shallow_copy(model: nn.Module) -> nn.Module:
    """Return a copy that shares parameters: a cut makes new ones. Buffers and other tensors are copied."""
    return copy_model(model, lambda x: x.detach() if isinstance(x, nn.Parameter) else x.detach().clone())


def _run(model: nn.Module, example: Example, double: bool, decisions: Decisions, orders: Iterable[Tensor]) -> Answers:
    outside = preserve_state(model, outside=True)
    with outside, made_in_double(double), CastsToDouble() if double else nullcontext():
        if decisions is not None:
            return [*capture(model, example, decisions, orders).values]
        with in_eval_mode(model), torch.no_grad():
            return floats(model(*example.args, **example.kwargs))


def check_own_run(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return a changed network's axes (``unproven``?) after comparing its own forward pass with its recording."""
    if not holds_numbers(model, axes.example):
        return replace(axes, unproven="the network or its example has no numbers")
    example = cast_example(axes.example, model)
    recorded = record_run(model, example) if axes.recording is None else axes.recording.capture
    return replace(axes, unproven=check_recording(model, recorded, example))


def record_run(model: nn.Module, example: Example) -> Capture:
    """Return a recording of a changed network in which data decide which operations run."""
    try:
        with preserve_state(model, entries=True):
            return capture(model, example, ())
    except TraceError as error:
        raise PlanError(f"the plan cannot be carried out: {error}") from error


def check_recording(model: nn.Module, recorded: Capture, example: Example) -> str:
    """Compare a changed network's own forward pass with its recording; return why that could not be done, or ``""``."""
    try:
        return compare_with_recording(model, recorded, example)
    except Exception as error:
        problem = f"the network does not run as recorded: {trim_error(error)}"
        raise PlanError(f"the plan cannot be carried out: {problem}; plan other sizes") from error
