"""Cut and widen single tensors: select the kept entries, and initialise the new ones."""

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regrow.core.axes import Role
from regrow.surgery.layout import Layout

Roles = Mapping[int, frozenset[Role]]
"""Dimension of a tensor → its roles in the axes that change there."""


def resize(
    name: str, tensor: Tensor, lays: Mapping[int, Layout], roles: Roles, seed: int = 0, exact: bool = False
) -> Tensor:
    """Return a tensor after a plan, cut and widened, in storage of its own.

    New entries that scale or shift units copy those of a kept unit. Those that make or consume units are drawn at
    random from the tensor's own values, unless they are copies. Weights that make new units are then multiplied by
    ``inward``, weights that consume them by ``outward``, so that the network's outputs do not change.
    """
    old = tensor.flatten()
    for dim, lay in lays.items():
        tensor = tensor.index_select(dim, lay.source.to(tensor.device))
    if exact and tensor.is_floating_point():
        tensor = tensor.double()
    own = {dim: roles.get(dim, frozenset()) for dim in lays}
    for dim in sorted(lays, key=lambda dim: Role.CONSUMES in own[dim]):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{dim}:{seed}".encode()))
        tensor = _filled(tensor, dim, lays[dim], own[dim], old, generator)
    return tensor


def _filled(
    tensor: Tensor, dim: int, lay: Layout, roles: frozenset[Role], old: Tensor, generator: torch.Generator
) -> Tensor:
    """Return a tensor with the new entries of one dimension initialised and scaled."""
    if not tensor.is_floating_point() or not bool(lay.is_new.any()):
        return tensor
    if bool(lay.drawn.any()) and roles & {Role.PRODUCES, Role.CONSUMES}:
        new = lay.drawn.nonzero().flatten().to(tensor.device)
        part = tensor.index_select(dim, new)
        if old.is_meta or bool(old.any()):
            drawn = old[torch.randint(len(old), part.shape, generator=generator).to(old.device)].to(part.dtype)
        else:  # a layer that starts at 0
            drawn = torch.randn(part.shape, generator=generator).to(part) * (part.shape[dim] / part.numel()) ** 0.5
        tensor = tensor.index_copy(dim, new, drawn).index_select(dim, lay.twin.to(tensor.device))
    factor = torch.ones(len(lay), dtype=torch.float64)
    factor = factor * lay.inward if roles & {Role.PRODUCES, Role.SHIFTS} else factor
    factor = factor * lay.outward if Role.CONSUMES in roles else factor
    if bool((factor == 1).all()):
        return tensor
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return tensor * factor.to(tensor).view(shape)


def resize_moment(tensor: Tensor, lays: Mapping[int, Layout], mean: bool) -> Tensor:
    """Return an optimiser's moment after a plan; kept entries are unchanged."""
    for dim, lay in lays.items():
        tensor = tensor.index_select(dim, lay.source.to(tensor.device))
        if not bool(lay.is_new.any()):
            continue
        new, old = (flags.nonzero().flatten().to(tensor.device) for flags in (lay.is_new, ~lay.is_new))
        part = tensor.index_select(dim, new)
        value = (
            tensor.index_select(dim, old).mean(dim, keepdim=True).expand_as(part) if mean else torch.zeros_like(part)
        )
        tensor = tensor.index_copy(dim, new, value)
    return tensor


def roles_of(slots: Sequence[tuple[str, int, Role]]) -> dict[str, dict[int, frozenset[Role]]]:
    """Return tensor name → dimension → all its roles."""
    result: dict[str, dict[int, frozenset[Role]]] = {}
    for name, dim, role in slots:
        own = result.setdefault(name, {})
        own[dim] = own.get(dim, frozenset()) | {role}
    return result
