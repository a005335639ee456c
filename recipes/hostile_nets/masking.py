"""Masking by hand: what a network answers when dropped units count for nothing, by none of regrow's own means.

A network says in its own code where it sums or compares over units: ``read(h, -1, "up.weight:0")``. That is nothing in
an ordinary run. In a masked run, entries of the units that were dropped from that dimension of that tensor count as 0
there (or as −∞ before a softmax or a maximum). Which entries were dropped is read off a copy of the network whose
tensors hold their own positions, after the same plan: not from what tracing says of it.

Networks that do not say where they read are masked by zeros: every entry that a copy lost is 0 in the whole one. That
stands for a dropped unit wherever its value is summed, for what makes it, shifts it and reads it is 0. Norms that are
taken again over what is kept are run so, found by the gain that they are given. A softmax over units, or their maximum,
knows no such zero: those axes are left whole.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass
class Masks:
    """What is kept of each dimension of each tensor.

    Args:
        kept: ``"tensor:dim"`` → which entries are kept, only for dimensions that became smaller.
        read: The dimensions that the network read so far.
    """

    kept: Mapping[str, Tensor]
    read: set[str] = field(default_factory=set)


_active: list[Masks] = []


@contextmanager
def masked(masks: Masks) -> Iterator[None]:
    """Networks inside read dropped units as nothing."""
    _active.append(masks)
    try:
        yield
    finally:
        _active.pop()


def _kept(places: str) -> Tensor | None:
    """Which entries are kept of the first named dimension that became smaller; ``None`` in an ordinary run."""
    for place in places.split() if _active else ():
        _active[-1].read.add(place)
        if place in _active[-1].kept:
            return _active[-1].kept[place]
    return None


def read(x: Tensor, dim: int, places: str, fill: float = 0.0) -> Tensor:
    """Say that what follows sums or compares over this dimension, whose entries are those of a tensor's dimension.

    Args:
        x: What is read.
        dim: The dimension.
        places: ``"tensor:dim"``, or several of which any may have been cut.
        fill: What a dropped entry counts as.
    """
    kept = _kept(places)
    if kept is None:
        return x
    shape = [1] * x.dim()
    shape[dim] = len(kept)
    return torch.where(kept.view(shape), x, torch.full((), fill, dtype=x.dtype))


def layer_norm(norm: nn.LayerNorm, x: Tensor, places: str) -> Tensor:
    """A layer norm over the last dimension: over kept entries alone in a masked run."""
    kept = _kept(places)
    if kept is None:
        return norm(x)
    part = F.layer_norm(x[..., kept], (int(kept.sum()),), norm.weight[kept], norm.bias[kept], norm.eps)
    return torch.zeros_like(x).index_copy(-1, kept.nonzero().flatten(), part)


def kept_entries(make: Callable[[], nn.Module], cut: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """``"tensor:dim"`` → which entries are kept, for each dimension that a plan makes smaller.

    Numbers that a plan scales or shifts (gains of norms) are found out by cutting constants too.

    Args:
        make: Builds the network.
        cut: Carries out the plan.
    """
    before = tensors_of(make())
    after = _cut(make(), cut, lambda n: torch.arange(n))
    zeros = ones = None
    found: dict[str, Tensor] = {}
    for name, tensor in after.items():
        first = before[name]
        if tensor.shape == first.shape or not tensor.is_floating_point():
            continue
        flat = tensor.detach().double()
        if not torch.equal(flat, flat.round()):
            if zeros is None or ones is None:
                zeros, ones = (_cut(make(), cut, torch.zeros), _cut(make(), cut, torch.ones))
            flat = (flat - zeros[name]) / (ones[name] - zeros[name])
        for dim, (was, now) in enumerate(zip(first.shape, tensor.shape, strict=True)):
            if was != now:
                coordinates = (flat.round().long() // math.prod(first.shape[dim + 1 :])) % was
                row = coordinates.movedim(dim, 0).reshape(now, -1)
                found[f"{name}:{dim}"] = torch.isin(torch.arange(was), row[:, 0])
    return found


def _cut(model: nn.Module, cut: Callable[[nn.Module], nn.Module], fill: Callable[[int], Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(fill(tensor.numel()).to(tensor).view(tensor.shape))
    return tensors_of(cut(model))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def answers(value: Any) -> list[Tensor]:
    """The numbers that a network answers: those of tuples, lists, dictionaries and fields of objects, in order."""
    if isinstance(value, Tensor):
        if value.is_complex():
            return [torch.view_as_real(value)]
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [x for one in value.values() for x in answers(one)]
    if isinstance(value, list | tuple):
        return [x for one in value for x in answers(one)]
    return [x for one in vars(value).values() for x in answers(one)] if hasattr(value, "__dict__") else []


class Double(TorchFunctionMode):
    """Whoever asks for float32 gets float64: casts inside a network would hide what a cut does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call, with other precisions."""
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = tuple(map(_longer, args)), {key: _longer(value) for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _longer(value: Any) -> Any:
    short = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if short else value


# --- by zeros ---------------------------------------------------------------------------------------------------------

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
