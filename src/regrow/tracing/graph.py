"""Turn a finished walk into an :class:`~regrow.core.axes.AxisGraph`: slots, keys, marks and reasons as plain data."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from torch import nn

from regrow.core.axes import Axis, AxisGraph, Dim, Example, Mark, Product, Role, Slot, Sum, Work, axes_in, size_of
from regrow.core.dims import occurrences
from regrow.tracing import attributes
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr, Leaf
from regrow.tracing.folds import folds, not_zero_initialisable
from regrow.tracing.kinds import unalterable
from regrow.tracing.model_state import state_of
from regrow.tracing.walk import Dims, Walk, all_dims

Multiple = tuple[Leaf, int]
"""A leaf, and how many entries of the dimension each of its units counts for."""


def group_equal_sizes(w: Walk) -> dict[int, tuple[str, int]]:
    """Return leaf number → label of its group of equal sizes, and how many entries each of its units counts for."""
    pairs: list[tuple[Multiple, Multiple, str]] = []
    for a, b, why in w.equal:
        leaves = _pairs(a, b)
        if leaves is None:
            d.clash(a, b, why)
        else:
            pairs += [(x, y, why) for x, y in leaves]
    again = True
    while again:
        again = False
        for (a, _), (b, _), why in pairs:
            if bool(a.frozen) != bool(b.frozen):
                d.clash(a, b, why)
                again = True
    held: dict[int, tuple[str, int]] = {}
    for (a, times_a), (b, times_b), why in pairs:
        label = held.get(a.number, held.get(b.number, (f"count-{a.number}", 0)))[0]
        for leaf, times in ((a, times_a), (b, times_b)):
            if held.setdefault(leaf.number, (label, times)) != (label, times):
                d.clash(a, b, why)
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


MOST_SLOTS = 64
"""The most separate places of an axis in one dimension; an axis with more is frozen."""


@dataclass(frozen=True)
class Names:
    """Writes the expressions of a walk in axes: each leaf becomes the key of an axis, or a fixed size.

    Args:
        keys: Number of a leaf → the key of its axis.
    """

    keys: Mapping[int, str]

    def dim(self, expr: Expr) -> Dim:
        """Return an expression as a dimension written in axes."""
        expr = d.resolve(expr)
        if isinstance(expr, Leaf):
            return self.keys.get(expr.number, expr.size)
        parts = self.dims(expr.parts)
        whole = Product(parts) if isinstance(expr, d.Times) else Sum(parts)
        return whole if {*axes_in(whole)} else size_of(whole, {})

    def dims(self, exprs: Dims) -> tuple[Dim, ...]:
        """Return several expressions as dimensions written in axes."""
        return tuple(map(self.dim, exprs))


def assemble(model: nn.Module, w: Walk, example: Example) -> tuple[AxisGraph, Names]:
    """Return the axis graph of a walked network, and the names of its axes for writing further expressions."""
    state = {name: w.of(node) for node, name in w.capture.states.items() if name not in w.capture.unused}
    ties = _ties(model, w, state)
    aliases = _aliases(ties)
    unused = {*w.capture.unused}
    unreached = tuple(name for name in w.capture.unused if unused.issuperset(aliases.get(name, ())))
    _freeze_unreachable(model, w, unreached)
    _freeze_unsettable(model, w)
    for name, reason in unalterable(model):
        for expr in state.get(name, ()):
            d.freeze(expr, reason)
    sites = folds(model, w)
    integers, alike = attributes.integers(model, w, state)
    w.equal += alike
    held = group_equal_sizes(w)
    places = {name: list(_places(name, dims)) for name, dims in state.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_leaf: dict[int, list[Slot]] = {}
    leaf_of: dict[int, Leaf] = {}
    for own in places.values():
        for leaf, slot in own:
            leaf_of[leaf.number] = leaf
            by_leaf.setdefault(leaf.number, []).extend(_with_roles(slot, w, aliases, parameters))
    read = {leaf.number for one in w.readings for leaf in d.leaves(w.of(one.operand)[one.dim])}
    read |= {leaf.number for expr, _ in w.also for leaf in d.leaves(expr)}
    tensors = state_of(model)
    lasting = {id(tensors[name]) for name in w.capture.states.values() if name in tensors}  # not made by the run itself
    tensors = {name: tensor for name, tensor in tensors.items() if id(tensor) in lasting}
    axes, keys = _axes(leaf_of, by_leaf, held, read, not_zero_initialisable(w, tensors))
    names = Names(keys)
    divisors = [replace(fold, over=names.dims(over)) for over, fold in sites]
    written = {place: names.dim(expr) for place, expr in integers.items()}
    shapes: dict[str, tuple[Dim, ...]] = {
        name: names.dims(state[name]) if name in state else tuple(tensor.shape) for name, tensor in tensors.items()
    }
    return (
        AxisGraph(
            axes=axes,
            shapes=shapes,
            parameters=frozenset(parameters),
            counted=_counted(w, ties, state),
            itemsize={name: tensor.element_size() for name, tensor in tensors.items()},
            ties=ties,
            work=tuple(Work(module, op, names.dims(dims)) for module, op, dims in w.work),
            integers={place: dim for place, dim in written.items() if not isinstance(dim, int)},
            folds=tuple(fold for fold in divisors if not all(isinstance(dim, int) for dim in fold.over)),
            unreached=unreached,
            notes=tuple(dict.fromkeys(w.notes)),
            decisions=w.capture.decisions,
            tracer=w.capture.tracer,
            trained=bool(w.also),
            example=example,
        ),
        names,
    )


def _ties(model: nn.Module, w: Walk, state: dict[str, Dims]) -> dict[str, str]:
    """Return further names of tied tensors → the first name; their dimensions are unified."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state_of(model).items():
        original = first.setdefault(id(tensor), name)
        if original == name:
            continue
        ties[name] = original
        known = state.get(name) or state.get(original)
        if known is None:
            continue
        for expr, other in zip(state.setdefault(name, known), state.setdefault(original, known), strict=True):
            d.unify(expr, other, f"{name} and {original} are one tensor, and their uses have no common form")
        if name in w.capture.unused or original in w.capture.unused:
            state[name] = state[original] = known
    return ties


