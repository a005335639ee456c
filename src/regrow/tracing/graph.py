"""Turn a finished walk into an :class:`~regrow.core.axes.AxisGraph`: slots, keys, marks and reasons as plain data."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from regrow.core.axes import Axis, AxisGraph, Dim, Example, Mark, Product, Role, Slot, Sum, Work, axes_in, size_of
from regrow.core.axes.axis import find_occurrences
from regrow.tracing import attributes
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr, Leaf
from regrow.tracing.folds import find_folds, not_zero_initialisable
from regrow.tracing.model_state import state_of
from regrow.tracing.walk import Dims, Walk, all_dims

# A leaf, and how many entries of the dimension each of its units counts for.
Multiple = tuple[Leaf, int]


def _group_equal_sizes(w: Walk) -> dict[int, tuple[str, int]]:
    """Return leaf number → (``count``, ``times``) of its axis, by the pairs in ``w.equal``; freezes what conflicts."""
    pairs: list[tuple[Multiple, Multiple, str]] = []
    for a, b, why in w.equal:
        leaves = _pair_leaves(a, b)
        if leaves is None:
            d.freeze_both(a, b, why)
        else:
            pairs += [(x, y, why) for x, y in leaves]
    again = True
    while again:  # until no leaf of a pair is frozen alone
        again = False
        for (x, _), (y, _), why in pairs:
            if bool(x.frozen) != bool(y.frozen):
                d.freeze_both(x, y, why)
                again = True
    groups: dict[int, tuple[str, int]] = {}
    for first, second, why in pairs:
        group = groups.get(first[0].number) or groups.get(second[0].number)
        label = group[0] if group else f"count-{first[0].number}"
        for leaf, times in (first, second):
            if groups.setdefault(leaf.number, (label, times)) != (label, times):
                d.freeze_both(first[0], second[0], why)
    return groups


def _pair_leaves(a: Expr, b: Expr) -> list[tuple[Multiple, Multiple]] | None:
    """Return the pairs of leaves whose sizes must match for two dimensions to be of equal size.

    Empty: they are identical; ``None``: no pairs of leaves say it.
    """
    a, b = d.resolve(a), d.resolve(b)
    if d.identical(a, b):
        return []
    left, right = _as_multiple(a), _as_multiple(b)
    if left is not None and right is not None:
        return [(left, right)] if left[0] is not right[0] else None
    if type(a) is not type(b) or isinstance(a, Leaf) or isinstance(b, Leaf) or len(a.parts) != len(b.parts):
        return None
    inner = [_pair_leaves(x, y) for x, y in zip(a.parts, b.parts, strict=True)]
    return None if None in inner else [pair for pairs in inner for pair in pairs or ()]


def _as_multiple(expr: Expr) -> Multiple | None:
    """Return a dimension as a multiple of one leaf (``f ‖ f`` is 2·f); ``None`` if it is none."""
    leaves = list(d.leaves(expr))
    match d.resolve(expr):
        case Leaf() as leaf:
            return leaf, 1
        case d.Plus(parts) if leaves and len(leaves) == len(parts) and all(leaf is leaves[0] for leaf in leaves):
            return leaves[0], len(leaves)
    return None


@dataclass(frozen=True)
class Names:
    """Writes symbolic dimensions of a walk in axes: each leaf becomes the key of its axis, or its size if frozen."""

    keys: Mapping[int, str]  # number of a leaf → the key of its axis

    def dim(self, expr: Expr) -> Dim:
        """Return a symbolic dimension written in axes: an integer if nothing in it can change."""
        expr = d.resolve(expr)
        if isinstance(expr, Leaf):
            return self.keys.get(expr.number, expr.size)
        parts = self.dims(expr.parts)
        whole = Product(parts) if isinstance(expr, d.Times) else Sum(parts)
        return whole if {*axes_in(whole)} else size_of(whole, {})

    def dims(self, exprs: Dims) -> tuple[Dim, ...]:
        """Return several symbolic dimensions written in axes."""
        return tuple(map(self.dim, exprs))


def assemble(model: nn.Module, w: Walk, example: Example) -> tuple[AxisGraph, Names]:
    """Return the axis graph of a walked network, and the names of its axes; freezes further dimensions of ``w``."""
    state = {name: w.of(node) for node, name in w.capture.states.items() if name not in w.capture.unused}
    ties = _unify_ties(model, w, state)
    groups: dict[str, list[str]] = {}
    for name, first in ties.items():
        groups.setdefault(first, [first]).append(name)
    aliases = {name: names for names in groups.values() for name in names}
    unreached = tuple(name for name in w.capture.unused if {*w.capture.unused}.issuperset(aliases.get(name, ())))
    _freeze_unreachable(model, w, unreached)
    _freeze_unsettable(model, w)
    for name, reason in _find_unalterable(model):
        for expr in state.get(name, ()):
            d.freeze(expr, reason)
    divisors = find_folds(model, w)
    integers, equal_pairs = attributes.find_integers(model, w, state)
    w.equal += equal_pairs
    equal = _group_equal_sizes(w)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    slots: dict[Leaf, list[Slot]] = {}
    for name, dims in state.items():
        for leaf, slot in _find_slots(name, dims):
            slots.setdefault(leaf, []).extend(_with_roles(slot, w, aliases, parameters))
    tensors = state_of(model)
    lasting = {id(tensors[name]) for name in w.capture.states.values() if name in tensors}  # not made by the run itself
    tensors = {name: tensor for name, tensor in tensors.items() if id(tensor) in lasting}
    axes, keys = _make_axes(w, slots, equal, not_zero_initialisable(w, tensors))
    names = Names(keys)
    written = {attribute: names.dim(expr) for attribute, expr in integers.items()}
    in_axes = [replace(fold, over=names.dims(over)) for over, fold in divisors]
    graph = AxisGraph(
        axes=axes,
        shapes={
            name: names.dims(state[name]) if name in state else tuple(tensor.shape) for name, tensor in tensors.items()
        },
        parameters=frozenset(parameters),
        counted=_counted_weights(w, ties, state),
        itemsize={name: tensor.element_size() for name, tensor in tensors.items()},
        ties=ties,
        work=tuple(Work(module, op, names.dims(dims)) for module, op, dims in w.work),
        integers={attribute: dim for attribute, dim in written.items() if not isinstance(dim, int)},
        folds=tuple(fold for fold in in_axes if not all(isinstance(dim, int) for dim in fold.over)),
        unreached=unreached,
        notes=tuple(dict.fromkeys(w.notes)),
        decisions=w.capture.decisions,
        tracer=w.capture.tracer,
        trained=bool(w.training_reads),
        example=example,
    )
    return graph, names


def _unify_ties(model: nn.Module, w: Walk, state: dict[str, Dims]) -> dict[str, str]:
    """Unify the dimensions of tied tensors; return further name of a tied tensor → its first name.

    ``state``: name → dimensions, to which the missing ones of both names are added in place.
    """
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state_of(model).items():
        original = first.setdefault(id(tensor), name)
        if original == name:
            continue
        ties[name] = original
        dims = state.get(name) or state.get(original)
        if dims is None:
            continue
        for expr, other in zip(state.setdefault(name, dims), state.setdefault(original, dims), strict=True):
            d.unify(expr, other, f"{name} and {original} are one tensor, and their uses have no common form")
        if name in w.capture.unused or original in w.capture.unused:
            state[name] = state[original] = dims
    return ties


def _freeze_unreachable(model: nn.Module, w: Walk, unreached: Iterable[str]) -> None:
    """Freeze dimensions that modules may read which did not run.

    ``unreached``: the names of unused parameters. Any dimension of the size of their second one is frozen.
    """
    for name in unreached:
        shape = model.get_parameter(name).shape
        for dims in w.dims.values() if len(shape) > 1 else ():
            for expr in all_dims(dims):
                if d.size(expr) == shape[1]:
                    d.freeze(expr, f"{name}, which the example does not reach, may read it")


def _freeze_unsettable(model: nn.Module, w: Walk) -> None:
    """Freeze repetitions (by ``expand``) whose number no attribute of their module or its parent holds."""
    for literal in w.literals:
        leaf, path = d.resolve(literal.expr), literal.module
        if isinstance(leaf, Leaf) and leaf.integer and not attributes.holds_repeats(model, path, literal.number):
            d.freeze(leaf, f"it is a repetition in {path or 'the model'}, and no attribute there sets how often")


def _find_slots(name: str, dims: Dims) -> Iterator[tuple[Leaf, Slot]]:
    """Yield (leaf, slot) per place of a leaf in the dimensions ``dims`` of tensor ``name``; roles are not known yet."""
    for i, expr in enumerate(dims):
        inside = {str(leaf.number): leaf for leaf in d.leaves(expr)}
        sizes = {key: leaf.size for key, leaf in inside.items()}
        dim = Names({leaf.number: key for key, leaf in inside.items()}).dim(expr)
        for key, leaf in inside.items():
            for loops, inner, offset in find_occurrences(dim, key, sizes):
                # the outermost loop is the slot's own; each turn of the inner ones gives a slot
                starts = [
                    offset + sum(n * stride for n, (_, stride) in zip(at, loops[1:], strict=True))
                    for at in product(*(range(times) for times, _ in loops[1:]))
                ]
                outer, stride = loops[0] if loops else (1, leaf.size * inner)
                for start in starts:
                    yield leaf, Slot(name, i, outer, stride, inner, start, Role.PRODUCES)


def _with_roles(slot: Slot, w: Walk, aliases: Mapping[str, list[str]], parameters: Container[str]) -> list[Slot]:
    """Return the slot once per role; of unknown role, a parameter produces its units and a buffer scales them.

    ``aliases``: name of a tied tensor → all of its names; ``parameters``: the names of the parameters.
    """
    names = aliases.get(slot.name, [slot.name])
    roles = {role for name in names for role in w.roles.get((name, slot.dim), ())}
    if slot.name not in parameters and roles > {Role.PRODUCES}:
        roles.discard(Role.PRODUCES)  # a mask on the weight that makes the units
    ordered = [role for role in Role if role in roles]
    return [replace(slot, role=role) for role in ordered or [Role.PRODUCES if slot.name in parameters else Role.SCALES]]


def _make_axes(
    w: Walk, slots: Mapping[Leaf, list[Slot]], equal: Mapping[int, tuple[str, int]], narrow: Mapping[int, str]
) -> tuple[dict[str, Axis], dict[int, str]]:
    """Return key → axis, and number of a leaf → the key of its axis, if that is free.

    ``slots``: leaf → its slots; ``equal``: leaf number → ``(count, times)``; ``narrow``: leaf number → why it cannot
    be widened.
    """
    exprs = [*(w.of(reading.operand)[reading.dim] for reading in w.readings), *(expr for expr, _ in w.training_reads)]
    read = {leaf.number for expr in exprs for leaf in d.leaves(expr)}
    keys: dict[int, str] = {}
    axes: dict[str, Axis] = {}
    for leaf, leaf_slots in slots.items():
        key, roles, reason = _make_key(leaf_slots[0], axes), {slot.role for slot in leaf_slots}, leaf.frozen
        if not reason and Role.PRODUCES not in roles:
            reason = "no parameter makes its units"
        if not reason and Role.CONSUMES not in roles and leaf.number not in read:
            reason = "nothing reads its units"
        count, times = equal.get(leaf.number, ("", 1))
        mark = Mark.FROZEN if reason else leaf.mark
        least = max(leaf.least, 2 if leaf.integer else 1)  # networks skip a repetition if there is only one
        axis = Axis(key, leaf.size, tuple(leaf_slots), mark, reason or leaf.why, count, times, least, leaf.multiple)
        axes[key] = replace(axis, narrow=narrow.get(leaf.number, ""))
        if not reason:
            keys[leaf.number] = key
    partners = {axis.count for axis in axes.values() if axis.count and not axis.free}
    for key, axis in axes.items():
        if axis.count in partners and axis.free:
            axes[key] = replace(axis, mark=Mark.FROZEN, reason="it must keep as many units as a frozen axis")
    return _set_nesting(axes), {number: key for number, key in keys.items() if axes[key].free}


def _set_nesting(axes: dict[str, Axis]) -> dict[str, Axis]:
    """Return the axes with ``inside`` of each set to the axis whose units contain its units, in the same dimension."""
    by_dim: dict[tuple[str, int], list[tuple[Slot, Axis]]] = {}
    for axis in axes.values():
        for slot in axis.slots:
            by_dim.setdefault((slot.name, slot.dim), []).append((slot, axis))

    def find_outer(axis: Axis) -> str:
        """Return the key of a free axis in whose units an axis lies; empty if there is none."""
        for a in axis.slots:
            for b, other in by_dim[a.name, a.dim]:
                # all units of a run lie in one unit of the other, and each of its units has such a run
                if other.free and b.inner >= a.stride and b.inner > a.inner and a.outer >= other.size > 1:
                    return other.key
        return ""

    return {key: replace(axis, inside=find_outer(axis)) for key, axis in axes.items()}


def _make_key(slot: Slot, existing: Mapping[str, Axis]) -> str:
    """Return the key of an axis by its first slot, as ``0.weight:0``, made unique by primes."""
    key = f"{slot.name}:{slot.dim}" + (f"+{slot.offset}" if slot.offset else "")
    key += f"/{slot.inner}" if slot.inner > 1 else ""
    while key in existing:
        key += "'"
    return key


def _counted_weights(w: Walk, ties: Mapping[str, str], state: Mapping[str, Dims]) -> tuple[str, ...]:
    """Return the names of the weights of which ``keep`` is a fraction.

    Vectors, embeddings and, in a network with embeddings, output heads are left out. ``ties``: further name → first
    name of a tied tensor; ``state``: name → dimensions.
    """
    tables = {ties.get(name, name) for name in w.tables}
    counted: dict[str, None] = {}
    for name in w.weights:
        first, leaves = ties.get(name, name), [leaf for expr in state[name] for leaf in d.leaves(expr)]
        head = w.tables and any(leaf.frozen == "it is an output of the model" for leaf in leaves)
        if first not in tables and not head and len(state[name]) > 1:
            counted[first] = None
    return tuple(counted)


def _find_unalterable(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) of tensors whose shapes must not change, for a spectral norm or shared memory."""
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        for name in _spectral_tensors(module):
            yield f"{dot}{name}", f"a spectral norm of {path or 'the model'} divides it; remove the norm first"
    for name, other in _find_overlapping(model):
        yield name, f"it shares memory with {other}, which a cut would end; tie them, or clone one"


def _spectral_tensors(module: nn.Module) -> Iterator[str]:
    """Yield the names, in the module, of the tensors of which it makes a weight that a spectral norm divides."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            yield f"{hook.name}_orig"
    chains = module.parametrizations if parametrize.is_parametrized(module) else nn.ModuleDict()
    assert isinstance(chains, nn.ModuleDict)
    for name, chain in chains.items():
        if any(isinstance(child, _SpectralNorm) for child in chain.children()):
            yield from (f"parametrizations.{name}.{leaf}" for leaf in state_of(chain))


def _find_overlapping(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield pairs of names of parameters and buffers whose ranges of memory overlap, each pair in both orders."""
    stores: dict[int, list[tuple[int, int, str]]] = {}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.layout is torch.strided and x.numel():
            start = int(x.storage_offset()) * x.element_size()  # in bytes
            extent = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
            stores.setdefault(x.untyped_storage()._cdata, []).append((start, start + extent * x.element_size(), name))
    for extents in stores.values():
        extents.sort()
        for i, (_, end, name) in enumerate(extents):
            for start, _, other in extents[i + 1 :]:
                if start >= end:
                    break
                yield from ((name, other), (other, name))
