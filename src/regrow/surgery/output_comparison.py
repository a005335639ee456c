"""Compare outputs of the masked network and its cut copy: side by side, block by block, or each as a whole.

Whole are networks in which data decide which operations run, declared axes, and plans that drop or restore.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from regrow.core.axes import AxisGraph, Decision, Dim, Example
from regrow.core.plan import Plan, PlanError
from regrow.surgery.carry import Prepared, carry_out
from regrow.surgery.compensate import PlannedTensors, bias_of, check_bias, mean_contribution, read_dim
from regrow.surgery.layout import Layout, ids_after, lay_out_dims, next_ids_after
from regrow.surgery.runner import Answers, Runner, floats, loader, masking, preserve_generators, reseed
from regrow.surgery.undo_store import UndoStore, locate_entries
from regrow.tracing.capture import Capture, TraceError, capture, evaluating, first_line, holds_numbers
from regrow.tracing.meta_copy import cast_example, copy_model, fake_example, map_tensors
from regrow.tracing.model_state import preserve_state
from regrow.tracing.nodes import op_name
from regrow.tracing.own_run import CastsToDouble, as_double, compare_with_recording, made_in_double
from regrow.tracing.readings import GraphBlock, Readings, Recording, blocks, readings
from regrow.tracing.steps import operations
from regrow.tracing.trial import Resizing, resize_copy

# The largest float64 difference allowed, relative to the largest value that is compared
RELATIVE_BOUND = 1e-9


# How many units in the last place a tensor may differ from its value in float64
ROUNDING = 16
Decisions = tuple[Decision, ...] | None


@dataclass(frozen=True)
class ProposedChange:
    """A plan whose result is computed but not yet written; ``undo`` is the store before it."""

    model: nn.Module
    axes: AxisGraph
    plan: Plan
    recording: Recording
    planned: Capture
    ready: Prepared
    undo: UndoStore | None = None

    @property
    def recalls(self) -> bool:
        """Whether units are restored with the weights they had when cut."""
        return any(change.recalled for change in self.plan.changes.values())

    @property
    def units(self) -> dict[str, Layout]:
        """Axis key → the layout of its units after the plan, for each axis that changes."""
        return self.ready.tensors.units

    def lays(self, dims: Sequence[Dim]) -> dict[int, Layout]:
        """Return dimension index → its layout after the plan, for those of ``dims`` that change."""
        return lay_out_dims(dims, self.axes.sizes(), self.units)

    @property
    def bound(self) -> float:
        """The largest relative difference allowed; larger where earlier folds were rounded to its precision."""
        rounded = any(fold.weight in self.ready.values for fold in self.axes.folds)
        if not self.recalls or not (rounded or (self.undo is not None and self.undo.means)):
            return RELATIVE_BOUND
        types = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        return ROUNDING * max(torch.finfo(dtype).eps for dtype in types)


def computed_tensors(change: ProposedChange) -> set[str]:
    """Return the names of the tensors that a plan computes (folded, compensated, widened) rather than selects from."""
    return set(filter(change.ready.tensors.computes, change.ready.values))


def restored_means(change: ProposedChange) -> dict[str, dict[int, float]]:
    """Return weight → position of a restored input → the mean that had replaced it while it was cut."""
    axes, plan = change.axes, change.plan
    if change.undo is None or change.ready.undo is None:
        return {}
    next_ids, ids = next_ids_after(axes, plan), ids_after(axes, plan)
    result: dict[str, dict[int, float]] = {}
    for weight, row in change.undo.means.items():
        dim, left = read_dim(axes, weight), change.ready.undo.means.get(weight, {})
        assert dim is not None
        for position, entry in enumerate(locate_entries(axes.shapes[weight], next_ids, ids)[dim].tolist()):
            if entry in row and entry not in left:
                result.setdefault(weight, {})[position] = row[entry]
    return result


class Deviation(NamedTuple):
    """How far a block of the cut network is from the masked one, in float64, and how far it may be."""

    largest_difference: float
    bound: float


def record_planned(model: nn.Module, axes: AxisGraph, to: Resizing, example: Example) -> Capture:
    """Record the network that a plan leads to, on a copy without numbers."""
    copy, mode = resize_copy(model, axes, to)
    try:
        return capture(copy, fake_example(example, mode), tracer=axes.tracer)
    except TraceError as error:
        raise PlanError(f"the plan cannot be carried out: the network does not run: {error}") from error


def run_pair(
    model: nn.Module, axes: AxisGraph, plan: Plan, whole: Readings, small: Capture, double: bool
) -> tuple[Answers, Answers]:
    """Run both networks from input to output, with the tensors of one block in memory; return the outputs of both."""
    keep = {key: change.keep for key, change in plan.changes.items()}
    mask = masking(whole.capture, whole.reads, whole.sizes, keep, plan.means)
    masked = Runner(whole.capture, whole.given, loader(model), double, mask, exact=lambda name: True)
    cut = PlannedTensors(model, axes, plan)
    shrunk = Runner(small, whole.given, cut.load, double, exact=lambda name: not cut.computes(name))
    ours, theirs = operations(whole.capture), operations(small)
    alike = [op_name(node) for node in ours] == [op_name(node) for node in theirs]
    # If the network runs other operations at other sizes, the two have no common blocks.
    run_both(masked, shrunk, blocks(whole.capture) if alike else (), ours, theirs)
    return masked.answers, shrunk.answers


def run_both(
    masked: Runner,
    shrunk: Runner,
    cut: Sequence[GraphBlock],
    ours: Sequence[Node],
    theirs: Sequence[Node],
) -> None:
    """Run two recorded networks to their ends, block by block in turns, each block from the same random seed."""
    with preserve_generators():
        for block in cut:
            last = block.stop == len(ours)
            reseed(block.start)
            masked.run_until(None if last else ours[block.stop])
            reseed(block.start)
            shrunk.run_until(None if last else theirs[block.stop])
        masked.run_until()
        shrunk.run_until()


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
        shared = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
        return values.get(id(tensor), shared)

    return copy_model(model, made)


def check_own_run(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return a changed network's axes (``unproven``?) after comparing its own forward pass with its recording."""
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
        raise PlanError(f"the plan cannot be carried out: {error}") from error


def check_recording(model: nn.Module, recorded: Capture, example: Example) -> str:
    """Compare a changed network's own forward pass with its recording; return why that could not be done, or ``""``."""
    try:
        return compare_with_recording(model, recorded, example)
    except Exception as error:
        problem = f"the network does not run as recorded: {first_line(error)}"
        raise PlanError(f"the plan cannot be carried out: {problem}; plan other sizes") from error
