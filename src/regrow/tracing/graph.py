"""From a finished walk to an :class:`~regrow.axes.AxisGraph`: slots, keys, marks and reasons as plain data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product
from math import prod

from torch import nn

from regrow.axes import Axis, AxisGraph, Dim, Example, Fold, Mark, Product, Role, Slot, Sum, Work
from regrow.tracing import attributes
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr, Leaf
from regrow.tracing.folds import Found, folds
from regrow.tracing.walk import Dims, Walk

MOST_SLOTS = 64
"""More places than this in one dimension are not kept apart; the axis is frozen."""


@dataclass(frozen=True)
class Names:
    """How leaves are written once the walk is over: the key of an axis, or a number."""

    keys: Mapping[int, str]

    def dim(self, expr: Expr) -> Dim:
        """A dimension written in axes."""
        expr = d.resolve(expr)
        match expr:
            case Leaf():
                return self.keys.get(expr.number, expr.size)
            case d.Times(parts):
                return _joined(Product, [self.dim(part) for part in parts])
            case d.Plus(parts):
                return _joined(Sum, [self.dim(part) for part in parts])

    def dims(self, exprs: Dims) -> tuple[Dim, ...]:
        """Several dimensions written in axes."""
        return tuple(map(self.dim, exprs))


def _joined(kind: type[Product] | type[Sum], parts: list[Dim]) -> Dim:
    if all(isinstance(part, int) for part in parts):
        numbers = [part for part in parts if isinstance(part, int)]
        return prod(numbers) if kind is Product else sum(numbers)
    return kind(tuple(parts))


def assemble(model: nn.Module, w: Walk, example: Example) -> tuple[AxisGraph, Names]:
    """The axis graph of a walked network, and the names under which its leaves stand in it."""
    state = {name: w.dims[node] for node, name in w.capture.states.items() if name not in w.capture.unused}
    ties = _ties(model, w, state)
    _freeze_unreachable(model, w)
    _freeze_unsettable(model, w)
    found = folds(model, w)
    integers = attributes.integers(model, w, state)
    _freeze_partners(state.values())
    places = {name: list(_places(name, dims)) for name, dims in state.items()}
    by_leaf: dict[int, list[Slot]] = {}
    leaf_of: dict[int, Leaf] = {}
    for name, own in places.items():
        for leaf, slot in own:
            leaf_of[leaf.number] = leaf
            by_leaf.setdefault(leaf.number, []).extend(_with_roles(model, w, name, slot, ties))
    axes, keys = _axes(leaf_of, by_leaf)
    names = Names(keys)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    shapes: dict[str, tuple[Dim, ...]] = {
        name: names.dims(state[name]) if name in state else tuple(tensor.shape) for name, tensor in tensors.items()
    }
    return (
        AxisGraph(
            axes=axes,
            shapes=shapes,
            parameters=frozenset(parameters),
            counted=_counted(w, ties, names, state),
            itemsize={name: tensor.element_size() for name, tensor in tensors.items()},
            ties=ties,
            work=tuple(Work(module, op, names.dims(dims)) for module, op, dims in w.work),
            integers={key: names.dim(expr) for key, expr in integers.items() if not isinstance(names.dim(expr), int)},
            folds=tuple(
                _fold(fold, names) for fold in found if not all(isinstance(x, int) for x in names.dims(fold.over))
            ),
            unreached=w.capture.unused,
            notes=tuple(dict.fromkeys(w.notes)),
            example=example,
        ),
        names,
    )


def _fold(found: Found, names: Names) -> Fold:
    return Fold(names.dims(found.over), found.weight, found.kind, found.plus, found.epsilon, found.value)


def _ties(model: nn.Module, w: Walk, state: dict[str, Dims]) -> dict[str, str]:
    """Further names of one tensor → its first name. Their dimensions are the same ones."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        original = first.setdefault(id(tensor), name)
        if original == name:
            continue
        ties[name] = original
        known = state.get(name) or state.get(original)
        if known is None:
            continue
        for own, other in zip(state.setdefault(name, known), state.setdefault(original, known), strict=True):
            d.unify(own, other, f"{name} and {original} are one tensor, and their uses have no common form")
        if name in w.capture.unused or original in w.capture.unused:
            state[name] = state[original] = known
    return ties


