"""Size and speed of a network; and what every measurement needs: eval mode, no collection, a device that is done."""

import gc
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import size_of
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, device_of
from regrow.core.tasks import first_tensor, run_network
from regrow.evaluation.memory import peak_meter
from regrow.tracing.capture import keep_modes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put the model in eval mode without gradients for the block; every module's mode is restored."""
    with keep_modes(model), torch.no_grad():
        model.eval()
        yield device_of(model)


@dataclass(frozen=True)
class Size:
    """The size of a network in parameters and bytes.

    Args:
        parameters: All its parameters; tied ones once.
        counted: Those of the named weights alone; tied ones once.
        bytes: The bytes of its state on disk with every floating-point tensor in ``dtype``; tied ones once.
        dtype: The dtype of ``bytes``, so that sizes of different models can be compared.
    """

    parameters: int
    counted: int
    bytes: int
    dtype: str

    def record(self) -> dict[str, object]:
        """Return the sizes as JSON-able data."""
        return asdict(self)


def size(model: nn.Module, counted: Iterable[str] = (), dtype: torch.dtype = torch.float32) -> Size:
    """Count the parameters and bytes of a network.

    >>> size(nn.Linear(3, 2), counted=["weight"], dtype=torch.bfloat16)
    Size(parameters=8, counted=6, bytes=16, dtype='bfloat16')

    Args:
        model: The network.
        counted: Names of parameters that are also counted separately (``AxisGraph.counted``).
        dtype: The dtype in which floating-point tensors would be stored. A quantised file is smaller than any of these.

    Raises:
        KeyError: If a counted name is not a parameter of the model.
    """
    every, stored = dict(model.named_parameters(remove_duplicate=False)), _stored(model)
    names = tuple(counted)
    if missing := [name for name in names if name not in every]:
        raise KeyError(f"the model has no parameter {missing[0]!r}")
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        counted=sum(p.numel() for p in _distinct(every[name] for name in names)),
        bytes=sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in stored),
        dtype=str(dtype).removeprefix("torch."),
    )


def macs(axes: AxisGraph) -> int:
    """Return the multiply–accumulates of one example: the sum over contractions of the product of their dimensions.

    Kernels are taken as dense: a weight that is 0 costs as much as any other.
    """
    sizes = axes.sizes()
    return sum(prod(size_of(dim, sizes) for dim in work.dims) for work in axes.work_per_example())


def dense(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Count parameters, non-zero parameters, multiply–accumulates per example, and bytes of a network as it is.

    >>> dense(nn.Linear(3, 2), torch.ones(5, 3))
    {'parameters': 8, 'nonzero': 8, 'macs': 6, 'bytes': 32}

    Args:
        model: The network.
        inputs: Examples, ``[N, …]``, or several such tensors in a tuple or by name; multiply–accumulates are counted
            for one.

    Returns:
        ``parameters``: stored entries, tied ones once; ``nonzero``: those that are not 0; ``macs`` of dense kernels;
        ``bytes`` of the tensors of its state, each in its own dtype.
    """
    weights = list(model.parameters())
    counter = FlopCounterMode(display=False)
    with evaluating(model) as device, counter:
        run_network(model, inputs, device)
    return {
        "parameters": sum(p.numel() for p in weights),
        "nonzero": sum(int(p.count_nonzero()) for p in weights),
        "macs": counter.get_total_flops() // 2 // len(first_tensor(inputs)),
        "bytes": sum(t.numel() * t.element_size() for t in _stored(model)),
    }


def _distinct(tensors: Iterable[object]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor)}.values())


def _stored(model: nn.Module) -> list[Tensor]:
    return _distinct(model.state_dict(keep_vars=True).values())


@dataclass(frozen=True)
class Speed:
    """The measured times of one model's forward passes.

    Args:
        model: The model's name.
        seconds: Per repeat, the seconds of one call.
        positions: The tokens (or images) per call.
        peak_bytes: Per repeat, the bytes of the weights plus the peak that a call needed on top; empty if it cannot be
            measured.
    """

    model: str
    seconds: tuple[float, ...]
    positions: int
    peak_bytes: tuple[int, ...] = ()

    @property
    def fastest(self) -> float:
        """The least seconds: the speed of the machine without disturbance."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median of the seconds: the typical latency of a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The lower and upper quartile of the seconds."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def per_second(self) -> float:
        """Positions (tokens or images) per second at the median.

        >>> Speed("a", (0.5, 2.0, 0.5), 100).per_second
        200.0
        """
        return self.positions / self.median

    def record(self) -> dict[str, object]:
        """Return the times as JSON-able data."""
        return {
            "model": self.model,
            "positions": self.positions,
            "seconds": list(self.seconds),
            "seconds_min": self.fastest,
            "seconds_median": self.median,
            "seconds_quartiles": list(self.spread),
            "per_second": self.per_second,
            "per_second_best": self.positions / self.fastest,
            "peak_bytes_min": min(self.peak_bytes, default=None),
            "peak_bytes_max": max(self.peak_bytes, default=None),
        }


def speed(
    model: nn.Module, batch: Batch, *, name: str = "model", repeats: int = 7, progress: Progress = silent
) -> Speed:
    """Time a forward pass of a model (for a language model: prefill), after a call that is not timed.

    Args:
        model: The model, on its device.
        batch: The inputs of the pass. A batch of one token measures the latency of a single position.
        name: What the result calls the model.
        repeats: Timed calls.
        progress: Called with (calls done, calls in all, description).

    Raises:
        ValueError: If ``repeats`` is not at least 1.
    """
    if repeats < 1:
        raise ValueError(f"speed needs at least 1 repeat; got {repeats}")
    seconds, peaks = list[float](), list[int]()
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    for turn in range(1 + repeats):
        with evaluating(model) as device, pause_collection():
            inputs, peak = batch.to(device), peak_meter(device)
            wait_for(device)
            begin = time.perf_counter()
            inputs.run(model)
            wait_for(device)
            taken, extra = time.perf_counter() - begin, peak()
        if turn:
            seconds.append(taken)
            peaks += [] if extra is None else [extra + weights]
        progress(turn + 1, 1 + repeats, "speed")
    return Speed(name, tuple(seconds), count_positions(batch), tuple(peaks))


@contextmanager
def pause_collection() -> Iterator[None]:
    """Disable garbage collection in the block, so that it does not fall into a timed call."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def count_positions(batch: Batch) -> int:
    """Return how many tokens, or images, a batch holds."""
    first = next((value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor)), None)
    if first is None:
        return 1
    # Whole numbers are tokens, [batch, tokens]; anything else is a batch of pictures.
    return first.shape[0] if first.is_floating_point() or first.dim() == 0 else first.numel()
