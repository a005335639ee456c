"""The laws that every cut must obey, as functions over a network, its axes and a plan.

Two referees know nothing of how regrow masks or cuts: :func:`zeroed` writes zeros into the weights of the uncut network
where the axes say the dropped units lie, and :func:`permuted` renames units in all their slots at once, which must not
change what a network computes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from regrow.core.axes import Axis, AxisGraph, Example, Mark
from regrow.core.plan import Change, Fill, Plan, PlanError

UNFOLDED = tuple(set(Mark) - {Mark.FROZEN, Mark.FOLDED})
"""The marks of axes whose units can be restored."""

EXACT = 1e-9
"""The float64 bound of masked = shrunk, as a part of the largest output."""


# --- running a network in float64 -----------------------------------------------------------------------------------


class _Double(TorchFunctionMode):
    """Whoever asks for float32 gets float64: norms that compute in float32 would hide what a cut does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        double = [torch.float64 if value is torch.float32 else value for value in args]
        named = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return func(*double, **named)


def in_double(value: Any) -> Any:
    """A deep copy of a module, or of example inputs, in float64."""
    if isinstance(value, nn.Module):
        copy = deepcopy(value)
        for module in copy.modules():
            if isinstance(module, nn.RMSNorm) and module.eps is None:  # it stands for the precision's own epsilon
                module.eps = torch.finfo(module.weight.dtype).eps
        return copy.double()
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def outputs(model: nn.Module, axes: AxisGraph) -> list[Tensor]:
    """Every tensor a float64 network answers to the traced example."""
    args, kwargs = in_double((axes.example.args, dict(axes.example.kwargs)))
    with torch.no_grad(), _Double():
        return [leaf.detach().clone() for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference between two answers, as a part of the largest value in the second."""
    assert [x.shape for x in ours] == [y.shape for y in theirs], "the answers differ in shape"
    assert all(y.isfinite().all() for y in theirs), "the reference answer is not finite"
    scale = max(float(y.abs().max()) for y in theirs)
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(ours, theirs, strict=True)) / scale


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


# --- plans ----------------------------------------------------------------------------------------------------------


def random_plan(
    axes: AxisGraph,
    generator: torch.Generator,
    floor: int = 1,
    keys: Iterable[str] | None = None,
    marks: Iterable[Mark] = tuple(set(Mark) - {Mark.FROZEN}),
) -> Plan:
    """A random legal plan: each chosen axis keeps a random number of random units, at least ``floor``.

    Args:
        axes: The axes of the network.
        generator: Where randomness comes from.
        floor: The least number of units to keep.
        keys: The axes to cut (all free ones if not given); those tied to them by ``count`` are cut with them.
        marks: Cut only axes with these marks.
    """
    keep: dict[str, tuple[int, ...]] = {}
    chosen = set(axes.axes if keys is None else keys)
    for members in together(axes, set(marks)):
        if not any(axis.key in chosen for axis in members):
            continue
        step = lcm(*(axis.times * axis.multiple for axis in members))
        most = min(axis.size * axis.times for axis in members) // step
        least = min(most, max(-(-min(max(floor, axis.least), axis.size) * axis.times // step) for axis in members))
        count = int(torch.randint(least, most + 1, (), generator=generator))
        if count == most > least and keys is not None:
            count -= 1
        for axis in members:
            units = torch.randperm(axis.size, generator=generator)[: count * step // axis.times]
            keep[axis.key] = tuple(units.tolist())
    return Plan.keeping(axes, keep)


def smallest_plan(axes: AxisGraph, marks: Iterable[Mark] = tuple(set(Mark) - {Mark.FROZEN})) -> Plan:
    """The plan that keeps as few units of every axis as can be, from the middle."""
    keep: dict[str, range] = {}
    for members in together(axes, set(marks)):
        step = lcm(*(axis.times * axis.multiple for axis in members))
        total = step * max(-(-axis.least * axis.times // step) for axis in members)
        for axis in members:
            units = total // axis.times
            first = min(axis.size // 2, axis.size - units)
            keep[axis.key] = range(first, first + units)
    return Plan.keeping(axes, keep)


def together(axes: AxisGraph, marks: set[Mark]) -> Iterator[list[Axis]]:
    """The free axes with the marks, those tied by ``count`` in one list; left out if one of them has another mark."""
    groups: dict[str, list[Axis]] = {}
    for axis in axes:
        groups.setdefault(axis.count or axis.key, []).append(axis)
    for members in groups.values():
        free = [axis for axis in members if axis.free]
        if free and all(axis.mark in marks for axis in free):
            yield free


def plan_for(axes: AxisGraph, axis: Axis, seed: int = 0) -> Plan:
    """A random legal plan for one axis, and those tied to it by count."""
    return random_plan(axes, torch.Generator().manual_seed(seed), keys=(axis.key,))


def growing_plan(axes: AxisGraph, axis: Axis, rule: str, units: int = 2) -> Plan | None:
    """A plan that widens one axis, and those tied to it by count; ``None`` where the axis says that it cannot be."""
    members = [other for other in axes.free() if other.count and other.count == axis.count] or [axis]
    step = units * lcm(*(other.times * other.multiple for other in members))
    try:
        return Plan.growing(axes, {other.key: step // other.times for other in members}, Fill(rule))
    except PlanError as error:
        assert "cannot be widened: " in str(error), error
        return None


def joint_growing_plan(axes: AxisGraph, rule: str, units: int = 2) -> Plan:
    """A plan that widens every axis that can be widened."""
    found = [plan for axis in axes.free() if (plan := growing_plan(axes, axis, rule, units)) is not None]
    return Plan({key: change for plan in found for key, change in plan.changes.items()})


def classes(axes: AxisGraph) -> Iterator[Axis]:
    """One free axis of more than one unit for each kind: same size, same mark, same places but for layer numbers."""
    seen = set()
    for axis in axes.free():
        places = tuple("".join("#" if c.isdigit() else c for c in f"{s.name}:{s.dim}") for s in axis.slots[:3])
        kind = (axis.size, axis.mark, places, len(axis.slots))
        if axis.size > 1 and kind not in seen:
            seen.add(kind)
            yield axis


# --- referees that know nothing of masks or cuts --------------------------------------------------------------------


def zeroed(model: nn.Module, axes: AxisGraph, plan: Plan, zeros: str = "consumers") -> nn.Module:
    """A copy of the network, of full size, in which the dropped units count for nothing.

    A neutral axis is zeroed in the weights that read it; that is exactly what masking means, whatever lies between. A
    folded one (and a neutral one read by activations alone) is zeroed in everything that makes it.
    """
    copy = deepcopy(model)
    state = tensors(copy)
    for key, change in plan.changes.items():
        axis = axes[key]
        assert axis.mark in (Mark.NEUTRAL, Mark.FOLDED), f"no zero stands for a unit of a {axis.mark} axis"
        dropped = list(change.dropped)
        at_consumers = zeros == "consumers" and axis.mark is Mark.NEUTRAL and axis.consumers()
        slots = axis.consumers() if at_consumers else axis.slots
        with torch.no_grad():
            for slot in slots:
                state[slot.name].index_fill_(slot.dim, slot.positions(axis.size)[dropped].flatten(), 0)
    return copy


def permuted(model: nn.Module, axis: Axis, order: Tensor) -> nn.Module:
    """A copy of the network in which unit ``i`` of an axis is what unit ``order[i]`` was."""
    copy = deepcopy(model)
    state = tensors(copy)
    done = set()
    with torch.no_grad():
        for slot in axis.slots:
            positions = slot.positions(axis.size)
            place = (id(state[slot.name]), slot.dim, tuple(positions.flatten().tolist()))
            if place not in done:
                done.add(place)
                tensor = state[slot.name]
                moved = tensor.index_select(slot.dim, positions[order].flatten())
                tensor.index_copy_(slot.dim, positions.flatten(), moved)
    return copy


def shrunk(model: nn.Module, axes: AxisGraph, plan: Plan) -> tuple[nn.Module, AxisGraph]:
    """A copy of the network with the plan applied; the example follows the network into float64."""
    from regrow.surgery import apply

    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        axes = replace(axes, example=Example(*in_double((axes.example.args, dict(axes.example.kwargs)))))
    return apply(deepcopy(model), axes, plan)


# --- laws -----------------------------------------------------------------------------------------------------------


def zeroed_equals_shrunk(model: nn.Module, axes: AxisGraph, plan: Plan, zeros: str = "consumers") -> None:
    """The cut network answers what the uncut one answers when the dropped units count for nothing (float64)."""
    double = in_double(model)
    expected = outputs(zeroed(double, axes, plan, zeros), axes)
    found = outputs(shrunk(double, axes, plan)[0], axes)
    assert (distance := gap(found, expected)) <= EXACT, f"off by {distance:.2e} of the largest output"


def masked_equals_shrunk(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """What ``verify`` says of a plan, and that it leaves the network as it was."""
    from regrow.surgery import verify

    with untouched(model):
        report = verify(model, axes, plan)
    assert report.ok, report
    assert report.max_abs_diff <= report.bound, report


def widening_keeps_function(model: nn.Module, axes: AxisGraph, plan: Plan, alive: bool = True) -> None:
    """The widened network answers what it did (float64), evaluated and in training, and what is new in it learns.

    ``alive=False`` leaves the last one out: behind a ReLU both of two new units can be off for two small images.
    """
    double = in_double(model)
    for module in double.modules():
        for name, value in vars(module).items():
            if ("drop" in name and isinstance(value, float)) or name == "p":
                setattr(module, name, 0.0)
    wide, left = shrunk(double, axes, plan)
    for train in (False, True):
        answers = []
        for net in (double, wide):
            net.train(train)
            torch.manual_seed(0)  # whole branches may be dropped by chance, in both nets the same ones
            answers.append(outputs(net, axes))
        distance = gap(*answers)
        assert distance <= EXACT, f"off by {distance:.2e} of the largest output, {train=}"
    if alive:
        newborn_units_learn(wide.eval(), axes, left, plan)


def newborn_units_learn(wide: nn.Module, axes: AxisGraph, left: AxisGraph, plan: Plan) -> None:
    """Of the new units of each axis, at least one has a gradient in some tensor from the first step on."""
    args, kwargs = in_double((axes.example.args, dict(axes.example.kwargs)))
    answers = [x for x in tree_leaves(wide(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(0)
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in answers).backward()
    state = dict(wide.named_parameters(remove_duplicate=False))
    for key, change in plan.changes.items():
        axis = left[key]
        young = range(len(change.keep), axis.size)
        moved = [
            state[slot.name].grad.index_select(slot.dim, slot.positions(axis.size)[list(young)].flatten()).abs().max()
            for slot in axis.slots
            if slot.name in state and state[slot.name].grad is not None
        ]
        assert max(map(float, moved), default=0.0) > 0, f"new units of {key} are dead"


def fitting_keeps_function(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """New units fitted to data leave the network's answers as they are, bit for bit."""
    from regrow.core.sources import Batch
    from regrow.surgery import apply, fit_new_units

    wide, left = apply(deepcopy(model), axes, plan)
    batches = [Batch(axes.example.args, dict(axes.example.kwargs))]

    def answers() -> list[Tensor]:
        with torch.no_grad():
            return [x for x in tree_leaves(wide(*batches[0].args, **batches[0].kwargs)) if isinstance(x, Tensor)]

    before, bits = answers(), {name: tensor.detach().clone() for name, tensor in tensors(wide).items()}
    written = {key: change for key, change in plan.changes.items() if axes[key].mark is not Mark.FOLDED}
    fit_new_units(wide, left, Plan(written), batches)
    assert all(torch.equal(x, y) for x, y in zip(answers(), before, strict=True))
    assert any(not torch.equal(tensor, bits[name]) for name, tensor in tensors(wide).items()), "nothing was fitted"


def permuting_units_keeps_function(model: nn.Module, axes: AxisGraph, axis: Axis, seed: int = 0) -> None:
    """Units have no order: renaming them in all their slots changes nothing. What depends on order is no axis."""
    double = in_double(model)
    order = torch.randperm(axis.size, generator=torch.Generator().manual_seed(seed))
    if order.tolist() == list(range(axis.size)):
        order = order.roll(1)
    distance = gap(outputs(permuted(double, axis, order), axes), outputs(double, axes))
    assert distance <= EXACT, f"units of {axis.key} have an order: off by {distance:.2e}"


def runs_with_its_ties(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """The cut network runs, answers something finite, has tensors of the planned shapes, and ties as before."""
    from regrow.core.axes import size_of

    small, left = shrunk(model, axes, plan)
    ties_stay_ties(model, small)
    with torch.no_grad():
        answer = small(*axes.example.args, **axes.example.kwargs)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor))
    sizes = plan.sizes(axes)
    assert left.sizes() == {key: sizes[key] for key in left.sizes()}
    state = tensors(small)
    for name, dims in axes.shapes.items():
        assert tuple(state[name].shape) == tuple(size_of(dim, sizes) for dim in dims), name


