"""The blocks (inverted bottlenecks) that a search found, as data and in words."""

from collections.abc import Sequence
from typing import Any

from regrow.reports.reading import JsonObject, items, mapping, objects, size, text

Block = dict[str, Any]

KINDS = ("mb3e3", "mb5e3", "mb7e3", "mb3e6", "mb5e6", "mb7e6", "skip")
"""Kinds of operations, in the order in which a block lists them."""

MAX_BLOCKS = 128


def blocks(origin: JsonObject) -> list[Block]:
    """Return the blocks of a found network, as far as its untrusted description is valid.

    Args:
        origin: The record of how to build the network that was found.

    Returns:
        Per block ``width``, ``stride`` and ``ops`` (``kind``, and ``mid``: channels inside a bottleneck).
    """
    result = []
    for plan in objects(mapping(origin.get("config")).get("blocks"))[:MAX_BLOCKS]:
        ops = {}
        for op in items(plan.get("ops"), len(KINDS)):
            kind, mid = op if isinstance(op, list) and len(op) == 2 else ("", None)
            if text(kind) in KINDS:
                ops[kind] = {"kind": kind, "mid": size(mid)}
        result.append({"width": size(plan.get("width")), "stride": size(plan.get("stride")), "ops": list(ops.values())})
    return result


def count_skipped(found: Sequence[Block]) -> int:
    """Return the number of blocks that only pass their input on.

    Args:
        found: The blocks.
    """
    return sum([op["kind"] for op in block["ops"]] == ["skip"] for block in found)


def describe_block(block: Block) -> str:
    """Return the operations whose outputs a block sums, in words.

    Args:
        block: The block.

    >>> describe_block({"ops": [{"kind": "mb3e6", "mid": 40}, {"kind": "skip", "mid": 8}]})
    '3 × 3 bottleneck (40 inside); its input'
    """
    words = []
    for op in block["ops"]:
        inside = f" ({op['mid']} inside)" if op["mid"] else ""
        words.append("its input" if op["kind"] == "skip" else f"{op['kind'][2]} × {op['kind'][2]} bottleneck{inside}")
    return "; ".join(words) or "nothing"
