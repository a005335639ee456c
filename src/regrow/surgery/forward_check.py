"""Check that a changed network's own forward pass computes what its recording does."""

from dataclasses import replace

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from regrow.core.axes import AxisGraph, Example
from regrow.core.plan import PlanError
from regrow.tracing.capture import Capture, TraceError, capture, first_line
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.model_state import preserve_state
from regrow.tracing.own_run import compare_with_recording


class NotAsRecordedError(PlanError):
    """Raised for a changed network whose own forward pass differs from its recording."""


def check_own_run(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the axes of a changed network after comparing its own forward pass with its recording.

    Where that cannot be done, the result says so (``unproven``).
    """
    if is_numberless(model, axes):
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


def is_numberless(model: nn.Module, axes: AxisGraph) -> bool:
    """Whether a network or its example has tensors without numbers."""
    inputs = (x for x in tree_leaves((axes.example.args, dict(axes.example.kwargs))) if isinstance(x, Tensor))
    return any(x.is_meta or isinstance(x, FakeTensor) for x in (*model.parameters(), *inputs))
