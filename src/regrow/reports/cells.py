"""The cells or blocks that a search found, in words."""

from typing import Annotated, Any

import msgspec

from regrow.store.convert import convert
from regrow.store.schemas import Count

ShortList = msgspec.Meta(max_length=128)  # a damaged file may name any number of parts


class Operation(msgspec.Struct, frozen=True, array_like=True):
    """An operation of a node: its kind, its source (0 and 1 are the cells before), and the channels inside it."""

    kind: str
    source: Count
    inside: Count | None = None


class BlockOperation(msgspec.Struct, frozen=True, array_like=True):
    """An operation of a block: its kind, and the channels inside it."""

    kind: str
    inside: Count | None = None


class Node(msgspec.Struct, frozen=True):
    """A node of a cell: its width, and the operations that it sums."""

    ops: Annotated[list[Operation], ShortList] = []
    width: Count | None = None


class FoundCell(msgspec.Struct, frozen=True):
    """A cell: its nodes, in order."""

    nodes: Annotated[list[Node], ShortList] = []


class Block(msgspec.Struct, frozen=True):
    """An inverted-bottleneck block: the operations that it sums, and its width."""

    ops: Annotated[list[BlockOperation], ShortList] = []
    width: Count | None = None


class FoundNetwork(msgspec.Struct, frozen=True):
    """The cells or the blocks of the network that a search found, from the record of how to build it."""

    cells: Annotated[list[FoundCell], ShortList] = []
    blocks: Annotated[list[Block], ShortList] = []

    @property
    def parts(self) -> list[tuple[str, int | None, str]]:
        """(name, width, operations in words) of every node or block, in order."""
        rows: list[tuple[str, int | None, str]] = []
        for i, cell in enumerate(self.cells, 1):
            for j, node in enumerate(cell.nodes, 1):
                sums = [f"{_name_operation(op.kind, op.inside)} of {_name_source(op.source)}" for op in node.ops]
                rows.append((f"Cell {i}, node {j}", node.width, "; ".join(sums) or "nothing"))
        for i, block in enumerate(self.blocks, 1):
            sums = [_name_operation(op.kind, op.inside) for op in block.ops]
            rows.append((f"Block {i}", block.width, "; ".join(sums) or "nothing"))
        return rows


def read_found(shapes: Any) -> FoundNetwork:
    """Return the parts of a found network from the content of its ``shapes.json``; StoreError if they do not fit."""
    origin = shapes.get("origin") if isinstance(shapes, dict) else None
    config = origin.get("config") if isinstance(origin, dict) else None
    config = config if isinstance(config, dict) else {}  # of networks that no search found
    parts = {name: config[name] for name in ("cells", "blocks") if isinstance(config.get(name), list)}
    return convert(parts, FoundNetwork, "shapes.json", "left out")


def _name_operation(kind: str, inside: int | None) -> str:
    """Return an operation in words, with the number of channels inside it.

    >>> _name_operation("mb3e6", 40), _name_operation("skip", 8), _name_operation("sep5", 3)
    ('3 × 3 bottleneck (40 inside)', 'skip', 'sep5 (3 inside)')
    """
    name = f"{kind[2]} × {kind[2]} bottleneck" if kind.startswith("mb") and len(kind) > 2 else kind
    return f"{name} ({inside} inside)" if inside and kind.startswith(("mb", "sep")) else name


def _name_source(source: int) -> str:
    """Return in words what an operation of a cell reads: one of the two cells before, or an earlier node."""
    return ("the cell before last", "the last cell")[source] if source < 2 else f"node {source - 1}"
