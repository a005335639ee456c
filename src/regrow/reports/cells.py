"""The cells or blocks that a search found, in words."""

from collections.abc import Sequence
from typing import Annotated

import msgspec

from regrow.store.schemas import Count

KINDS = ("skip", "sep3", "sep5", "dil3", "dil5", "avg", "max")
"""Kinds of operations of DARTS-like cells, in the order in which cells list them."""
BLOCK_KINDS = ("mb3e3", "mb5e3", "mb7e3", "mb3e6", "mb5e6", "mb7e6", "skip")
"""Kinds of operations of inverted-bottleneck blocks, in the order in which a block lists them."""
Few = msgspec.Meta(max_length=128)


class Operation(msgspec.Struct, frozen=True, array_like=True):
    """An operation of a node: its kind, its source (0 and 1 are the inputs), and the channels inside it."""

    kind: str
    source: Count
    mid: Count | None = None


class Node(msgspec.Struct, frozen=True):
    """A node of a cell: its width, and the operations that it sums."""

    ops: Annotated[list[Operation], Few] = []
    width: Count | None = None


class FoundCell(msgspec.Struct, frozen=True):
    """A cell: its nodes, whether it halves the resolution, and the widths of its inputs."""

    nodes: Annotated[list[Node], Few] = []
    reduce: bool = False
    inputs: tuple[Count | None, ...] = (None, None)


class BlockOperation(msgspec.Struct, frozen=True, array_like=True):
    """An operation of a block: its kind, and the channels inside it."""

    kind: str
    mid: Count | None = None


class FoundBlock(msgspec.Struct, frozen=True):
    """An inverted-bottleneck block: the operations that it sums, its width and its stride."""

    ops: Annotated[list[BlockOperation], Few] = []
    width: Count | None = None
    stride: Count = 1


class FoundParts(msgspec.Struct, frozen=True):
    """The cells or the blocks of a found network, from the record of how to build it."""

    cells: Annotated[list[FoundCell], Few] = []
    blocks: Annotated[list[FoundBlock], Few] = []


def operations(cells: Sequence[FoundCell]) -> list[Operation]:
    """Return all operations of some cells in one list."""
    return [op for cell in cells for node in cell.nodes for op in node.ops]


def count_bare(cells: Sequence[FoundCell]) -> int:
    """Return the number of operations without weights: of skips, those that do not halve the resolution."""
    skips = sum(
        op.kind == "skip" and not (cell.reduce and op.source < 2) for cell in cells for op in operations([cell])
    )
    return skips + sum(op.kind in ("avg", "max") for op in operations(cells))


def count_kinds(cells: Sequence[FoundCell]) -> dict[str, list[int]]:
    """Return kind of operation → how many of it each cell keeps."""
    return {kind: [sum(op.kind == kind for op in operations([cell])) for cell in cells] for kind in KINDS}


def count_skipped(blocks: Sequence[FoundBlock]) -> int:
    """Return the number of blocks that only pass their input on."""
    return sum([op.kind for op in block.ops] == ["skip"] for block in blocks)


def describe_nodes(cell: FoundCell) -> list[tuple[str, int | None, str]]:
    """Return the name of each node of a cell, its width, and what it sums, in words."""
    rows = []
    for i, node in enumerate(cell.nodes):
        sources: dict[int, list[str]] = {}
        for op in node.ops:
            inside = f" ({op.mid} inside)" if op.kind.startswith("sep") and op.mid else ""
            sources.setdefault(op.source, []).append(f"{op.kind}{inside}")
        sums = "; ".join(f"{name_source(at)}: {', '.join(ops)}" for at, ops in sorted(sources.items()))
        rows.append((name_source(i + 2), node.width, sums or "nothing"))
    return rows


def describe_block(block: FoundBlock) -> str:
    """Return the operations whose outputs a block sums, in words.

    >>> describe_block(FoundBlock([BlockOperation("mb3e6", 40), BlockOperation("skip", 8)]))
    '3 × 3 bottleneck (40 inside); its input'
    """
    words = []
    for op in block.ops:
        inside = f" ({op.mid} inside)" if op.mid else ""
        kernel = f"{op.kind[2]} × {op.kind[2]} bottleneck" if op.kind in BLOCK_KINDS else op.kind
        words.append("its input" if op.kind == "skip" else f"{kernel}{inside}")
    return "; ".join(words) or "nothing"


def name_source(source: int) -> str:
    """Return the name of a source of operations.

    >>> name_source(0), name_source(1), name_source(2)
    ('cell before last', 'last cell', 'node 1')
    """
    return ("cell before last", "last cell")[source] if source < 2 else f"node {source - 1}"
