"""Compare outputs: of the masked network and its cut copy, and of a changed network and its recording."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from math import inf

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Decision, Example
from regrow.core.errors import first_line
from regrow.core.plan import Plan, PlanError
from regrow.surgery.carry import apply_unchecked
from regrow.surgery.runner import Results, Runner, float_outputs, make_masking, tensor_getter
from regrow.tracing.capture import Capture, TraceError, capture, holds_numbers, in_eval_mode
from regrow.tracing.meta_copy import cast_example, copy_model, map_tensors
from regrow.tracing.model_state import preserve_state
from regrow.tracing.own_run import CastsToDouble, as_double, compare_with_recording, made_in_double
from regrow.tracing.readings import record_readings

# The largest float64 difference allowed, relative to the largest value that is compared
RELATIVE_BOUND = 1e-9

Decisions = tuple[Decision, ...] | None


def max_difference(ours: Results, theirs: Results) -> float:
    """Return the largest absolute difference of two networks' outputs; infinite if shapes differ or one is NaN."""
    return float(measure_difference(ours, theirs))


def measure_difference(ours: Results, theirs: Results) -> Tensor:
    """Return :func:`max_difference` as a tensor on the device, ``[]`` float64: the host does not wait for it."""
    if len(ours) != len(theirs):
        return torch.tensor(inf, dtype=torch.float64)
    return _take_largest([_measure_gap(x.double(), y.double()) for x, y in common_outputs(ours, theirs)])


def _measure_gap(x: Tensor, y: Tensor) -> Tensor:
    """Return the largest absolute difference of two tensors, ``[]``; infinite if shapes differ or one is NaN."""
    if x.shape != y.shape:
        return torch.tensor(inf, dtype=torch.float64)
    difference = (x - y).abs().masked_fill(x == y, 0.0)  # infinities are equal too
    return difference.masked_fill(difference.isnan(), inf).max()


def _take_largest(numbers: list[Tensor]) -> Tensor:
    """Return the largest of some scalars, ``[]`` float64, on the device of the first that is not on the CPU; or 0."""
    if not numbers:
        return torch.zeros((), dtype=torch.float64)
    device = next((number.device for number in numbers if number.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([number.to(device) for number in numbers]).max()


def common_outputs(ours: Results, theirs: Results) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of outputs that both networks have and that are not empty."""
    both = zip(ours, theirs, strict=False)  # max_difference notices another number of outputs
    return [(x, y) for x, y in both if x is not None and y is not None and x.numel()]


def max_magnitude(outputs: Results) -> float:
    """Return the largest finite absolute value in a network's outputs; 0 if there is none."""
    return float(measure_magnitude(outputs))


def measure_magnitude(outputs: Results) -> Tensor:
    """Return :func:`max_magnitude` as a tensor on the device, ``[]`` float64: the host does not wait for it."""
    magnitudes = (x.abs() for x in outputs if x is not None and x.numel())
    return _take_largest([x.masked_fill(~x.isfinite(), 0).max().double() for x in magnitudes])


def all_true(verdicts: list[Tensor]) -> bool:
    """Whether all of several verdicts (``[]`` bool) are true; the host waits for the device once."""
    return not verdicts or bool(_take_largest([(~verdict).double() for verdict in verdicts]) == 0)


def run_whole_pair(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    example: Example,
    double: bool,
    decisions: Decisions,
    apply_plan: Callable[[nn.Module, AxisGraph, Plan], tuple[nn.Module, AxisGraph]] = apply_unchecked,
) -> tuple[Results, Results, Decisions]:
    """Run the masked network and its cut copy as a whole: where data decide what runs, and where branches are dropped.

    ``decisions``: what both do where data decide; ``()``: decided by the masked network; ``None``: data decide nothing.

    Returns:
        The outputs of both (masked, cut), in float64 if ``double``, and the decisions of the masked network.
    """
    whole = _widen(model, axes) if double else shallow_copy(model)
    example = map_tensors(example, as_double) if double else example
    with made_in_double(double), CastsToDouble() if double and decisions is not None else nullcontext():
        trace = record_readings(whole, axes, example, decisions)
    keep = {key: change.keep for key, change in plan.changes.items()}
    mask = make_masking(trace.capture, trace.reads, trace.sizes, keep, plan.means, trace.compared, plan.drop.values())
    runner = Runner(trace.capture, trace.given, tensor_getter(whole), double, mask)
    runner.run_until()
    cut, _ = apply_plan(shallow_copy(whole), axes, plan)
    try:
        shrunk = _run(cut, example, double, trace.capture.decisions, runner.orders)
    except Exception as error:
        raise PlanError(f"the plan cannot be carried out: the network does not run: {error}") from error
    return runner.outputs, shrunk, trace.capture.decisions


def _widen(model: nn.Module, axes: AxisGraph) -> nn.Module:
    """Return a copy in float64; norms without an epsilon keep that of the model's own precision."""
    wide = copy_model(model, lambda x: x.detach().double() if x.is_floating_point() else x.detach().clone())
    for fold in axes.folds:
        path, _, name = fold.epsilon.partition(":")
        if name and getattr(wide.get_submodule(path), name) is None:
            setattr(wide.get_submodule(path), name, fold.value)
    return wide


def shallow_copy(model: nn.Module) -> nn.Module:
    """Return a copy that shares parameters: a cut makes new ones. Buffers and other tensors are copied."""
    return copy_model(model, lambda x: x.detach() if isinstance(x, nn.Parameter) else x.detach().clone())


def _run(model: nn.Module, example: Example, double: bool, decisions: Decisions, orders: Iterable[Tensor]) -> Results:
    """Return a network's outputs, with the given data-dependent ``decisions`` and sort ``orders`` if there are any."""
    outside = preserve_state(model, outside=True)
    with outside, made_in_double(double), CastsToDouble() if double else nullcontext():
        if decisions is not None:
            return [*capture(model, example, decisions, orders).values]
        with in_eval_mode(model), torch.no_grad():
            return float_outputs(model(*example.args, **example.kwargs))


def check_own_run(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Compare a changed network's own forward pass with its recording; raise ``PlanError`` if they differ.

    Returns the axes, whose ``unproven`` says why they could not be compared; empty: they were.
    """
    if not holds_numbers(model, axes.example):
        return replace(axes, unproven="the network or its example has no numbers")
    example = cast_example(axes.example, model)
    recorded = record_run(model, example) if axes.recording is None else axes.recording.capture
    return replace(axes, unproven=check_recording(model, recorded, example))


def record_run(model: nn.Module, example: Example) -> Capture:
    """Record one run of a changed network in which data decide what runs; ``PlanError`` if it does not run."""
    try:
        with preserve_state(model, entries=True):
            return capture(model, example, ())
    except TraceError as error:
        raise PlanError(f"the plan cannot be carried out: {error}") from error


def check_recording(model: nn.Module, recorded: Capture, example: Example) -> str:
    """Raise ``PlanError`` unless a network runs as recorded; return why they could not be compared, else ``""``."""
    try:
        return compare_with_recording(model, recorded, example)
    except Exception as error:
        problem = f"the network does not run as recorded: {first_line(error)}"
        raise PlanError(f"the plan cannot be carried out: {problem}; plan other sizes") from error
