"""Compute what a checked plan makes of every tensor, and write it into the model, its optimisers and its axes."""

import ctypes
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from mmap import PAGESIZE
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from regrow.core.axes import Axis, AxisGraph, Fold, Role, Slot, axes_in, size_of
from regrow.core.plan import Plan, PlanError
from regrow.surgery.compensate import bias_dim, bias_of, divisor_size, fold_constants, fold_values, offsets
from regrow.surgery.layout import (
    Layout,
    Layouts,
    ids_after,
    next_ids_after,
    places,
    plan_layouts,
    resize,
    resize_moment,
    slots_after,
)
from regrow.surgery.restore import plan_with_undo
from regrow.surgery.undo_store import UndoStore
from regrow.tracing.attributes import get_attribute, set_attribute
from regrow.tracing.model_state import Snapshot, select_state, state_of
from regrow.tracing.support import recompute_weights
from regrow.tracing.trial import Resizing, planned_integers

T = TypeVar("T")
LEAST = 2**26
"""The fewest bytes for which it is worth asking."""
_MADV_PAGEOUT = 21


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Let Linux reclaim the pages of tensors in memory-mapped files; they are read again from there if they are used.

    A checkpoint stays mapped while any of its tensors is in use, and its pages count as memory of the process.
    """
    plain = (x for x in tensors if x.layout is torch.strided and x.device.type == "cpu" and x.is_contiguous())
    large = [x for x in plain if not isinstance(x, FakeTensor) and x.nbytes >= 2 * PAGESIZE]
    if sys.platform != "linux" or sum(x.nbytes for x in large) < LEAST:
        return
    try:
        rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return
    files = [row[0].split("-") for row in rows if row[4] != "0"]
    ranges = sorted((int(start, 16), int(stop, 16)) for start, stop in files)
    advise = ctypes.CDLL(None).madvise
    for tensor in large:
        begin = -(-tensor.data_ptr() // PAGESIZE) * PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // PAGESIZE * PAGESIZE
        place = bisect_right(ranges, begin, key=lambda mapped: mapped[0]) - 1
        if place >= 0 and end <= ranges[place][1]:  # advice: where the kernel does not know it, nothing happens
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT)


@dataclass(frozen=True)
class Prepared:
    """The computed result of a plan, before anything is changed.

    Args:
        sizes: Axis key → its number of units after the plan.
        lays: Tensor name → dimension → the layout of its entries after the plan.
        values: Name → the tensor to set.
        constants: ``module:attribute`` → the number to set.
        folds: The folds after the plan.
        removed: Biases that only compensation had added, and that are removed again.
        undo: The undo store after the plan; ``None`` without one.
    """

    sizes: Mapping[str, int]
    lays: Layouts
    values: Mapping[str, Tensor]
    constants: Mapping[str, float | None]
    folds: tuple[Fold, ...]
    removed: tuple[str, ...] = ()
    undo: UndoStore | None = None

    def resizing(self, axes: AxisGraph) -> Resizing:
        """Return the sizes, constants and biases of the planned network, without the values of its tensors."""
        added = {name: len(value) for name, value in self.values.items() if name not in axes.shapes}
        return Resizing(self.sizes, self.constants, added, self.removed)


def carry_out(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    optimizers: Sequence[Optimizer] = (),
    undo: UndoStore | None = None,
) -> tuple[nn.Module, AxisGraph]:
    """Apply a plan without the checks of :func:`regrow.apply`: for copies that are run and compared right after."""
    return commit(model, axes, plan, prepare(model, axes, plan, undo), optimizers, undo)


def prepare(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    undo: UndoStore | None = None,
    names: Collection[str] | None = None,
    exact: bool = False,
) -> Prepared:
    """Compute the tensors that a plan leads to, without changing the model.

    Only those called ``names`` if there are any; without rounding to the model's precision if ``exact``.
    """
    sizes = plan.sizes(axes)
    grown = [(key, change.fill.seed, axes[key].next_id) for key, change in sorted(plan.changes.items())]
    seed = zlib.crc32(repr(grown).encode())
    roles: dict[str, dict[int, set[Role]]] = {}
    for slot in (slot for key in plan.changes for slot in axes[key].slots):
        roles.setdefault(slot.name, {}).setdefault(slot.dim, set()).add(slot.role)
    part, plan = (axes, plan) if names is None else _restricted(axes, plan, names)
    lays = plan_layouts(part, plan)
    tensors = state_of(model) if names is None else select_state(model, names)
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in lays:
                values[name] = resize(name, tensor.detach(), lays[name], roles.get(name, {}), seed, exact)
        if exact:
            for fold in part.folds:
                if fold.weight in tensors and divisor_size(fold, axes.sizes()) != divisor_size(fold, sizes):
                    values.setdefault(fold.weight, tensors[fold.weight].detach().double())
        values |= offsets(model, axes, plan, lays, values, exact)
        if undo is None:
            values |= fold_values(model, part, sizes, values)
            ready = Prepared(sizes, lays, values, *fold_constants(model, part, sizes))
        else:
            ready = Prepared(sizes, lays, *plan_with_undo(undo, model, axes, plan, lays, values))
    for name, value in ready.values.items():
        if list(value.shape) != [size_of(dim, sizes) for dim in axes.shapes.get(name, tuple(value.shape))]:
            raise PlanError(f"{name} would become {tuple(value.shape)}, which is not what the plan says")
    return ready


def resizing(model: nn.Module, axes: AxisGraph, plan: Plan) -> Resizing:
    """Return the sizes, constants and biases that a plan leads to, without computing any tensor."""
    sizes = plan.sizes(axes)
    constants, _ = fold_constants(model, axes, sizes)
    biases = [bias_of(weight) for weight in plan.means]
    added = {bias: size_of(bias_dim(axes, bias), sizes) for bias in biases if bias not in axes.shapes}
    return Resizing(sizes, constants, added)


def _restricted(axes: AxisGraph, plan: Plan, names: Collection[str]) -> tuple[AxisGraph, Plan]:
    """Return axes and a plan reduced to what concerns some tensors."""
    means = {weight: row for weight, row in plan.means.items() if bias_of(weight) in names}
    shapes = {name: axes.shapes[name] for name in (*names, *means) if name in axes.shapes}
    folds = tuple(fold for fold in axes.folds if fold.weight in names)
    own = {key for dims in shapes.values() for dim in dims for key in axes_in(dim)}
    changes = {key: change for key, change in plan.changes.items() if key in own}
    return replace(axes, shapes=shapes, folds=folds), replace(plan, changes=changes, means=means)


def commit(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    ready: Prepared,
    optimizers: Sequence[Optimizer] = (),
    undo: UndoStore | None = None,
    prove: Callable[[AxisGraph], AxisGraph] = lambda axes: axes,
) -> tuple[nn.Module, AxisGraph]:
    """Write a prepared plan into the model, the optimisers and the undo store, in place; return model and axes."""
    parameters = dict(model.named_parameters())
    replaced = [name for name in (*ready.values, *ready.removed) if name in parameters]
    exchanged = [Exchange(name, parameters[name], ready.lays.get(name, {})) for name in replaced]
    for exchange in exchanged:
        if exchange.old._backward_hooks or exchange.old._post_accumulate_grad_hooks:
            raise PlanError(
                f"{exchange.name} has a gradient hook, which does not follow a change of shape; remove it "
                "(handle.remove()) and register it again on the new parameter"
            )
    remember = follow(optimizers, exchanged, added=[name for name in ready.values if name not in axes.shapes])
    before = Snapshot(model)
    try:
        _write(model, axes, ready)
        after = prove(_after(axes, plan, ready))
    except BaseException:
        before.restore()
        raise
    remember(dict(model.named_parameters()))
    release_pages(exchange.old for exchange in exchanged)
    if undo is not None:
        vars(undo).update(vars(ready.undo))
    return model, after


def _write(model: nn.Module, axes: AxisGraph, ready: Prepared) -> None:
    made: dict[str, nn.Parameter | Tensor] = {}
    for name, value in ready.values.items():
        path, _, leaf = name.rpartition(".")
        module, first = model.get_submodule(path), axes.ties.get(name, name)
        if first not in made:
            old = module._parameters.get(leaf)
            if leaf in module._buffers:
                made[first] = _laid_out(value, module._buffers[leaf])
            elif old is None:  # a bias that compensates; it trains if the weight beside it does
                made[first] = nn.Parameter(value, requires_grad=module.get_parameter("weight").requires_grad)
            else:
                made[first] = _successor(old, value, ready.lays.get(name, {}))
        setattr(module, leaf, made[first])  # as a user would: modules that keep lists of their weights notice
    for name in ready.removed:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, None)
    for place, number in {**planned_integers(axes, ready.sizes), **ready.constants}.items():
        path, name = place.split(":")
        module = model.get_submodule(path)
        old_value = get_attribute(module, name)
        set_attribute(module, name, (number, *old_value[1:]) if isinstance(old_value, tuple) else number)
    recompute_weights(model)


def _successor(old: nn.Parameter, value: Tensor, lays: Mapping[int, Layout]) -> nn.Parameter:
    """Return the new parameter that replaces an old one: with its memory format, attributes and gradient (0 if new)."""
    made = nn.Parameter(_laid_out(value, old), requires_grad=old.requires_grad)
    vars(made).update(vars(old))
    if old.grad is not None:
        with torch.no_grad():
            made.grad = _laid_out(resize_moment(old.grad, lays, mean=False).to(made), old.grad)
    return made


def _laid_out(value: Tensor, like: Tensor | None) -> Tensor:
    """Return a tensor in the memory format of another one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if like is None or like.layout is not torch.strided or like.dim() not in formats or like.is_contiguous():
        return value
    order = formats[like.dim()]
    return value.contiguous(memory_format=order) if like.is_contiguous(memory_format=order) else value


