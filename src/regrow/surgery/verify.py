"""Verify a cut for any network and plan: the cut network must compute what the masked network computes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf

from torch import nn

from regrow.core.axes import AxisGraph, Example
from regrow.core.plan import Plan
from regrow.surgery.apply import apply, check_plan, record_present, rehearse_plan
from regrow.surgery.carry import apply_unchecked, plan_resizing, prepare, write
from regrow.surgery.compensate import PlannedTensors
from regrow.surgery.output_comparison import (
    RELATIVE_BOUND,
    Decisions,
    check_recording,
    common_outputs,
    max_difference,
    max_magnitude,
    record_run,
    run_whole_pair,
)
from regrow.surgery.runner import Results, Runner, make_masking, run_both, tensor_getter
from regrow.tracing.capture import Capture, holds_numbers
from regrow.tracing.meta_copy import cast_example, leaves_in
from regrow.tracing.model_state import Snapshot
from regrow.tracing.nodes import op_name
from regrow.tracing.readings import Readings, divide_into_blocks, record_readings
from regrow.tracing.trial import record_resized


@dataclass(frozen=True)
class Verification:
    """The differences between a network cut by a plan and the same network masked by it.

    Args:
        ok: Whether the float64 difference is within its bound, something was compared, and the cut network's own
            forward pass gives what its recording does.
        max_abs_diff: The largest absolute difference of an output, in float64.
        bound: The largest difference allowed: 1e-9 of the largest output.
        float32_diff: The largest absolute difference in the network's own precision.
        rounding: The largest difference between the masked network in its own precision and in float64.
        argmax_flips: Positions whose argmax changes in the network's own precision.
        positions: How many positions were compared (the outputs without their last dimension).
        unproven: Why the cut network itself was not run, only its recording; empty: it was.
    """

    ok: bool
    max_abs_diff: float
    bound: float
    float32_diff: float
    rounding: float
    argmax_flips: int
    positions: int
    unproven: str = ""


def verify(model: nn.Module, axes: AxisGraph, plan: Plan, example: Example | None = None) -> Verification:
    """Compare the network cut by a plan with the same network masked by it, in float64 and in its own precision.

    Masked means: in every operation that sums over an axis its dropped units count as 0 (or as the plan's means), in
    one that compares as −∞; layer and group norms run over the kept units; the output of a dropped branch counts as 0,
    or as its input where that passes through. The masked network is computed by running the recorded operations one by
    one, without surgery; so is the cut one, recorded on a copy of the planned shapes. Both run block by block
    (:mod:`regrow.tracing.readings`), each with its own hidden states: one block of the network and its cut copy are in
    float64 at a time. Networks in which data decide which operations run, and plans that drop branches, are run as a
    whole, and the cut copy as it is.

    Where data decide what a network does (which boxes overlap), both networks get the decisions of the uncut one, so
    that their outputs have one shape; then the values on which the decisions are based are compared too: the scores and
    boxes of all anchors, not only of those found. If these agree, so do the decisions. Likewise the cut network sorts
    in the order of the masked one: equal scores (of anchors on the padding) may come in any order.

    Args:
        model: The traced model; it is left unchanged.
        axes: Its axes.
        plan: The plan.
        example: The input to compare on, of any batch size and length; the traced one unless given.

    Returns:
        The differences, and whether they are within their bound.

    Raises:
        PlanError: If the plan does not fit the model, or the model does not run as planned.
    """
    check_plan(model, axes, plan)
    runs = _Runs(model, axes, plan, example or axes.example)
    exact_masked, exact_shrunk, decisions = runs.run_pair(double=True)
    masked, shrunk, _ = runs.run_pair(double=False, decisions=decisions)
    difference, largest = max_difference(exact_masked, exact_shrunk), max_magnitude(exact_masked)
    rows = [(a, b) for a, b in common_outputs(masked, shrunk) if a.shape == b.shape]
    positions = sum(a[..., 0].numel() if a.dim() else 1 for a, _ in rows)
    return Verification(
        ok=difference <= RELATIVE_BOUND * largest and positions > 0,
        max_abs_diff=difference,
        bound=RELATIVE_BOUND * largest,
        float32_diff=max_difference(masked, shrunk),
        rounding=max_difference(masked, exact_masked),
        argmax_flips=sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in rows if a.dim()),
        positions=positions,
        unproven=runs.check_own_run(),
    )


def measure_distances(model: nn.Module, axes: AxisGraph, plans: Iterable[Plan]) -> Iterator[tuple[Plan, float]]:
    """Yield each plan with max |masked − cut| / max |masked| of its outputs in float64; ∞ if nothing was compared."""
    for plan in plans:
        check_plan(model, axes, plan)
        masked, shrunk, _ = _Runs(model, axes, plan, axes.example).run_pair(double=True)
        compared = bool(common_outputs(masked, shrunk))
        yield plan, max_difference(masked, shrunk) / (max_magnitude(masked) or 1.0) if compared else inf


class _Runs:
    """Runs of the masked and the cut network, after the checks that :func:`regrow.apply` makes on a copy."""

    def __init__(self, model: nn.Module, axes: AxisGraph, plan: Plan, example: Example) -> None:
        self.model, self.axes, self.plan, self.example = model, axes, plan, cast_example(example, model)
        self.recorded: Readings | None = None
        self.planned: Capture | None = None  # where a recording is run instead of the cut network
        if plan.changes_modules:
            return
        rehearsal = rehearse_plan(model, axes, plan)
        if axes.decisions is not None:
            return
        if example is axes.example:
            recording = record_present(model, axes, rehearsal.present)
            self.recorded = Readings(recording.capture, leaves_in(self.example), recording.reads, axes.sizes(), ())
            self.planned = rehearsal.planned
        else:
            self.recorded = record_readings(model, axes, self.example)
            example_axes = replace(axes, example=self.example)
            self.planned = record_resized(model, example_axes, plan_resizing(model, axes, plan))

    def run_pair(self, double: bool, decisions: Decisions = ()) -> tuple[Results, Results, Decisions]:
        """Run both networks (``double``: in float64); return the masked one's outputs, the cut one's, and decisions."""
        model, axes, plan, recorded = self.model, self.axes, self.plan, self.recorded
        if recorded is None or self.planned is None:
            given = None if axes.decisions is None else decisions
            apply_plan = apply if plan.changes_modules else apply_unchecked
            return run_whole_pair(model, axes, plan, self.example, double, given, apply_plan)
        keep = {key: change.keep for key, change in plan.changes.items()}
        mask = make_masking(recorded.capture, recorded.reads, recorded.sizes, keep, plan.means)
        masked = Runner(recorded.capture, recorded.given, tensor_getter(model), double, mask, exact=lambda name: True)
        cut = PlannedTensors(model, axes, plan)
        shrunk = Runner(self.planned, recorded.given, cut.load, double, exact=lambda name: not cut.computes(name))
        alike = [op_name(node) for node in masked.nodes] == [op_name(node) for node in shrunk.nodes]
        # If the network runs other operations at other sizes, the two have no common blocks.
        run_both(masked, shrunk, divide_into_blocks(recorded.capture) if alike else ())
        return masked.outputs, shrunk.outputs, None

    def check_own_run(self) -> str:
        """Raise ``PlanError`` unless the cut network runs as recorded; return why that was not compared, or ``""``.

        The model itself is cut for that, and restored: a copy may run otherwise.
        """
        model, axes, plan = self.model, self.axes, self.plan
        if not holds_numbers(model, axes.example):
            return "the network or its example has no numbers"
        if plan.changes_modules:
            return ""  # the cut network itself was run

        before = Snapshot(model)
        try:
            write(model, axes, prepare(model, axes, plan))
            return check_recording(model, self.planned or record_run(model, self.example), self.example)
        finally:
            before.restore()
