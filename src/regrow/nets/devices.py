"""The device on which a network runs, and the precision of its forward passes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from regrow.core.errors import InputError, ResourceError
from regrow.core.sources import device_of
from regrow.distributed import SINGLE, ProcessRank, choose_rank_device
from regrow.settings.shared import PRECISION


def choose_device(name: str | torch.device, ranks: ProcessRank = SINGLE) -> torch.device:
    """Return the torch device of a name; ``auto``: a CUDA GPU if there is one, else the CPU.

    Each of several processes (``ranks``) gets a GPU of its own, as ``regrow.distributed.choose_rank_device`` does it.
    Raises InputError for an unknown name, ResourceError for a device that this machine does not have.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    names = list_devices()
    name = choose_rank_device(str(name), ranks, torch.cuda.device_count())
    if name == "auto":
        return torch.device("cuda" if "cuda:0" in names else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise InputError(f"there is no device {str(name)!r}; write auto, cpu, cuda, cuda:1 or mps") from None
    same_type = [other for other in names if other.partition(":")[0] == device.type]
    if (device.index or 0) >= len(same_type):
        raise ResourceError(f"device {name} is not available; this machine has {', '.join(names)}; use --device cpu")
    return device


def list_devices() -> list[str]:
    """Return the names of the devices of this machine that models can run on, like ``cpu`` and ``cuda:0``."""
    result = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    result += ["mps"] if torch.backends.mps.is_available() else []
    return result + [f"xpu:{i}" for i in range(torch.xpu.device_count())]


def check_precision(model: nn.Module, precision: str) -> None:
    """Raise InputError unless a network can compute in ``"float32"`` (any) or ``"bfloat16"`` (with float32 weights)."""
    if precision not in PRECISION.choices:
        raise InputError(f"precision must be one of {', '.join(PRECISION.choices)}, got {precision!r:.40}")
    if precision == "float32":
        return
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.float32 not in dtypes:
        stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "no numbers"
        problem = f"precision {precision} computes weights of float32 in {precision}, and these are {stored}"
        raise InputError(f"{problem}; leave it out, or load them with --dtype float32")


def choose_precision(model: nn.Module) -> str:
    """Return ``"bfloat16"`` for weights of float32 on a processor that multiplies in it, else ``"float32"``."""
    is_fast = device_of(model).type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if is_fast and {p.dtype for p in model.parameters()} == {torch.float32} else "float32"


@contextmanager
def autocasting(model: nn.Module, precision: str) -> Iterator[None]:
    """Context manager in which a network computes its forward passes in a precision; outputs are float32 again.

    Only what runs inside a call of the network is computed so: weights keep their format, and losses, sums and
    optimizers theirs. Raises InputError as :func:`check_precision` does.

    >>> net = nn.Linear(2, 2)
    >>> with torch.no_grad(), autocasting(net, "bfloat16"):
    ...     net.weight.fill_(1 / 3)[0, 0].item() == net(torch.eye(2))[0, 0].item(), net(torch.eye(2)).dtype
    (False, torch.float32)
    """
    check_precision(model, precision)
    if precision == "float32":
        yield
        return
    local = threading.local()  # batches of a recovery run in threads, each of which leaves what it has entered

    def entered() -> list[torch.autocast]:
        local.entered = getattr(local, "entered", [])
        return cast(list[torch.autocast], local.entered)

    def enter(module: nn.Module, args: Any) -> None:
        # No cache of cast weights: a recovery changes them within a pass.
        entered().append(torch.autocast(device_of(model).type, torch.bfloat16, cache_enabled=False))
        entered()[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        entered().pop().__exit__(None, None, None)
        return tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, output)

    # Gradients for scores run the model below the head of a transformers model by itself.
    called = {part for part in (model, getattr(model, "base_model", None)) if isinstance(part, nn.Module)}
    hooks = [part.register_forward_pre_hook(enter) for part in called]
    hooks += [part.register_forward_hook(leave, always_call=True) for part in called]
    try:
        yield
    finally:
        while entered():  # an interrupt runs no hooks
            entered().pop().__exit__(None, None, None)
        for hook in hooks:
            hook.remove()
