"""Rules for operations that move entries: reshaping, transposing, concatenating, slicing, pooling."""

from itertools import pairwise
from math import prod

from torch.fx import Node

from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import (
    argument,
    as_int,
    as_ints,
    dim_index,
    op_name,
    operand_of,
    operands_in,
    permutation,
    result_shapes,
    shape_of,
    shapes_of,
)
from regrow.tracing.walk import Dims, Rule, Value, Walk


def reshape(w: Walk, node: Node) -> Dims:
    """Rule for reshapes: neighbouring dimensions are grouped so that sizes match, and tied as products."""
    dims, shape = w.first(node), shape_of(node)
    why = w.why(node)
    filled = iter(_group_to_shape([expr for expr in dims if d.size(expr) != 1], [n for n in shape if n != 1], why))
    result = tuple(d.ONE if n == 1 else next(filled) for n in shape)
    if op_name(node) == "unflatten":
        numbers = [0] * dim_index(node, 1, len(dims)) + as_ints(node.args[2])
    else:
        sizes = argument(node, 1)
        numbers = as_ints(sizes) if isinstance(sizes, list | tuple) else []
    for i, (number, expr) in enumerate(zip(numbers, result, strict=False)):
        if number > 1:
            w.add_literal(node, number, expr, last=i == len(numbers) - 1)
    return result


def _group_to_shape(dims: list[Expr], shape: list[int], why: str) -> list[Expr]:
    """Return dimensions of the sizes ``shape``, as products of ``dims`` and factors of them; empties both lists."""
    if 0 in shape or not all(map(d.size, dims)):
        return [d.frozen(n, why) for n in shape]
    out: list[Expr] = []
    while dims or shape:
        left, right = [dims.pop(0)], [shape.pop(0)]
        while (n := prod(map(d.size, left))) != (m := prod(right)):
            if n < m:
                left.append(dims.pop(0))
            else:
                right.append(shape.pop(0))
        product = d.times(*left)
        out += [product] if len(right) == 1 else d.split_product(product, right, why)
    return out


def transpose(w: Walk, node: Node) -> Dims:
    """Rule for ``transpose``, ``permute`` and the like: reorders the dimensions."""
    dims = w.first(node)
    order = permutation(node, len(dims))
    assert order is not None
    return tuple(dims[i] for i in order)


def unsqueeze(w: Walk, node: Node) -> Dims:
    """Rule for ``unsqueeze``: inserts a dimension of size 1."""
    dims = list(w.first(node))
    dims.insert(as_int(node.args[1]) % (len(dims) + 1), d.ONE)
    return tuple(dims)


def squeeze(w: Walk, node: Node) -> Dims:
    """Rule for ``squeeze``: removes dimensions of size 1."""
    dims = w.first(node)
    named = [i % len(dims) for i in as_ints(node.args[1])] if len(node.args) > 1 else range(len(dims))
    return tuple(expr for i, expr in enumerate(dims) if not (i in named and d.size(expr) == 1))


def concatenate(w: Walk, node: Node) -> Dims:
    """Rule for ``cat``: the joined dimension is the sum of its parts; the others are tied."""
    operands = operands_in(node.args[0])
    parts = [operand for operand in operands if shape_of(operand) != (0,)] or operands  # torch skips empty vectors
    axis = dim_index(node, 1, len(shape_of(parts[0])))
    dims = [w.of(part) for part in parts if shape_of(part)[axis]] or [w.of(parts[0])]  # an empty cache ties nothing
    out = list(dims[0])
    for other in dims[1:]:
        for i, expr in enumerate(other):
            if i != axis and d.size(expr) > 1:
                w.unify(node, out[i], expr)
    out[axis] = d.plus(*(part[axis] for part in dims))
    return tuple(out)


def stack(w: Walk, node: Node) -> Dims:
    """Rule for ``stack``: ties all dimensions of the tensors and inserts a frozen new one."""
    parts = operands_in(node.args[0])
    out = list(w.of(parts[0]))
    for part in parts[1:]:
        for a, b in zip(out, w.of(part), strict=True):
            w.unify(node, a, b)
    out.insert(dim_index(node, 1, len(out) + 1), w.frozen(node, len(parts)))
    return tuple(out)


def split(w: Walk, node: Node) -> Value:
    """Rule for ``split`` and ``chunk``: cuts a dimension into pieces; equal pieces must keep equally many units."""
    dims, axis = w.along(node, 2)
    lengths = [shape[axis] for shape in result_shapes(node)]
    why = w.why(node)
    pieces, rest = [], dims[axis]
    for length in lengths[:-1]:
        piece, rest = d.split_at(rest, length, why)
        pieces.append(piece)
    pieces.append(rest)
    for a, b in pairwise(pieces) if op_name(node) != "split_with_sizes" else ():
        if d.size(a) == d.size(b):
            w.equal.append((a, b, why))
        else:
            w.freeze(node, [dims[axis]])
    for length, piece in zip(lengths, pieces, strict=True):
        w.add_literal(node, length, piece)
    return [replace_dim(dims, axis, piece) for piece in pieces]


def replace_dim(dims: Dims, axis: int, *exprs: Expr) -> Dims:
    """Return dimensions with that at index ``axis`` replaced by ``exprs``; removed if there are none."""
    return (*dims[:axis], *exprs, *dims[axis + 1 :])


