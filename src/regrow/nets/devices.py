"""Devices by name, checked before anything is loaded."""

import torch

from regrow.errors import InputError, ResourceError


def usable_device(name: str) -> torch.device:
    """The device of a name, if this machine has it.

    >>> usable_device("cpu")
    device(type='cpu')

    Raises:
        InputError: If it is no name of a device.
        ResourceError: If this machine, or this torch, does not have it; says which there are.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise InputError(f"there is no device {name!r}; write cpu, cuda, cuda:1 or mps") from None
    there = devices_here()
    kind = device.type
    if kind not in {one.partition(":")[0] for one in there} or (device.index or 0) >= sum(
        one.partition(":")[0] == kind for one in there
    ):
        raise ResourceError(f"device {name} is not available; this machine has {', '.join(there)}; use --device cpu")
    return device


def devices_here() -> list[str]:
    """The devices that models can run on here, like ``cpu`` and ``cuda:0``."""
    result = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        result.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        result += [f"xpu:{i}" for i in range(torch.xpu.device_count())]
    return result
