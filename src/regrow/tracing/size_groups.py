"""Group dimensions that must keep equal numbers of units although their units are different ones."""

from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr, Leaf
from regrow.tracing.walk import Walk

Multiple = tuple[Leaf, int]
"""A leaf, and how many entries of the dimension each of its units counts for."""


def group_equal_sizes(w: Walk) -> dict[int, tuple[str, int]]:
    """Return leaf number → label of its group of equal sizes, and how many entries each of its units counts for.

    Args:
        w: The walk; dimensions that cannot be matched are frozen.
    """
    pairs: list[tuple[Multiple, Multiple, str]] = []
    for a, b, why in w.equal:
        leaves = _pairs(a, b)
        if leaves is None:
            d.freeze(a, why)
            d.freeze(b, why)
        else:
            pairs += [(x, y, why) for x, y in leaves]
    again = True
    while again:
        again = False
        for (a, _), (b, _), why in pairs:
            if bool(a.frozen) != bool(b.frozen):
                d.freeze(a, why)
                d.freeze(b, why)
                again = True
    held: dict[int, tuple[str, int]] = {}
    for (a, times_a), (b, times_b), why in pairs:
        label = held.get(a.number, held.get(b.number, (f"count-{a.number}", 0)))[0]
        for leaf, times in ((a, times_a), (b, times_b)):
            if held.setdefault(leaf.number, (label, times)) != (label, times):
                d.freeze(a, why)
                d.freeze(b, why)
    return held


def _pairs(a: Expr, b: Expr) -> list[tuple[Multiple, Multiple]] | None:
    """Return the leaves whose sizes must match for two dimensions to have equal size; ``None`` if that is unclear."""
    a, b = d.resolve(a), d.resolve(b)
    if d.identical(a, b):
        return []
    if (left := _multiple(a)) is not None and (right := _multiple(b)) is not None:
        return [(left, right)] if left[0] is not right[0] else None
    if type(a) is not type(b) or isinstance(a, Leaf) or isinstance(b, Leaf) or len(a.parts) != len(b.parts):
        return None
    pairs = []
    for x, y in zip(a.parts, b.parts, strict=True):
        if (one := _pairs(x, y)) is None:
            return None
        pairs += one
    return pairs


def _multiple(expr: Expr) -> Multiple | None:
    """Return a dimension as a multiple of one leaf, if it is: ``f ‖ f`` is 2·f."""
    expr = d.resolve(expr)
    if isinstance(expr, Leaf):
        return expr, 1
    own = list(d.leaves(expr))
    if isinstance(expr, d.Plus) and own and all(leaf is own[0] for leaf in own) and len(own) == len(expr.parts):
        return own[0], len(own)
    return None
