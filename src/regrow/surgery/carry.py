"""A plan carried out, once it is checked and tried: tensors, integers, optimisers and axes follow."""

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
from regrow.surgery.fold import Outcome, folded
from regrow.surgery.layout import Layout, born_as, layouts, places, slots_after
from regrow.surgery.optimizer import Exchange, follow
from regrow.surgery.restore import through
from regrow.surgery.widen import carried, roles_of
from regrow.tracing.attributes import held, hold
from regrow.tracing.kinds import recompute_weights
from regrow.tracing.trial import planned_integers


def carry_out(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    optimizers: Sequence[Optimizer] = (),
    attic: Attic | None = None,
) -> tuple[nn.Module, AxisGraph]:
    """What :func:`regrow.apply` does once a plan is checked and tried; alone for copies that are run right after."""
    sizes, lays = plan.sizes(axes), layouts(axes, plan)
    roles = roles_of([(slot.name, slot.dim, slot.role) for key in plan.changes for slot in axes[key].slots])
    births = [(key, change.fill.seed, axes[key].born) for key, change in sorted(plan.changes.items())]
    seed = zlib.crc32(repr(births).encode())
    with torch.no_grad():
        values = {
            name: carried(name, tensor.detach(), lays[name], roles.get(name, {}), seed)
            for name, tensor in state_of(model).items()
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


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


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
    recompute_weights(model)


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
