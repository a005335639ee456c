"""The only function that changes a model."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.axes import Axis, AxisGraph, size_of
from regrow.plan import Plan, PlanError
from regrow.surgery.compensate import offsets
from regrow.surgery.fold import folded, ratio
from regrow.surgery.layout import Layout, layouts, slots_after
from regrow.surgery.optimizer import Exchange, follow
from regrow.surgery.widen import carried, roles_of
from regrow.tracing.trial import planned_integers, rehearsed


def apply(
    model: nn.Module, axes: AxisGraph, plan: Plan, *, optimizers: Sequence[Optimizer] = ()
) -> tuple[nn.Module, AxisGraph]:
    """Change a model's shape as planned: all of it, or nothing.

    Parameters, buffers and the integers that modules hold are cut and widened; sizes that stand in divisors are folded
    into the numbers next to them; tied tensors stay tied; where the plan gives means for dropped inputs, they go into a
    bias. Everything is worked out and tried on a copy without numbers first; only then is the model touched, in place.

    Args:
        model: The traced model.
        axes: Its axes, as :func:`regrow.trace` gave them.
        plan: What to keep, and what grows.
        optimizers: Those that move the model's parameters; they follow, with what they remember of them.

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
    plan.check(axes)
    _check_state(model, axes)
    sizes, lays = plan.sizes(axes), layouts(axes, plan)
    # A cut by one was tried when the network was traced; that a number depends on a size may show in growth only.
    grown = any(change.grow for change in plan.changes.values())
    numbers = grown and not rehearsed(model, axes, axes.sizes(), numbers=True)
    if problem := rehearsed(model, axes, sizes, numbers):
        raise PlanError(f"the plan cannot be carried out: {problem}")
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
        values, epsilons = folded(model, axes, sizes, values)
    for name, value in values.items():
        if list(value.shape) != [size_of(dim, sizes) for dim in axes.shapes.get(name, tuple(value.shape))]:
            raise PlanError(f"{name} would become {tuple(value.shape)}, which is not what the plan says")
    parameters = dict(model.named_parameters())
    exchanged = [Exchange(name, parameters[name], lays.get(name, {})) for name in values if name in parameters]
    remember = follow(optimizers, exchanged, added=[name for name in values if name not in axes.shapes])
    _commit(model, axes, values, {**planned_integers(axes, sizes), **epsilons})
    remember(dict(model.named_parameters()))
    return model, _after(axes, plan, lays, sizes, values)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _check_state(model: nn.Module, axes: AxisGraph) -> None:
    sizes, state = axes.sizes(), _state(model)
    for name, dims in axes.shapes.items():
        expected = tuple(size_of(dim, sizes) for dim in dims)
        if name not in state:
            raise PlanError(f"the model has no tensor {name!r}; trace it again")
        if tuple(state[name].shape) != expected:
            raise PlanError(
                f"{name} has shape {tuple(state[name].shape)}, its axes say {expected}; trace the model again"
            )


def _commit(model: nn.Module, axes: AxisGraph, values: Mapping[str, Tensor], attributes: Mapping[str, float]) -> None:
    made: dict[str, nn.Parameter | Tensor] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        module, first = model.get_submodule(path), axes.ties.get(name, name)
        if first not in made:
            old = module._parameters.get(leaf)
            trains = old.requires_grad if old is not None else next(model.parameters()).requires_grad
            made[first] = value if leaf in module._buffers else nn.Parameter(value, requires_grad=trains)
        setattr(module, leaf, made[first])  # as a user would: modules that keep lists of their weights notice
    for place, number in attributes.items():
        path, name = place.split(":")
        module = model.get_submodule(path)
        old_value = getattr(module, name)
        setattr(module, name, (number, *old_value[1:]) if isinstance(old_value, tuple) else number)


def _after(
    axes: AxisGraph,
    plan: Plan,
    lays: Mapping[str, Mapping[int, Layout]],
    sizes: Mapping[str, int],
    values: Mapping[str, Tensor],
) -> AxisGraph:
    def changed(axis: Axis) -> Axis:
        change = plan.changes.get(axis.key)
        ids = axis.ids if change is None else tuple(axis.ids[unit] for unit in change.keep)
        new = 0 if change is None else change.grow
        ids += tuple(range(axis.born, axis.born + new))
        slots = slots_after(axis, axes, lays, sizes)
        return replace(axis, size=sizes[axis.key], slots=slots, ids=ids, born=axis.born + new)

    added = {name: tuple(value.shape) for name, value in values.items() if name not in axes.shapes}
    return replace(
        axes,
        axes={key: changed(axis) for key, axis in axes.axes.items()},
        shapes={**axes.shapes, **added},
        parameters=axes.parameters | added.keys(),
        itemsize={**axes.itemsize, **{name: values[name].element_size() for name in added}},
        folds=tuple(replace(fold, value=fold.value * ratio(fold, axes.sizes(), sizes)) for fold in axes.folds),
    )