def _freeze_unreachable(model: nn.Module, w: Walk, unreached: Iterable[str]) -> None:
    """Freeze dimensions that unused modules might read: those of the size that such a module expects."""
    for name in unreached:
        shape = model.get_parameter(name).shape
        for expr in (expr for dims in w.dims.values() for expr in all_dims(dims)):
            if len(shape) > 1 and d.size(expr) == shape[1]:
                d.freeze(expr, f"{name}, which the example does not reach, may read it")


def _freeze_unsettable(model: nn.Module, w: Walk) -> None:
    """Freeze repetitions whose number no attribute holds."""
    for literal in w.literals:
        leaf, where = d.resolve(literal.expr), literal.module
        if isinstance(leaf, Leaf) and leaf.integer and not attributes.repeats(model, where, literal.number):
            d.freeze(leaf, f"it is a repetition in {where or 'the model'}, and no attribute there sets how often")


def _places(name: str, dims: Dims) -> Iterator[tuple[Leaf, Slot]]:
    for i, expr in enumerate(dims):
        inside = {leaf.number: leaf for leaf in d.leaves(expr)}
        sizes = {str(number): leaf.size for number, leaf in inside.items()}
        dim = Names({number: str(number) for number in inside}).dim(expr)
        for number, leaf in inside.items():
            for loops, inner, offset in occurrences(dim, str(number), sizes):
                starts = [
                    offset + sum(n * stride for n, (_, stride) in zip(at, loops[1:], strict=True))
                    for at in product(*(range(times) for times, _ in loops[1:]))
                ]
                if len(starts) > MOST_SLOTS:
                    d.freeze(leaf, f"its units lie in {len(starts)} separate places of {name}")
                    starts = starts[:1]
                outer, stride = loops[0] if loops else (1, leaf.size * inner)
                for start in starts:
                    yield leaf, Slot(name, i, outer, stride, inner, start, Role.PRODUCES)


