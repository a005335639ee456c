"""Tracing: from a model and an example input to its axes."""

from dataclasses import replace
from typing import Any

from torch import nn

from regrow.axes import AxisGraph, Example
from regrow.tracing.branches import candidate_branches, with_branches
from regrow.tracing.caches import caches
from regrow.tracing.capture import TraceError, capture, example_of, first_line
from regrow.tracing.graph import assemble
from regrow.tracing.kinds import check_traceable, with_remedies
from regrow.tracing.model_state import preserve_state
from regrow.tracing.readings import recording
from regrow.tracing.rules import POINTWISE, RULES
from regrow.tracing.steps import steps
from regrow.tracing.training_trace import trace_training
from regrow.tracing.trial import freeze_failing
from regrow.tracing.walk import walk

__all__ = ["TraceError", "trace", "with_branches"]


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> AxisGraph:
    """The axes of a network, found by running it once on an example.

    The model is recorded on fake data, as ``torch.export`` does, or, where data decide what it does, in one real run
    (its weights are not touched). Every dimension of every tensor gets an expression, and one unit of each axis is cut
    on trial: an axis that the network does not survive as planned is frozen, with the reason.

    Args:
        model: Any network that runs. It is traced in evaluation mode.
        *args: Positional inputs, as for ``model(...)``.
        **kwargs: Inputs by name.

    Returns:
        The axes, with every tensor's shape and all work written in them.

    Raises:
        TraceError: If the network cannot be recorded; says what stood in the way.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(axis.key, axis.size) for axis in trace(net, torch.ones(1, 4)).free()]
    [('0.weight:0', 8)]
    """
    check_traceable(model)
    with preserve_state(model, entries=True):
        try:
            return with_remedies(model, _traced(model, example_of(model, args, kwargs)))
        except TraceError:
            raise
        except Exception as error:
            problem = f"regrow failed on {type(model).__name__}: {type(error).__name__}: {first_line(error)}"
            remedy = "name the axes yourself with regrow.declare, and please report this: it is a fault of regrow"
            raise TraceError(f"{problem}; {remedy}") from error


def _traced(model: nn.Module, example: Example) -> AxisGraph:
    recorded = capture(model, example)
    w = walk(recorded, RULES, POINTWISE)
    trace_training(model, example, w)
    axes, names = assemble(model, w, example)
    axes = replace(axes, steps=steps(w, names), caches=caches(w, names), branches=candidate_branches(model))
    return freeze_failing(model, replace(axes, recording=recording(w, names)))
