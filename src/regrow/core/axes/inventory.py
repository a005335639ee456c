"""The axes of a network as table rows: what each axis is, where it lies, and what one unit of it costs."""

import re
from collections import ChainMap, Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from regrow.core.axes.axis import Dim, Mark, Product, axes_in, size_of
from regrow.core.tables import Table


@dataclass(frozen=True)
class Row:
    """One row of the table of axes; a unit saves ``unit_params`` and ``unit_macs``, 0 on a frozen axis."""

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


def unit_costs(sizes: dict[str, int], products: Iterable[tuple[Dim, ...]]) -> Counter[str]:
    """Return by how much a sum of products of sizes falls if an axis loses one unit, by axis key."""
    less = Counter[str]()
    for dims in map(Product, products):
        for key in set(axes_in(dims)):
            less[key] += size_of(dims, sizes) - size_of(dims, ChainMap({key: sizes[key] - 1}, sizes))
    return less


def tables_of(rows: Sequence[Row], *, everything: bool) -> tuple[Table, Table]:
    """Return a table of the axes that can be cut, by kind, and one of the frozen axes, by reason or (all) by key."""
    alike: dict[tuple[str, str, bool], list[Row]] = {}
    reasons: dict[str, list[Row]] = {}
    for row in rows:
        if row.mark == Mark.FROZEN:
            reasons.setdefault(row.key if everything else re.sub(r"\d+", "#", row.reason), []).append(row)
        else:
            alike.setdefault((row.label, row.mark, bool(row.inside)), []).append(row)
    columns = ("made by → read by", "where", "axes", "units", "mark", "parameters a unit", "MACs a unit")
    free = Table("What can be cut", columns, list(map(_describe_kind, alike.values())), (2, 3, 5, 6))
    if everything:
        each = [(row.key, row.size, row.reason) for (row,) in reasons.values()]
        return free, Table("Frozen", ("axis", "units", "why"), each, (1,))
    groups = sorted(reasons.values(), key=len, reverse=True)
    lines = [(len(group), group[0].reason, group[0].key) for group in groups]
    return free, Table("Frozen", ("axes", "why (of the first)", "the first"), lines, (0,))


def _describe_kind(rows: Sequence[Row]) -> tuple[object, ...]:
    first, blocks = rows[0], [row.block for row in rows if row.block]
    where = f"{blocks[0]} … {blocks[-1]}" if len(blocks) > 1 else (blocks[0] if blocks else first.key)
    spans = []
    for numbers in zip(*((row.size, row.unit_params, row.unit_macs) for row in rows), strict=True):
        low, high = min(numbers), max(numbers)
        spans.append(f"{low:,}" if low == high else f"{low:,}–{high:,}")
    mark = first.mark + (", inside another" if first.inside else "")
    return first.label, where, len(rows), spans[0], mark, *spans[1:]


def block(names: list[str]) -> str:
    """Return the longest numbered path prefix that all names share, such as ``model.layers.7``; or ``""``."""
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    numbered = [i for i, part in enumerate(shared) if part.isdigit()]
    return ".".join(shared[: numbered[0] + 1]) if numbered else ""
