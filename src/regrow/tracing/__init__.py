"""Trace networks: find which tensor dimensions belong together (the axes) by running the network on an example."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_leaves

from regrow.core.axes import AxisGraph, Example
from regrow.core.axes.axis import to_example
from regrow.core.axes.operations import Tracer
from regrow.core.errors import first_line
from regrow.core.sources import Batch
from regrow.tracing.branches import list_candidates, with_branches
from regrow.tracing.capture import Capture, TraceError, capture, complete_example, holds_numbers
from regrow.tracing.graph import assemble
from regrow.tracing.interception import without_garbage_collection
from regrow.tracing.model_state import preserve_state
from regrow.tracing.other_sizes import freeze_by_size
from regrow.tracing.own_run import compare_with_recording
from regrow.tracing.readings import make_recording, trace_training
from regrow.tracing.rules import walk
from regrow.tracing.steps import find_caches, list_symbolic_steps
from regrow.tracing.trial import freeze_failing

__all__ = ["TraceError", "trace", "with_branches"]


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> AxisGraph:
    """Run a network once on an example input and return its axes: the sets of dimensions that change together.

    The model is recorded on fake data, as ``torch.export`` does, or, where data decide which operations run, in one
    real run (its weights are not changed). Every dimension of every tensor gets an expression, and a few units of each
    axis are cut from a copy on trial: an axis whose cut network does not run as planned is frozen, with the reason. So
    is one whose cut does not run on an input of another batch size and length. Where the network has numbers, its own
    forward pass must give what the recording gives.

    Args:
        model: Any network that runs. It is traced in evaluation mode.
        *args: Positional inputs, as for ``model(...)``; or a single dict of inputs by name, whose labels are left out
            unless the network takes them.
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
    _check_traceable(model)
    with preserve_state(model, entries=True), without_garbage_collection():
        try:
            return _trace(model, complete_example(model, *_read_call(model, args, kwargs)))
        except TraceError as error:
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
                raise
            raise TraceError(
                f"{type(model).__name__} does not run without a tensor among its inputs; give what its "
                "forward takes, for example trace(model, torch.ones(1, 3, 224, 224))"
            ) from error
        except Exception as error:
            problem = f"regrow failed on {type(model).__name__}: {type(error).__name__}: {first_line(error)}"
            raise TraceError(f"{problem}; please report this: it is a fault of regrow") from error


def _read_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Return positional and named inputs; a single dict or batch holds inputs by name if ``forward`` takes these."""
    if len(args) != 1 or kwargs or not isinstance(args[0], Mapping | Batch | Example):
        return args, kwargs
    example = to_example(args[0], model)
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*example.args, **example.kwargs)
    except TypeError:  # it takes the dict itself
        return args, kwargs
    takes_any = any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in signature.parameters.values())
    return (args, kwargs) if takes_any or not example.kwargs else (example.args, example.kwargs)


def _trace(model: nn.Module, example: Example) -> AxisGraph:
    """Return the axes of a network as :func:`trace` does, without the checks before and the errors for users."""
    recorded, unproven = _capture_and_compare(model, example)
    w = walk(recorded)
    trace_training(model, example, w)
    axes, names = assemble(model, w, example)
    axes = replace(axes, steps=list_symbolic_steps(w, names), caches=find_caches(w, names), unproven=unproven)
    axes = replace(axes, recording=make_recording(model, w, names), branches=list_candidates(model))
    return freeze_by_size(model, freeze_failing(model, axes))


def _capture_and_compare(model: nn.Module, example: Example) -> tuple[Capture, str]:
    """Return a recording, and why its outputs could not be compared with the network's; TraceError if they differ."""
    recorded = capture(model, example)
    if not holds_numbers(model, example):
        return recorded, "the network or its example has no numbers"
    try:
        return recorded, compare_with_recording(model, recorded, example)
    except Exception as error:
        if recorded.tracer == Tracer.RECORD:  # PLAIN neither is in export mode nor copies operations
            with suppress(Exception):
                recorded = capture(model, example, tracer=Tracer.PLAIN)
                return recorded, compare_with_recording(model, recorded, example)
        raise TraceError(
            f"{type(model).__name__} does not run as it is recorded: {first_line(error)}; give an input that its "
            "forward takes, and remove what its code asks of the mode (export, gradients, types of tensors) or of "
            "hidden state"
        ) from error


# Classes of torch whose modules cannot be traced; importing them would take longer than most traces.
_CLASSES = frozenset(
    ("ScriptModule", "ObserverBase", "FakeQuantizeBase", "DistributedDataParallel", "FullyShardedDataParallel")
)


def _check_traceable(model: nn.Module) -> None:
    """Raise :class:`TraceError` for a scripted, quantised or wrapped module, or a tensor of a class of its own."""
    for path, module in model.named_modules():
        if _is_converted(module):
            raise TraceError(
                f"{path or 'the model'} is a {type(module).__name__}: scripted, exported, quantised and wrapped "
                "modules cannot be cut; trace the plain module that it was made from, and convert it after the cut"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if problem := tensor_problem(tensor):
            raise TraceError(f"{name} {problem}")


def _is_converted(module: nn.Module) -> bool:
    """Whether a module is scripted, exported, quantised or wrapped for distributed training."""
    kind = type(module)
    return (
        any(base.__module__.startswith("torch.") and base.__name__ in _CLASSES for base in kind.__mro__)
        or kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        or (isinstance(module, GraphModule) and getattr(module.train, "__module__", "").startswith("torch.export"))
        or any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
    )


def tensor_problem(tensor: Tensor) -> str:
    """Return why a parameter or buffer cannot be cut, as a clause behind its name, with the remedy; empty if it can."""
    kind = type(tensor.data)
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "has no shape yet; run the model once on an example, then trace it"
    if kind not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor) or tensor.is_quantized:
        return (
            f"is no plain tensor (a {kind.__name__} of {tensor.dtype}); trace the float model, convert it after the cut"
        )
    return ""
