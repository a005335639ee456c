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
from regrow.tracing.capture import Capture, in_eval_mode, silence_torch
from regrow.tracing.effects import Effects
from regrow.tracing.meta_copy import leaves_in, map_tensors
from regrow.tracing.model_state import copy_tensor, describe_state, output_tensors, preserve_state, state_of
from regrow.tracing.nodes import op_name, writes_in_place


@contextmanager
def made_in_double(double: bool) -> Iterator[None]:
    """Context manager in which torch's default dtype is float64, if ``double``, so that new tensors are, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class CastsToDouble(TorchFunctionMode):
    """Torch function mode in which casts to shorter floats give float64; ``operands``: all operands are cast, too."""

    def __init__(self, operands: bool = False) -> None:
        super().__init__()
        self.change = _to_double if operands else widen_dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self.change, (args, kwargs or {}))
        return _EXACT.get(func, func)(*args, **kwargs)


T = TypeVar("T")


def widen_dtype(value: T) -> T | torch.dtype:
    """Return float64 for a shorter floating-point dtype; any other argument of an operation unchanged."""
    is_shorter = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if is_shorter else value


def as_double(value: T) -> T | Tensor:
    """Return a floating-point tensor in float64; any other value unchanged."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _to_double(value: Any) -> Any:
    """Return a floating-point tensor in float64, float64 for a shorter dtype, and any other value unchanged."""
    return as_double(widen_dtype(value))


