"""The only function that changes a model."""

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.axes import Axis, AxisGraph, Role, Slot, size_of
from regrow.plan import Plan, PlanError
from regrow.surgery.attic import Attic
from regrow.surgery.compensate import bias_dim, offsets
from regrow.surgery.drop import brought_back, dropping
from regrow.surgery.eager import tried
from regrow.surgery.fold import Outcome, folded
from regrow.surgery.layout import Layout, born_as, layouts, places, slots_after
from regrow.surgery.optimizer import Exchange, follow
from regrow.surgery.restore import through
from regrow.surgery.widen import carried, roles_of
from regrow.tracing.attributes import held, hold
from regrow.tracing.trial import planned_integers, rehearsed


def apply(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    *,
    optimizers: Sequence[Optimizer] = (),
    attic: Attic | None = None,
) -> tuple[nn.Module, AxisGraph]:
    """Change a model's shape as planned: all of it, or nothing.

    Parameters, buffers and the integers that modules hold are cut and widened; sizes that stand in divisors are folded
    into the numbers next to them; tied tensors stay tied; where the plan gives means for dropped inputs, they go into a
    bias. Branches that go are exchanged for modules that compute nothing. Everything is worked out and tried on a copy
    first, without numbers, or, for axes that were declared, by a run on the example; only then is the model touched, in
    place.

    Args:
        model: The traced model.
        axes: Its axes, as :func:`regrow.trace` gave them.
        plan: What to keep, which branches go, what grows, and what comes back.
        optimizers: Those that move the model's parameters; they follow, with what they remember of them. Entries that
            are newborn or restored start with no drift and the step size of their neighbours.
        attic: Keeps what is cut, and has what is restored.

    Returns:
        The same model, and its axes as they are now.

    Raises:
        PlanError: If the plan does not fit the model, the model does not run as planned, or an optimiser cannot follow.
            Nothing is changed then.

    >>> from regrow.tracing import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> axes = trace(net, torch.ones(1, 4))
    >>> net, axes = apply(net, axes, Plan.keeping(axes, {"0.weight:0": range(3)}))
    >>> net[0].weight.shape, net[2].in_features, axes["0.weight:0"].size
    (torch.Size([3, 4]), 3, 3)
    """
    check(model, axes, plan)
    if plan.back:
        return brought_back(model, axes, plan, optimizers, attic)
    if plan.drop:
        with dropping(model, axes, plan, optimizers, attic) as (left, rest, kept):
            return apply(model, left, rest, optimizers=optimizers, attic=kept)
    if attic is None and (lost := next((key for key, change in plan.changes.items() if change.recalled), "")):
        raise PlanError(
            f"axis {lost!r}: what its restored units held is in no attic; give the one that was there when they were "
            "cut, apply(..., attic=attic), or restore them with fresh numbers: Plan.restoring(axes, units, Fill())"
        )
    if axes.steps or not axes.declared:
        _rehearse(model, axes, plan)
    if axes.declared:
        _try(model, axes, plan, attic)
    return carry_out(model, axes, plan, optimizers, attic)


def carry_out(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    optimizers: Sequence[Optimizer] = (),
    attic: Attic | None = None,
) -> tuple[nn.Module, AxisGraph]:
    """What :func:`apply` does once a plan is checked and tried; by itself for copies that are run right after."""
    sizes, lays = plan.sizes(axes), layouts(axes, plan)
    roles = roles_of([(slot.name, slot.dim, slot.role) for key in plan.changes for slot in axes[key].slots])
    births = [(key, change.fill.seed, axes[key].born) for key, change in sorted(plan.changes.items())]
    seed = zlib.crc32(repr(births).encode())
    with torch.no_grad():
        values = {
            name: carried(name, tensor.detach(), lays[name], roles.get(name, {}), seed)
            for name, tensor in _state(model).items()
            if name in lays
        }
        values |= offsets(model, axes, plan, lays, values)
        if attic is None:
            done = folded(model, axes, sizes, values)
        else:
            done, stored = through(attic, model, axes, plan, lays, values)
    for name, value in done.values.items():
        if list(value.shape) != [size_of(dim, sizes) for dim in axes.shapes.get(name, tuple(value.shape))]:
            raise PlanError(f"{name} would become {tuple(value.shape)}, which is not what the plan says")
    parameters = dict(model.named_parameters())
    exchanged = [Exchange(n, parameters[n], lays.get(n, {})) for n in (*done.values, *done.removed) if n in parameters]
    remember = follow(optimizers, exchanged, added=[n for n in done.values if n not in axes.shapes])
    _commit(model, axes, done, planned_integers(axes, sizes))
    remember(dict(model.named_parameters()))
    if attic is not None:
        vars(attic).update(vars(stored))
    return model, _after(axes, plan, lays, sizes, done)


