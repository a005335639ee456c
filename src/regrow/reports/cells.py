"""The cells or blocks that a search found, in words."""

from typing import Annotated, Any

import msgspec

from regrow.store.convert import convert
from regrow.store.schemas import Count

ShortList = msgspec.Meta(max_length=128)  # a damaged file may name any number of parts


class Operation(msgspec.Struct, frozen=True, array_like=True):
    """An operation of a node in a cell: what it is, what it reads, and its hidden channels."""

    kind: str  # as in the search space: `skip`, `sep5`, …
    source: Count  # what it reads: 0 the cell before last, 1 the last cell, from 2 on nodes of this cell
    inside: Count | None = None  # channels between its layers; None if it has a single one


class BlockOperation(msgspec.Struct, frozen=True, array_like=True):
    """An operation of an inverted-bottleneck block: what it is, and its hidden channels."""

    kind: str  # as in the search space: `mb3e6` (kernel 3, expansion 6), `skip`
    inside: Count | None = None


class Node(msgspec.Struct, frozen=True):
    """A node of a cell: the operations whose outputs it sums, and its width in channels."""

    ops: Annotated[list[Operation], ShortList] = []
    width: Count | None = None


class FoundCell(msgspec.Struct, frozen=True):
    """A cell of a DARTS-like network: its nodes, in order."""

    nodes: Annotated[list[Node], ShortList] = []


class Block(msgspec.Struct, frozen=True):
    """An inverted-bottleneck block: the operations whose outputs it sums, and its width in channels."""

    ops: Annotated[list[BlockOperation], ShortList] = []
    width: Count | None = None


class FoundNetwork(msgspec.Struct, frozen=True):
    """The cells or the blocks of the network that a search found; both empty for a network that has neither."""

    cells: Annotated[list[FoundCell], ShortList] = []
    blocks: Annotated[list[Block], ShortList] = []

    @property
    def parts(self) -> list[tuple[str, int | None, str]]:
        """(name, width in channels, operations in words) of every node or block, in order; width ``None``: unknown."""
        rows: list[tuple[str, int | None, str]] = []
        for i, cell in enumerate(self.cells, 1):
            for j, node in enumerate(cell.nodes, 1):
                sums = [f"{_name_operation(op.kind, op.inside)} of {_name_source(op.source)}" for op in node.ops]
                rows.append((f"Cell {i}, node {j}", node.width, "; ".join(sums) or "nothing"))
        for i, block in enumerate(self.blocks, 1):
            sums = [_name_operation(op.kind, op.inside) for op in block.ops]
            rows.append((f"Block {i}", block.width, "; ".join(sums) or "nothing"))
        return rows

    @property
    def widths(self) -> list[tuple[str, float]]:
        """(width in words, fraction of the largest width) of the parts whose width is known, as cells of a strip."""
        known = [(name, width) for name, width, _ in self.parts if width]
        largest = max((width for _, width in known), default=1)
        return [(f"{name}: {width:,} channels", width / largest) for name, width in known]


def read_found(shapes: Any) -> FoundNetwork:
    """Return the cells or blocks in the parsed JSON of ``shapes.json``; StoreError if they do not fit the schema."""
    origin = shapes.get("origin") if isinstance(shapes, dict) else None
    config = origin.get("config") if isinstance(origin, dict) else None
    config = config if isinstance(config, dict) else {}  # of networks that no search found
    parts = {name: config[name] for name in ("cells", "blocks") if isinstance(config.get(name), list)}
    return convert(parts, FoundNetwork, "shapes.json", "left out")


def _name_operation(kind: str, inside: int | None) -> str:
    """Return an operation in words, with its hidden channels (of a bottleneck or separable convolution).

    >>> _name_operation("mb3e6", 40), _name_operation("skip", 8), _name_operation("sep5", 3)
    ('3 × 3 bottleneck (40 inside)', 'skip', 'sep5 (3 inside)')
    """
    name = f"{kind[2]} × {kind[2]} bottleneck" if kind.startswith("mb") and len(kind) > 2 else kind
    return f"{name} ({inside} inside)" if inside and kind.startswith(("mb", "sep")) else name


def _name_source(source: int) -> str:
    """Return in words what an operation reads, by :attr:`Operation.source`; nodes are numbered from 1."""
    return ("the cell before last", "the last cell")[source] if source < 2 else f"node {source - 1}"
