"""Rules for operations that multiply and sum: linear layers, matrix products, convolutions, attention, embeddings."""

from torch.fx import Node
from torch.fx.node import Argument

from regrow.core.axes import Mark, Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import argument, module_of, op_name, operand_of, operands_in, whole
from regrow.tracing.walk import Dims, Walk


def linear(w: Walk, node: Node) -> Dims:
    """Rule for linear layers: ties the input's last dimension to ``W``'s second and the bias to its first."""
    x, weight = operand_of(node, 0, "input"), operand_of(node, 1, "weight")
    _contract(w, node, (x, len(w.of(x)) - 1), (weight, 1))
    w.role(weight, 0, Role.PRODUCES)
    out = (*w.of(x)[:-1], w.of(weight)[0])
    _add_bias(w, node, argument(node, 2, "bias"), out)
    _count(w, node, (*out, w.of(x)[-1]))
    return out


def addmm(w: Walk, node: Node) -> Dims:
    """Rule for ``b + x W``, with ``W`` as [..., in, out]: ties as a matrix product does, and b to the result."""
    out = _product(w, node, operand_of(node, 1), operand_of(node, 2))
    _add_bias(w, node, node.args[0], out)
    return out


def matmul(w: Walk, node: Node) -> Dims:
    """Rule for matrix products: ties the summed dimensions of both factors, and batch dimensions by broadcasting."""
    return _product(w, node, operand_of(node), operand_of(node, 1))


def _product(w: Walk, node: Node, a: Node, b: Node) -> Dims:
    left, right = w.of(a), w.of(b)
    inner = max(len(right) - 2, 0)
    _contract(w, node, (a, len(left) - 1), (b, inner))
    if len(right) > 1:
        w.role(b, len(right) - 1, Role.PRODUCES)
    out: list[Expr] = []
    batch_a, batch_b = left[:-2], right[:-2]
    rank = max(len(batch_a), len(batch_b))
    for i in range(-rank, 0):
        pair = [batch[i] for batch in (batch_a, batch_b) if len(batch) >= -i and d.size(batch[i]) != 1]
        if len(pair) == 2:
            d.unify(pair[0], pair[1], w.why(node, "batch dimensions of a product have no common form"))
        out.append(pair[0] if pair else d.ONE)
    out += left[-2:-1] if len(left) > 1 else ()
    out += right[-1:] if len(right) > 1 else ()
    _count(w, node, (*out, left[-1]))
    return tuple(out)


