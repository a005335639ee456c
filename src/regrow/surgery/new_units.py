"""New units after a plan: fit their weights to data, make them sparse; the network's outputs stay."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regrow.core.axes import AxisGraph, Mark, Role
from regrow.core.plan import Plan, PlanError
from regrow.core.sources import Batch, device_of
from regrow.scoring.watch import find_inputs
from regrow.surgery.compensate import bias_of
from regrow.tracing.capture import in_eval_mode


@dataclass(frozen=True)
class Entries:
    """The indices that the new units of an axis (its key) own in dimension ``dim`` of tensor ``name``: ``where``.

    ``old``: those of its other units.
    """

    axis: str
    name: str
    dim: int
    where: tuple[int, ...]
    old: tuple[int, ...] = ()

    @property
    def is_statistic(self) -> bool:
        """Whether the tensor is a running variance of a batch normalisation, which is measured and not trained."""
        return self.name.endswith("running_var")

    def of(self, tensor: Tensor) -> Tensor:
        """Return these entries of a tensor, copied."""
        return tensor.index_select(self.dim, torch.tensor(self.where, device=tensor.device))

    def set(self, model: nn.Module, value: Tensor) -> None:
        """Write a value, expanded to their shape, into these entries of the model's parameter, in place."""
        tensor = model.get_parameter(self.name).detach()
        part = value.to(tensor).expand_as(self.of(tensor))
        tensor.index_copy_(self.dim, torch.tensor(self.where, device=tensor.device), part)


def fit_new_units(model: nn.Module, axes: AxisGraph, plan: Plan, batches: Iterable[Batch]) -> nn.Module:
    """Scale the weights of new units so that their outputs vary as much as those of the old units.

    Each row of a linear layer or convolution that makes a new unit becomes ± w · median(std of old outputs) / std of
    its own output; its bias likewise. A unit whose mean is more than one standard deviation below 0 changes its sign:
    behind a ReLU it would hardly learn. The running statistics of new batch-norm channels are set to those of their
    inputs. The units must have grown by ``zero_out``: their outgoing weights are 0, so no output changes.

    Args:
        model: The network after the plan; changed in place.
        axes: Its axes after the plan.
        plan: The plan that added the units.
        batches: Batches to measure on; one to four are enough.

    Raises:
        PlanError: If the plan did not grow an axis by ``zero_out``, or no linear layer or convolution makes its units.

    Source: after Mishkin and Matas, LSUV (arXiv 1511.06422).
    >>> from regrow import apply, trace
    >>> net, x = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2)), torch.randn(32, 4)
    >>> axes = trace(net, x)
    >>> plan = Plan.growing(axes, {"0.weight:0": 2})
    >>> net, axes = apply(net, axes, plan)
    >>> spread = fit_new_units(net, axes, plan, [Batch((x,))])[0](x).std(0)
    >>> bool(torch.allclose(spread[7:], spread[:7].median().expand(2)))
    True
    """
    new, batches = new_units(model, axes, plan), list(batches)
    for key in new:
        if axes[key].mark is Mark.FOLDED:
            raise PlanError(f"axis {key!r}: nothing writes its new units yet, so they have no spread to fit")
    weights = _weight_names(model)
    items = _entries(axes, new, lambda name, role: role is Role.PRODUCES and name in weights)
    items += _entries(axes, new, lambda name, _: name.rpartition(".")[2] == "running_var")
    reached = [item for item, _, _ in _measure(model, items, batches[:1])]
    for key in new:
        if not any(item.axis == key for item in reached):
            raise PlanError(f"axis {key!r}: no linear layer or convolution makes its units when the network runs")
    by_axis = [[item for item in reached if item.axis == key] for key in new]
    # Later layers depend on earlier ones, so fit them in order; axes do not see each other's unused new units.
    for i in range(max(map(len, by_axis))):
        for item, mean, variance in _measure(model, [members[i] for members in by_axis if i < len(members)], batches):
            if item.is_statistic:
                _set_statistics(model, item, mean, variance)
            else:
                _scale_rows(model, item, mean, variance.sqrt())
    return model


def sparsify_new_units(
    model: nn.Module, axes: AxisGraph, plan: Plan, density: float, generator: torch.Generator | None = None
) -> nn.Module:
    """Keep a random fraction ``density`` of the random weights of each new unit, at least one; set the others to 0.

    The model is changed in place and returned. Its outputs stay, since the weights on the other side are still 0; if
    they are not, ``PlanError`` is raised. ``axes``: those after the plan; ``generator``: by default torch's global one.
    """
    random_entries, _ = split_entries(model, axes, new_units(model, axes, plan))
    for entries in random_entries:
        rows = entries.of(model.get_parameter(entries.name).detach()).movedim(entries.dim, 0)
        flat = rows.flatten(1)
        ranks = torch.rand(flat.shape, generator=generator).argsort(1).to(flat.device)  # so many stay in every row
        mask = ranks < max(1, round(density * flat.shape[1]))
        entries.set(model, (flat * mask).view(rows.shape).movedim(0, entries.dim))
    return model


def new_units(model: nn.Module, axes: AxisGraph, plan: Plan) -> dict[str, Tensor]:
    """Return axis key → positions of the units that a plan added; ``PlanError`` if there are none, or they are used.

    ``axes``: those after the plan. Units are unused as long as the weights on one side of them are 0.
    """
    result = {}
    for key, change in plan.changes.items():
        if not change.grow:
            continue
        if change.fill.rule != "zero_out":
            raise PlanError(
                f"axis {key!r}: units added by {change.fill.rule!r} are read already, so outputs would change; "
                "take the fill 'zero_out'"
            )
        axis = axes[key]
        ids = {*range(axis.next_id - change.grow, axis.next_id)}
        if not ids <= set(axis.ids) or axis.size != change.after:
            raise PlanError(f"axis {key!r} is not as this plan left it; give the axes that apply returned for it")
        result[key] = torch.tensor([unit for unit, unit_id in enumerate(axis.ids) if unit_id in ids])
    if not result:
        raise PlanError("the plan adds no units; there is nothing to fit")
    _, zero_entries = split_entries(model, axes, result)
    for entries in zero_entries:
        if bool(entries.of(model.get_parameter(entries.name).detach()).any()):
            raise PlanError(
                f"axis {entries.axis!r}: {entries.name} already uses its new units; fit them before they learn"
            )
    return result


