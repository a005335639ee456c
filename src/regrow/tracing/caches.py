"""Find the tensors that a key-value cache holds: keys and values of each attention, before heads are repeated."""

from collections.abc import Container, Iterator

from torch.fx import Node

from regrow.core.axes import Cache
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr, Leaf
from regrow.tracing.graph import Names
from regrow.tracing.nodes import ALIASES, module_of, op_name, whole
from regrow.tracing.walk import Dims, Walk, all_dims

MOST_STEPS = 16
"""The most operations between a softmax and the matrix products before and after it."""


def caches(w: Walk, names: Names) -> tuple[Cache, ...]:
    """Return the keys and values that each attention reads, as dimensions per token.

    Only attention over tokens of the model's input counts; tensors that are read twice are cached once.

    Args:
        w: The walk over the network's recording.
        names: Writes expressions as axes.
    """
    given = [node for node in w.capture.graph.nodes if node.op == "placeholder" and node not in w.capture.states]
    tokens = {leaf.number for node in given for expr in all_dims(w.dims[node]) for leaf in d.leaves(expr)}
    result: dict[tuple[Node, Node], Cache] = {}
    for node in w.capture.graph.nodes:
        for key, value, over in _read(w, node):
            if not _is_token(over, tokens):
                continue
            both = _kept(w, key), _kept(w, value)
            own = [_per_token(w.of(one), tokens) for one in both]
            if own[0] is not None and own[1] is not None:
                item = both[0].meta["val"].element_size()
                result.setdefault(both, Cache(module_of(node), names.dims(own[0]), names.dims(own[1]), item))
    return tuple(result.values())


def _read(w: Walk, node: Node) -> Iterator[tuple[Node, Node, Expr]]:
    """Yield keys, values and the dimension attended over, if an operation is an attention, fused or its softmax."""
    if node.op != "call_function":
        return
    if op_name(node) == "scaled_dot_product_attention":
        key, value = (node.kwargs.get(name, node.args[i] if len(node.args) > i else None) for i, name in _PLACES)
        if isinstance(key, Node) and isinstance(value, Node):
            yield key, value, w.of(key)[-2]
    elif op_name(node) in ("softmax", "_softmax"):
        asked, answered = _product(w, node, back=True), _product(w, node, back=False)
        if asked is not None and answered is not None:
            yield asked, answered, w.of(node)[whole(node.args[1])]


_PLACES = ((1, "key"), (2, "value"))


def _product(w: Walk, softmax: Node, back: bool) -> Node | None:
    """Return the second factor of the product before a softmax (the keys), or after it (the values)."""
    near = [softmax]
    for _ in range(MOST_STEPS):
        beyond: list[Node] = []
        for one in near:
            for other in one.all_input_nodes if back else one.users:
                if other.op != "call_function":
                    continue
                if op_name(other) in _PRODUCTS:
                    first, second = other.all_input_nodes[-2:] if len(other.all_input_nodes) > 1 else (other, other)
                    if first is not second and not w.source(first) and not w.source(second) and (back or first is one):
                        return second
                elif len(w.dims[other] or ()) >= 3:
                    beyond.append(other)
        near = beyond
    return None


_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum"))


def _kept(w: Walk, node: Node) -> Node:
    """Return the smallest of a tensor and those from which it was only reshaped or repeated."""
    best, one = node, node
    while one.op == "call_function" and op_name(one) in _LAID_OUT and isinstance(one.args[0], Node):
        one = one.args[0]
        if _bytes(one) < _bytes(best):
            best = one
    return best


_SHAPES = (
    "view reshape _unsafe_view view_as reshape_as flatten unflatten squeeze unsqueeze expand expand_as broadcast_to "
    "repeat tile repeat_interleave transpose swapaxes permute movedim mT mH adjoint t slice"
)
_LAID_OUT = ALIASES | frozenset(_SHAPES.split())


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _per_token(dims: Dims, tokens: Container[int]) -> Dims | None:
    """Return the dimensions without those of the model's input; ``None`` if there are none of these."""
    parts = [part for expr in map(d.resolve, dims) for part in (expr.parts if isinstance(expr, d.Times) else (expr,))]
    own = tuple(part for part in parts if not _is_token(part, tokens))
    return own if len(own) < len(parts) else None


def _is_token(expr: Expr, tokens: Container[int]) -> bool:
    expr = d.resolve(expr)
    return isinstance(expr, Leaf) and expr.number in tokens