def _after(axes: AxisGraph, plan: Plan, ready: Prepared) -> AxisGraph:
    added = {name: (bias_dim(axes, name),) for name in ready.values if name not in axes.shapes}
    ids, next_ids = ids_after(axes, plan), next_ids_after(axes, plan)

    def changed(axis: Axis) -> Axis:
        key = axis.key
        slots = [slot for slot in slots_after(axis, axes, ready.lays, ready.sizes) if slot.name not in ready.removed]
        for name, (dim,) in added.items():
            slots += [Slot(name, 0, *place, role=Role.SHIFTS) for place in places(dim, key, ready.sizes)]
        return replace(axis, size=ready.sizes[key], slots=tuple(slots), ids=ids[key], next_id=next_ids[key])

    def left(entries: Mapping[str, T]) -> dict[str, T]:
        return {name: entry for name, entry in entries.items() if name not in ready.removed}

    # Declared sizes are in no recording.
    moves_declared = not plan.changes.keys().isdisjoint(axes.declared)
    return replace(
        axes,
        axes={key: changed(axis) for key, axis in axes.axes.items()},
        shapes=left({**axes.shapes, **added}),
        parameters=(axes.parameters | added.keys()) - set(ready.removed),
        itemsize=left({**axes.itemsize, **{name: ready.values[name].element_size() for name in added}}),
        folds=ready.folds,
        recording=None if moves_declared else axes.recording,
        steps=() if moves_declared else axes.steps,
    )


