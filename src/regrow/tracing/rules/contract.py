"""Rules for operations that multiply and sum: linear layers, matrix products, convolutions, attention, embeddings."""

from torch.fx import Node
from torch.fx.node import Argument

from regrow.core.axes import Mark, Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import argument, module_of, op_name, operand_of, operands_in, whole
from regrow.tracing.walk import Dims, Rule, Walk

ALIGNED = 16
"""Alignment in bytes of each row of an expert's matrix, as torch's grouped matrix product requires."""


def linear(w: Walk, node: Node) -> Dims:
    """Rule for linear layers: ties the input's last dimension to ``W``'s second and the bias to its first."""
    x, weight = operand_of(node, 0, "input"), operand_of(node, 1, "weight")
    _contract(w, node, (x, len(w.of(x)) - 1), (weight, 1))
    w.role(weight, 0, Role.PRODUCES)
    out = (*w.of(x)[:-1], w.of(weight)[0])
    _add_bias(w, node, argument(node, 2, "bias"), out)
    w.contracts(node, (x, weight), (*out, w.of(x)[-1]))
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
    _contract(w, node, (a, len(left) - 1), (b, max(len(right) - 2, 0)))
    if len(right) > 1:
        w.role(b, len(right) - 1, Role.PRODUCES)
    out: list[Expr] = []
    batches = left[:-2], right[:-2]
    for i in range(-max(map(len, batches)), 0):
        pair = [batch[i] for batch in batches if len(batch) >= -i and d.size(batch[i]) != 1]
        if len(pair) == 2:
            w.unify(node, pair[0], pair[1], "batch dimensions of a product have no common form")
        out.append(pair[0] if pair else d.ONE)
    out += left[-2:-1] if len(left) > 1 else ()
    out += right[-1:] if len(right) > 1 else ()
    w.contracts(node, (a, b), (*out, left[-1]))
    return tuple(out)


def einsum(w: Walk, node: Node) -> Dims:
    """Rule for ``einsum``: ties dimensions of the same letter; letters missing in the result are summed over."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    tensors = operands_in(operands)
    terms, result = _letters(equation, [len(w.of(tensor)) for tensor in tensors])
    known: dict[str, Expr] = {}
    for tensor, term in zip(tensors, terms, strict=True):
        for letter, expr in zip(term, w.of(tensor), strict=True):
            if term.count(letter) > 1:
                w.freeze(node, "a diagonal of it is taken", expr)
            if d.size(known.get(letter, d.ONE)) == 1:
                known[letter] = expr
            elif d.size(expr) > 1:
                w.unify(node, known[letter], expr, "dimensions of one letter have no common form")
    for letter, expr in known.items():
        holders = {i: tensor for i, tensor in enumerate(tensors) if letter in terms[i]}
        summed = letter not in result and d.size(expr) > 1
        role = Role.CONSUMES if summed else Role.SCALES if len(holders) > 1 else Role.PRODUCES
        for i, tensor in holders.items():
            w.role(tensor, terms[i].index(letter), role)
        if summed:
            first = min(holders.values(), key=lambda tensor: bool(w.source(tensor)))
            others = [w.source(tensor) for tensor in holders.values() if tensor is not first]
            dim = terms[tensors.index(first)].index(letter)
            w.reads(node, first, dim, weight=next(filter(None, others), ""))
    w.contracts(node, tensors if len(tensors) > 1 else (), tuple(known.values()))
    return tuple(known[letter] for letter in result)


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result, with an ellipsis replaced by letters."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = "".join(map(chr, range(0x391, 0x3A0)))  # capital Greek: no equation uses them
    covers = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    written = [term.replace("...", spare[max(covers) - n : max(covers)]) for term, n in zip(terms, covers, strict=True)]
    if arrow:
        return written, right.replace("...", spare[: max(covers)])
    every = "".join(terms).replace("...", "")
    once = sorted(letter for letter in set(every) if every.count(letter) == 1)
    return written, spare[: max(covers) if "..." in left else 0] + "".join(once)


def _contract(w: Walk, node: Node, *summed: tuple[Node, int]) -> None:
    (x, i), (other, k) = summed
    w.unify(node, w.of(x)[i], w.of(other)[k], "the two sides of a sum have no common form")
    w.reads(node, x, i, weight=w.source(other))
    for operand, dim in summed:
        w.role(operand, dim, Role.CONSUMES)


def _align(w: Walk, node: Node, operand: Node, dims: Dims, why: str) -> None:
    """Tie an operand, whose dimensions of size 1 are broadcast, to the last dimensions of a tensor."""
    shape = w.of(operand)
    for expr, other in zip(shape, dims[len(dims) - len(shape) :], strict=True):
        if d.size(expr) > 1:
            w.unify(node, other, expr, why)


def _add_bias(w: Walk, node: Node, bias: Argument, out: Dims) -> None:
    if isinstance(bias, Node):
        for i in range(len(w.of(bias))):
            w.role(bias, i, Role.SHIFTS)
        _align(w, node, bias, out, "a bias has another form than its layer's output")


def convolution(w: Walk, node: Node) -> Dims:
    """Rule for convolutions: ties input channels to ``W``'s second dimension (of one group) and output to its first."""
    x, weight = operand_of(node, 0, "input"), operand_of(node, 1, "weight")
    dims, kernel = w.of(x), w.of(weight)
    space = len(kernel) - 2
    *batch, channels = dims[: len(dims) - space]
    for expr in kernel[2:]:
        d.freeze(expr, "it is a kernel's extent")
    w.freeze(node, "a convolution runs along it", *dims[len(dims) - space :])
    transposed = "transpose" in op_name(node)
    groups = whole(argument(node, 6, "groups") or 1)
    made = _grouped(w, node, channels, kernel, groups, transposed)
    w.role(weight, 0, Role.CONSUMES if transposed and groups == 1 else Role.PRODUCES)
    w.role(weight, 1, Role.PRODUCES if transposed else Role.CONSUMES)
    if not (groups > 1 and d.size(kernel[1]) == 1 and d.size(kernel[0]) == groups):
        w.reads(node, x, len(dims) - space - 1, weight=w.source(weight))
    out = (*batch, made, *(w.frozen(node, n, "made by a convolution") for n in node.meta["val"].shape[-space:]))
    _add_bias(w, node, argument(node, 2, "bias"), (made,))
    w.contracts(node, (weight,), (*out, kernel[0] if transposed else kernel[1], *kernel[2:]))
    return out