def _freeze_unreachable(model: nn.Module, w: Walk) -> None:
    """A module that the example does not run may read any dimension of the size it expects."""
    unused = set(w.capture.unused)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name in w.capture.unused:
        others = [n for n, tensor in tensors.items() if tensor is tensors[name] and n != name]
        if tensors[name].dim() < 2 or any(n not in unused for n in others):
            continue
        width = tensors[name].shape[1]
        for dims in w.dims.values():
            for one in dims if isinstance(dims, list) else [dims]:
                for expr in one or ():
                    if d.size(expr) == width and d.is_free(expr):
                        d.freeze(expr, f"{name}, which the example does not reach, may read it")


def _freeze_unsettable(model: nn.Module, w: Walk) -> None:
    """A repetition whose number no attribute holds cannot change."""
    for path, n, expr in w.literals:
        leaf = d.resolve(expr)
        if isinstance(leaf, Leaf) and leaf.integer and not leaf.frozen and not attributes.repeats(model, path, n):
            d.freeze(leaf, f"it is a repetition in {path or 'the model'}, and no attribute there sets how often")


def _freeze_partners(state: Iterator[Dims] | object) -> None:
    """Where one of several axes of equal count is frozen, all are."""
    leaves = list({leaf.number: leaf for dims in state for expr in dims for leaf in d.leaves(expr)}.values())  # type: ignore[attr-defined]
    again = True
    while again:
        again = False
        fixed = {label: leaf.frozen for leaf in leaves if leaf.frozen for label in leaf.counts}
        for leaf in leaves:
            if not leaf.frozen and (label := next((x for x in leaf.counts if x in fixed), None)):
                leaf.frozen = f"it must keep as many units as a frozen one: {fixed[label]}"
                again = True


def _places(name: str, dims: Dims) -> Iterator[tuple[Leaf, Slot]]:
    for dim, expr in enumerate(dims):
        for leaf, loops, inner, offset in _occurrences(expr):
            loops = _merged(loops)
            starts = [
                offset + sum(i * s for i, s in zip(at, (s for _, s in loops[1:]), strict=True))
                for at in product(*(range(n) for n, _ in loops[1:]))
            ]
            if len(starts) > MOST_SLOTS:
                d.freeze(leaf, f"its units lie in {len(starts)} separate places of {name}")
                starts = starts[:1]
            outer, stride = loops[0] if loops else (1, leaf.size * inner)
            for start in starts:
                yield leaf, Slot(name, dim, outer, stride, inner, start, Role.PRODUCES)


def _occurrences(expr: Expr) -> Iterator[tuple[Leaf, list[tuple[int, int]], int, int]]:
    """Each leaf in a dimension with its enclosing loops ``(times, stride)``, inner extent and offset."""
    expr = d.resolve(expr)
    if isinstance(expr, Leaf):
        yield expr, [], 1, 0
    elif isinstance(expr, d.Plus):
        before = 0
        for part in expr.parts:
            for leaf, loops, inner, offset in _occurrences(part):
                yield leaf, loops, inner, offset + before
            before += d.size(part)
    else:
        for i, part in enumerate(expr.parts):
            times, tail = prod(map(d.size, expr.parts[:i])), prod(map(d.size, expr.parts[i + 1 :]))
            for leaf, loops, inner, offset in _occurrences(part):
                around = [(times, d.size(part) * tail)] if times > 1 else []
                yield leaf, [*around, *((n, s * tail) for n, s in loops)], inner * tail, offset * tail