def restored_is_what_was_cut(model: nn.Module, axes: AxisGraph, plans: Iterable[Callable[[AxisGraph], Plan]]) -> None:
    """What was cut, in however many steps, and brought back step by step is the old network each time, bit for bit.

    Args:
        model: The network; it is left as it is.
        axes: Its axes.
        plans: Plans that cut, each made for the axes that the one before left.
    """
    from regrow.surgery import UndoStore, apply

    net, left, undo, before = deepcopy(model), axes, UndoStore(), []
    for plan in plans:
        before.append((deepcopy(net), left))
        net, left = apply(net, left, plan(left), undo=undo)
    for old, known in reversed(before):
        back = {axis.key: set(known[axis.key].ids) - set(axis.ids) for axis in left}
        if not any(back.values()):
            continue
        net, left = apply(net, left, Plan.restoring(left, {key: ids for key, ids in back.items() if ids}), undo=undo)
        same_network(net, old)
        same_axes(left, known)
    assert not undo.restorable


def same_axes(left: AxisGraph, known: AxisGraph) -> None:
    """The same units in the same places, and the same folds."""
    assert left.folds == known.folds and left.shapes == known.shapes and left.itemsize == known.itemsize
    for axis in known.free():
        again = left[axis.key]
        assert (again.ids, again.next_id, again.size) == (axis.ids, axis.next_id, axis.size)
        assert entries_of(again) == entries_of(axis), axis.key