def einsum(w: Walk, node: Node) -> Dims:
    """Rule for ``einsum``: ties dimensions of the same letter; letters missing in the result are summed over."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    tensors = operands_in(operands)
    terms, result = _letters(equation, [len(w.of(one)) for one in tensors])
    known: dict[str, Expr] = {}
    for tensor, term in zip(tensors, terms, strict=True):
        for letter, expr in zip(term, w.of(tensor), strict=True):
            if term.count(letter) > 1:
                d.freeze(expr, w.why(node, "a diagonal of it is taken"))
            if d.size(known.get(letter, d.ONE)) == 1:
                known[letter] = expr
            elif d.size(expr) > 1:
                d.unify(known[letter], expr, w.why(node, "dimensions of one letter have no common form"))
    for letter, expr in known.items():
        holders = [one for one, term in zip(tensors, terms, strict=True) if letter in term]
        summed = letter not in result and d.size(expr) > 1
        role = Role.CONSUMES if summed else Role.SCALES if len(holders) > 1 else Role.PRODUCES
        for tensor, term in zip(tensors, terms, strict=True):
            if letter in term:
                w.role(tensor, term.index(letter), role)
        if summed:
            first = min(holders, key=lambda one: bool(w.source(one)))
            others = [w.source(one) for one in holders if one is not first]
            w.reads(node, first, terms[tensors.index(first)].index(letter), weight=next(filter(None, others), ""))
    for tensor in tensors:
        if len(tensors) > 1 and (name := w.source(tensor)) and name not in w.weights:
            w.weights.append(name)
    _count(w, node, tuple(known.values()))
    return tuple(known[letter] for letter in result)


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result, with an ellipsis replaced by letters."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = "".join(sorted(set(map(chr, range(0x391, 0x3A0)))))  # capital Greek: no equation uses them
    covers = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    written = [term.replace("...", spare[max(covers) - n : max(covers)]) for term, n in zip(terms, covers, strict=True)]
    if arrow:
        return written, right.replace("...", spare[: max(covers)])
    every = "".join(terms).replace("...", "")
    once = sorted(letter for letter in set(every) if every.count(letter) == 1)
    return written, spare[: max(covers) if "..." in left else 0] + "".join(once)


def _contract(w: Walk, node: Node, read: tuple[Node, int], weight: tuple[Node, int]) -> None:
    (x, i), (other, k) = read, weight
    d.unify(w.of(x)[i], w.of(other)[k], w.why(node, "the two sides of a sum have no common form"))
    w.reads(node, x, i, weight=w.source(other))
    for operand, dim in (read, weight):
        w.role(operand, dim, Role.CONSUMES)
    for operand in (x, other):
        if (name := w.source(operand)) and name not in w.weights:
            w.weights.append(name)


def _add_bias(w: Walk, node: Node, bias: Argument, out: Dims) -> None:
    if not isinstance(bias, Node):
        return
    dims = w.of(bias)
    for i, expr in enumerate(dims):
        w.role(bias, i, Role.SHIFTS)
        if d.size(expr) > 1:
            d.unify(out[len(out) - len(dims) + i], expr, w.why(node, "a bias has another form than its layer's output"))


def convolution(w: Walk, node: Node) -> Dims:
    """Rule for convolutions: ties input channels to ``W``'s second dimension and output channels to its first.

    With groups, the second dimension is the input channels of one group.
    """
    x, weight, bias = operand_of(node, 0, "input"), operand_of(node, 1, "weight"), argument(node, 2, "bias")
    dims, kernel = w.of(x), w.of(weight)
    space = len(kernel) - 2
    batch, channels = dims[: len(dims) - space - 1], dims[len(dims) - space - 1]
    for expr in kernel[2:]:
        d.freeze(expr, "it is a kernel's extent")
    for expr in dims[len(dims) - space :]:
        d.freeze(expr, w.why(node, "a convolution runs along it"))
    transposed = "transpose" in op_name(node)
    given = _argument(node, "groups", 6)
    groups = 1 if given is None else whole(given)
    made = _grouped(w, node, channels, kernel, groups, transposed)
    w.role(weight, 0, Role.CONSUMES if transposed and groups == 1 else Role.PRODUCES)
    w.role(weight, 1, Role.PRODUCES if transposed else Role.CONSUMES)
    if not (groups > 1 and d.size(kernel[1]) == 1 and d.size(kernel[0]) == groups):
        w.reads(node, x, len(dims) - space - 1, weight=w.source(weight))
    if (name := w.source(weight)) and name not in w.weights:
        w.weights.append(name)
    space_out = tuple(d.frozen(n, w.why(node, "made by a convolution")) for n in node.meta["val"].shape[-space:])
    out = (*batch, made, *space_out)
    if isinstance(bias, Node):
        w.role(bias, 0, Role.SHIFTS)
        d.unify(made, w.of(bias)[0], w.why(node, "a bias has another form than its layer's output"))
    _count(w, node, (*out, kernel[0] if transposed else kernel[1], *kernel[2:]))
    return out


def _grouped(w: Walk, node: Node, channels: Expr, kernel: Dims, groups: int, transposed: bool) -> Expr:
    """Tie the input channels to the kernel and return the output channels."""
    why = w.why(node, "a convolution's channels have no common form with its input's")
    first, second = (kernel[1], kernel[0]) if transposed else (kernel[0], kernel[1])
    if groups == 1:
        d.unify(channels, second, why)
        return first
    if transposed:
        for expr in (channels, *kernel[:2]):
            d.freeze(expr, w.why(node, "a grouped transposed convolution reads it"))
        return d.frozen(d.size(kernel[1]) * groups, w.why(node, "made by a grouped transposed convolution"))
    group = d.Leaf(groups)
    inner = d.Leaf(d.size(channels) // groups) if d.size(channels) > groups else d.ONE
    outer = d.Leaf(d.size(first) // groups) if d.size(first) > groups else d.ONE
    d.unify(channels, d.times(group, inner), why)
    d.unify(first, d.times(group, outer), why)
    d.unify(inner, second, why)
    w.groups.append((module_of(node), group))
    return first


def attention(w: Walk, node: Node) -> Dims:
    """Rule for fused attention: ties query, key and value per head, and freezes the sequence that is attended over."""
    query = operand_of(node)
    q, k, v = w.of(query), w.of(operand_of(node, 1)), w.of(operand_of(node, 2))
    why = w.why(node, "query, key and value have no common form")
    d.unify(q[-1], k[-1], why)
    d.unify(k[-2], v[-2], why)
    d.mark(k[-2], Mark.COMPETED, why)
    if d.is_free(k[-2]):
        d.freeze(k[-2], w.why(node, "attention is taken over it"))
    grouped = bool(_argument(node, "enable_gqa", 7))
    for i in range(len(q) - 2):
        d.unify(k[i], v[i], why)
        if grouped and i == len(q) - 3 and d.size(q[i]) != d.size(k[i]):
            d.unify(q[i], d.times(k[i], d.Leaf(d.size(q[i]) // d.size(k[i]))), why)
        else:
            d.unify(q[i], k[i], why)
    out = (*q[:-1], v[-1])
    _mask(w, node, argument(node, 3), (*q[:-1], k[-2]))
    w.reads(node, query, len(q) - 1)
    if _argument(node, "scale", 6) is None:
        w.norms.append((node, "scale"))
    _count(w, node, (*q, k[-2]))
    _count(w, node, (*out, k[-2]))
    return out


def _mask(w: Walk, node: Node, mask: Argument, dims: Dims) -> None:
    if isinstance(mask, Node):
        own = w.of(mask)
        for i, expr in enumerate(own):
            if d.size(expr) > 1:
                other = dims[len(dims) - len(own) + i]
                d.unify(other, expr, w.why(node, "a mask has another form than the attention"))


def embedding(w: Walk, node: Node) -> Dims:
    """Rule for embeddings: freezes the vocabulary, and appends ``W``'s second dimension to the index's."""
    table, index = operand_of(node), operand_of(node, 1)
    d.freeze(w.of(table)[0], w.why(node, "it is a vocabulary, looked up by number"))
    w.role(table, 1, Role.PRODUCES)
    if name := w.source(table):
        w.tables.append(name)
    return (*w.of(index), *w.of(table)[1:])


def _argument(node: Node, name: str, position: int) -> Argument:
    """Return an argument of a call by its name in the operation's schema, or its position if it has no schema."""
    takes = getattr(getattr(node.target, "_schema", None), "arguments", ())
    return argument(node, next((i for i, one in enumerate(takes) if one.name == name), position), name)


def _count(w: Walk, node: Node, dims: Dims) -> None:
    w.work.append((module_of(node), op_name(node), dims))


_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"

RULES = {
    "linear": linear,
    "addmm": addmm,
    "baddbmm": addmm,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), matmul),
    **dict.fromkeys(_CONVOLUTIONS.split(), convolution),
    "scaled_dot_product_attention": attention,
    "embedding": embedding,
    "einsum": einsum,
}