def _with_roles(slot: Slot, w: Walk, aliases: Mapping[str, list[str]], parameters: Container[str]) -> list[Slot]:
    """Return the slot once per role; a parameter of unknown role produces its units."""
    names = aliases.get(slot.name, [slot.name])
    roles = {role for name in names for role in w.roles.get((name, slot.dim), ())}
    if slot.name not in parameters and roles > {Role.PRODUCES}:
        roles.discard(Role.PRODUCES)  # a mask on the weight that makes the units
    ordered = [role for role in Role if role in roles]
    return [replace(slot, role=role) for role in ordered or [Role.PRODUCES if slot.name in parameters else Role.SCALES]]


def _aliases(ties: Mapping[str, str]) -> dict[str, list[str]]:
    """Return name → all names of the same tensor."""
    groups: dict[str, list[str]] = {}
    for name, first in ties.items():
        groups.setdefault(first, [first]).append(name)
    return {name: group for group in groups.values() for name in group}


def _axes(
    leaf_of: Mapping[int, Leaf],
    slots: Mapping[int, list[Slot]],
    held: Mapping[int, tuple[str, int]],
    read: Container[int],
    narrow: Mapping[int, str],
) -> tuple[dict[str, Axis], dict[int, str]]:
    keys: dict[int, str] = {}
    axes: dict[str, Axis] = {}
    for number, leaf in leaf_of.items():
        own = tuple(slots[number])
        key = _key(own[0], axes)
        roles = {slot.role for slot in own}
        reason = leaf.frozen
        if not reason and Role.PRODUCES not in roles:
            reason = "no parameter makes its units"
        if not reason and Role.CONSUMES not in roles and number not in read:
            reason = "nothing reads its units"
        mark = Mark.FROZEN if reason else leaf.mark
        count, times = held.get(number, ("", 1))
        least, why = max(leaf.least, 2 if leaf.integer else 1), narrow.get(number, "")
        axes[key] = Axis(key, leaf.size, own, mark, reason or leaf.why, count, times, least, leaf.multiple, narrow=why)
        if not reason:
            keys[number] = key
    partners = {axis.count for axis in axes.values() if axis.count and not axis.free}
    for key, axis in axes.items():
        if axis.count in partners and axis.free:
            axes[key] = replace(axis, mark=Mark.FROZEN, reason="it must keep as many units as a frozen axis")
            keys = {number: other for number, other in keys.items() if other != key}
    return _nested(axes), keys


def _nested(axes: dict[str, Axis]) -> dict[str, Axis]:
    """Set ``inside`` of each axis to the axis whose units contain its units, in the same dimension."""
    by_place: dict[tuple[str, int], list[tuple[Slot, Axis]]] = {}
    for axis in axes.values():
        for slot in axis.slots:
            by_place.setdefault((slot.name, slot.dim), []).append((slot, axis))

    def around(axis: Axis) -> str:
        for a in axis.slots:
            for b, other in by_place[a.name, a.dim]:
                if other.free and b.inner >= a.stride and b.inner > a.inner and a.outer >= other.size > 1:
                    return other.key
        return ""

    return {key: replace(axis, inside=around(axis)) for key, axis in axes.items()}


def _key(slot: Slot, taken: Mapping[str, Axis]) -> str:
    key = f"{slot.name}:{slot.dim}" + (f"+{slot.offset}" if slot.offset else "")
    key += f"/{slot.inner}" if slot.inner > 1 else ""
    while key in taken:
        key += "'"
    return key


def _counted(w: Walk, ties: Mapping[str, str], state: Mapping[str, Dims]) -> tuple[str, ...]:
    """Return the weights of which ``keep`` is a fraction: without embeddings and the output head that mirrors them."""
    tables = {ties.get(name, name) for name in w.tables}
    counted: dict[str, None] = {}
    for name in w.weights:
        first, leaves = ties.get(name, name), [leaf for expr in state[name] for leaf in d.leaves(expr)]
        head = w.tables and any(leaf.frozen == "it is an output of the model" for leaf in leaves)
        if first not in tables and not head and len(state[name]) > 1:
            counted[first] = None
    return tuple(counted)
