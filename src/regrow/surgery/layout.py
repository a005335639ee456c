"""Layouts: for each entry of a dimension after a plan, its old index, whether it is new, and how it is initialised."""

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from regrow.core.axes import Axis, AxisGraph, Dim, Mark, Product, Role, Slot, Sum, axes_in, size_of
from regrow.core.axes.axis import AxisTensor, find_occurrences
from regrow.core.plan import Change, Plan


@dataclass(frozen=True)
class Layout:
    """The entries of a dimension (or the units of an axis) after a plan; every field is ``[entries]``.

    Args:
        source: The index of the entry before the plan, or of the entry that a new one copies.
        is_new: Whether it is new (bool).
        is_random: Whether it is new and randomly initialised instead of copied (bool).
        inward: The factor on weights that make the entry (float64).
        outward: The factor on weights that consume the entry (float64).
    """

    source: Tensor
    is_new: Tensor
    is_random: Tensor
    inward: Tensor
    outward: Tensor

    @classmethod
    def of(cls, source: Tensor) -> "Layout":
        """Return the layout in which old entries stay, in the given order, and none is new."""
        none = torch.zeros(len(source), dtype=torch.bool)
        ones = torch.ones(len(source), dtype=torch.float64)
        return cls(source, none, none, ones, ones)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def kept(self) -> Tensor:
        """The old indices of the entries that stay, in their order after the plan."""
        return self.source[~self.is_new]


def plan_layouts(axes: AxisGraph, plan: Plan) -> dict[str, dict[int, Layout]]:
    """Return tensor name → dimension → its layout after the plan, for every dimension that the plan changes."""
    sizes = axes.sizes()
    used = {key for dims in axes.shapes.values() for dim in dims for key in axes_in(dim)}
    units = {k: units_after(change, axes[k]) for k, change in plan.changes.items() if k in used and not change.idle}
    layouts = {name: lay_out_dims(dims, sizes, units) for name, dims in axes.shapes.items()}
    return {name: pieces for name, pieces in layouts.items() if pieces}


def lay_out_dims(dims: Sequence[Dim], sizes: Mapping[str, int], units: Mapping[str, Layout]) -> dict[int, Layout]:
    """Return dimension index → its layout after a plan, for those of ``dims`` that change.

    ``sizes``: of all axes before the plan; ``units``: axis key → the layout of its units, for axes that change.
    """
    moved = {i: dim for i, dim in enumerate(dims) if not units.keys().isdisjoint(axes_in(dim))}
    return {i: lay_out(dim, sizes, units) for i, dim in moved.items()}


def lay_out(dim: Dim, sizes: Mapping[str, int], units: Mapping[str, Layout]) -> Layout:
    """Return the layout of one dimension after a plan; arguments as in :func:`lay_out_dims`."""
    match dim:
        case int():
            return Layout.of(torch.arange(dim))
        case str():
            return units[dim] if dim in units else Layout.of(torch.arange(sizes[dim]))
        case Product(parts):
            whole = lay_out(parts[0], sizes, units)
            for part in parts[1:]:
                whole = _nest(whole, lay_out(part, sizes, units), size_of(part, sizes))
            return whole
        case Sum(parts):
            before, pieces = 0, []
            for part in parts:
                piece = lay_out(part, sizes, units)
                pieces.append(replace(piece, source=piece.source + before))
                before += size_of(part, sizes)
            return Layout(*(torch.cat([vars(piece)[name] for piece in pieces]) for name in vars(pieces[0])))


def _nest(outer: Layout, inner: Layout, size: int) -> Layout:
    """Return the layout of a product of two dimensions; ``size`` is that of the inner one before the plan."""

    def pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.repeat_interleave(len(inner)), b.repeat(len(outer))

    return Layout(
        torch.add(*pairs(outer.source * size, inner.source)),
        torch.logical_or(*pairs(outer.is_new, inner.is_new)),
        torch.logical_or(*pairs(outer.is_random, inner.is_random)),
        torch.mul(*pairs(outer.inward, inner.inward)),
        torch.mul(*pairs(outer.outward, inner.outward)),
    )


def units_after(change: Change, axis: Axis) -> Layout:
    """Return the layout of an axis's units after its change, in the order of their ids; new ones as its fill says.

    Restored units lie among the kept ones, and are new until their stored weights are written.
    """
    keep = torch.tensor(change.keep)
    added = len(change.restore) + change.grow
    if not added:
        return Layout.of(keep)
    units = _add_units(keep, added, change, axis)
    if not change.restore:
        return units
    order = torch.tensor(unit_ids_after(change, axis)).argsort()
    return Layout(*(part[order] for part in vars(units).values()))


