"""Compare a recording with the network's own forward pass: what is recorded must be what runs.

A recording is made on fake tensors, in export mode, and the operations of repeated modules may be copied. Code that
asks for any of this, or for state that nobody compares, runs otherwise when users run it.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from regrow.core.axes import Example
from regrow.tracing.capture import Capture, evaluating, quiet
from regrow.tracing.effects import Effects
from regrow.tracing.meta_copy import leaves_in, map_tensors
from regrow.tracing.model_state import describe_state, output_tensors, preserve_state, state_of
from regrow.tracing.nodes import op_name, writes


@contextmanager
def made_in_double(double: bool) -> Iterator[None]:
    """Context manager in which torch's default dtype is float64, if ``double``, so that new tensors are too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class CastsToDouble(TorchFunctionMode):
    """Torch function mode that turns every cast to a shorter float into one to float64, and operands if asked to."""

    def __init__(self, operands: bool = False) -> None:
        super().__init__()
        self.change = _widen if operands else widen_dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self.change, (args, kwargs or {}))
        return _EXACT.get(func, func)(*args, **kwargs)


T = TypeVar("T")


def widen_dtype(value: T) -> T | torch.dtype:
    """Return float64 for a shorter floating-point dtype; any other argument of an operation unchanged."""
    short = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if short else value


def as_double(value: T) -> T | Tensor:
    """Return a floating-point tensor in float64; any other value unchanged."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _widen(value: Any) -> Any:
    return as_double(widen_dtype(value))


def grouped_product(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute torch's grouped matrix product of experts in float64, for which torch has no kernel."""
    if bias is not None or offs is None or (x.dim(), weight.dim()) != (2, 3):
        raise NotImplementedError(
            "in float64 a grouped matrix product takes rows of experts and no bias; add it behind"
        )
    ends = offs.tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    products = [x[part] @ matrix for part, matrix in zip(parts, weight, strict=True)]
    return torch.cat([*products, x.new_zeros(len(x) - (ends[-1] if ends else 0), weight.shape[-1])])


_EXACT: Mapping[object, Callable[..., Tensor]] = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double),
    **dict.fromkeys(
        (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)), grouped_product
    ),
}


BOUND = 1e-9
"""The largest float64 difference allowed, relative to the largest output."""

ROUNDING = 64
"""The largest difference that counts as rounding, in units in the last place of the largest output."""


class DeviationError(RuntimeError):
    """Raised for a network whose own forward pass differs from its recording."""


def compare_with_recording(model: nn.Module, recorded: Capture, example: Example) -> str:
    """Run a network itself, and its recording; return why their outputs cannot be compared; empty if they are equal.

    Both run without gradients in evaluation mode, with the same random numbers. Outputs that are not equal bit for bit
    may differ by three times the rounding of the recording, and not in float64. In float64 one tensor at a time is in
    memory. The network's state is restored.
    """
    written = Effects(recorded).writers if any(map(writes, recorded.graph.nodes)) else {}
    with _preserve_parameters(model, [recorded.states[node] for node in written if node in recorded.states]):
        before = describe_state(model)
        with preserve_state(model, entries=True):
            outputs = _run(model, example)
            caches = describe_state(model) != before
        if not caches:
            return _compare(model, recorded, example, written, outputs)
        with preserve_state(model, entries=True):
            _run(model, example)  # the second run is what is recorded, and what this one cached stays for it
            return _compare(model, recorded, example, written, run_network(model, example))


