"""Speed: seconds, tokens per second and peak memory of several models, measured in alternation."""

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, moved
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
    models: Mapping[str, nn.Module],
    batch: Batch,
    *,
    repeats: int = 7,
    warmup: int = 1,
    progress: Progress = silent,
) -> dict[str, Speed]:
    """Time one forward pass of each model on the same batch (for a language model: prefill).

    The models alternate, and each round begins with another one, so that a change in the machine's load affects all of
    them equally.

    Args:
        models: Name → model; each on its device.
        batch: The inputs of the pass. A batch of one token measures the latency of a single position.
        repeats: Timed calls per model.
        warmup: Untimed calls per model before.
        progress: Called with (calls done, calls in all, description).

    Returns:
        Name → speed, in the order of ``models``.

    Raises:
        ValueError: If there is no model, or ``repeats`` is not at least 1.
    """
    if not models or repeats < 1 or warmup < 0:
        raise ValueError(f"speed needs a model and at least 1 repeat; got {len(models)} models, {repeats} repeats")
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[int]] = {name: [] for name in names}
    total = (warmup + repeats) * len(names)
    for turn in range(warmup + repeats):
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            taken, peak = _one_call(models[name], batch)
            if turn >= warmup:
                seconds[name].append(taken)
                peaks[name] += [] if peak is None else [peak]
            progress(turn * len(names) + step + 1, total, "speed")
    positions = positions_of(batch)
    return {name: Speed(name, tuple(seconds[name]), positions, tuple(peaks[name])) for name in names}


def _one_call(model: nn.Module, batch: Batch) -> tuple[float, int | None]:
    with evaluating(model) as device:
        args, kwargs = moved(batch.args, device), moved(dict(batch.kwargs), device)
        # A collection during a timed call would be blamed on the model.
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            peak = peak_meter(device)
            waiting_for(device)
            begin = time.perf_counter()
            model(*args, **kwargs)
            waiting_for(device)
            taken = time.perf_counter() - begin
            extra = peak()
        finally:
            if enabled:
                gc.enable()
    return taken, None if extra is None else extra + _weight_bytes(model)


def waiting_for(device: torch.device) -> None:
    """Wait until a device has finished its work.

    Args:
        device: The device.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))


def positions_of(batch: Batch) -> int:
    """Return how many tokens, or images, a batch holds.

    Args:
        batch: The batch.
    """
    tensors = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor)]
    if not tensors:
        return 1
    first = tensors[0]
    # Whole numbers are tokens, [batch, tokens]; anything else is a batch of pictures.
    return first.shape[0] if first.is_floating_point() or first.dim() == 0 else first.numel()