def _add_units(keep: Tensor, added: int, change: Change, axis: Axis) -> Layout:
    """Return the layout of kept units and ``added`` new ones behind them, which change no output of the network."""
    kept, total = len(keep), len(keep) + added
    generator = torch.Generator().manual_seed((change.fill.seed + 65537 * axis.next_id) % 2**63)
    rounds = [torch.randperm(kept, generator=generator) for _ in range(-(-added // kept))]
    donors = torch.cat(rounds)[:added]  # every kept unit about equally often
    units = replace(Layout.of(torch.cat([keep, keep[donors]])), is_new=torch.arange(total) >= kept)
    if change.fill.rule == "split":
        # Unequal shares; with equal ones a unit and its copy would get equal gradients for ever.
        share = 0.5 + torch.rand(total, dtype=torch.float64, generator=generator)
        owner = torch.cat([torch.arange(kept), donors])
        sums = torch.zeros(kept, dtype=torch.float64).index_add(0, owner, share)
        return replace(units, outward=share / sums[owner])
    zeroed = torch.where(units.is_new, 0.0, units.outward)
    if axis.mark is Mark.FOLDED:  # a norm divides by the number of units: the units themselves must be 0
        return replace(units, is_random=units.is_new, inward=zeroed)
    return replace(units, is_random=units.is_new, outward=zeroed)


def unit_ids_after(change: Change, axis: Axis) -> list[int]:
    """Return the ids of an axis's units after its change, unsorted: those kept, those restored, then new ones."""
    kept = [axis.ids[unit] for unit in change.keep]
    return [*kept, *change.restore, *range(axis.next_id, axis.next_id + change.grow)]


def ids_after(axes: AxisGraph, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return axis key → the ids of its units after a plan, ascending."""
    changed = {key: tuple(sorted(unit_ids_after(change, axes[key]))) for key, change in plan.changes.items()}
    return {axis.key: changed.get(axis.key, axis.ids) for axis in axes}


def next_ids_after(axes: AxisGraph, plan: Plan) -> dict[str, int]:
    """Return axis key → the id that the next unit added after a plan gets."""
    grown = {key: change.grow for key, change in plan.changes.items()}
    return {axis.key: axis.next_id + grown.get(axis.key, 0) for axis in axes}


def slots_after(
    axis: Axis, axes: AxisGraph, layouts: Callable[[str], Mapping[int, Layout]], sizes: Mapping[str, int]
) -> tuple[Slot, ...]:
    """Return the slots of an axis after a plan, without those of which nothing is left.

    ``layouts``: tensor name → dimension → its layout, where it changes; ``sizes``: of all axes after the plan.
    """
    result: dict[Slot, None] = {}
    for slot in axis.slots:
        layout = layouts(slot.name).get(slot.dim)
        if layout is None:
            result[slot] = None
        elif axis.free:
            dim = axes.shapes[slot.name][slot.dim]
            result |= dict.fromkeys(slots_in(slot.name, slot.dim, slot.role, dim, axis.key, sizes))
        elif (moved := _move_frozen_slot(slot, layout, axis.size)) is not None:
            result[moved] = None
    return tuple(result)


def slots_in(name: str, index: int, role: Role, dim: Dim, key: str, sizes: Mapping[str, int]) -> Iterator[Slot]:
    """Yield a slot per place of axis ``key`` in dimension ``index`` of tensor ``name``, written ``dim`` in axes."""
    for loops, inner, offset in find_occurrences(dim, key, sizes):
        outer, stride = loops[0] if loops else (1, sizes[key] * inner)
        for turns in product(*(range(n) for n, _ in loops[1:])):
            before = sum(i * step for i, (_, step) in zip(turns, loops[1:], strict=True))
            yield Slot(name, index, outer, stride, inner, offset + before, role)


def _move_frozen_slot(slot: Slot, layout: Layout, size: int) -> Slot | None:
    """Return a slot of a frozen axis of ``size`` units, derived from its first unit's entries; ``None`` if cut."""
    first = torch.isin(layout.source, slot.positions(size)[0]).nonzero().flatten()
    if not len(first):
        return None
    gaps = (torch.diff(first) != 1).nonzero().flatten()
    width = int(gaps[0]) + 1 if len(gaps) else len(first)
    blocks = len(first) // width
    stride = int(first[width] - first[0]) if blocks > 1 else size * width
    return Slot(slot.name, slot.dim, blocks, stride, width, int(first[0]), slot.role)


# Dimension of a tensor → its roles in the axes that change there
Roles = Mapping[int, Collection[Role]]


def resize(
    name: str, tensor: Tensor, layouts: Mapping[int, Layout], roles: Roles, seed: int = 0, exact: bool = False
) -> Tensor:
    """Return a tensor after a plan, cut and widened, in new storage; ``exact``: in float64.

    New entries that scale or shift units copy those of a kept unit. Those that make or consume units are drawn at
    random from the tensor's own values, unless they are copies. Weights that make new units are then multiplied by
    ``inward``, weights that consume them by ``outward``, so that the network's outputs do not change.

    ``layouts``: changed dimension → its layout after the plan; ``name``, ``seed``: what random numbers depend on.
    """
    old = tensor.flatten()
    for dim, layout in layouts.items():
        tensor = tensor.index_select(dim, layout.source.to(tensor.device))
    if exact and tensor.is_floating_point():
        tensor = tensor.double()
    # Consuming dimensions come last: their factor, which may be 0, must also apply to what other dimensions draw.
    for dim in sorted(layouts, key=lambda dim: Role.CONSUMES in roles.get(dim, ())):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{dim}:{seed}".encode()))
        tensor = _fill(tensor, dim, layouts[dim], roles.get(dim, ()), old, generator)
    return tensor


def _fill(
    tensor: Tensor, dim: int, layout: Layout, roles: Collection[Role], old: Tensor, generator: torch.Generator
) -> Tensor:
    """Return a resized tensor with new entries along ``dim`` initialised and scaled; ``old``: values to draw from."""
    if not tensor.is_floating_point() or not bool(layout.is_new.any()):
        return tensor
    if bool(layout.is_random.any()) and (Role.PRODUCES in roles or Role.CONSUMES in roles):
        new = layout.is_random.nonzero().flatten().to(tensor.device)
        part = tensor.index_select(dim, new)
        if old.is_meta or bool(old.any()):  # meta tensors have no numbers to ask
            values = old[torch.randint(len(old), part.shape, generator=generator).to(old.device)].to(part.dtype)
        else:  # a layer that starts at 0
            values = torch.randn(part.shape, generator=generator, dtype=torch.float32).to(part)
            values = values * (part.shape[dim] / part.numel()) ** 0.5  # 1 / √(weights of a unit)
        tensor = tensor.index_copy(dim, new, values)
    factor = torch.ones(len(layout), dtype=torch.float64)
    factor = factor * layout.inward if Role.PRODUCES in roles or Role.SHIFTS in roles else factor
    factor = factor * layout.outward if Role.CONSUMES in roles else factor
    if bool((factor == 1).all()):
        return tensor
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return tensor * factor.to(tensor).view(shape)


def resize_moment(tensor: Tensor, layouts: Mapping[int, Layout], mean: bool) -> Tensor:
    """Return an optimizer's moment or a gradient after a plan; new entries are 0 or (``mean``) the kept ones' mean."""
    for dim, layout in layouts.items():
        tensor = tensor.index_select(dim, layout.source.to(tensor.device))
        if not bool(layout.is_new.any()):
            continue
        new, old = (flags.nonzero().flatten().to(tensor.device) for flags in (layout.is_new, ~layout.is_new))
        part = tensor.index_select(dim, new)
        kept = tensor.index_select(dim, old)
        value = kept.mean(dim, keepdim=True).expand_as(part) if mean else torch.zeros_like(part)
        tensor = tensor.index_copy(dim, new, value)
    return tensor


def resize_axis_tensor(tensor: AxisTensor, axes: AxisGraph, plan: Plan) -> AxisTensor:
    """Return an axis tensor after a plan, detached: kept entries keep their values, new ones are 0 (``False``)."""
    units = {key: units_after(change, axes[key]) for key, change in plan.changes.items() if not change.idle}
    layouts = lay_out_dims(tensor.dims, axes.sizes(), units)
    return AxisTensor(resize_moment(tensor.values.detach(), layouts, mean=False), tensor.dims, tensor.lr)
