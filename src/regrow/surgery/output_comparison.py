"""Compare outputs of the masked network and its cut copy, which run side by side, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from regrow.core.axes import AxisGraph, Dim, Example
from regrow.core.plan import Plan, PlanError
from regrow.surgery.carry import Prepared
from regrow.surgery.compensate import PlannedTensors, read_dim
from regrow.surgery.layout import Layout, ids_after, lay_out_dims, next_ids_after
from regrow.surgery.runner import Answers, Runner, loader, masking, preserve_generators, reseed
from regrow.surgery.undo_store import UndoStore, locate_entries
from regrow.tracing.blocks import GraphBlock, blocks
from regrow.tracing.capture import Capture, TraceError, capture
from regrow.tracing.meta_copy import fake_example
from regrow.tracing.nodes import op_name
from regrow.tracing.readings import Readings, Recording
from regrow.tracing.steps import operations
from regrow.tracing.trial import Resizing, resize_copy

# The largest float64 difference allowed, relative to the largest value that is compared
RELATIVE_BOUND = 1e-9


# How many units in the last place a tensor may differ from its value in float64
ROUNDING = 16


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
        return ROUNDING * max(torch.finfo(one.dtype).eps for one in self.model.parameters() if one.is_floating_point())


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
        for position, place in enumerate(locate_entries(axes.shapes[weight], next_ids, ids)[dim].tolist()):
            if place in row and place not in left:
                result.setdefault(weight, {})[position] = row[place]
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
    """Run the masked network and its cut copy from input to output; return the outputs of both.

    Of each network, the tensors of one block at a time are in memory beside the model.
    """
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
    place = next((one.device for one in numbers if one.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([one.to(place) for one in numbers]).max() if numbers else torch.zeros((), dtype=torch.float64)


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
    return not verdicts or bool(_largest([(~one).double() for one in verdicts]) == 0)
