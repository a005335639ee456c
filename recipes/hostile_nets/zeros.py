"""Masking by zeros, for networks that do not say where they read: every entry that a copy lost is 0 in the whole one.

That stands for a dropped unit wherever its value is summed, for what makes it, shifts it and reads it is 0. Norms that
are taken again over what is kept are run so, found by the gain that they are given. A softmax over units, or their
maximum, knows no such zero: those axes are left whole.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hostile_nets.masking import tensors_of

NOT_BY_ZEROS = ("competed",)
"""Marks of axes that zeros do not mask."""


def zero(model: nn.Module, kept: Mapping[str, Tensor]) -> "KeptNorms":
    """Write zeros into a network.

    Args:
        model: The network; changed in place.
        kept: ``"tensor:dim"`` → which entries are kept.

    Returns:
        In what it must run.
    """
    state = tensors_of(model)
    gains: dict[int, Tensor] = {}
    with torch.no_grad():
        for place, mask in kept.items():
            name, _, dim = place.rpartition(":")
            state[name].index_fill_(int(dim), (~mask).nonzero().flatten(), 0)
            if state[name].dim() == 1:
                gains[id(state[name])] = mask
    return KeptNorms(gains)


class KeptNorms(TorchFunctionMode):
    """Runs layer and group norms over the kept entries of their gain; the others are 0."""

    def __init__(self, gains: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.gains = gains

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call, or the norm over what is kept."""
        kwargs = kwargs or {}
        rule: Callable[..., Tensor] | None = _NORMS.get(func)
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if rule is None or id(weight) not in self.gains:
            return func(*args, **kwargs)
        return rule(self.gains[id(weight)], *args, **kwargs)


def _layer_norm(kept: Tensor, x: Tensor, shape: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Tensor:
    places = kept.nonzero().flatten()
    part = F.layer_norm(x[..., kept], (len(places),), weight[kept], None if bias is None else bias[kept], eps)
    return torch.zeros_like(x).index_copy(-1, places, part)


def _group_norm(
    kept: Tensor, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    out = torch.zeros_like(x)
    for rows in torch.arange(len(kept)).view(groups, -1):
        places = rows[kept[rows]]
        if len(places):
            part = F.group_norm(x[:, places], 1, weight[places], None if bias is None else bias[places], eps)
            out = out.index_copy(1, places, part)
    return out


_NORMS = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