def same_network(net: nn.Module, other: nn.Module) -> None:
    """Tensors of the same bits, tied alike, and modules that hold the same numbers."""
    ours, theirs = tensors(net), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
        assert (tensor.requires_grad, type(tensor)) == (theirs[name].requires_grad, type(theirs[name])), name
        assert {n for n, t in ours.items() if t is tensor} == {n for n, t in theirs.items() if t is theirs[name]}
    assert _attributes(net) == _attributes(other)


def axes_after_a_cut_are_those_of_a_new_trace(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """What a cut says of where units lie now is what tracing the cut network finds."""
    from regrow.tracing import trace

    small, left = shrunk(model, axes, plan)
    again = {entries_of(axis) for axis in trace(small, *axes.example.args, **axes.example.kwargs)}
    for axis in left.free():
        if axis.size > 1:
            assert entries_of(axis) in again, f"{axis.key} lies elsewhere after the cut: {axis.slots}"


def entries_of(axis: Axis) -> frozenset[tuple[str, int, tuple[tuple[int, ...], ...]]]:
    """Which entries of which dimensions each unit owns, however the slots are written."""
    entries: dict[tuple[str, int], list[set[int]]] = {}
    for slot in axis.slots:
        units = entries.setdefault((slot.name, slot.dim), [set() for _ in range(axis.size)])
        for unit, own in zip(units, slot.positions(axis.size).tolist(), strict=True):
            unit |= set(own)
    return frozenset((*place, tuple(tuple(sorted(unit)) for unit in units)) for place, units in entries.items())


def ties_stay_ties(model: nn.Module, small: nn.Module) -> None:
    """Names of one tensor are names of one tensor after the cut, and parameters stay parameters that learn."""
    before, after = tensors(model), tensors(small)
    assert before.keys() == after.keys()
    for one in before:
        assert isinstance(before[one], nn.Parameter) == isinstance(after[one], nn.Parameter), one
        assert before[one].requires_grad == after[one].requires_grad, one
        assert before[one].dtype == after[one].dtype, one
        for other in before:
            assert (before[one] is before[other]) == (after[one] is after[other]), (one, other)


def same_seed_same_plan(propose: Callable[[int], Plan]) -> None:
    """A seed decides a plan, and another seed decides another."""
    assert propose(3).to_json() == propose(3).to_json()
    assert propose(3).to_json() != propose(4).to_json()


def permuting_units_permutes_plan(
    model: nn.Module, axes: AxisGraph, propose: Callable[[nn.Module], Plan], seed: int = 0
) -> None:
    """Units renamed before are the renamed units kept: a plan rests on what units are, not on where they lie.

    The units of every neutral axis are renamed, one axis after the other; scores must have no ties.
    """
    plan = propose(model)
    generator = torch.Generator().manual_seed(seed)
    orders: dict[str, Tensor] = {}
    renamed = in_double(model)
    for axis in axes.free():
        if axis.mark is Mark.NEUTRAL and not axis.inside:
            orders[axis.key] = torch.randperm(axis.size, generator=generator)
            renamed = permuted(renamed, axis, orders[axis.key])
    again = propose(renamed)
    assert plan.changes.keys() == again.changes.keys()
    for key, change in again.changes.items():
        order = orders.get(key, torch.arange(change.size))
        assert tuple(sorted(order[list(change.keep)].tolist())) == plan.changes[key].keep, key


def all_or_nothing(model: nn.Module, axes: AxisGraph) -> None:
    """A plan that cannot be carried out changes nothing at all, and the error is a :class:`PlanError`."""
    from regrow.surgery import apply

    free = [axis for axis in axes.free() if axis.size > 1]
    for plan in illegal_plans(axes, free[0]):
        with untouched(model):
            try:
                apply(model, axes, plan)
            except PlanError as error:
                assert str(error)
            else:
                raise AssertionError(f"accepted an illegal plan: {plan}")


def illegal_plans(axes: AxisGraph, axis: Axis) -> Iterator[Plan]:
    """Plans that name a legal change, and one that does not fit the network."""
    good = {axis.key: Change(axis.size, tuple(range(axis.size - 1)), axis.slots, axis.ids)}
    yield Plan(good | {"no.such.weight:0": Change(3, (0,), ())})
    yield Plan({axis.key: Change(axis.size + 1, (0,), axis.slots)})
    moved = axis.slots[:-1]
    yield Plan({axis.key: Change(axis.size, (0,), moved)})
    for other in axes:
        if not other.free and other.size > 1:
            yield Plan(good | {other.key: Change(other.size, (0,), other.slots, other.ids)})
            break
    for other in axes.free():
        if other.count and other.size > 1 and other.key != axis.key:
            yield Plan({other.key: Change(other.size, (0,), other.slots, other.ids)})
            break


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the network is the same after it: objects, bits, shapes, and module attributes."""
    before = tensors(model)
    bits = {name: tensor.detach().clone() for name, tensor in before.items()}
    plain = _attributes(model)
    yield
    after = tensors(model)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor is before[name], f"{name} is another object"
        assert tensor.shape == bits[name].shape, f"{name} has another shape"
        assert torch.equal(tensor.detach(), bits[name]), f"{name} has other values"
    assert plain == _attributes(model)


def _attributes(model: nn.Module) -> Mapping[str, Any]:
    kinds = (int, float, str, tuple, bool)
    own = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, kinds)
    }
    config = getattr(model, "config", None)
    return own | ({"config": str(config.to_dict())} if config is not None else {})
