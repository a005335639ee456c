"""How the entries of a dimension lie after a plan: where each comes from, which are new, and what new ones hold."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from regrow.axes import Axis, AxisGraph, Dim, Mark, Product, Slot, Sum, axes_in, size_of
from regrow.plan import Change, Plan


@dataclass(frozen=True)
class Layout:
    """The entries of a dimension (or the units of an axis) after a plan; everything ``[entries]``.

    Args:
        source: The entry that it was before, or that a newborn one is a copy of.
        born: Whether it is newborn.
        drawn: Whether it is newborn and no copy: its numbers are drawn.
        twin: The entry whose drawn numbers it shares; itself, mostly.
        inward: The factor on numbers that make it.
        outward: The factor on numbers that read it.
    """

    source: Tensor
    born: Tensor
    drawn: Tensor
    twin: Tensor
    inward: Tensor
    outward: Tensor

    @classmethod
    def of(cls, source: Tensor) -> "Layout":
        """Entries that stay, in the order of ``source``."""
        no = torch.zeros(len(source), dtype=torch.bool)
        one = torch.ones(len(source), dtype=torch.float64)
        return cls(source, no, no, torch.arange(len(source)), one, one)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def kept(self) -> Tensor:
        """The entries before that stay, ascending."""
        return self.source[~self.born]

    def after(self, old: int) -> Tensor:
        """Where each of ``old`` entries lies now, −1 where it is gone."""
        place = torch.full((old,), -1)
        place[self.kept] = (~self.born).nonzero().flatten()
        return place


def layouts(axes: AxisGraph, plan: Plan) -> dict[str, dict[int, Layout]]:
    """Name of a tensor → dimension → its entries after the plan, for every dimension that the plan changes.

    Args:
        axes: The network's axes before the plan.
        plan: What is cut, and what grows.
    """
    sizes = axes.sizes()
    units = {
        key: units_after(change, axes[key].mark)
        for key, change in plan.changes.items()
        if change.grow or len(change.keep) < change.size
    }
    return {
        name: found
        for name, dims in axes.shapes.items()
        if (found := {i: laid(d, sizes, units) for i, d in enumerate(dims) if not units.keys().isdisjoint(axes_in(d))})
    }


def laid(dim: Dim, sizes: Mapping[str, int], units: Mapping[str, Layout]) -> Layout:
    """The entries of a dimension, given the units of the axes that change.

    Args:
        dim: The dimension before.
        sizes: The size of each axis before.
        units: Axis key → its units after.
    """
    match dim:
        case int():
            return Layout.of(torch.arange(dim))
        case str():
            return units[dim] if dim in units else Layout.of(torch.arange(sizes[dim]))
        case Product(parts):
            whole = laid(parts[0], sizes, units)
            for part in parts[1:]:
                whole = _nested(whole, laid(part, sizes, units), size_of(part, sizes))
            return whole
        case Sum(parts):
            before, after, found = 0, 0, []
            for part in parts:
                one = laid(part, sizes, units)
                values = [getattr(one, field.name) for field in fields(Layout)]
                found.append([values[0] + before, *values[1:3], values[3] + after, *values[4:]])
                before, after = before + size_of(part, sizes), after + len(one)
            return Layout(*(torch.cat(columns) for columns in zip(*found, strict=True)))


def _nested(outer: Layout, inner: Layout, size: int) -> Layout:
    """The entries of a product; ``size`` is that of the inner dimension before."""

    def pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.repeat_interleave(len(inner)), b.repeat(len(outer))

    def index(a: Tensor, b: Tensor, width: int) -> Tensor:
        high, low = pairs(a, b)
        return high * width + low

    born, drawn = (torch.logical_or(*pairs(getattr(outer, n), getattr(inner, n))) for n in ("born", "drawn"))
    inward, outward = (torch.mul(*pairs(getattr(outer, n), getattr(inner, n))) for n in ("inward", "outward"))
    source, twin = index(outer.source, inner.source, size), index(outer.twin, inner.twin, len(inner))
    return Layout(source, born, drawn, twin, inward, outward)


def units_after(change: Change, mark: Mark) -> Layout:
    """The units of an axis after its change: those kept, then the newborn ones, as its fill has them.

    ``zero_out``: drawn, and nothing reads them yet; on a folded axis (a residual stream under root-mean-square norms)
    nothing writes them yet. ``split``: each is a copy of a kept unit, and they share what reads that. ``pair``: two and
    two are drawn alike and read with opposite signs.
    """
    keep = torch.tensor(change.keep)
    old, n = Layout.of(keep), change.grow
    if not n or change.fill is None:
        return old
    generator = torch.Generator().manual_seed(change.fill.seed)
    many = len(keep)
    rounds = [torch.randperm(many, generator=generator) for _ in range(-(-n // many))]
    donors = torch.cat(rounds)[:n]
    source, born = torch.cat([keep, keep[donors]]), torch.arange(many + n) >= many
    twin, one = torch.arange(many + n), torch.ones(many + n, dtype=torch.float64)
    match change.fill.rule:
        case "split":
            # Unequal shares, or a unit and its copy would learn the same for ever.
            share = 0.5 + torch.rand(many + n, dtype=torch.float64, generator=generator)
            owner = torch.cat([torch.arange(many), donors])
            total = torch.zeros(many, dtype=torch.float64).index_add(0, owner, share)
            return Layout(source, born, torch.zeros_like(born), twin, one, share / total[owner])
        case "pair":
            twin[many + n // 2 :] = torch.arange(many, many + n // 2)
            sign = one.clone()
            sign[many + n // 2 :] = -1
            return Layout(source, born, born, twin, one, sign)
    silent = torch.where(born, 0.0, one)
    return Layout(source, born, born, twin, *((silent, one) if mark is Mark.FOLDED else (one, silent)))


def members(dim: Dim, key: str, sizes: Mapping[str, int]) -> list[Tensor]:
    """To which unit of an axis each entry of a dimension belongs, −1 for none; ``[entries]``, per occurrence in it."""
    match dim:
        case str() if dim == key:
            return [torch.arange(sizes[dim])]
        case Product(parts):
            return [
                one.repeat_interleave(_size(parts[i + 1 :], sizes)).repeat(_size(parts[:i], sizes))
                for i, part in enumerate(parts)
                for one in members(part, key, sizes)
            ]
        case Sum(parts):
            ends = [size_of(part, sizes) for part in parts]
            return [
                torch.cat([torch.full((sum(ends[:i]),), -1), one, torch.full((sum(ends[i + 1 :]),), -1)])
                for i, part in enumerate(parts)
                for one in members(part, key, sizes)
            ]
    return []


def _size(parts: tuple[Dim, ...], sizes: Mapping[str, int]) -> int:
    return size_of(Product(parts), sizes)


def moved(
    slot: Slot, lay: Layout, axis: Axis, dim: Dim, before: Mapping[str, int], after: Mapping[str, int]
) -> Slot | None:
    """Where a slot lies after a plan; ``None`` where nothing of it is left.

    The old layout is regular, and a plan does the same to each of its blocks, so the new one is too: the places of its
    first unit give its numbers.

    Args:
        slot: Where it lay.
        lay: The entries of its dimension after the plan.
        axis: Its axis before.
        dim: Its dimension, written in axes.
        before: The size of each axis before.
        after: And after.
    """
    places = slot.positions(axis.size)
    if axis.free:
        units = torch.arange(axis.size)[:, None].expand_as(places)
        pairs = zip(members(dim, axis.key, before), members(dim, axis.key, after), strict=True)
        unit = next(new for old, new in pairs if torch.equal(old[places], units))
        own = torch.isin(lay.source, places) & (unit == 0)
    else:
        own = torch.isin(lay.source, places[0])
    first = own.nonzero().flatten()
    if not len(first):
        return None
    gaps = (torch.diff(first) != 1).nonzero().flatten()
    width = int(gaps[0]) + 1 if len(gaps) else len(first)
    blocks = len(first) // width
    stride = int(first[width] - first[0]) if blocks > 1 else after[axis.key] * width
    return Slot(slot.name, slot.dim, blocks, stride, width, int(first[0]), slot.role)
