"""Rules for operations of object detectors: pooled image regions, writes by index, data-dependent decisions."""

import torch
from torch.fx import Node

from regrow.tracing import dimensions as d
from regrow.tracing.nodes import module_of, operand_of, operands_in, shape_of
from regrow.tracing.walk import Dims, Value, Walk


def region(w: Walk, node: Node) -> Dims:
    """Rule for RoI pooling: passes the channels, freezes batch and space; regions are new dimensions."""
    batch, channels, *space = w.of(operand_of(node))
    for expr in (batch, *space):
        d.freeze(expr, w.why(node, "regions are taken from it"))
    count, _, *out = (d.frozen(n, w.why(node, "made of regions")) for n in shape_of(node))
    return (count, channels, *out)


def put(w: Walk, node: Node) -> Dims:
    """Rule for ``index_put``: freezes the indexed dimensions and ties the others to those of the written values."""
    _, picks, values = node.args[:3]
    assert isinstance(picks, list | tuple)
    dims, given = w.of(operand_of(node)), w.of(values) if isinstance(values, Node) else ()
    why = w.why(node, "its entries are picked by a tensor of numbers")
    named = operands_in(picks)
    masks = sum(len(w.of(pick)) - 1 for pick in named if pick.meta["val"].dtype in (torch.bool, torch.uint8))
    covered = len(picks) + masks if len(named) == len(picks) else len(dims)
    tied = min(len(dims) - covered, len(given))
    for expr in (*dims[:covered], *given[: len(given) - tied], *(expr for pick in named for expr in w.of(pick))):
        d.freeze(expr, why)
    for i in range(1, tied + 1):
        if d.size(given[-i]) > 1:
            d.unify(dims[-i], given[-i], w.why(node, "what is put has another form than where it is put"))
    return dims


def decision(w: Walk, node: Node) -> Value:
    """Rule for data-dependent decisions: freezes what they read; a decided number is noted for the module using it."""
    read = node.all_input_nodes
    for one in read:
        for expr in w.of(one):
            d.freeze(expr, w.why(node, f"data decide on it, by `{node.meta['asks']}`"))
    if node.meta["number"]:
        w.decided.setdefault(module_of(node), node.meta["asks"])
    return [w.of(one) for one in read]


RULES = {
    **dict.fromkeys(("roi_align", "roi_pool"), region),
    **dict.fromkeys(("index_put", "_index_put_impl"), put),
    "decision": decision,
}
