"""Verify a cut for any network and plan: the cut network must compute what the masked network computes."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

from torch import nn

from regrow.core.axes import AxisGraph, Example
from regrow.core.plan import Plan
from regrow.surgery.apply import apply, check, try_out
from regrow.surgery.carry import carry_out, commit, prepare, resizing
from regrow.surgery.output_comparison import (
    RELATIVE_BOUND,
    Decisions,
    check_recording,
    common_outputs,
    max_difference,
    max_magnitude,
    record_planned,
    record_run,
    run_pair,
    run_whole_pair,
    shallow_copy,
)
from regrow.surgery.runner import Answers
from regrow.tracing.capture import Capture, holds_numbers
from regrow.tracing.meta_copy import leaves_in
from regrow.tracing.readings import Readings, readings
from regrow.tracing.steps import difference, refold_steps
from regrow.tracing.trial import Resizing


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


def verify(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    example: Example | None = None,
    *,
    examples: Iterable[Example] = (),
) -> Verification:
    """Compare the network cut by a plan with the same network masked by it, in float64 and in its own precision.

    Masked means: in every operation that sums over an axis its dropped units count as 0 (or as the plan's means), in
    one that compares as −∞; layer and group norms run over the kept units; the output of a dropped branch counts as 0,
    or as its input where that passes through. The masked network is computed by running the recorded operations one by
    one, without surgery; so is the cut one, recorded on a copy of the planned shapes. Both run block by block
    (:mod:`regrow.tracing.readings`), each with its own hidden states: one block of the network and its cut copy are in
    float64 at a time. For declared axes (:func:`regrow.declare`) the masked network is the whole network with 0 in each
    weight that consumes dropped units; it and its cut copy are run as they are, and so are networks in which data
    decide which operations run, and plans that drop branches.

    Where data decide what a network does (which boxes overlap), both networks get the decisions of the uncut one, so
    that their outputs have one shape; then the values on which the decisions are based are compared too: the scores and
    boxes of all anchors, not only of those found. If these agree, so do the decisions. Likewise the cut network sorts
    in the order of the masked one: equal scores (of anchors on the padding) may come in any order.

    Args:
        model: The traced model; it is left unchanged.
        axes: Its axes.
        plan: The plan.
        example: The input to compare on; the traced one unless given.
        examples: Further inputs to compare on, of any batch size and length.

    Returns:
        The differences, and whether they are within their bound; of several inputs, the largest.

    Raises:
        PlanError: If the plan does not fit the model, or the model does not run as planned.
    """
    check(model, axes, plan)
    results = [_verify(model, axes, plan, inputs) for inputs in (example or axes.example, *examples)]
    worst = max(results, key=lambda result: result.max_abs_diff / (result.bound or 1.0))
    return replace(
        worst,
        ok=all(result.ok for result in results),
        float32_diff=max(result.float32_diff for result in results),
        rounding=max(result.rounding for result in results),
        argmax_flips=sum(result.argmax_flips for result in results),
        positions=sum(result.positions for result in results),
    )


def _verify(model: nn.Module, axes: AxisGraph, plan: Plan, example: Example) -> Verification:
    runs = _Runs(model, axes, example)
    exact_masked, exact_shrunk, decisions = runs.both(plan, double=True)
    masked, shrunk, _ = runs.both(plan, double=False, decisions=decisions)
    difference, largest = max_difference(exact_masked, exact_shrunk), max_magnitude(exact_masked)
    holds = difference <= RELATIVE_BOUND * largest
    if not holds:
        _refuse(model, axes, plan)  # a plan that is refused is no wrong cut
    rows = [(a, b) for a, b in common_outputs(masked, shrunk) if a.shape == b.shape]
    positions = sum(a[..., 0].numel() if a.dim() else 1 for a, _ in rows)
    return Verification(
        ok=holds and positions > 0,
        max_abs_diff=difference,
        bound=RELATIVE_BOUND * largest,
        float32_diff=max_difference(masked, shrunk),
        rounding=max_difference(masked, exact_masked),
        argmax_flips=sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in rows if a.dim()),
        positions=positions,
        unproven=runs.check_own_run(plan),
    )


def distances(model: nn.Module, axes: AxisGraph, plans: Iterable[Plan]) -> Iterator[tuple[Plan, float]]:
    """Yield each of many plans with max |masked − shrunk| / max |masked| in float64."""
    runs = _Runs(model, axes, axes.example)
    for plan in plans:
        check(model, axes, plan)
        masked, shrunk, _ = runs.both(plan, double=True)
        compared = bool(common_outputs(masked, shrunk))
        distance = max_difference(masked, shrunk) / (max_magnitude(masked) or 1.0) if compared else inf
        if not distance <= RELATIVE_BOUND:
            _refuse(model, axes, plan)  # a plan that is refused is no wrong cut
        yield plan, distance


def _refuse(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """Raise :class:`PlanError` if :func:`regrow.apply` would not try the plan."""
    if plan.changes_modules:
        apply(shallow_copy(model), axes, plan)
    else:
        try_out(model, axes, plan, resizing(model, axes, plan))


class _Checked(Exception):  # noqa: N818
    """Raised when a cut network has been checked, to have the model restored."""


class _Runs:
    """Runs of the network masked and cut by several plans: recorded once, and once per plan."""

    def __init__(self, model: nn.Module, axes: AxisGraph, example: Example) -> None:
        self.model, self.axes, self.example = model, axes, example
        self.recorded: Readings | None = None
        self.planned: tuple[Plan, Capture] | None = None

    def both(self, plan: Plan, double: bool, decisions: Decisions = ()) -> tuple[Answers, Answers, Decisions]:
        """Run the masked and the cut network in float64 or their own precision; return outputs, and decisions."""
        model, axes = self.model, self.axes
        moved = any(change.restore for change in plan.changes.values())
        if axes.declared or axes.decisions is not None or plan.changes_modules or moved:
            taken = None if axes.decisions is None else decisions
            carried = apply if plan.changes_modules else carry_out
            return run_whole_pair(model, axes, plan, self.example, double, taken, carried)
        if self.planned is None or self.planned[0] is not plan:
            to = resizing(model, axes, plan)
            self.planned = plan, record_planned(model, axes, to, self.example)
            self.recorded = self.recorded or self._present(to, self.planned[1])
        assert self.recorded is not None
        return *run_pair(model, axes, plan, self.recorded, self.planned[1], double), None

    def check_own_run(self, plan: Plan) -> str:
        """Compare the cut network's own forward pass with its recording; return why that could not be done.

        The model itself is cut for that, and restored: a copy may run otherwise.
        """
        model, axes = self.model, self.axes
        if not holds_numbers(model, axes.example):
            return "the network or its example has no numbers"
        if plan.changes_modules or (self.planned is None and axes.decisions is None):
            return ""  # the cut network itself was run

        def check(after: AxisGraph) -> AxisGraph:
            recorded = record_run(model, self.example) if self.planned is None else self.planned[1]
            unproven.append(check_recording(model, recorded, self.example))
            raise _Checked

        unproven: list[str] = []
        with suppress(_Checked):
            commit(model, axes, plan, prepare(model, axes, plan), prove=check)
        return unproven[0]

    def _present(self, to: Resizing, planned: Capture) -> Readings:
        """Return the recording that the axes have, if the planned network shows that it still holds, or a new one."""
        axes, known = self.axes, self.axes.recording
        if known is None or not known.fits(self.model, self.example):
            return readings(self.model, axes, self.example)
        if difference(refold_steps(axes, to.constants), planned, to.sizes, to.added) is not None:
            return readings(self.model, axes, self.example)
        return Readings(known.capture, leaves_in(self.example), known.reads, axes.sizes(), ())