def compute_grouped_product(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``torch._grouped_mm`` of rows and experts by single products, in any dtype; ``out_dtype`` is ignored.

    ``offs``: the end of each expert's rows. NotImplementedError without it, for a bias, or for other ranks.
    """
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
        (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)), compute_grouped_product
    ),
}


# The largest float64 difference allowed, relative to the largest output.
BOUND = 1e-9

# The largest difference that counts as rounding, in units in the last place of the largest output.
ROUNDING = 64


class DeviationError(RuntimeError):
    """Raised for a network whose own forward pass differs from its recording."""


def compare_with_recording(model: nn.Module, recorded: Capture, example: Example) -> str:
    """Run a network and its recording; return why their outputs cannot be compared, empty if they are equal.

    Both run without gradients in evaluation mode, with the same random numbers. Outputs that are not equal bit for bit
    may differ by three times the rounding of the recording, and not in float64. In float64 one tensor at a time is in
    memory. The network's state is restored. Raises :class:`DeviationError` where the outputs differ.
    """
    written = Effects(recorded).writers if any(map(writes_in_place, recorded.graph.nodes)) else {}
    with _preserve_tensors(model, [recorded.states[node] for node in written if node in recorded.states]):
        before = describe_state(model)
        with preserve_state(model, entries=True):
            outputs = _run_forward(model, example)
            caches = describe_state(model) != before
        if not caches:
            return _compare_outputs(model, recorded, example, written, outputs)
        with preserve_state(model, entries=True):
            _run_forward(model, example)  # the second run is what is recorded, and what this one cached stays for it
            return _compare_outputs(model, recorded, example, written, compute_outputs(model, example))


def _compare_outputs(
    model: nn.Module, recorded: Capture, example: Example, written: Container[Node], outputs: list[Tensor]
) -> str:
    """Compare ``outputs`` with those of a recording; return or raise as :func:`compare_with_recording`.

    ``written``: placeholders that the recording writes into, which are copied before it runs.
    """
    if recorded.decisions is not None:
        # Other kernels may have run under the recorder, and in float64 another decision could be taken.
        outputs, replayed = [x for x in outputs if x.is_floating_point()], [*recorded.values]
        distance, largest = measure_distance(outputs, replayed[: len(outputs)])
        rounding = max((ROUNDING * torch.finfo(x.dtype).eps for x in outputs), default=0.0)
        if distance <= rounding * largest:
            return ""
        again = [x for x in compute_outputs(model, example) if x.is_floating_point()]
    else:
        replayed = _replay_recording(model, recorded, example, written)
        distance, largest = measure_distance(outputs, replayed)
        if not distance:
            return ""
        exact = _replay_recording(model, recorded, example, written, double=True)
        rounding, _ = measure_distance([x.double() for x in replayed], [x.double() for x in exact])
        if distance <= max(3 * rounding, BOUND * largest):
            distance, largest = measure_distance(compute_outputs(model, example, double=True), exact)
            if distance <= BOUND * largest:
                return ""
        again = compute_outputs(model, example)
    if measure_distance(outputs, again)[0]:
        return "the network gives other outputs when it runs again"
    raise DeviationError(f"its outputs differ by {distance:.1e} of {largest:.1e} from what was recorded")


def compute_outputs(model: nn.Module, example: Example, double: bool = False) -> list[Tensor]:
    """Return copies of the tensors in a network's output, in evaluation mode; its state is restored."""
    with preserve_state(model, entries=True):
        return _run_forward(model, example, double)


def _run_forward(model: nn.Module, example: Example, double: bool = False) -> list[Tensor]:
    """Return what :func:`compute_outputs` returns; changes that the run makes to the network stay."""
    inputs = map_tensors(example, lambda x: copy_tensor(as_double(x) if double else x))
    with _same_random_numbers(), in_eval_mode(model), silence_torch(), torch.no_grad():
        with made_in_double(double), CastsToDouble(operands=True) if double else nullcontext():
            result = model(*inputs.args, **inputs.kwargs)
        return [copy_tensor(x) for x in output_tensors(result)]


def _replay_recording(
    model: nn.Module, recorded: Capture, example: Example, written: Container[Node], double: bool = False
) -> list[Tensor]:
    """Return the outputs of a recording, run with a network's state; placeholders in ``written`` are copied first."""
    state = state_of(model)
    values: dict[Node, object] = {node: state[name].detach() for node, name in recorded.states.items()}
    values |= recorded.constants | dict(zip(recorded.inputs, leaves_in(example), strict=True))
    for node, value in values.items():
        if node in written and isinstance(value, Tensor):
            values[node] = value.clone()
    placeholders = [values[node] for node in recorded.graph.nodes if node.op == "placeholder"]
    with _same_random_numbers(), torch.no_grad(), made_in_double(double):
        return [*_Replay(recorded, double).run(*placeholders)]


@contextmanager
def _preserve_tensors(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Context manager that restores the named parameters and buffers, bit for bit."""
    state = state_of(model)
    saved = [(state[name], copy_tensor(state[name])) for name in names]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in saved:
                tensor.detach().copy_(old)


class _Replay(Interpreter):
    """Interpreter of a recording; ``double``: it casts the operands of each operation to float64 when that runs."""

    def __init__(self, recorded: Capture, double: bool) -> None:
        super().__init__(recorded.root, garbage_collect_values=True, graph=recorded.graph)
        self.double = double

    def run_node(self, n: Node) -> Any:
        """Return the value of a node; in float64 ``None`` for an assertion."""
        if self.double and op_name(n).startswith("_assert"):
            return None  # it asserts the precision that was recorded
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation, in float64 if ``double``."""
        if self.double:
            args, kwargs = tree_map(_to_double, (args, dict(kwargs)))
        return target(*args, **kwargs)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Context manager that seeds torch's random generators with 0 and restores them afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def measure_distance(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest |difference| (infinite if shapes, integers or nans differ) and largest finite |output|."""
    distance, largest = 0.0, 0.0
    if len(outputs) != len(others):
        return float("inf"), largest
    for x, y in zip(outputs, others, strict=True):
        real = x.is_floating_point() or x.is_complex()
        if x.shape != y.shape or not (real or torch.equal(x, y)):
            return float("inf"), largest
        if x.numel() and real:
            gap = (x - y).abs().masked_fill((x == y) | (x.isnan() & y.isnan()), 0.0)  # equal infinities give nan
            distance = max(distance, float(gap.masked_fill(gap.isnan(), float("inf")).max()))
            largest = max(largest, float(x.abs().masked_fill(~x.isfinite(), 0.0).max()))
    return distance, largest
