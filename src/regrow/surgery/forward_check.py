"""Check that a changed network's own forward pass computes what its recording does."""

from dataclasses import replace

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from regrow.axes import AxisGraph
from regrow.plan import PlanError
from regrow.tracing.capture import TraceError, capture
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.own_run import compare_with_recording


class NotAsRecordedError(PlanError):
    """Raised for a changed network whose own forward pass differs from its recording."""


def check_own_run(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the axes of a changed network after comparing its own forward pass with its recording.

    Where that cannot be done, the result says so (``unproven``).

    Args:
        model: The changed network; its state is restored.
        axes: Its axes.

    Raises:
        NotAsRecordedError: If it does not run, or computes something else.
    """
    if is_numberless(model, axes):
        return replace(axes, unproven="the network or its example has no numbers")
    example = cast_example(axes.example, model)
    try:
        if axes.decisions is not None:
            recorded = capture(model, example, ())
        elif axes.recording is not None:
            recorded = axes.recording.capture
        else:
            return axes  # declared axes: the network itself was run
        problem = compare_with_recording(model, recorded, example)
    except TraceError as error:
        raise NotAsRecordedError(f"the plan cannot be carried out: {error}") from error
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise NotAsRecordedError(f"the plan cannot be carried out: the network does not run: {line:.200}") from error
    if problem:
        raise NotAsRecordedError(
            f"the plan cannot be carried out: {problem}; leave the axes of that module out of the plan"
        )
    return replace(axes, unproven="")


def is_numberless(model: nn.Module, axes: AxisGraph) -> bool:
    """Whether a network or its example has tensors without numbers.

    Args:
        model: The network.
        axes: Its axes.
    """
    inputs = (x for x in tree_leaves((axes.example.args, dict(axes.example.kwargs))) if isinstance(x, Tensor))
    return any(x.is_meta or isinstance(x, FakeTensor) for x in (*model.parameters(), *inputs))