def _compare(
    model: nn.Module, recorded: Capture, example: Example, written: Container[Node], outputs: list[Tensor]
) -> str:
    if recorded.decisions is not None:
        # Other kernels may have run under the recorder, and in float64 another decision could be taken.
        outputs, replayed = [x for x in outputs if x.is_floating_point()], [*recorded.values]
        distance, largest = measure_distance(outputs, replayed[: len(outputs)])
        if distance <= max((ROUNDING * torch.finfo(x.dtype).eps for x in outputs), default=0.0) * largest:
            return ""
        again = [x for x in run_network(model, example) if x.is_floating_point()]
    else:
        replayed = _replay(model, recorded, example, written)
        distance, largest = measure_distance(outputs, replayed)
        if not distance:
            return ""
        exact = _replay(model, recorded, example, written, double=True)
        rounding, _ = measure_distance([x.double() for x in replayed], [x.double() for x in exact])
        if distance <= max(3 * rounding, BOUND * largest):
            distance, largest = measure_distance(run_network(model, example, double=True), exact)
            if distance <= BOUND * largest:
                return ""
        again = run_network(model, example)
    if measure_distance(outputs, again)[0]:
        return "the network gives other outputs when it runs again"
    raise DeviationError(f"its outputs differ by {distance:.1e} of {largest:.1e} from what was recorded")


def run_network(model: nn.Module, example: Example, double: bool = False) -> list[Tensor]:
    """Return the tensors in the output of a network's own forward pass, in evaluation mode; its state is restored."""
    with preserve_state(model, entries=True):
        return _run(model, example, double)


def _run(model: nn.Module, example: Example, double: bool = False) -> list[Tensor]:
    """As :func:`run_network`, but what the run changes stays."""
    inputs = map_tensors(example, lambda x: (as_double(x) if double else x).detach().clone())
    with _same_numbers(), evaluating(model), quiet(), torch.no_grad():
        with made_in_double(double), CastsToDouble(operands=True) if double else nullcontext():
            result = model(*inputs.args, **inputs.kwargs)
        return [x.detach().clone() for x in output_tensors(result)]


def _replay(
    model: nn.Module, recorded: Capture, example: Example, written: Container[Node], double: bool = False
) -> list[Tensor]:
    """Return the tensors in the output of a recording, run with a network's parameters and buffers.

    What the recording writes into is copied.
    """
    state = state_of(model)
    values: dict[Node, object] = {node: state[name].detach() for node, name in recorded.states.items()}
    values |= recorded.constants | dict(zip(recorded.inputs, leaves_in(example), strict=True))
    for node, value in values.items():
        if node in written and isinstance(value, Tensor):
            values[node] = value.clone()
    placeholders = [values[node] for node in recorded.graph.nodes if node.op == "placeholder"]
    with _same_numbers(), torch.no_grad(), made_in_double(double):
        return [*_Replay(recorded, double).run(*placeholders)]


@contextmanager
def _preserve_parameters(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Context manager that restores parameters and buffers that operations write into, bit for bit."""
    state = state_of(model)
    saved = [(state[name], state[name].detach().clone()) for name in names]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in saved:
                tensor.detach().copy_(old)


class _Replay(Interpreter):
    """Interpreter of a recording; runs in float64 if ``double``, with one cast operand of an operation at a time."""

    def __init__(self, recorded: Capture, double: bool) -> None:
        super().__init__(recorded.root, garbage_collect_values=True, graph=recorded.graph)
        self.double = double

    def run_node(self, n: Node) -> Any:
        if self.double and op_name(n).startswith("_assert"):
            return None  # it asserts the precision that was recorded
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.double:
            args, kwargs = tree_map(_widen, (args, dict(kwargs)))
        return target(*args, **kwargs)


@contextmanager
def _same_numbers() -> Iterator[None]:
    """Context manager in which torch draws the same random numbers each time."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def measure_distance(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest difference of two networks' outputs (infinite if shapes or integers differ), and output."""
    distance, largest = 0.0, 0.0
    if len(outputs) != len(others):
        return float("inf"), largest
    for x, y in zip(outputs, others, strict=True):
        real = x.is_floating_point() or x.is_complex()
        if x.shape != y.shape or not (real or torch.equal(x, y)):
            return float("inf"), largest
        if x.numel() and real:
            gap = (x - y).abs().masked_fill((x == y) | ((x != x) & (y != y)), 0.0)
            distance = max(distance, float(gap.masked_fill(gap != gap, float("inf")).max()))
            largest = max(largest, float(x.abs().masked_fill(~x.isfinite(), 0.0).max()))
    return distance, largest
