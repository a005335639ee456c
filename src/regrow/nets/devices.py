"""Choose the device on which a network runs, before anything is loaded."""

import torch

from regrow.core.errors import InputError, ResourceError
from regrow.distributed import SINGLE, ProcessRank, choose_rank_device


def choose_device(name: str | torch.device, ranks: ProcessRank = SINGLE) -> torch.device:
    """Return the torch device of a name, or raise an error if this machine does not have it.

    Of several processes that share a run, each gets a GPU of its own (``regrow.distributed.choose_rank_device``).

    >>> choose_device("cpu")
    device(type='cpu')

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` and so on; ``auto``: ``cuda`` if there is one, else
            ``cpu`` (parts of pruning and growing compute in float64, which ``mps`` does not have).
        ranks: The processes that share the run.

    Raises:
        InputError: If the name is not that of a device.
        ResourceError: If this machine, or this torch, does not have it; says which there are.
    """
    there = devices_here()
    name = choose_rank_device(str(name), ranks, torch.cuda.device_count())
    if name == "auto":
        return torch.device("cuda" if any(one.startswith("cuda") for one in there) else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise InputError(f"there is no device {str(name)!r}; write auto, cpu, cuda, cuda:1 or mps") from None
    kind = device.type
    if kind not in {one.partition(":")[0] for one in there} or (device.index or 0) >= sum(
        one.partition(":")[0] == kind for one in there
    ):
        raise ResourceError(f"device {name} is not available; this machine has {', '.join(there)}; use --device cpu")
    return device


def devices_here() -> list[str]:
    """Return the names of the devices of this machine that models can run on, like ``cpu`` and ``cuda:0``."""
    result = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        result.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        result += [f"xpu:{i}" for i in range(torch.xpu.device_count())]
    return result
