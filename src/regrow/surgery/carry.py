"""Compute every tensor after a checked plan, and write them into the model and its optimizers: ``commit``."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim import Optimizer

from regrow.core.axes import Axis, AxisGraph, Fold, Role, size_of
from regrow.core.plan import Plan, PlanError
from regrow.core.process_memory import release_pages
from regrow.surgery.compensate import PlannedTensors, bias_dim, bias_of, rescale_epsilons
from regrow.surgery.layout import Layout, ids_after, next_ids_after, resize_moment, slots_after, slots_in
from regrow.surgery.undo_store import UndoStore, plan_with_undo
from regrow.tracing.attributes import get_attribute, set_attribute
from regrow.tracing.capture import Capture
from regrow.tracing.model_state import Snapshot, state_of
from regrow.tracing.readings import Recording
from regrow.tracing.trial import Resizing, planned_integers


@dataclass(frozen=True)
class Prepared:
    """The computed result of a plan, before anything is changed.

    Args:
        tensors: All tensors after the plan, computed when they are asked for.
        values: Name → the tensor to write, for those that change; perhaps not all (``prepare(names=…)``).
        constants: ``module:attribute`` → the epsilon to write.
        folds: All divisors of the network (``AxisGraph.folds``), with their new epsilons.
        undo: The undo store after the plan; ``None``: there is none.
    """

    tensors: PlannedTensors
    values: Mapping[str, Tensor]
    constants: Mapping[str, float]
    folds: tuple[Fold, ...]
    undo: UndoStore | None = None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Axis key → its number of units after the plan."""
        return self.tensors.sizes


@dataclass(frozen=True)
class ProposedChange:
    """A plan whose result is computed but not yet written.

    ``recording``: of the network before the plan; ``planned``: of the network after it.
    """

    ready: Prepared
    recording: Recording
    planned: Capture

    @property
    def tensors(self) -> PlannedTensors:
        """The tensors after the plan, with the model, its axes and the plan."""
        return self.ready.tensors


def apply_unchecked(
    model: nn.Module, axes: AxisGraph, plan: Plan, undo: UndoStore | None = None
) -> tuple[nn.Module, AxisGraph]:
    """Apply a plan in place without the checks of :func:`regrow.apply`, for copies that are compared right after."""
    return commit(model, axes, prepare(model, axes, plan, undo), undo=undo)


def prepare(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    undo: UndoStore | None = None,
    names: Collection[str] | None = None,
) -> Prepared:
    """Compute the tensors after a plan (only those in ``names``, if given); the model and ``undo`` stay unchanged.

    ``undo``: holds the weights of restored units. Raises ``PlanError`` if a tensor cannot become what the plan says.
    """
    if names is not None:
        plan = replace(plan, means={weight: row for weight, row in plan.means.items() if bias_of(weight) in names})
    tensors = PlannedTensors(model, axes, plan)
    names = dict.fromkeys((*state_of(model), *tensors.biases) if names is None else names)
    with torch.no_grad():
        values = {name: tensors.load(name) for name in names if tensors.changes(name)}
        if undo is not None:
            values, undo = plan_with_undo(undo, tensors, values)
    for name, value in values.items():
        if list(value.shape) != [size_of(dim, tensors.sizes) for dim in axes.shapes.get(name, tuple(value.shape))]:
            raise PlanError(f"{name} would become {tuple(value.shape)}, which is not what the plan says")
    return Prepared(tensors, values, *rescale_epsilons(model, axes, tensors.sizes), undo)


def plan_resizing(model: nn.Module, axes: AxisGraph, plan: Plan) -> Resizing:
    """Return the axis sizes after a plan, the epsilons of norms, and the biases it adds, without computing tensors."""
    sizes = plan.sizes(axes)
    constants, _ = rescale_epsilons(model, axes, sizes)
    biases = [bias_of(weight) for weight in plan.means]
    added = {bias: size_of(bias_dim(axes, bias), sizes) for bias in biases if bias not in axes.shapes}
    return Resizing(sizes, constants, added)


