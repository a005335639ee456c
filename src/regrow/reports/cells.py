"""The cells that a search found, as data and as a picture."""

import math
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, Entry, draw, legend
from regrow.reports.reading import JsonObject, items, mapping, objects, size, text
from regrow.reports.records import CellRow, KindCount, Node, NodeText, Operation, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


KINDS: dict[str, tuple[str, float]] = {
    "skip": (palette.INK, 1.0),
    "sep3": (palette.ACCENT, 0.55),
    "sep5": (palette.ACCENT, 1.0),
    "dil3": (palette.COOL, 0.55),
    "dil5": (palette.COOL, 1.0),
    "avg": (palette.WARM, 0.55),
    "max": (palette.WARM, 1.0),
}
"""Kinds of operations of DARTS-like cells, in the order in which cells list them → colour and opacity."""

SINGLE: dict[str, tuple[str, float]] = {
    "none": (palette.MUTED, 0.4),
    "skip": (palette.INK, 1.0),
    "conv1": (palette.ACCENT, 0.55),
    "conv3": (palette.ACCENT, 1.0),
    "avg": (palette.WARM, 0.55),
}
"""Kinds of operations of NAS-Bench-201's cells, which have one input → colour and opacity."""

NAME = 8.5
"""The distance between two operations, in pixels, that vertical names need."""

MAX_CELLS = 64
MAX_NODES = 16
MAX_DRAWN = 16


def cells(origin: JsonObject) -> list[CellRow]:
    """Return the cells of a found network, as far as its untrusted description is valid.

    Args:
        origin: The record of how to build the network that was found.

    Returns:
        Per cell ``reduce`` (it halves the resolution), ``inputs`` (their two widths inside) and ``nodes``: for each
        ``width`` and ``ops`` (``kind``, ``source``, ``mid``: channels inside a ``sep``, and whether it is ``bare``: has
        no weights). Sources 0 and 1 are the inputs, 2 is the first node.
    """
    result: list[CellRow] = []
    for plan in objects(mapping(origin.get("config")).get("cells"))[:MAX_CELLS]:
        inputs = items(plan.get("inputs"), 2)
        nodes: list[Node] = []
        for i, node in enumerate(objects(plan.get("nodes"))[:MAX_NODES]):
            ops: dict[tuple[str, int], Operation] = {}
            for op in items(node.get("ops"), 8 * (MAX_NODES + 2)):
                kind, source, mid = op if isinstance(op, list) and len(op) == 3 else ("", None, None)
                if text(kind) in KINDS and (known := size(source, i + 1)) is not None:
                    halves = plan.get("reduce") is True and known < 2
                    bare = kind in ("avg", "max") or (kind == "skip" and not halves)
                    ops[kind, known] = {"kind": kind, "source": known, "mid": size(mid), "bare": bare}
            nodes.append({"width": size(node.get("width")), "ops": list(ops.values())})
        widths = [size(width) for width in inputs] + [None] * (2 - len(inputs))
        result.append({"reduce": plan.get("reduce") is True, "inputs": widths, "nodes": nodes})
    return result


def kept_operations(found: Sequence[CellRow]) -> list[Operation]:
    """Return all operations of some cells in one list.

    Args:
        found: The cells.
    """
    return [op for cell in found for node in cell["nodes"] for op in node["ops"]]


def counts(found: Sequence[CellRow]) -> list[KindCount]:
    """Return how many operations of each kind the cells keep, as ``kind``, ``cells`` (one count per cell) and ``all``.

    Args:
        found: The cells.
    """
    table = [[op["kind"] for op in kept_operations([cell])] for cell in found]
    rows = [(kind, [kinds.count(kind) for kinds in table]) for kind in KINDS]
    return [{"kind": kind, "cells": many, "all": sum(many)} for kind, many in rows]


def describe_nodes(cell: CellRow) -> list[NodeText]:
    """Return what each node of a cell sums, in words, as ``name``, ``width`` and ``sums``.

    Args:
        cell: The cell.
    """
    rows: list[NodeText] = []
    inputs = len(cell["inputs"])
    for i, node in enumerate(cell["nodes"]):
        sources: dict[int, list[str]] = {}
        for op in node["ops"]:
            inside = f" ({op['mid']} inside)" if op["kind"].startswith("sep") and op["mid"] else ""
            sources.setdefault(op["source"], []).append(f"{op['kind']}{inside}")
        sums = "; ".join(f"{source_name(source, inputs)}: {', '.join(ops)}" for source, ops in sorted(sources.items()))
        rows.append({"name": source_name(i + inputs, inputs), "width": node["width"], "sums": sums or "nothing"})
    return rows


def source_name(source: int, inputs: int = 2) -> str:
    """Return the name of a source of operations; in cells with one input, that is node 0.

    Args:
        source: The index of the source.
        inputs: The number of inputs of the cell.

    >>> source_name(0), source_name(1), source_name(2), source_name(0, inputs=1)
    ('cell before last', 'last cell', 'node 1', 'node 0')
    """
    return ("cell before last", "last cell")[source] if source < inputs == 2 else f"node {source - inputs + 1}"


def cells_of(run: Run) -> list[CellRow]:
    """Return the cells of a search, or the one cell of NAS-Bench-201's space that all its cells equal.

    Args:
        run: A run of the summary.
    """
    found: dict[str, list[CellRow]] = run["search"] or {"cells": [], "topology": []}
    return found["cells"] or found["topology"]


