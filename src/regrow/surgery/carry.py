"""Compute what a checked plan makes of every tensor, and write it into the model, its optimisers and its axes."""

import ctypes
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from mmap import PAGESIZE
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from regrow.core.axes import Axis, AxisGraph, Role, Slot, axes_in, size_of
from regrow.core.plan import Plan, PlanError
from regrow.surgery.compensate import bias_dim, bias_of, offsets
from regrow.surgery.fold import Outcome, divisor_size, fold_constants, fold_values
from regrow.surgery.layout import Layout, places, plan_layouts, slots_after, unit_ids_after
from regrow.surgery.optimizer import Exchange, follow
from regrow.surgery.restore import plan_with_undo
from regrow.surgery.undo_store import UndoStore
from regrow.surgery.widen import resize, resize_moment, roles_of
from regrow.tracing.attributes import get_attribute, set_attribute
from regrow.tracing.kinds import recompute_weights
from regrow.tracing.model_state import Snapshot, select_state, state_of
from regrow.tracing.trial import Resizing, planned_integers

LEAST = 2**26
"""The fewest bytes for which it is worth asking."""
_MADV_PAGEOUT = 21


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Let Linux reclaim the pages of tensors in memory-mapped files; they are read again from there if they are used.

    A checkpoint stays mapped while any of its tensors is in use, and its pages count as memory of the process.
    """
    large = [one for one in tensors if _is_plain(one) and one.nbytes >= 2 * PAGESIZE]
    if sys.platform != "linux" or sum(one.nbytes for one in large) < LEAST:
        return
    ranges = _mapped_ranges()
    starts = [start for start, _ in ranges]
    advise = ctypes.CDLL(None).madvise
    for one in large:
        begin, end = -(-one.data_ptr() // PAGESIZE) * PAGESIZE, (one.data_ptr() + one.nbytes) // PAGESIZE * PAGESIZE
        place = bisect_right(starts, begin) - 1
        if place >= 0 and end <= ranges[place][1]:  # advice: where the kernel does not know it, nothing happens
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT)


def _is_plain(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
    return strided and tensor.is_contiguous()


def _mapped_ranges() -> list[tuple[int, int]]:
    """Return the address ranges of this process that files are mapped to, in ascending order."""
    try:
        rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return []
    files = [row[0].split("-") for row in rows if row[4] != "0"]
    return sorted((int(start, 16), int(stop, 16)) for start, stop in files)


@dataclass(frozen=True)
class Prepared:
    """The computed result of a plan, before anything is changed.

    Args:
        sizes: Axis key → its number of units after the plan.
        lays: Tensor name → dimension → the layout of its entries after the plan.
        done: The tensors and constants to write.
        undo: The undo store after the plan; ``None`` without one.
    """

    sizes: Mapping[str, int]
    lays: Mapping[str, Mapping[int, Layout]]
    done: Outcome
    undo: UndoStore | None = None

    def resizing(self, axes: AxisGraph) -> Resizing:
        """Return the sizes, constants and biases of the planned network, without the values of its tensors."""
        added = {name: len(value) for name, value in self.done.values.items() if name not in axes.shapes}
        return Resizing(self.sizes, self.done.constants, added, self.done.removed)


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
    """Compute the tensors that a plan leads to, without changing the model."""
    sizes, seed = plan.sizes(axes), _seed(axes, plan)
    part, plan = (axes, plan) if names is None else _restricted(axes, plan, names)
    lays = plan_layouts(part, plan)
    roles = roles_of([(slot.name, slot.dim, slot.role) for key in plan.changes for slot in axes[key].slots])
    tensors = state_of(model) if names is None else select_state(model, names)
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    stored: UndoStore | None = None
    with torch.no_grad():
        values = {name: _exact(state[name]) for name in _gains(part, sizes) if name in state} if exact else {}
        values |= {
            name: resize(name, tensor, lays[name], roles.get(name, {}), seed, exact)
            for name, tensor in state.items()
            if name in lays
        }
        values |= offsets(model, axes, plan, lays, values, exact)
        if undo is None:
            done = fold_values(model, part, sizes, values)
        else:
            done, stored = plan_with_undo(undo, model, axes, plan, lays, values)
    for name, value in done.values.items():
        if list(value.shape) != [size_of(dim, sizes) for dim in axes.shapes.get(name, tuple(value.shape))]:
            raise PlanError(f"{name} would become {tuple(value.shape)}, which is not what the plan says")
    return Prepared(sizes, lays, done, stored)


def resizing(model: nn.Module, axes: AxisGraph, plan: Plan) -> Resizing:
    """Return the sizes, constants and biases that a plan leads to, without computing any tensor."""
    sizes = plan.sizes(axes)
    constants, _ = fold_constants(model, axes, sizes)
    biases = [bias_of(weight) for weight in plan.means]
    added = {bias: size_of(bias_dim(axes, bias), sizes) for bias in biases if bias not in axes.shapes}
    return Resizing(sizes, constants, added)


def _seed(axes: AxisGraph, plan: Plan) -> int:
    grown = [(key, change.fill.seed, axes[key].next_id) for key, change in sorted(plan.changes.items())]
    return zlib.crc32(repr(grown).encode())


def _restricted(axes: AxisGraph, plan: Plan, names: Collection[str]) -> tuple[AxisGraph, Plan]:
    """Return axes and a plan reduced to what concerns some tensors."""
    means = {weight: row for weight, row in plan.means.items() if bias_of(weight) in names}
    shapes = {name: axes.shapes[name] for name in (*names, *means) if name in axes.shapes}
    folds = tuple(fold for fold in axes.folds if fold.weight in names)
    own = {key for dims in shapes.values() for dim in dims for key in axes_in(dim)}
    changes = {key: change for key, change in plan.changes.items() if key in own}
    return replace(axes, shapes=shapes, folds=folds), replace(plan, changes=changes, means=means)


def _gains(axes: AxisGraph, sizes: Mapping[str, int]) -> list[str]:
    """Return the parameters that compensate for the divisors that change."""
    return [fold.weight for fold in axes.folds if divisor_size(fold, axes.sizes()) != divisor_size(fold, sizes)]


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def commit(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    ready: Prepared,
    optimizers: Sequence[Optimizer] = (),
    undo: UndoStore | None = None,
    prove: Callable[[AxisGraph], AxisGraph] = lambda axes: axes,
) -> tuple[nn.Module, AxisGraph]:
    """Write a prepared plan into the model, the optimisers and the undo store, in place.

    Returns:
        The model, and its axes after the plan.
    """
    done, lays = ready.done, ready.lays
    parameters = dict(model.named_parameters())
    exchanged = [Exchange(n, parameters[n], lays.get(n, {})) for n in (*done.values, *done.removed) if n in parameters]
    _check_hooks(exchanged)
    remember = follow(optimizers, exchanged, added=[n for n in done.values if n not in axes.shapes])
    before = Snapshot(model)
    try:
        _commit(model, axes, ready, planned_integers(axes, ready.sizes))
        after = prove(_after(axes, plan, lays, ready.sizes, done))
    except BaseException:
        before.restore()
        raise
    remember(dict(model.named_parameters()))
    release_pages(one.old for one in exchanged)
    if undo is not None:
        vars(undo).update(vars(ready.undo))
    return model, after


def _check_hooks(exchanged: Sequence[Exchange]) -> None:
    for one in exchanged:
        if one.old._backward_hooks or one.old._post_accumulate_grad_hooks:
            raise PlanError(
                f"{one.name} has a gradient hook, which does not follow a change of shape; remove it (handle.remove()) "
                "and register it again on the new parameter"
            )


def _commit(model: nn.Module, axes: AxisGraph, ready: Prepared, integers: Mapping[str, int]) -> None:
    done = ready.done
    made: dict[str, nn.Parameter | Tensor] = {}
    for name, value in done.values.items():
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
    for name in done.removed:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, None)
    for place, number in {**integers, **done.constants}.items():
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
        ids = axis.ids if change is None else tuple(sorted(unit_ids_after(change, axis)))
        slots = [slot for slot in slots_after(axis, axes, lays, sizes) if slot.name not in done.removed]
        for name, (dim,) in added.items():
            slots += [Slot(name, 0, *place, role=Role.SHIFTS) for place in places(dim, axis.key, sizes)]
        next_id = axis.next_id + (0 if change is None else change.grow)
        return replace(axis, size=sizes[axis.key], slots=tuple(slots), ids=ids, next_id=next_id)

    itemsize = {**axes.itemsize, **{name: done.values[name].element_size() for name in added}}
    return replace(
        axes,
        axes={key: changed(axis) for key, axis in axes.axes.items()},
        shapes={name: dims for name, dims in {**axes.shapes, **added}.items() if name not in done.removed},
        parameters=(axes.parameters | added.keys()) - set(done.removed),
        itemsize={name: size for name, size in itemsize.items() if name not in done.removed},
        folds=done.folds,
        recording=None if plan.changes.keys() & set(axes.declared) else axes.recording,
        steps=() if plan.changes.keys() & set(axes.declared) else axes.steps,  # they know no declared sizes
    )