def commit(
    model: nn.Module,
    axes: AxisGraph,
    ready: Prepared,
    optimizers: Sequence[Optimizer] = (),
    undo: UndoStore | None = None,
    prove: Callable[[AxisGraph], AxisGraph] = lambda axes: axes,
) -> tuple[nn.Module, AxisGraph]:
    """Write a prepared plan into model, optimizers and undo store, in place; return the model and its new axes.

    ``prove`` gets the new axes once the model is changed, and returns them; if it raises, the model is restored.
    ``PlanError`` for gradient hooks, and optimizers that cannot follow, is raised before anything is changed.
    """
    parameters = dict(model.named_parameters())
    replaced = {name: parameters[name] for name in ready.values if name in parameters}
    exchanged = [Exchange(name, old, ready.tensors.layouts(name)) for name, old in replaced.items()]
    for exchange in exchanged:
        if exchange.old._backward_hooks or exchange.old._post_accumulate_grad_hooks:
            raise PlanError(
                f"{exchange.name} has a gradient hook, which does not follow a change of shape; remove it "
                "(handle.remove()) and register it again on the new parameter"
            )
    added = [name for name in ready.values if name not in axes.shapes]
    write_state = prepare_optimizers(optimizers, exchanged, added)
    before = Snapshot(model)
    try:
        write(model, axes, ready)
        after = prove(_axes_after(axes, ready))
    except BaseException:
        before.restore()
        raise
    write_state(dict(model.named_parameters()))
    release_pages(exchange.old for exchange in exchanged)
    if undo is not None and ready.undo is not None:
        undo.replace_contents(replace(ready.undo, network=after.network))
    return model, after


def write(model: nn.Module, axes: AxisGraph, ready: Prepared) -> None:
    """Write a prepared plan's tensors and numbers into the model's modules, in place; tied tensors stay tied."""
    new_tensors: dict[str, nn.Parameter | Tensor] = {}
    for name, value in ready.values.items():
        path, _, leaf = name.rpartition(".")
        module, first = model.get_submodule(path), axes.ties.get(name, name)
        if first not in new_tensors:
            old = module._parameters.get(leaf)
            if leaf in module._buffers:
                new_tensors[first] = _match_format(value, module._buffers[leaf])
            elif old is None:  # a bias that compensates; it trains if the weight beside it does
                new_tensors[first] = nn.Parameter(value, requires_grad=module.get_parameter("weight").requires_grad)
            else:
                new_tensors[first] = _make_successor(old, value, ready.tensors.layouts(name))
        setattr(module, leaf, new_tensors[first])  # as a user would: modules that keep lists of their weights notice
    for attribute, number in {**planned_integers(axes, ready.sizes), **ready.constants}.items():
        path, name = attribute.split(":")
        module = model.get_submodule(path)
        old_value = get_attribute(module, name)
        set_attribute(module, name, (number, *old_value[1:]) if isinstance(old_value, tuple) else number)
    _recompute_weights(model)


def _make_successor(old: nn.Parameter, value: Tensor, layouts: Mapping[int, Layout]) -> nn.Parameter:
    """Return the new parameter that replaces an old one: with its memory format, attributes and gradient (0 if new)."""
    new = nn.Parameter(_match_format(value, old), requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    if old.grad is not None:
        with torch.no_grad():
            new.grad = _match_format(resize_moment(old.grad, layouts, mean=False).to(new), old.grad)
    return new


def _match_format(value: Tensor, like: Tensor | None) -> Tensor:
    """Return a tensor in the memory format of ``like``: channels last if that is; unchanged for ``None``."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if like is None or like.layout is not torch.strided or like.dim() not in formats or like.is_contiguous():
        return value
    order = formats[like.dim()]
    return value.contiguous(memory_format=order) if like.is_contiguous(memory_format=order) else value


def _axes_after(axes: AxisGraph, ready: Prepared) -> AxisGraph:
    """Return a network's axes after a prepared plan."""
    plan = ready.tensors.plan
    added = {name: (bias_dim(axes, name),) for name in ready.values if name not in axes.shapes}
    ids, next_ids = ids_after(axes, plan), next_ids_after(axes, plan)

    def changed(axis: Axis) -> Axis:
        key = axis.key
        slots = [*slots_after(axis, axes, ready.tensors.layouts, ready.sizes)]
        for name, (dim,) in added.items():
            slots += slots_in(name, 0, Role.SHIFTS, dim, key, ready.sizes)
        return replace(axis, size=ready.sizes[key], slots=tuple(slots), ids=ids[key], next_id=next_ids[key])

    return replace(
        axes,
        axes={key: changed(axis) for key, axis in axes.axes.items()},
        shapes={**axes.shapes, **added},
        parameters=axes.parameters | added.keys(),
        itemsize={**axes.itemsize, **{name: ready.values[name].element_size() for name in added}},
        folds=ready.folds,
        network=uuid4().hex if ready.tensors.rewrites else axes.network,  # what was cut before fits it no more
    )


# Names of first moments in optimizer state: new entries get 0
FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})