def _rehearse(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """Try on a copy without numbers what the plan does to axes that a recording shows."""
    shown = {key: change for key, change in plan.changes.items() if key not in axes.declared}
    # A cut by one was tried when the network was traced; that a number depends on a size may show in growth only.
    grown = any(change.after > len(change.keep) for change in shown.values())
    numbers = grown and not rehearsed(model, axes, axes.sizes(), numbers=True)
    sizes = axes.sizes() | {key: change.after for key, change in shown.items()}
    if problem := rehearsed(model, axes, sizes, numbers):
        raise PlanError(f"the plan cannot be carried out: {problem}")


def _try(model: nn.Module, axes: AxisGraph, plan: Plan, attic: Attic | None) -> None:
    """Do all of the plan to a copy, and run that on the example: no recording shows what declared axes do."""
    if problem := tried(model, axes, lambda other: carry_out(other, axes, plan, attic=copy.copy(attic))):
        changed = [key for key in axes.declared if key in plan.changes]
        hint = f"; is something of {' or '.join(changed)} not declared?" if changed else ""
        raise PlanError(f"the plan cannot be carried out: {problem}{hint}")


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def check(model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
    """Raise :class:`PlanError` if a plan is not for these axes, or the axes are not of this model as it is."""
    plan.check(axes)
    sizes, state = axes.sizes(), _state(model)
    for name, dims in axes.shapes.items():
        expected = tuple(size_of(dim, sizes) for dim in dims)
        if name not in state:
            raise PlanError(f"the model has no tensor {name!r}; trace it again")
        if tuple(state[name].shape) != expected:
            raise PlanError(
                f"{name} has shape {tuple(state[name].shape)}, its axes say {expected}; trace the model again"
            )


def _commit(model: nn.Module, axes: AxisGraph, done: Outcome, integers: Mapping[str, int]) -> None:
    made: dict[str, nn.Parameter | Tensor] = {}
    for name, value in done.values.items():
        path, _, leaf = name.rpartition(".")
        module, first = model.get_submodule(path), axes.ties.get(name, name)
        if first not in made:
            old = module._parameters.get(leaf)
            trains = old.requires_grad if old is not None else next(model.parameters()).requires_grad
            made[first] = value if leaf in module._buffers else nn.Parameter(value, requires_grad=trains)
        setattr(module, leaf, made[first])  # as a user would: modules that keep lists of their weights notice
    for name in done.removed:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, None)
    for place, number in {**integers, **done.constants}.items():
        path, name = place.split(":")
        module = model.get_submodule(path)
        old_value = held(module, name)
        hold(module, name, (number, *old_value[1:]) if isinstance(old_value, tuple) else number)


def _after(
    axes: AxisGraph,
    plan: Plan,
    lays: Mapping[str, Mapping[int, Layout]],
    sizes: Mapping[str, int],
    done: Outcome,
) -> AxisGraph:
    added = {name: (bias_dim(axes, name),) for name in done.values if name not in axes.shapes}

    def changed(axis: Axis) -> Axis:
        change = plan.changes.get(axis.key)
        ids = axis.ids if change is None else tuple(sorted(born_as(change, axis)))
        slots = [slot for slot in slots_after(axis, axes, lays, sizes) if slot.name not in done.removed]
        for name, (dim,) in added.items():
            slots += [Slot(name, 0, *place, role=Role.SHIFTS) for place in places(dim, axis.key, sizes)]
        born = axis.born + (0 if change is None else change.grow)
        return replace(axis, size=sizes[axis.key], slots=tuple(slots), ids=ids, born=born)

    itemsize = {**axes.itemsize, **{name: done.values[name].element_size() for name in added}}
    return replace(
        axes,
        axes={key: changed(axis) for key, axis in axes.axes.items()},
        shapes={name: dims for name, dims in {**axes.shapes, **added}.items() if name not in done.removed},
        parameters=(axes.parameters | added.keys()) - set(done.removed),
        itemsize={name: size for name, size in itemsize.items() if name not in done.removed},
        folds=done.folds,
        steps=() if plan.changes.keys() & set(axes.declared) else axes.steps,  # they know no declared sizes
    )
