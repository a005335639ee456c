"""From a model and an example to a graph of ATen operations, with the name of every tensor of the model's state."""

import copy
import gc
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from regrow.axes import Example


class TraceError(ValueError):
    """A network that cannot be traced, with what stood in the way."""


@dataclass(frozen=True)
class Capture:
    """The operations of one run.

    Args:
        program: What was recorded; its placeholders are parameters, buffers, constants and inputs.
        states: Placeholder → name of the parameter or buffer.
        unused: Names of parameters that no operation reads.
    """

    program: ExportedProgram
    states: dict[Node, str]
    unused: tuple[str, ...]

    @property
    def graph(self) -> Graph:
        """The operations in order."""
        return self.program.graph

    @property
    def constants(self) -> dict[Node, Tensor]:
        """Placeholder → its value, where that is neither state nor input."""
        lifted = self.program.graph_signature.inputs_to_lifted_tensor_constants
        return {n: self.program.constants[lifted[n.name]] for n in self.graph.nodes if n.name in lifted}


def example_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """The example as it will be run: a cache, where the model offers one, is left out (its units are not outputs)."""
    accepts = inspect.signature(model.forward).parameters
    extra = {} if "use_cache" not in accepts or "use_cache" in kwargs else {"use_cache": False}
    return Example(tuple(args), {**kwargs, **extra})


def capture(model: nn.Module, example: Example) -> Capture:
    """Run the model once on fake data and record what it does.

    Raises:
        TraceError: If ``torch.export`` refuses the model; says why.
    """
    try:
        with evaluating(model), torch.enable_grad(), _quiet(), _lightly():
            program = torch.export.export(model, example.args, dict(example.kwargs), strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(
            f"torch.export refuses {type(model).__name__}: {reason}. "
            "Check that the example input is what the model's forward takes"
        ) from error
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    states = {node: names[node.name] for node in program.graph.nodes if node.op == "placeholder" and node.name in names}
    parameters = set(signature.inputs_to_parameters.values())
    unused = tuple(name for node, name in states.items() if not node.users and name in parameters)
    return Capture(program, states, unused)


@contextmanager
def _quiet() -> Iterator[None]:
    """A refusal is reported by whoever asked; torch need not log it as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _lightly() -> Iterator[None]:
    """Have nobody note stack traces, or look for garbage among objects that all stay: a third of a recording's time."""
    config, name = torch.fx.config, "do_not_emit_stack_traces"
    before, collecting = getattr(config, name, False), gc.isenabled()
    setattr(config, name, True)
    gc.disable()
    try:
        yield
    finally:
        setattr(config, name, before)
        if collecting:
            gc.enable()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have the model in evaluation mode for a while; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def hollow(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, FakeTensorMode]:
    """A copy of the model's structure without its numbers, with other shapes where given. Costs no memory.

    Args:
        model: Left untouched.
        shapes: Name → new shape of the parameter or buffer.

    Returns:
        The copy, whose tensors are fake, and the mode in which it runs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    with mode:
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            if id(tensor) in memo and name not in shapes:
                continue
            fake = torch.empty(shapes.get(name, tuple(tensor.shape)), dtype=tensor.dtype, device=tensor.device)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo), mode


def faked(example: Example, mode: FakeTensorMode) -> Example:
    """The example as fake tensors of a mode."""

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    return Example(tree_map(fake, example.args), tree_map(fake, dict(example.kwargs)))


def fitting(example: Example, model: nn.Module) -> Example:
    """The example in the precision of the model, if all of the model is in one."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(kinds) != 1:
        return example
    (dtype,) = kinds

    def fit(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return Example(tree_map(fit, example.args), tree_map(fit, dict(example.kwargs)))


def module_of(node: Node) -> str:
    """The dotted path of the innermost module in whose forward a node was recorded."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def shape_of(node: Node) -> Any:
    """The shape of a node's value; a list of shapes for several values, ``None`` for what is no tensor."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(int(n) for n in value.shape)
    if isinstance(value, tuple | list):
        return [tuple(int(n) for n in v.shape) if isinstance(v, Tensor) else None for v in value]
    return None
