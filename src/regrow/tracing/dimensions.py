"""Symbolic dimensions while a graph is walked: leaves, products and sums, and how equal ones are unified.

While a graph is walked, every dimension of every tensor is a leaf, a product (a reshaped dimension) or a sum (a
concatenation). Unifying two dimensions splits leaves until both have the same form; where no common form exists, both
are frozen with the reason. Nothing here depends on an operation or a network.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from math import lcm, prod

from regrow.core.axes import Mark

_numbers = count()  # of leaves, in the order in which they are made


@dataclass(eq=False)
class Leaf:
    """An elementary dimension, which unification may later replace by a product or sum of others."""

    size: int
    frozen: str = ""  # why its size cannot change; empty while it can
    mark: Mark = Mark.NEUTRAL  # the strongest of its readers
    why: str = ""  # the reader that caused the mark
    integer: str = ""  # for a dimension made by expand: the module whose attribute must hold its size
    least: int = 1  # how many entries it must keep
    multiple: int = 1  # what its size must stay a multiple of
    link: "Expr | None" = None  # what replaces it, once it is unified
    number: int = field(default_factory=lambda: next(_numbers))  # what identifies it


@dataclass(frozen=True, eq=False)
class Times:
    """A product of dimensions, outermost first, without factors of size 1; without any factor it has size 1."""

    parts: tuple["Expr", ...]


@dataclass(frozen=True, eq=False)
class Plus:
    """A concatenation of dimensions, first part first."""

    parts: tuple["Expr", ...]


Expr = Leaf | Times | Plus
ONE = Times(())

# Frozen is no mark of a leaf here: see freeze.
_STRENGTH = {mark: rank for rank, mark in enumerate((Mark.NEUTRAL, Mark.COMPETED, Mark.FOLDED, Mark.RESTATED))}


def resolve(expr: Expr) -> Expr:
    """Return the current form of a dimension: unified leaves are replaced by what they were unified with."""
    match expr:
        case Leaf(link=None):
            return ONE if expr.size == 1 else expr
        case Leaf(link=link):
            assert link is not None
            expr.link = resolve(link)  # shortens the chain
            return expr.link
        case Times(parts) | Plus(parts):
            return _join_parts(type(expr), parts)


def times(*parts: Expr) -> Expr:
    """Return the product of dimensions, outermost first; nested products are flattened."""
    return _join_parts(Times, parts)


def plus(*parts: Expr) -> Expr:
    """Return the concatenation of dimensions, first part first; nested ones are flattened."""
    return _join_parts(Plus, parts)


def _join_parts(kind: type[Times] | type[Plus], parts: Iterable[Expr]) -> Expr:
    """Return a product or sum (``kind``) of dimensions, resolved and flattened; of one part, that itself."""
    flat = _flatten_parts(kind, parts)
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


def _flatten_parts(kind: type[Times] | type[Plus], parts: Iterable[Expr]) -> list[Expr]:
    """Return the resolved parts of a product or sum, with those of nested ones in their place."""
    flat: list[Expr] = []
    for part in map(resolve, parts):
        flat.extend(part.parts if isinstance(part, kind) else (part,))
    return flat


def size(expr: Expr) -> int:
    """Return how many entries a dimension has."""
    match resolve(expr):
        case Leaf(size=n):
            return n
        case Times(parts):
            return prod(map(size, parts))
        case Plus(parts):
            return sum(map(size, parts))


def leaves(expr: Expr) -> Iterator[Leaf]:
    """Yield the leaves of a dimension in order; one that occurs twice is yielded twice."""
    expr = resolve(expr)
    if isinstance(expr, Leaf):
        yield expr
    else:
        for part in expr.parts:
            yield from leaves(part)


def new(n: int) -> Expr:
    """Return a new free dimension of size ``n``; of size 1 the constant ``ONE``."""
    return ONE if n == 1 else Leaf(n)


def frozen(n: int, reason: str) -> Expr:
    """Return a new dimension of size ``n`` that cannot change, with the reason; of size 1 the constant ``ONE``."""
    return ONE if n == 1 else Leaf(n, frozen=reason)


def freeze(expr: Expr, reason: str) -> None:
    """Freeze every leaf of a dimension: its size cannot change. An earlier reason is kept."""
    for leaf in leaves(expr):
        leaf.frozen = leaf.frozen or reason


def freeze_both(a: Expr, b: Expr, why: str) -> None:
    """Freeze every leaf of two dimensions that cannot agree, for the reason ``why``."""
    freeze(a, why)
    freeze(b, why)


def is_free(expr: Expr) -> bool:
    """Whether any leaf of a dimension can change its size."""
    return any(not leaf.frozen for leaf in leaves(expr))


def strengthen_mark(expr: Expr, kind: Mark, why: str) -> None:
    """Give each leaf a mark (no FROZEN) and why, unless its own is stronger: neutral < competed < folded < restated."""
    for leaf in leaves(expr):
        if _STRENGTH[kind] > _STRENGTH[leaf.mark]:
            leaf.mark, leaf.why = kind, why


def require_multiple(expr: Expr, of: int) -> None:
    """Require that the size of every leaf of a dimension stays a multiple of ``of``."""
    for leaf in leaves(expr):
        leaf.multiple = lcm(leaf.multiple, of)


def identical(a: Expr, b: Expr) -> bool:
    """Whether two dimensions are already the same expression."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Leaf):
        return False
    assert not isinstance(b, Leaf)
    return len(a.parts) == len(b.parts) and all(map(identical, a.parts, b.parts))


