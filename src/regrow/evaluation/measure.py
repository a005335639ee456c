"""Size and speed of a network; and what every measurement needs: eval mode, no collection, a device that is done."""

import gc
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from regrow.tracing.capture import keep_modes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Context manager: eval mode without gradients; yields the model's device, and restores every module's mode."""
    with keep_modes(model), torch.no_grad():
        model.eval()
        yield device_of(model)


def size(model: nn.Module, counted: Iterable[str] = (), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the number of parameters and bytes of a network; tied parameters count once.

    >>> size(nn.Linear(3, 2), counted=["weight"], dtype=torch.bfloat16)
    {'parameters': 8, 'counted': 6, 'bytes': 16, 'dtype': 'bfloat16'}

    Args:
        model: The network.
        counted: Names of parameters whose entries are also counted separately (``AxisGraph.counted``).
        dtype: The dtype in which floating-point tensors would be stored, so that the bytes of different models can be
            compared. A quantised file is smaller than any of these.

    Returns:
        ``parameters``: entries of all parameters; ``counted``: those of ``counted``; ``bytes`` of the tensors of the
        state dict in ``dtype``, integers as they are; the name of the ``dtype``.

    Raises:
        KeyError: If a counted name is not a parameter of the model.
    """
    every, stored = dict(model.named_parameters(remove_duplicate=False)), _state_tensors(model)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "counted": sum(p.numel() for p in _distinct_tensors(every[name] for name in counted)),
        "bytes": sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in stored),
        "dtype": str(dtype).removeprefix("torch."),
    }


def macs(axes: AxisGraph) -> int:
    """Return the multiply–accumulates of one example: the sum over contractions of the product of their dimensions.

    Kernels are taken as dense: a weight that is 0 costs as much as any other.
    """
    sizes = axes.sizes()
    return sum(prod(size_of(dim, sizes) for dim in work.dims) for work in axes.work_per_example())


def dense(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Return the parameters, non-zero parameters, multiply–accumulates per example, and bytes of a network as it is.

    The network is run once on the inputs, in eval mode, which is undone.

    >>> dense(nn.Linear(3, 2), torch.ones(5, 3))
    {'parameters': 8, 'nonzero': 8, 'macs': 6, 'bytes': 32}

    Args:
        model: The network.
        inputs: Examples, ``[N, …]``, or several such tensors in a tuple or by name; costs are those of one.

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
        "bytes": sum(t.numel() * t.element_size() for t in _state_tensors(model)),
    }


def _distinct_tensors(values: Iterable[object]) -> list[Tensor]:
    """Return the tensors among values, each object once."""
    return list({id(tensor): tensor for tensor in values if isinstance(tensor, Tensor)}.values())


def _state_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors of the model's ``state_dict``, tied ones once."""
    return _distinct_tensors(model.state_dict(keep_vars=True).values())


def speed(
    model: nn.Module, batch: Batch, *, name: str = "model", repeats: int = 7, progress: Progress = silent
) -> dict[str, Any]:
    """Time a forward pass of a model (for a language model: prefill), after a call that is not timed.

    Args:
        model: The model, on its device.
        batch: The inputs of the pass. A batch of one token measures the latency of a single position.
        name: What the result calls the model.
        repeats: Timed calls.
        progress: Called with (calls done, calls in all, description).

    Returns:
        ``seconds`` of each timed call and their ``seconds_median``; ``positions`` (tokens or images) per call, and
        ``per_second`` at the median; the ``model``'s name.

    Raises:
        ValueError: If ``repeats`` is not at least 1.
    """
    if repeats < 1:
        raise ValueError(f"speed needs at least 1 repeat; got {repeats}")
    seconds = list[float]()
    for turn in range(1 + repeats):
        with evaluating(model) as device, pause_collection():
            inputs = batch.to(device)
            wait_for(device)
            begin = time.perf_counter()
            inputs.run(model)
            wait_for(device)
            seconds.append(time.perf_counter() - begin)
        progress(turn + 1, 1 + repeats, "speed")
    median, positions = statistics.median(seconds[1:]), count_positions(batch)
    return {
        "model": name,
        "positions": positions,
        "seconds": seconds[1:],
        "seconds_median": median,
        "per_second": positions / median,
    }


@contextmanager
def pause_collection() -> Iterator[None]:
    """Context manager: collects garbage, then disables automatic collection, so that none falls into a timed call."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished the work that was queued on it; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def count_positions(batch: Batch) -> int:
    """Return the number of tokens (integer ids) or images (floats) in the first tensor of a batch; 1 without one."""
    first = next((value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor)), None)
    if first is None or first.dim() == 0:
        return 1
    return len(first) if first.is_floating_point() else first.numel()
