"""Layouts: for each entry of a dimension after a plan, its old index, whether it is new, and how it is initialised."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product

import torch
from torch import Tensor

from regrow.core.axes import Axis, AxisGraph, Dim, Mark, Product, Slot, Sum, axes_in, size_of
from regrow.core.dims import occurrences
from regrow.core.fills import FILLS, Growth
from regrow.core.plan import Change, Plan


@dataclass(frozen=True)
class Layout:
    """The entries of a dimension (or the units of an axis) after a plan; every field is ``[entries]``.

    Args:
        source: The index of the entry before the plan, or of the entry that a new one copies.
        is_new: Whether it is new (bool).
        drawn: Whether it is new and randomly initialised instead of copied (bool).
        twin: The index of the new entry whose random values it shares; mostly its own.
        inward: The factor on weights that make the entry (float64).
        outward: The factor on weights that consume the entry (float64).
    """

    source: Tensor
    is_new: Tensor
    drawn: Tensor
    twin: Tensor
    inward: Tensor
    outward: Tensor

    @classmethod
    def of(cls, source: Tensor) -> "Layout":
        """Return the layout in which old entries stay, in the given order, and none is new."""
        no = torch.zeros(len(source), dtype=torch.bool)
        one = torch.ones(len(source), dtype=torch.float64)
        return cls(source, no, no, torch.arange(len(source)), one, one)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def kept(self) -> Tensor:
        """The old indices of the entries that stay, in their order after the plan."""
        return self.source[~self.is_new]


def plan_layouts(axes: AxisGraph, plan: Plan) -> dict[str, dict[int, Layout]]:
    """Return tensor name → dimension → its layout after the plan, for every dimension that the plan changes."""
    sizes = axes.sizes()
    lie = {key for dims in axes.shapes.values() for dim in dims for key in axes_in(dim)}
    moved = {key: change for key, change in plan.changes.items() if key in lie and not change.idle}
    units = {key: units_after(change, axes[key]) for key, change in moved.items()}
    return {
        name: pieces
        for name, dims in axes.shapes.items()
        if (
            pieces := {
                i: lay_out(d, sizes, units) for i, d in enumerate(dims) if not units.keys().isdisjoint(axes_in(d))
            }
        )
    }


def lay_out(dim: Dim, sizes: Mapping[str, int], units: Mapping[str, Layout]) -> Layout:
    """Return the layout of a dimension after a plan, from the layouts of the axes that change."""
    match dim:
        case int():
            return Layout.of(torch.arange(dim))
        case str():
            return units[dim] if dim in units else Layout.of(torch.arange(sizes[dim]))
        case Product(parts):
            whole = lay_out(parts[0], sizes, units)
            for part in parts[1:]:
                whole = _nested(whole, lay_out(part, sizes, units), size_of(part, sizes))
            return whole
        case Sum(parts):
            before, after, pieces = 0, 0, []
            for part in parts:
                one = lay_out(part, sizes, units)
                pieces.append(replace(one, source=one.source + before, twin=one.twin + after))
                before, after = before + size_of(part, sizes), after + len(one)
            return Layout(*(torch.cat([getattr(one, field.name) for one in pieces]) for field in fields(Layout)))


def _nested(outer: Layout, inner: Layout, size: int) -> Layout:
    """Return the layout of a product dimension; ``size`` is that of the inner dimension before the plan."""

    def pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.repeat_interleave(len(inner)), b.repeat(len(outer))

    def index(a: Tensor, b: Tensor, width: int) -> Tensor:
        high, low = pairs(a, b)
        return high * width + low

    is_new, drawn = (torch.logical_or(*pairs(getattr(outer, n), getattr(inner, n))) for n in ("is_new", "drawn"))
    inward, outward = (torch.mul(*pairs(getattr(outer, n), getattr(inner, n))) for n in ("inward", "outward"))
    source, twin = index(outer.source, inner.source, size), index(outer.twin, inner.twin, len(inner))
    return Layout(source, is_new, drawn, twin, inward, outward)


def units_after(change: Change, axis: Axis) -> Layout:
    """Return the layout of an axis's units after its change, in the order of their ids; new ones as its fill says.

    Restored units lie among the kept ones, and are new until their stored weights are written.
    """
    keep = torch.tensor(change.keep)
    old, n = Layout.of(keep), len(change.restore) + change.grow
    if not n:
        return old
    generator = torch.Generator().manual_seed((change.fill.seed + 65537 * axis.next_id) % 2**63)
    rounds = [torch.randperm(len(keep), generator=generator) for _ in range(-(-n // len(keep)))]
    rule = FILLS["zero_out" if change.recalled else change.fill.rule]
    growth = Growth(len(keep), torch.cat(rounds)[:n], axis.mark is Mark.FOLDED, generator)
    made = rule.fill(growth)
    source = torch.cat([keep, keep[made.donors]])
    units = Layout(source, growth.is_new, made.drawn, made.twin, made.inward, made.outward)
    return _in_order(units, unit_ids_after(change, axis)) if change.restore else units


def unit_ids_after(change: Change, axis: Axis) -> list[int]:
    """Return the ids of an axis's units after its change: those kept, then those restored, then new ones."""
    kept = [axis.ids[unit] for unit in change.keep]
    return [*kept, *change.restore, *range(axis.next_id, axis.next_id + change.grow)]


def _in_order(units: Layout, ids: list[int]) -> Layout:
    """Return the same units, sorted by their ids."""
    order = torch.tensor(ids).argsort()
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return Layout(*(place[part[order]] if name == "twin" else part[order] for name, part in vars(units).items()))


def slots_after(
    axis: Axis, axes: AxisGraph, lays: Mapping[str, Mapping[int, Layout]], sizes: Mapping[str, int]
) -> tuple[Slot, ...]:
    """Return the slots of an axis after a plan, without those of which nothing is left."""
    result: dict[Slot, None] = {}
    for slot in axis.slots:
        lay = lays.get(slot.name, {}).get(slot.dim)
        if lay is None:
            result[slot] = None
        elif axis.free:
            dim = axes.shapes[slot.name][slot.dim]
            for outer, stride, inner, offset in places(dim, axis.key, sizes):
                result[Slot(slot.name, slot.dim, outer, stride, inner, offset, slot.role)] = None
        elif (moved := _moved(slot, lay, axis.size)) is not None:
            result[moved] = None
    return tuple(result)


def places(dim: Dim, key: str, sizes: Mapping[str, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(outer, stride, inner, offset)`` of every place where the units of an axis lie in a dimension.

    The numbers mean the same as in :class:`~regrow.core.axes.Slot`.
    """
    for loops, inner, offset in occurrences(dim, key, sizes):
        outer, stride = loops[0] if loops else (1, sizes[key] * inner)
        for at in product(*(range(n) for n, _ in loops[1:])):
            yield outer, stride, inner, offset + sum(i * s for i, (_, s) in zip(at, loops[1:], strict=True))


def _moved(slot: Slot, lay: Layout, size: int) -> Slot | None:
    """Return where a slot of a frozen axis lies after a plan, derived from the places of its first unit."""
    first = torch.isin(lay.source, slot.positions(size)[0]).nonzero().flatten()
    if not len(first):
        return None
    gaps = (torch.diff(first) != 1).nonzero().flatten()
    width = int(gaps[0]) + 1 if len(gaps) else len(first)
    blocks = len(first) // width
    stride = int(first[width] - first[0]) if blocks > 1 else size * width
    return Slot(slot.name, slot.dim, blocks, stride, width, int(first[0]), slot.role)
