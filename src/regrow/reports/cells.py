"""The cells or blocks that a search found, read from the untrusted record of how to build the network, and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

KINDS = ("skip", "sep3", "sep5", "dil3", "dil5", "avg", "max")
"""Kinds of operations of DARTS-like cells, in the order in which cells list them."""
BENCH_NAMES = {
    "none": "none",
    "skip": "skip_connect",
    "conv1": "nor_conv_1x1",
    "conv3": "nor_conv_3x3",
    "avg": "avg_pool_3x3",
}
"""Kinds of operations → NAS-Bench-201's names, in the order in which edges list them."""
BENCH_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""The edges (source node, target node), in the order of NAS-Bench-201's notation."""
BLOCK_KINDS = ("mb3e3", "mb5e3", "mb7e3", "mb3e6", "mb5e6", "mb7e6", "skip")
"""Kinds of operations of inverted-bottleneck blocks, in the order in which a block lists them."""
MAX_PARTS = 128


class Operation(msgspec.Struct, frozen=True):
    """An operation of a node: its kind, its source, channels inside it, and whether it has no weights."""

    kind: str
    source: int
    mid: int | None
    bare: bool


class Node(msgspec.Struct, frozen=True):
    """A node of a cell, or a block: its width, and the operations that it sums."""

    width: int | None
    ops: list[Operation]


class FoundCell(msgspec.Struct, frozen=True):
    """A cell: whether it halves the resolution, the widths of its inputs, and its nodes."""

    reduce: bool
    inputs: list[int | None]
    nodes: list[Node]


def read_cells(config: Mapping[str, Any]) -> list[FoundCell]:
    """Return the cells of a found network, as far as its description is valid; sources 0 and 1 are the inputs."""
    result = []
    for plan in _objects(config.get("cells")):
        reduce, inputs, nodes = plan.get("reduce") is True, _list(plan.get("inputs"))[:2], []
        for i, node in enumerate(_objects(plan.get("nodes"))):
            ops = {}
            for op in _list(node.get("ops")):
                kind, source, mid = op if isinstance(op, list) and len(op) == 3 else ("", None, None)
                if kind in KINDS and (at := _size(source)) is not None and at <= i + 1:
                    bare = kind in ("avg", "max") or (kind == "skip" and not (reduce and at < 2))
                    ops[kind, at] = Operation(kind, at, _size(mid), bare)
            nodes.append(Node(_size(node.get("width")), list(ops.values())))
        result.append(FoundCell(reduce, [_size(width) for width in inputs] + [None] * (2 - len(inputs)), nodes))
    return result


def read_topology(config: Mapping[str, Any]) -> list[FoundCell]:
    """Return the one cell that a network of NAS-Bench-201's space repeats; empty for other networks."""
    edges, width = _list(config.get("edges")), _size(config.get("width"))
    if len(edges) != len(BENCH_EDGES):
        return []
    ops: list[list[Operation]] = [[], [], []]
    for (source, node), names in zip(BENCH_EDGES, edges, strict=True):
        kept = [kind for kind, name in BENCH_NAMES.items() if name in _list(names)]
        ops[node - 1] += [Operation(kind, source, None, not kind.startswith("conv")) for kind in kept]
    return [FoundCell(False, [width], [Node(width, kept) for kept in ops])]


def read_blocks(config: Mapping[str, Any]) -> list[FoundCell]:
    """Return the blocks of a found network as cells of one node."""
    result = []
    for plan in _objects(config.get("blocks")):
        ops = {}
        for op in _list(plan.get("ops")):
            kind, mid = op if isinstance(op, list) and len(op) == 2 else ("", None)
            if kind in BLOCK_KINDS:
                ops[kind] = Operation(kind, 0, _size(mid), kind == "skip")
        node = Node(_size(plan.get("width")), list(ops.values()))
        result.append(FoundCell(plan.get("stride") == 2, [None], [node]))
    return result


def notation(topology: Sequence[FoundCell]) -> str:
    """Return a topology in NAS-Bench-201's notation; empty if an edge has not exactly one operation."""
    nodes = [node.ops for cell in topology for node in cell.nodes]
    if not nodes or any([op.source for op in ops] != [*range(i + 1)] for i, ops in enumerate(nodes)):
        return ""
    return "+".join("|" + "".join(f"{BENCH_NAMES[op.kind]}~{op.source}|" for op in ops) for ops in nodes)


def operations(parts: Sequence[FoundCell]) -> list[Operation]:
    """Return all operations of some cells in one list."""
    return [op for cell in parts for node in cell.nodes for op in node.ops]


def count_kinds(parts: Sequence[FoundCell]) -> dict[str, list[int]]:
    """Return kind of operation → how many of it each cell keeps."""
    return {kind: [sum(op.kind == kind for op in operations([cell])) for cell in parts] for kind in KINDS}


def count_skipped(blocks: Sequence[FoundCell]) -> int:
    """Return the number of blocks that only pass their input on."""
    return sum([op.kind for op in operations([block])] == ["skip"] for block in blocks)


def describe_nodes(cell: FoundCell) -> list[tuple[str, int | None, str]]:
    """Return the name of each node of a cell, its width, and what it sums, in words."""
    rows, inputs = [], len(cell.inputs)
    for i, node in enumerate(cell.nodes):
        sources: dict[int, list[str]] = {}
        for op in node.ops:
            inside = f" ({op.mid} inside)" if op.kind.startswith("sep") and op.mid else ""
            sources.setdefault(op.source, []).append(f"{op.kind}{inside}")
        sums = "; ".join(f"{name_source(at, inputs)}: {', '.join(ops)}" for at, ops in sorted(sources.items()))
        rows.append((name_source(i + inputs, inputs), node.width, sums or "nothing"))
    return rows


def describe_block(block: FoundCell) -> str:
    """Return the operations whose outputs a block sums, in words.

    >>> describe_block(read_blocks({"blocks": [{"ops": [["mb3e6", 40], ["skip", 8]]}]})[0])
    '3 × 3 bottleneck (40 inside); its input'
    """
    words = []
    for op in operations([block]):
        inside = f" ({op.mid} inside)" if op.mid else ""
        words.append("its input" if op.kind == "skip" else f"{op.kind[2]} × {op.kind[2]} bottleneck{inside}")
    return "; ".join(words) or "nothing"


def name_source(source: int, inputs: int = 2) -> str:
    """Return the name of a source of operations; in cells with one input, that is node 0.

    >>> name_source(0), name_source(1), name_source(2), name_source(0, inputs=1)
    ('cell before last', 'last cell', 'node 1', 'node 0')
    """
    return ("cell before last", "last cell")[source] if source < inputs == 2 else f"node {source - inputs + 1}"


def _list(value: object) -> list[Any]:
    return value[:1000] if isinstance(value, list) else []


def _objects(value: object) -> list[dict[str, Any]]:
    return [part for part in _list(value)[:MAX_PARTS] if isinstance(part, dict)]


def _size(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None