def split_entries(model: nn.Module, axes: AxisGraph, new: Mapping[str, Tensor]) -> tuple[list[Entries], list[Entries]]:
    """Return the entries of new units (axis key → positions) in weights: (initialised at random, initialised to 0)."""
    random, zero = list[Entries](), list[Entries]()
    weights = _weight_names(model)
    for side in (Role.PRODUCES, Role.CONSUMES):
        for entries in _entries(axes, new, lambda name, role: role is side and name in weights):  # noqa: B023
            is_zero = (side is Role.PRODUCES) == (axes[entries.axis].mark is Mark.FOLDED)
            (zero if is_zero else random).append(entries)
    return random, zero


def _weight_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters of two or more dimensions."""
    return {name for name, parameter in model.named_parameters() if parameter.dim() > 1}


def _entries(axes: AxisGraph, new: Mapping[str, Tensor], picks: Callable[[str, Role], bool]) -> list[Entries]:
    """Return the entries of new units (axis key → positions) in the tensors that ``picks`` accepts by name and role."""
    indices: dict[tuple[str, str, int], tuple[list[int], list[int]]] = {}
    for key, units in new.items():
        is_new = torch.zeros(axes[key].size, dtype=torch.bool).index_fill(0, units, True)
        for slot in axes[key].slots:
            name = axes.ties.get(slot.name, slot.name)
            if picks(name, slot.role):
                positions = slot.positions(axes[key].size)
                where, old = indices.setdefault((key, name, slot.dim), ([], []))
                where += positions[is_new].flatten().tolist()
                old += positions[~is_new].flatten().tolist()
    return [
        Entries(key, name, dim, tuple(dict.fromkeys(where)), tuple(old))
        for (key, name, dim), (where, old) in indices.items()
    ]


def _scale_rows(model: nn.Module, rows: Entries, mean: Tensor, spread: Tensor) -> None:
    """Scale a layer's rows of new units, in place, so that their outputs get the median std of the old ones'.

    ``mean``, ``spread``: mean and std of each output, ``[channels]``; a row with a mean below −std is negated.
    """
    spreads, median = spread[list(rows.where)], spread[list(rows.old)].median()
    factor = torch.where((spreads > 0) & (median > 0), median / spreads, 1.0)
    factor *= torch.where(mean[list(rows.where)] < -spreads, -1.0, 1.0)
    path, _, leaf = rows.name.rpartition(".")
    scaled = [rows]
    if leaf == "weight" and model.get_submodule(path)._parameters.get("bias") is not None:
        scaled.append(Entries(rows.axis, bias_of(rows.name), 0, rows.where))
    for entries in scaled:
        value = entries.of(model.get_parameter(entries.name).detach())
        shape = [-1 if dim == entries.dim else 1 for dim in range(value.dim())]
        entries.set(model, value * factor.view(shape).to(value))


def _set_statistics(model: nn.Module, channels: Entries, mean: Tensor, variance: Tensor) -> None:
    """Write the running mean and variance of a batch normalisation's new channels, in place."""
    module, where = model.get_submodule(channels.name.rpartition(".")[0]), list(channels.where)
    for buffer, value in ((module.running_mean, mean), (module.running_var, variance)):
        assert isinstance(buffer, Tensor)
        buffer[where] = value[where].to(buffer)


def _measure(
    model: nn.Module, items: Sequence[Entries], batches: Sequence[Batch]
) -> list[tuple[Entries, Tensor, Tensor]]:
    """Return (entries, mean, variance), ``[channels]``, of layers' outputs and batch norms' inputs, in run order."""
    watch = _OutputSums({id(model.get_parameter(item.name)): item.name for item in items if not item.is_statistic})
    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda _, args, name=name: watch.add(name, args[0], 1)
        )
        for name in {item.name for item in items if item.is_statistic}
    ]
    device = device_of(model)
    try:
        with in_eval_mode(model), torch.no_grad(), watch:
            for batch in batches:
                batch.to(device).run(model)
    finally:
        for handle in handles:
            handle.remove()
    result = []
    for name, (count, total, square) in watch.sums.items():
        mean = total / count
        variance = (square / count - mean**2).clamp_min(0) * (count / max(count - 1, 1))
        result += [(item, mean, variance) for item in items if item.name == name and len(mean) > max(item.where)]
    return result


class _OutputSums(TorchFunctionMode):
    """Torch function mode that sums the outputs of layers whose weights are ``watched`` (id → name), per channel.

    ``sums``: name → (number of positions, Σ y, Σ y²).
    """

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.watched = watched
        self.sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (read := next(find_inputs(self.watched, func, args, kwargs), None)) is not None:
            self.add(read[0], result, read[2])
        return result

    def add(self, name: str, value: Tensor, dim: int) -> None:
        """Add the values of a tensor to the sums of a name, with its channels along ``dim``."""
        rows = value.detach().movedim(dim, -1).flatten(0, -2).double().cpu()
        count, total, square = self.sums.get(name, (0, 0.0, 0.0))
        self.sums[name] = (count + len(rows), total + rows.sum(0), square + rows.square().sum(0))