FIRST = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
"""Names of first moments in optimiser state: new entries get 0."""

SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"})
"""Names of second moments in optimiser state: new entries get the mean of the kept ones."""


@dataclass(frozen=True)
class Exchange:
    """A parameter that a plan replaces or removes, and the layouts of its dimensions after the plan."""

    name: str
    old: nn.Parameter
    lays: Mapping[int, Layout]


def follow(
    optimizers: Sequence[Optimizer], exchanged: Sequence[Exchange], added: Sequence[str] = ()
) -> Callable[[Mapping[str, nn.Parameter]], None]:
    """Compute the optimisers' state after a plan; return a function of the new parameters by name that writes it.

    Groups, their settings and their order stay, so learning-rate schedulers keep working.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "_params"):
            kind = type(optimizer).__name__
            raise PlanError(
                f"{kind} keeps all parameters in one piece and cannot follow; make a new one after the change"
            )
    known = {id(exchange.old): exchange for exchange in exchanged}
    states = [
        {
            id(parameter): {what: _state(what, value, known[id(parameter)]) for what, value in memory.items()}
            for parameter, memory in optimizer.state.items()
            if id(parameter) in known
        }
        for optimizer in optimizers
    ]

    def commit(made: Mapping[str, nn.Parameter]) -> None:
        for optimizer, state in zip(optimizers, states, strict=True):
            for group in optimizer.param_groups:
                params: list[nn.Parameter] = group["params"]
                left = [p for p in params if id(p) not in known or known[id(p)].name in made]
                params[:] = [made[known[id(p)].name] if id(p) in known else p for p in left]
                for name in added:
                    weight = made.get(name.removesuffix("bias") + "weight")
                    if any(parameter is weight for parameter in params):
                        params.append(made[name])
            for exchange in exchanged:
                if optimizer.state.pop(exchange.old, None) is not None and exchange.name in made:
                    optimizer.state[made[exchange.name]] = state[id(exchange.old)]

    return commit


def _state(what: str, value: object, exchange: Exchange) -> object:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    name, old = exchange.name, exchange.old
    if value.shape != old.shape:
        raise PlanError(
            f"the optimiser's {what!r} of {name} has shape {tuple(value.shape)}, not its parameter's "
            f"{tuple(old.shape)}: it cannot follow a change of shape; make a new optimiser after the change"
        )
    if what not in FIRST | SECOND:
        raise PlanError(
            f"the optimiser keeps {what!r} for {name}; what new or kept units should have of it is not known; "
            "make a new optimiser after the change"
        )
    with torch.no_grad():
        return resize_moment(value, exchange.lays, mean=what in SECOND)