def narrow(w: Walk, node: Node) -> Dims:
    """Rule for slices: cuts a dimension into the slice and the rest; a step other than 1 freezes it."""
    dims, axis = w.along(node, 1)
    n = d.size(dims[axis])
    start, end = slice_bounds(node)
    step = as_int(node.args[4]) if len(node.args) > 4 else 1
    if start == 0 and end == n and step == 1:
        return dims
    if start >= end:
        return replace_dim(dims, axis, w.frozen(node, 0))
    if step != 1 or not d.is_free(dims[axis]):
        return freeze_picked(w, node, axis)
    why = w.why(node)
    before, rest = d.split_at(dims[axis], start, why) if start else (d.ONE, dims[axis])
    if start:
        w.starts[node] = before
    middle, after = d.split_at(rest, end - start, why) if end < n else (rest, d.ONE)
    # two halves must keep equally many units, as the pieces of a split
    if n == 2 * (end - start) and (start == 0 or end == n) and not _has_other_cuts(node, axis, end - start):
        other = after if start == 0 else before
        w.equal.append((middle, other, why))
    for number in (start, end, end - start):
        if number > 1:
            w.add_literal(node, number, middle if number == end - start else before)
    return replace_dim(dims, axis, middle)


def freeze_picked(w: Walk, node: Node, axis: int) -> Dims:
    """Freeze the dimension at index ``axis``, from which an operation picks entries; return the result's dimensions."""
    dims = w.first(node)
    w.freeze(node, [dims[axis]])
    return replace_dim(dims, axis, w.frozen(node, shape_of(node)[axis]))


def _has_other_cuts(node: Node, axis: int, half: int) -> bool:
    """Whether other slices cut dimension ``axis`` elsewhere than into two halves of ``half`` entries."""
    rank = len(shape_of(operand_of(node)))
    alike = [user for user in operand_of(node).users if op_name(user) == op_name(node) and len(user.args) > 1]
    ends = [end for user in alike if dim_index(user, 1, rank) == axis for end in slice_bounds(user)]
    return not {0, half, 2 * half}.issuperset(ends)


def slice_bounds(node: Node) -> tuple[int, int]:
    """Return the first index of a slice and the index behind its last."""
    shape = shape_of(operand_of(node))
    n = shape[dim_index(node, 1, len(shape))]
    if op_name(node) == "narrow":
        start = as_int(node.args[2]) % n
        return start, start + as_int(node.args[3])
    first, end = (None if value is None else as_int(value) for value in (argument(node, 2), argument(node, 3)))
    return slice(first, end).indices(n)[:2]


def pixel_shuffle(w: Walk, node: Node) -> Dims:
    """Rule for pixel shuffle: ``C·r²`` channels become ``C`` channels on a finer grid; the factor r² is frozen."""
    dims, shape = w.first(node), shape_of(node)
    why = w.why(node)
    channels, factor = d.split_product(dims[-3], [shape[-3], d.size(dims[-3]) // shape[-3]], why)
    d.freeze(factor, why)
    return (*dims[:-3], channels, *(d.frozen(n, why) for n in shape[-2:]))


def per_channel(w: Walk, node: Node) -> Value:
    """Rule for pooling and resizing: passes batch and channels, freezes space."""
    dims = w.first(node)
    outer = len(dims) - {"1d": 1, "3d": 3}.get(op_name(node)[-2:], 2)  # without the dimensions of space
    w.freeze(node, dims[outer:])
    out: list[Dims | None] = [
        (*dims[:outer], *(w.frozen(node, n) for n in shape[outer:])) for shape in result_shapes(node)
    ]
    return out if isinstance(shapes_of(node), list) else out[0]


def triangle(w: Walk, node: Node) -> Dims:
    """Rule for ``tril`` and ``triu``: freezes the last two dimensions, since the diagonal depends on positions."""
    w.freeze(node, w.first(node)[-2:])
    return w.first(node)


def glu(w: Walk, node: Node) -> Dims:
    """Rule for GLU, where the second half gates the first: ties both halves, unit by unit."""
    dims, axis = w.along(node, 1, -1)
    first, second = d.split_at(dims[axis], d.size(dims[axis]) // 2, w.why(node))
    w.unify(node, first, second)
    return replace_dim(dims, axis, first)


def freeze_operand(w: Walk, node: Node) -> Value:
    """Freeze all dimensions of the operand and return new frozen ones for the result."""
    w.freeze(node, w.first(node))
    return w.fresh(node)


RULES: dict[Rule, str] = {
    reshape: "view reshape flatten unflatten _unsafe_view view_as reshape_as",
    transpose: "transpose swapaxes mT mH adjoint t numpy_T permute movedim",
    unsqueeze: "unsqueeze",
    squeeze: "squeeze",
    concatenate: "cat concat concatenate",
    stack: "stack",
    split: "split split_with_sizes chunk tensor_split",
    narrow: "slice narrow",
    pixel_shuffle: "pixel_shuffle",
    per_channel: (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices "
        "_adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "upsample_nearest3d upsample_trilinear3d _upsample_bilinear2d_aa"
    ),
    triangle: "tril triu",
    glu: "glu",
}
