"""The axes of a network as table rows: what each axis is, where it lies, and what one unit of it costs."""

import re
from collections import ChainMap, Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod

from regrow.core.axes.axis import Axis, Mark
from regrow.core.dims import Dim, axes_in, size_of
from regrow.core.tables import Table


@dataclass(frozen=True)
class Row:
    """One row of the table of axes.

    Args:
        key: The axis's key.
        label: Which modules produce its units and which read them; the same for axes of one kind in every block.
        block: The numbered block that all of its tensors lie in, such as ``model.layers.7``; empty if there are
            several.
        size: How many units.
        mark: What cutting it does to the network's function (:class:`regrow.core.axes.Mark`).
        reason: Why it is frozen or has its mark.
        inside: The key of the axis whose units contain these units.
        unit_params: How many parameters removing one unit saves; 0 if the axis is frozen.
        unit_macs: How many multiply–accumulates per example removing one unit saves; 0 if the axis is frozen.
        tensors: How many tensors it lies in.
    """

    key: str
    label: str
    block: str
    size: int
    mark: str
    reason: str
    inside: str
    unit_params: int
    unit_macs: int
    tensors: int

    def record(self) -> dict[str, str | int]:
        """Return the row as JSON-able data."""
        return asdict(self)


def rows_of(
    axes: Iterable[Axis], sizes: dict[str, int], tensors: Iterable[tuple[Dim, ...]], work: Iterable[tuple[Dim, ...]]
) -> list[Row]:
    """Return one row per axis.

    Args:
        axes: The axes.
        sizes: Axis key → number of units, of every axis of the network.
        tensors: The dimensions of each parameter.
        work: The dimensions of each contraction, for one example.
    """
    parameters, macs = _per_unit(sizes, tensors), _per_unit(sizes, work)
    return [_row(axis, parameters[axis.key], macs[axis.key]) for axis in axes]


def _per_unit(sizes: dict[str, int], products: Iterable[tuple[Dim, ...]]) -> Counter[str]:
    """Return by how much a sum of products of sizes falls if an axis loses one unit, by axis key."""
    less = Counter[str]()
    for dims in products:
        whole = prod(size_of(dim, sizes) for dim in dims)
        for key in {key for dim in dims for key in axes_in(dim)}:
            smaller = ChainMap({key: sizes[key] - 1}, sizes)
            less[key] += whole - prod(size_of(dim, smaller) for dim in dims)
    return less


def _row(axis: Axis, parameters: int, macs: int) -> Row:
    names = list(dict.fromkeys(slot.name for slot in axis.slots))
    return Row(
        key=axis.key,
        label=axis.label,
        block=block(names),
        size=axis.size,
        mark=str(axis.mark),
        reason=axis.reason,
        inside=axis.inside,
        unit_params=parameters if axis.free else 0,
        unit_macs=macs if axis.free else 0,
        tensors=len(names),
    )


def tables_of(rows: Sequence[Row], *, everything: bool) -> tuple[Table, Table]:
    """Return a table of the axes that can be cut, by kind, and one of the frozen axes, by reason.

    Args:
        rows: The axes.
        everything: Whether every frozen axis has a row of its own.
    """
    kinds: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        if row.mark != Mark.FROZEN:
            kinds.setdefault((row.label, row.mark, bool(row.inside)), []).append(row)
    columns = ("made by → read by", "where", "axes", "units", "mark", "parameters a unit", "MACs a unit")
    free = Table("What can be cut", columns, [_kind(*kind, of) for kind, of in kinds.items()], (2, 3, 5, 6))
    frozen = [row for row in rows if row.mark == Mark.FROZEN]
    if everything:
        each = [(row.key, row.size, row.reason) for row in frozen]
        return free, Table("Frozen", ("axis", "units", "why"), each, (1,))
    reasons: dict[str, list[Row]] = {}
    for row in frozen:
        reasons.setdefault(re.sub(r"\d+", "#", row.reason), []).append(row)
    groups = sorted(reasons.values(), key=len, reverse=True)
    lines = [(len(members), members[0].reason, members[0].key) for members in groups]
    return free, Table("Frozen", ("axes", "why (of the first)", "the first"), lines, (0,))


def _kind(label: str, mark: str, inside: bool, members: Sequence[Row]) -> tuple[object, ...]:
    blocks = [row.block for row in members if row.block]
    where = f"{blocks[0]} … {blocks[-1]}" if len(blocks) > 1 else (blocks[0] if blocks else members[0].key)
    units, parameters, macs = (
        _span([getattr(row, name) for row in members]) for name in ("size", "unit_params", "unit_macs")
    )
    return label, where, len(members), units, mark + (", inside another" if inside else ""), parameters, macs


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def block(names: list[str]) -> str:
    """Return the longest numbered path prefix that all names share, such as ``model.layers.7``; or ``""``.

    Args:
        names: Names of parameters or buffers.
    """
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    numbered = [i for i, part in enumerate(shared) if part.isdigit()]
    return ".".join(shared[: numbered[0] + 1]) if numbered else ""
