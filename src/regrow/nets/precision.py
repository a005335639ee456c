"""The precision of forward passes: that of the weights, or bfloat16 for matrix products and convolutions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from regrow.core.errors import InputError
from regrow.core.sources import device_of
from regrow.settings.shared import PRECISION


def check_precision(model: nn.Module, precision: str) -> None:
    """Raise InputError unless a network can compute in a precision.

    Args:
        model: The network.
        precision: ``"float32"``: as the weights are; ``"bfloat16"``: weights of float32, computed in bfloat16.

    Raises:
        InputError: If there is no such precision, or it would be ignored since the weights are not in float32.
    """
    if precision not in PRECISION.choices:
        raise InputError(f"precision must be one of {', '.join(PRECISION.choices)}, got {precision!r:.40}")
    if precision == "float32":
        return
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.float32 not in dtypes:
        stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "no numbers"
        raise InputError(
            f"precision {precision} computes weights of float32 in {precision}, and these are {stored}; leave it out, "
            "or load them with --dtype float32"
        )


@contextmanager
def autocasting(model: nn.Module, precision: str) -> Iterator[None]:
    """Compute the forward passes of a network in a precision inside the ``with`` block; its outputs are float32 again.

    Only what runs inside a call of the network is computed so: weights keep their format, and losses, sums and
    optimizers theirs.

    Args:
        model: The network, which has hooks inside the block.
        precision: As for :func:`check_precision`.

    Raises:
        InputError: As :func:`check_precision`.

    >>> net = nn.Linear(2, 2)
    >>> with torch.no_grad(), autocasting(net, "bfloat16"):
    ...     net.weight.fill_(1 / 3)[0, 0].item() == net(torch.eye(2))[0, 0].item(), net(torch.eye(2)).dtype
    (False, torch.float32)
    """
    check_precision(model, precision)
    if precision == "float32":
        yield
        return
    entered: list[torch.autocast] = []

    def enter(module: nn.Module, args: Any) -> None:
        # No cache of cast weights: a recovery changes them within a pass.
        entered.append(torch.autocast(device_of(model).type, torch.bfloat16, cache_enabled=False))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return tree_map_only(Tensor, lambda one: one.float() if one.dtype == torch.bfloat16 else one, output)

    called = {id(one): one for one in (model, getattr(model, "base_model", None)) if isinstance(one, nn.Module)}
    hooks = [one.register_forward_pre_hook(enter) for one in called.values()]
    hooks += [one.register_forward_hook(leave, always_call=True) for one in called.values()]
    try:
        yield
    finally:
        while entered:  # an interrupt runs no hooks
            entered.pop().__exit__(None, None, None)
        for hook in hooks:
            hook.remove()
