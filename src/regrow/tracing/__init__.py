"""Trace networks: find which tensor dimensions belong together (the axes) by running the network on an example."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.axes import AxisGraph, Example
from regrow.core.axes.operations import Tracer
from regrow.tracing.branches import candidate_branches, with_branches
from regrow.tracing.capture import (
    Capture,
    TraceError,
    capture,
    example_of,
    first_line,
    holds_numbers,
)
from regrow.tracing.graph import assemble
from regrow.tracing.interception import without_collection
from regrow.tracing.model_state import preserve_state
from regrow.tracing.other_sizes import freeze_by_size
from regrow.tracing.own_run import compare_with_recording
from regrow.tracing.readings import recording, trace_training
from regrow.tracing.rules import walk
from regrow.tracing.steps import caches, steps
from regrow.tracing.support import check_traceable, with_remedies
from regrow.tracing.trial import freeze_failing

__all__ = ["TraceError", "trace", "with_branches"]


def trace(model: nn.Module, *args: Any, examples: Sequence[Any] | None = None, **kwargs: Any) -> AxisGraph:
    """Run a network once on an example input and return its axes: the sets of dimensions that change together.

    The model is recorded on fake data, as ``torch.export`` does, or, where data decide which operations run, in one
    real run (its weights are not changed). Every dimension of every tensor gets an expression, and a few units of each
    axis are cut from a copy on trial: an axis whose cut network does not run as planned is frozen, with the reason. So
    is one whose cut does not run on an input of another batch size and length. Where the network has numbers, its own
    forward pass must give what the recording gives.

    Args:
        model: Any network that runs. It is traced in evaluation mode.
        *args: Positional inputs, as for ``model(...)``.
        examples: Inputs of other sizes, each a tensor, a tuple or a dict; none: a larger one is made.
        **kwargs: Inputs by name.

    Returns:
        The axes, with the shape of every tensor and the size of every contraction as products and sums of axes.

    Raises:
        TraceError: If the network cannot be recorded; the message says why.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(axis.key, axis.size) for axis in trace(net, torch.ones(1, 4)).free()]
    [('0.weight:0', 8)]
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes a torch.nn.Module, got a {type(model).__name__}; load it first (regrow.load)")
    check_traceable(model)
    if examples is not None and "examples" in inspect.signature(model.forward).parameters:
        kwargs, examples = {**kwargs, "examples": examples}, None  # an input of this network
    with preserve_state(model, entries=True), without_collection():
        try:
            others = []
            for other in examples or ():
                named = other if isinstance(other, Mapping) else {}
                positional = () if isinstance(other, Mapping) else other if isinstance(other, tuple) else (other,)
                others.append(example_of(model, positional, named))
            return with_remedies(model, _traced(model, example_of(model, args, kwargs), others))
        except TraceError as error:
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
                raise
            name = type(model).__name__
            raise TraceError(
                f"{name} does not run without a tensor among its inputs; give what its forward takes, for example "
                "trace(model, torch.ones(1, 3, 224, 224))"
            ) from error
        except Exception as error:
            problem = f"regrow failed on {type(model).__name__}: {type(error).__name__}: {first_line(error)}"
            raise TraceError(f"{problem}; please report this: it is a fault of regrow") from error


def _traced(model: nn.Module, example: Example, others: Sequence[Example]) -> AxisGraph:
    recorded, unproven = _recorded(model, example)
    w = walk(recorded)
    trained = trace_training(model, example, w)
    axes, names = assemble(model, w, example)
    axes = replace(axes, steps=steps(w, names), caches=caches(w, names), branches=candidate_branches(model))
    axes = replace(axes, recording=recording(model, w, names), unproven=unproven)
    for other in others:
        _compare(model, capture(model, other, tracer=axes.tracer), other)
    return freeze_by_size(model, freeze_failing(model, axes, trained), others)


def _recorded(model: nn.Module, example: Example) -> tuple[Capture, str]:
    """Return a recording that computes what the network itself does, or a reason why the two were not compared."""
    recorded = capture(model, example)
    if not holds_numbers(model, example):
        return recorded, "the network or its example has no numbers"
    try:
        return recorded, _compare(model, recorded, example)
    except TraceError:
        for tracer in (Tracer.FULL, Tracer.PLAIN) if recorded.tracer == Tracer.COPY else ():
            recorded = capture(model, example, tracer=tracer)
            with suppress(TraceError):
                return recorded, _compare(model, recorded, example)
        raise


def _compare(model: nn.Module, recorded: Capture, example: Example) -> str:
    """Raise TraceError unless the network's own forward pass gives what its recording does; return what is unproven."""
    name = type(model).__name__
    try:
        result = compare_with_recording(model, recorded, example)
    except Exception as error:
        raise TraceError(
            f"{name} does not run on the example input: {first_line(error)}. "
            "Give an input of the shape and type that its forward takes"
        ) from error
    if result.problem:
        raise TraceError(
            f"{name} does not run as it is recorded: {result.problem}; remove what its code asks of the mode (export, "
            "gradients, types of tensors) or of hidden state"
        )
    return result.unproven