def _grouped(w: Walk, node: Node, channels: Expr, kernel: Dims, groups: int, transposed: bool) -> Expr:
    """Tie the input channels to the kernel and return the output channels."""
    why = "a convolution's channels have no common form with its input's"
    first, second = (kernel[1], kernel[0]) if transposed else (kernel[0], kernel[1])
    if groups == 1:
        w.unify(node, channels, second, why)
        return first
    if transposed:
        w.freeze(node, "a grouped transposed convolution reads it", channels, *kernel[:2])
        return w.frozen(node, d.size(kernel[1]) * groups, "made by a grouped transposed convolution")
    group = d.Leaf(groups)
    inner, outer = d.new(d.size(channels) // groups), d.new(d.size(first) // groups)
    w.unify(node, channels, d.times(group, inner), why)
    w.unify(node, first, d.times(group, outer), why)
    w.unify(node, inner, second, why)
    w.groups.append((module_of(node), group))
    return first


def attention(w: Walk, node: Node) -> Dims:
    """Rule for fused attention: ties query, key and value per head, and freezes the sequence that is attended over."""
    query = operand_of(node)
    q, k, v = w.of(query), w.of(operand_of(node, 1)), w.of(operand_of(node, 2))
    why = "query, key and value have no common form"
    w.unify(node, q[-1], k[-1], why)
    w.unify(node, k[-2], v[-2], why)
    d.mark(k[-2], Mark.COMPETED, w.why(node, why))
    w.freeze(node, "attention is taken over it", k[-2])
    grouped = bool(argument(node, 7, "enable_gqa"))
    for i in range(len(q) - 2):
        w.unify(node, k[i], v[i], why)
        repeated = grouped and i == len(q) - 3 and d.size(q[i]) != d.size(k[i])
        w.unify(node, q[i], d.times(k[i], d.Leaf(d.size(q[i]) // d.size(k[i]))) if repeated else k[i], why)
    out = (*q[:-1], v[-1])
    if isinstance(mask := argument(node, 3), Node):
        _align(w, node, mask, (*q[:-1], k[-2]), "a mask has another form than the attention")
    w.reads(node, query, len(q) - 1)
    if argument(node, 6, "scale") is None:
        w.norms.append((node, "scale"))
    w.contracts(node, (), (*q, k[-2]), (*out, k[-2]))
    return out


def embedding(w: Walk, node: Node) -> Dims:
    """Rule for embeddings: freezes the vocabulary, and appends ``W``'s second dimension to the index's."""
    table, index = operand_of(node), operand_of(node, 1)
    w.freeze(node, "it is a vocabulary, looked up by number", w.of(table)[0])
    w.role(table, 1, Role.PRODUCES)
    if name := w.source(table):
        w.tables.append(name)
    return (*w.of(index), *w.of(table)[1:])


def grouped_product(w: Walk, node: Node) -> Dims:
    """Rule for the grouped matrix product ``y[s] = x[s] W[e(s)]`` of experts, with ``W`` as [experts, in, out]."""
    x, weight, ends = (operand_of(node, i) for i in range(3))
    rows, kernel = w.of(x), w.of(weight)
    _contract(w, node, (x, 1), (weight, 1))
    w.unify(node, kernel[0], w.of(ends)[0], "experts and their rows have no common form")
    for expr in kernel[1:]:
        d.in_multiples(expr, max(1, ALIGNED // node.meta["val"].itemsize))
    w.role(weight, 0, Role.SCALES)
    w.role(weight, 2, Role.PRODUCES)
    w.contracts(node, (weight,), (rows[0], *kernel[1:]))
    return (rows[0], kernel[2])


RULES: dict[Rule, str] = {
    linear: "linear",
    addmm: "addmm baddbmm",
    matmul: "matmul mm bmm mv dot",
    convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    attention: "scaled_dot_product_attention",
    embedding: "embedding",
    einsum: "einsum",
    grouped_product: "_grouped_mm grouped_mm_fallback",
}
