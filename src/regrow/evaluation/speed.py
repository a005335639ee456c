"""Speed: seconds, tokens per second and peak memory of a model; and what every measurement of time needs."""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch
from regrow.evaluation.forward import evaluating
from regrow.evaluation.memory import peak_meter


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
            model(*inputs.args, **inputs.kwargs)
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
    tensors = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor)]
    if not tensors:
        return 1
    first = tensors[0]
    # Whole numbers are tokens, [batch, tokens]; anything else is a batch of pictures.
    return first.shape[0] if first.is_floating_point() or first.dim() == 0 else first.numel()