def unify(a: Expr, b: Expr, why: str) -> None:
    """Make two dimensions equal, entry by entry, in place; where they cannot be, freeze both for the reason ``why``."""
    a, b = resolve(a), resolve(b)
    if identical(a, b):
        return
    if size(a) != size(b):
        freeze_both(a, b, why)
    elif isinstance(a, Leaf):
        _bind(a, b, why)
    elif isinstance(b, Leaf):
        _bind(b, a, why)
    elif isinstance(a, Times):
        _unify_parts(Times, a, b, why) if isinstance(b, Times) else _unify_product_with_sum(a, b, why)
    elif isinstance(b, Times):
        _unify_product_with_sum(b, a, why)
    else:
        _unify_parts(Plus, a, b, why)


def split_at(expr: Expr, at: int, why: str) -> tuple[Expr, Expr]:
    """Split a dimension, in place, behind its first ``at`` entries; return both parts.

    If that is impossible, freeze it for the reason ``why``, and return new frozen parts. 0 < ``at`` < its size.
    """
    pieces = _try_split(expr, at)
    if pieces is None:
        freeze(expr, why)
        return frozen(at, why), frozen(size(expr) - at, why)
    return pieces


def split_product(expr: Expr, sizes: list[int], why: str) -> list[Expr]:
    """Factor a dimension into new ones of the given sizes, outermost first; return these, frozen if impossible."""
    parts = list(map(new, sizes))
    unify(expr, _join_parts(Times, parts), why)
    return parts


def _bind(leaf: Leaf, expr: Expr, why: str) -> None:
    """Replace a leaf by a dimension of its size, in place; the dimension takes on the leaf's restrictions.

    If the dimension contains the leaf, both are frozen instead, for the reason ``why``.
    """
    if _shares_leaf([expr], leaf):
        freeze_both(leaf, expr, f"{why}: the dimension would have to contain itself")
        return
    if leaf.frozen:
        freeze(expr, leaf.frozen)
    strengthen_mark(expr, leaf.mark, leaf.why)
    require_multiple(expr, leaf.multiple)
    if isinstance(expr, Leaf):
        if expr.frozen and not leaf.frozen:
            leaf.frozen = expr.frozen
        expr.integer = expr.integer or leaf.integer
        expr.least = max(expr.least, leaf.least)
    leaf.link = expr


def _split_leaf(leaf: Leaf, kind: type[Times] | type[Plus], sizes: Iterable[int]) -> tuple[Leaf, ...]:
    """Replace a leaf by a product or sum (``kind``) of new ones, which inherit its properties; return these."""
    parts = tuple(Leaf(n, leaf.frozen, leaf.mark, leaf.why, leaf.integer, multiple=leaf.multiple) for n in sizes)
    leaf.link = kind(parts)
    return parts


def _unify_parts(kind: type[Times] | type[Plus], left: Times | Plus, right: Times | Plus, why: str) -> None:
    """Unify two products, or two sums, part by part from the front; the larger of two parts is split, or all freeze."""
    a, b = list(left.parts), list(right.parts)
    while a and b:
        small, large = (a, b) if size(a[0]) <= size(b[0]) else (b, a)
        n, m, first = size(small[0]), size(large[0]), resolve(large[0])
        if n == m:
            unify(small.pop(0), large.pop(0), why)
        elif kind is Times and m % n == 0 and isinstance(first, Leaf) and not _shares_leaf(small, first):
            large[:1] = _split_leaf(first, Times, (n, m // n))
        elif kind is Plus and not _shares_leaf(small, first) and (pieces := _try_split(first, n)) is not None:
            large[:1] = pieces
        else:
            freeze_both(_join_parts(kind, a), _join_parts(kind, b), why)
            return
        a[:], b[:] = _flatten_parts(kind, a), _flatten_parts(kind, b)


def _shares_leaf(parts: Iterable[Expr], expr: Expr) -> bool:
    """Whether a leaf of a dimension occurs in one of ``parts``, too."""
    numbers = {leaf.number for leaf in leaves(expr)}
    return any(leaf.number in numbers for part in parts for leaf in leaves(part))


def _unify_product_with_sum(product: Times, sum_: Expr, why: str) -> None:
    """Unify a product with a concatenation: ``(x ‖ y) × p = x·p ‖ y·p``; freeze both where their sizes do not fit."""
    assert isinstance(sum_, Plus)
    first, inner = product.parts[0], times(*product.parts[1:])
    if isinstance(first, Plus):
        unify(plus(*(times(part, inner) for part in first.parts)), sum_, why)
        return
    n = size(inner)
    assert isinstance(first, Leaf)
    if any(size(part) % n for part in sum_.parts) or _shares_leaf([sum_], product):
        freeze_both(product, sum_, why)
        return
    pieces = _split_leaf(first, Plus, [size(part) // n for part in sum_.parts])
    for piece, part in zip(pieces, sum_.parts, strict=True):
        unify(times(piece, inner), part, why)


def _try_split(expr: Expr, at: int) -> tuple[Expr, Expr] | None:
    """Return the first ``at`` entries of a dimension (0 < ``at`` < its size) and the rest; splits leaves in place.

    ``None`` if a product cannot be split there.
    """
    expr = resolve(expr)
    match expr:
        case Leaf(size=n):
            first, second = _split_leaf(expr, Plus, (at, n - at))
            return first, second
        case Plus(parts):
            before = 0  # entries of the parts before
            for i, part in enumerate(parts):
                if before == at:
                    return plus(*parts[:i]), plus(*parts[i:])
                if before < at < before + size(part):
                    pieces = _try_split(part, at - before)
                    return pieces and (plus(*parts[:i], pieces[0]), plus(pieces[1], *parts[i + 1 :]))
                before += size(part)
            return None
        case Times(parts):
            inner = times(*parts[1:])  # the first factor varies slowest: split between its entries
            pieces = None if at % size(inner) else _try_split(parts[0], at // size(inner))
            return pieces and (times(pieces[0], inner), times(pieces[1], inner))