def _merged(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Loops that run on without a gap are one; the longest of the rest comes first."""
    merged: list[tuple[int, int]] = []
    for times, stride in loops:
        if merged and merged[-1][1] == times * stride:
            merged[-1] = (merged[-1][0] * times, stride)
        else:
            merged.append((times, stride))
    return sorted(merged, key=lambda loop: -loop[0])


def _with_roles(model: nn.Module, w: Walk, name: str, slot: Slot, ties: Mapping[str, str]) -> list[Slot]:
    parts = [name, *(n for n, first in ties.items() if first == name or first == ties.get(name)), ties.get(name, name)]
    roles = {role for part in parts for role in w.roles.get((part, slot.dim), ())}
    fallback = Role.PRODUCES if name in dict(model.named_parameters(remove_duplicate=False)) else Role.SCALES
    ordered = [role for role in Role if role in roles] or [fallback]
    return [Slot(slot.name, slot.dim, slot.outer, slot.stride, slot.inner, slot.offset, role) for role in ordered]


def _axes(leaf_of: Mapping[int, Leaf], slots: Mapping[int, list[Slot]]) -> tuple[dict[str, Axis], dict[int, str]]:
    keys: dict[int, str] = {}
    axes: dict[str, Axis] = {}
    counts = _count_groups(leaf_of)
    for number, leaf in leaf_of.items():
        own = tuple(slots[number])
        key = _key(own[0], axes)
        roles = {slot.role for slot in own}
        reason = leaf.frozen
        if not reason and Role.PRODUCES not in roles:
            reason = "no parameter makes its units"
        if not reason and Role.CONSUMES not in roles:
            reason = "no parameter reads its units"
        mark = Mark.FROZEN if reason else leaf.mark
        axes[key] = Axis(key, leaf.size, own, mark, reason or leaf.why, counts.get(number, ""))
        if not reason:
            keys[number] = key
    partners = {axis.count for axis in axes.values() if axis.count and not axis.free}
    for key, axis in axes.items():
        if axis.count in partners and axis.free:
            axes[key] = _refrozen(axis, "it must keep as many units as a frozen axis")
            keys = {number: other for number, other in keys.items() if other != key}
    return {key: _nested(axis, axes) for key, axis in axes.items()}, keys


def _refrozen(axis: Axis, reason: str) -> Axis:
    return Axis(axis.key, axis.size, axis.slots, Mark.FROZEN, reason, axis.count, axis.inside)


def _nested(axis: Axis, axes: Mapping[str, Axis]) -> Axis:
    for other in axes.values():
        if other is axis or not other.free:
            continue
        if any(
            a.name == b.name and a.dim == b.dim and b.inner >= a.stride and b.inner > a.inner and a.outer >= other.size
            for a in axis.slots
            for b in other.slots
        ):
            return Axis(axis.key, axis.size, axis.slots, axis.mark, axis.reason, axis.count, other.key)
    return axis


def _count_groups(leaf_of: Mapping[int, Leaf]) -> dict[int, str]:
    groups: list[tuple[set[str], set[int]]] = []
    for number, leaf in leaf_of.items():
        if not leaf.counts:
            continue
        labels, members = set(leaf.counts), {number}
        for group in [g for g in groups if g[0] & labels]:
            labels |= group[0]
            members |= group[1]
            groups.remove(group)
        groups.append((labels, members))
    return {n: f"count-{min(members)}" for _, members in groups if len(members) > 1 for n in members}


def _key(slot: Slot, taken: Mapping[str, Axis]) -> str:
    key = f"{slot.name}:{slot.dim}" + (f"+{slot.offset}" if slot.offset else "")
    key += f"/{slot.inner}" if slot.inner > 1 else ""
    while key in taken:
        key += "'"
    return key


def _counted(w: Walk, ties: Mapping[str, str], names: Names, state: Mapping[str, Dims]) -> tuple[str, ...]:
    """The weights a keep fraction is a fraction of; without look-up tables and the head that mirrors them."""
    tables = {ties.get(name, name) for name in w.tables}
    counted = []
    for name in w.weights:
        first = ties.get(name, name)
        heads = w.tables and any(
            leaf.frozen == "it is an output of the model" for expr in state[name] for leaf in d.leaves(expr)
        )
        if first not in tables and first not in counted and not heads and len(state[name]) > 1:
            counted.append(first)
    return tuple(counted)
