"""The topology that a search found in the space of NAS-Bench-201: its one cell as data, and in the paper's notation."""

from regrow.reports.reading import JsonObject, mapping, size
from regrow.reports.records import CellRow, Node

NAMES = {
    "none": "none",
    "skip": "skip_connect",
    "conv1": "nor_conv_1x1",
    "conv3": "nor_conv_3x3",
    "avg": "avg_pool_3x3",
}
"""Kinds of operations → NAS-Bench-201's names, in the order in which edges list them."""

EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""The edges (source node, target node), in the order of NAS-Bench-201's notation."""


def topology(origin: JsonObject) -> list[CellRow]:
    """Return the cell that the network repeats, as :func:`regrow.reports.cells.cells` does; empty for other networks.

    Args:
        origin: The record of how to build the network that was found.

    Returns:
        One cell, of one input and three nodes; widths are those of the first stage.
    """
    config = mapping(origin.get("config"))
    edges = config.get("edges")
    if not isinstance(edges, list) or len(edges) != len(EDGES):
        return []
    width = size(config.get("width"))
    nodes: list[Node] = [{"width": width, "ops": []} for _ in range(3)]
    for (source, node), ops in zip(EDGES, edges, strict=True):
        there = ops if isinstance(ops, list) else []
        nodes[node - 1]["ops"] += [
            {"kind": kind, "source": source, "mid": None, "bare": not kind.startswith("conv")}
            for kind, name in NAMES.items()
            if name in there
        ]
    return [{"reduce": False, "inputs": [width], "nodes": nodes}]


def notation(found: list[CellRow]) -> str:
    """Return a topology in NAS-Bench-201's notation; empty if an edge has not exactly one operation.

    Args:
        found: The result of :func:`topology`.
    """
    nodes = [node["ops"] for cell in found for node in cell["nodes"]]
    if not nodes or any([op["source"] for op in ops] != [*range(i + 1)] for i, ops in enumerate(nodes)):
        return ""
    return "+".join("|" + "".join(f"{NAMES[op['kind']]}~{op['source']}|" for op in ops) for ops in nodes)
