"""The size of a network: parameters, multiply–accumulates of dense kernels, and bytes at a stated dtype."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regrow.core.axes import AxisGraph
from regrow.core.dims import size_of
from regrow.core.tasks import first_tensor, run_network
from regrow.evaluation.forward import evaluating


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
    every = dict(model.named_parameters(remove_duplicate=False))
    names = tuple(counted)
    if missing := [name for name in names if name not in every]:
        raise KeyError(f"the model has no parameter {missing[0]!r}")
    stored = _distinct(model.state_dict(keep_vars=True).values())
    return Size(
        parameters=sum(p.numel() for p in _distinct(every.values())),
        counted=sum(p.numel() for p in _distinct(every[name] for name in names)),
        bytes=sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in stored),
        dtype=str(dtype).removeprefix("torch."),
    )


def macs(axes: AxisGraph) -> int:
    """Return the multiply–accumulates of one example: the sum over contractions of the product of their dimensions.

    Kernels are taken as dense: a weight that is 0 costs as much as any other.

    Args:
        axes: The network's axes.
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
    weights = _distinct(model.parameters())
    counter = FlopCounterMode(display=False)
    with evaluating(model) as device, counter:
        run_network(model, inputs, device)
    return {
        "parameters": sum(p.numel() for p in weights),
        "nonzero": sum(int(p.count_nonzero()) for p in weights),
        "macs": counter.get_total_flops() // 2 // len(first_tensor(inputs)),
        "bytes": sum(t.numel() * t.element_size() for t in _distinct(model.state_dict(keep_vars=True).values())),
    }


def _distinct(tensors: Iterable[object]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor)}.values())