def picture(run: Run) -> Drawing | None:
    """Draw each cell as a wiring: a horizontal line per value, and a coloured vertical line per kept operation.

    Each kind of operation has its place on each edge, so that cells can be compared and removed operations are gaps.

    Args:
        run: A run of the summary.
    """
    found = cells_of(run)[:MAX_DRAWN]
    if not kept_operations(found):
        return None
    inputs, most = len(found[0]["inputs"]), max(len(cell["nodes"]) for cell in found)
    kinds = KINDS if inputs == 2 else SINGLE
    slots = sum(_edge(kinds) * (i + inputs) for i in range(most))
    titles = [f"Cell {i + 1}" for i in range(len(found))] if inputs == 2 else ["Every cell"]
    description = "; ".join(
        f"{titles[i].lower()}: " + ", ".join(f"{row['name']} sums {row['sums']}" for row in describe_nodes(cell))
        for i, cell in enumerate(found[:6])
    )
    entries: list[Entry] = [(kind, colour, "s", strength) for kind, (colour, strength) in kinds.items()]

    def paint(canvas: Canvas) -> None:
        left, gap = 92, 26

        def step(across: int) -> float:
            return ((canvas.width - gap * (across - 1)) / across - left - 4) / slots

        # Names are written where they find room; a picture of many cells, or of broad ones, does without.
        across = 1 if canvas.narrow or (step(2) < NAME and step(1) >= NAME and len(found) <= 8) else 2
        head, wire = (64 if step(across) >= NAME else 34), 22
        width, high = (canvas.width - gap * (across - 1)) / across, head + wire * (most + inputs) + 18
        rows = [entries[:4], entries[4:]] if canvas.narrow else [entries]
        top = 8 + 20 * len(rows)
        canvas.start(top + math.ceil(len(found) / across) * high)
        for i, row in enumerate(rows):
            legend(canvas, 10 + 20 * i, row)
        for i, cell in enumerate(found):
            x, y = (i % across) * (width + gap), top + (i // across) * high
            n = len(kept_operations([cell]))
            canvas.text(x, y + 14, f"{titles[i]}{', halves the resolution' * cell['reduce']}")
            words = f"{q.count(n)} operation{'s' * (n != 1)}, output width {_given(cell)}"
            if not canvas.narrow or not cell["reduce"]:
                canvas.text(x + width, y + 14, words, color=palette.MUTED, fontsize=SMALL, ha="right")
            axes = canvas.panel(y + head, wire * (len(cell["nodes"]) + inputs), left=x + left, width=width - left - 4)
            _wiring(axes, cell, kinds, slots, step(across) >= NAME)
            for place, value in enumerate([*cell["inputs"], *(node["width"] for node in cell["nodes"])]):
                at = y + head + (place + 0.5) * wire
                canvas.text(
                    x, at, source_name(place, inputs).replace("cell before last", "before last"), fontsize=SMALL
                )
                canvas.text(x + left - 6, at, q.count(value), color=palette.MUTED, fontsize=SMALL, ha="right")

    return draw("fig-cells", "The cells of the final network", description, paint)


def _edge(kinds: Sized) -> int:
    """Return the number of places of an edge in the picture: one per kind of operation, and a free one."""
    return len(kinds) + 1


def _wiring(axes: "Axes", cell: CellRow, looks: dict[str, tuple[str, float]], slots: int, names: bool) -> None:
    """Draw one cell: rows are values, columns are places of operations, grouped by node and then by source."""
    inputs, kinds = len(cell["inputs"]), list(looks)
    many = len(cell["nodes"]) + inputs
    axes.set_axis_off()
    axes.set_xlim(0, slots)
    axes.set_ylim(many - 0.5, -0.5)
    start, lines = 0, dict[str, list[tuple[float, int, int]]]()
    for value in range(inputs):
        axes.plot([0, slots], [value, value], color=palette.FAINT, lw=1, zorder=1)
    for i, node in enumerate(cell["nodes"]):
        axes.plot([start, slots], [i + inputs, i + inputs], color=palette.FAINT, lw=1, zorder=1)
        for op in node["ops"]:
            x = start + _edge(kinds) * op["source"] + kinds.index(op["kind"]) + 0.5
            lines.setdefault(op["kind"], []).append((x, op["source"], i + inputs))
            if names:
                axes.text(x, -0.6, op["kind"], rotation=90, ha="center", va="bottom", color=palette.MUTED, fontsize=8.5)
        start += _edge(kinds) * (i + inputs)
        if i + 1 < len(cell["nodes"]):
            axes.plot(
                [start - 0.5, start - 0.5], [-0.5, many - 0.5], color=palette.LINE, lw=1, ls=(0, (3, 3)), zorder=1
            )
    for kind, places in lines.items():
        colour, strength = looks[kind]
        xs, tops, bottoms = zip(*places, strict=True)
        axes.vlines(xs, tops, bottoms, colors=colour, alpha=strength, lw=2.4, zorder=2)
        for ys, marker in ((tops, "o"), (bottoms, "v")):
            axes.plot(xs, ys, marker, color=colour, ms=4, mew=0, alpha=strength, zorder=3)


def _given(cell: CellRow) -> str:
    """Return the output width of a cell in words: all nodes side by side, or the last one if there is one input."""
    widths = [node["width"] for node in cell["nodes"]]
    widths = widths if len(cell["inputs"]) == 2 else widths[-1:]
    known = [width for width in widths if width is not None]
    return q.count(sum(known)) if len(known) == len(widths) else q.NONE