# Names of second moments in optimizer state: new entries get the mean of the kept ones
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"})


@dataclass(frozen=True)
class Exchange:
    """A parameter (``old``) that a plan replaces or removes; ``layouts``: changed dimension → its layout after that."""

    name: str
    old: nn.Parameter
    layouts: Mapping[int, Layout]


def prepare_optimizers(
    optimizers: Sequence[Optimizer], exchanged: Sequence[Exchange], added: Sequence[str] = ()
) -> Callable[[Mapping[str, nn.Parameter]], None]:
    """Compute the optimizers' state after a plan; return a function that writes it, given name → new parameter.

    Of ``exchanged`` parameters those without a new one are left out. ``added``: the names of biases that the plan adds,
    which join the group of their weight. Groups, their settings and their order stay, so learning-rate schedulers keep
    working. Raises ``PlanError`` if an optimizer cannot follow.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "_params"):
            kind = type(optimizer).__name__
            raise PlanError(
                f"{kind} keeps all parameters in one piece and cannot follow; make a new one after the change"
            )
    by_id = {id(exchange.old): exchange for exchange in exchanged}
    states = [
        {
            id(parameter): {key: _resize_state(key, value, by_id[id(parameter)]) for key, value in entries.items()}
            for parameter, entries in optimizer.state.items()
            if id(parameter) in by_id
        }
        for optimizer in optimizers
    ]

    def write_state(new: Mapping[str, nn.Parameter]) -> None:
        for optimizer, state in zip(optimizers, states, strict=True):
            for group in optimizer.param_groups:
                params: list[nn.Parameter] = group["params"]
                remaining = [p for p in params if id(p) not in by_id or by_id[id(p)].name in new]
                params[:] = [new[by_id[id(p)].name] if id(p) in by_id else p for p in remaining]
                for name in added:
                    weight = new.get(name.removesuffix("bias") + "weight")
                    if any(parameter is weight for parameter in params):
                        params.append(new[name])
            for exchange in exchanged:
                if optimizer.state.pop(exchange.old, None) is not None and exchange.name in new:
                    optimizer.state[new[exchange.name]] = state[id(exchange.old)]

    return write_state


def _resize_state(key: str, value: object, exchange: Exchange) -> object:
    """Return the entry ``key`` of a parameter's optimizer state after a plan; ``PlanError`` if it cannot follow."""
    if not isinstance(value, Tensor) or value.dim() == 0:  # such as the number of steps
        return value
    if value.shape != exchange.old.shape or key not in FIRST_MOMENTS | SECOND_MOMENTS:
        raise PlanError(
            f"the optimizer's {key!r} of {exchange.name}, of shape {tuple(value.shape)}, cannot follow a change of "
            "shape; make a new optimizer after the change"
        )
    with torch.no_grad():
        return resize_moment(value, exchange.layouts, mean=key in SECOND_MOMENTS)


def _recompute_weights(model: nn.Module) -> None:
    """Recompute in place the weights that hooks compute before each run (weight norm, spectral norm, pruning masks)."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
            elif isinstance(hook, WeightNorm | BasePruningMethod):
                hook(module, None)
