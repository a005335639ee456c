"""New units after a plan: fit their weights to data, make them sparse, turn them; the network's outputs stay."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

from regrow.core.axes import AxisGraph, Mark, Role
from regrow.core.change import FILLS
from regrow.core.plan import Plan, PlanError
from regrow.core.sources import Batch, device_of, moved
from regrow.scoring.watch import find_inputs
from regrow.tracing.capture import evaluating

_Spot = tuple[str, str, int]
"""The key of an axis, the name of a parameter, and one of its dimensions."""


def fit_new_units(model: nn.Module, axes: AxisGraph, plan: Plan, batches: Iterable[Batch]) -> nn.Module:
    """Scale the weights of new units so that their outputs vary as much as those of the old units.

    Each row of a linear layer or convolution that makes a new unit becomes ± w · median(std of old outputs) / std of
    its own output, over all positions of all batches; its bias likewise. A unit whose mean is more than one standard
    deviation below 0 changes its sign: behind a ReLU it would be almost always 0, and hardly learn. The running
    statistics of new batch-norm channels are set to those of their inputs. The units must have grown by ``zero_out``:
    their outgoing weights are 0, so the network's outputs do not change.

    Args:
        model: The network after the plan; changed in place.
        axes: Its axes after the plan.
        plan: The plan that added the units.
        batches: Batches to measure on; one to four are enough.

    Returns:
        The same model.

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
    spots: list[_Rows | _Channels] = [*_rows(model, axes, new), *_channels(axes, new)]
    met = list(_sums(model, spots, batches[:1]))
    for key in new:
        if not any(spot.axis == key for spot in met):
            raise PlanError(f"axis {key!r}: no linear layer or convolution makes its units when the network runs")
    turns = [[spot for spot in met if spot.axis == key] for key in new]
    # Later layers depend on earlier ones, so fit them in order; axes do not see each other's unused new units.
    for i in range(max(map(len, turns))):
        now = [turn[i] for turn in turns if i < len(turn)]
        for spot, sums in _sums(model, now, batches).items():
            spot.fit(model, *sums)
    return model


def sparsify_new_units(
    model: nn.Module, axes: AxisGraph, plan: Plan, density: float, generator: torch.Generator | None = None
) -> nn.Module:
    """Set a random part of the randomly initialised weights of new units to 0; each unit keeps at least one.

    >>> from regrow import apply, trace
    >>> net = nn.Sequential(nn.Linear(40, 7), nn.ReLU(), nn.Linear(7, 2))
    >>> axes = trace(net, torch.randn(2, 40))
    >>> plan = Plan.growing(axes, {"0.weight:0": 2})
    >>> net, axes = apply(net, axes, plan)
    >>> sparsify_new_units(net, axes, plan, 0.25)[0].weight[7:].count_nonzero(1).tolist()
    [10, 10]
    """
    for entries in split_entries(model, axes, new_units(model, axes, plan))[0]:
        rows = entries.of(model.get_parameter(entries.name).detach()).movedim(entries.dim, 0)
        flat = rows.flatten(1)
        order = torch.rand(flat.shape, generator=generator).argsort(1).to(flat.device)
        stays = order < max(1, round(density * flat.shape[1]))
        entries.set(model, (flat * stays).view(rows.shape).movedim(0, entries.dim))
    return model


def new_units(model: nn.Module, axes: AxisGraph, plan: Plan) -> dict[str, Tensor]:
    """Return axis key → the positions of the units that a plan added or restored afresh."""
    result = {}
    for key, change in plan.changes.items():
        if not change.new_units:
            continue
        if not FILLS[change.fill.rule].unread:
            raise PlanError(
                f"axis {key!r}: units added by {change.fill.rule!r} are read already, so a change would be heard; "
                "take the fill 'zero_out'"
            )
        axis = axes[key]
        ids = {*range(axis.next_id - change.grow, axis.next_id), *(change.restore if change.fresh else ())}
        if not ids <= set(axis.ids) or axis.size != change.after:
            raise PlanError(f"axis {key!r} is not as this plan left it; give the axes that apply returned for it")
        result[key] = torch.tensor([unit for unit, one in enumerate(axis.ids) if one in ids])
    if not result:
        raise PlanError("the plan adds no units; there is nothing to fit")
    for entries in split_entries(model, axes, result)[1]:
        if bool(entries.of(model.get_parameter(entries.name).detach()).any()):
            raise PlanError(
                f"axis {entries.axis!r}: {entries.name} already uses its new units; fit them before they learn"
            )
    return result


@dataclass(frozen=True)
class Entries:
    """The indices that new units of an axis own in one dimension of a parameter.

    Args:
        axis: The key of the axis.
        name: The name of the parameter.
        dim: Its dimension.
        where: The indices along the dimension.
    """

    axis: str
    name: str
    dim: int
    where: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Return these entries of a tensor that has the parameter's shape."""
        return tensor.index_select(self.dim, torch.tensor(self.where, device=tensor.device))

    def set(self, model: nn.Module, value: Tensor) -> None:
        """Write a value into these entries of the model's parameter, in place."""
        tensor = model.get_parameter(self.name).detach()
        part = value.to(tensor).expand_as(self.of(tensor))
        tensor.index_copy_(self.dim, torch.tensor(self.where, device=tensor.device), part)

    def turn(self, model: nn.Module, direction: Tensor) -> None:
        """Turn each row halfway to another direction and keep its norm; a row whose direction is 0 stays.

        The directions are made orthogonal to one another by the smallest change that does it (the polar factor);
        otherwise all rows would take the one best direction, and learn the same.
        """
        now = self.of(model.get_parameter(self.name).detach()).movedim(self.dim, 0)
        rows, old = (x.double().flatten(1) for x in (direction.movedim(self.dim, 0), now))
        left, _, right = torch.linalg.svd(normalize(rows), full_matrices=False)
        turned = normalize(normalize(old) + normalize(left @ right)) * old.norm(dim=1, keepdim=True)
        turned = torch.where(rows.any(1, keepdim=True), turned, old)
        self.set(model, turned.reshape(now.shape).movedim(0, self.dim))


def split_entries(model: nn.Module, axes: AxisGraph, new: Mapping[str, Tensor]) -> tuple[list[Entries], list[Entries]]:
    """Return the entries of new units as (randomly initialised, zero-initialised)."""
    drawn: list[Entries] = []
    zero: list[Entries] = []
    for role in (Role.PRODUCES, Role.CONSUMES):
        positions: dict[_Spot, list[int]] = {}
        for spot, where in _weights(model, axes, new, role):
            positions.setdefault(spot, []).extend(where[new[spot[0]]].flatten().tolist())
        for spot, indices in positions.items():
            is_zero = (role is Role.PRODUCES) == (axes[spot[0]].mark is Mark.FOLDED)
            (zero if is_zero else drawn).append(Entries(*spot, tuple(dict.fromkeys(indices))))
    return drawn, zero


def _weights(model: nn.Module, axes: AxisGraph, keys: Iterable[str], role: Role) -> Iterator[tuple[_Spot, Tensor]]:
    """Yield (axis, weight, dimension) and the positions of every unit there, ``[units, positions]``."""
    parameters = dict(model.named_parameters())
    for key in keys:
        for slot in axes[key].slots:
            name = axes.ties.get(slot.name, slot.name)
            if slot.role is role and name in parameters and parameters[name].dim() > 1:
                yield (key, name, slot.dim), slot.positions(axes[key].size)


@dataclass(frozen=True)
class _Rows:
    """The rows of a weight that make units of an axis: those of new units and those of old ones."""

    axis: str
    name: str
    dim: int
    new: tuple[int, ...]
    old: tuple[int, ...]

    def fit(self, model: nn.Module, mean: Tensor, variance: Tensor) -> None:
        spread, new = variance.sqrt(), list(self.new)
        own, usual = spread[new], spread[list(self.old)].median()
        factor = torch.where((own > 0) & (usual > 0), usual / own, 1.0)
        factor *= torch.where(mean[new] < -own, -1.0, 1.0)
        path, _, leaf = self.name.rpartition(".")
        scaled = [(model.get_parameter(self.name), self.dim)]
        if leaf == "weight" and (bias := model.get_submodule(path)._parameters.get("bias")) is not None:
            scaled.append((bias, 0))
        for parameter, dim in scaled:
            value, at = parameter.detach(), torch.tensor(self.new, device=parameter.device)
            shape = [-1 if d == dim else 1 for d in range(value.dim())]
            value.index_copy_(dim, at, value.index_select(dim, at) * factor.view(shape).to(value))


@dataclass(frozen=True)
class _Channels:
    """The channels of a batch normalisation that are new units of an axis."""

    axis: str
    name: str
    new: tuple[int, ...]

    def fit(self, model: nn.Module, mean: Tensor, variance: Tensor) -> None:
        module, at = model.get_submodule(self.name), list(self.new)
        for own, value in ((module.running_mean, mean), (module.running_var, variance)):
            assert isinstance(own, Tensor)
            own[at] = value[at].to(own)


def _rows(model: nn.Module, axes: AxisGraph, new: Mapping[str, Tensor]) -> list[_Rows]:
    rows: dict[_Spot, tuple[list[int], list[int]]] = {}
    for spot, where in _weights(model, axes, new, Role.PRODUCES):
        is_new = torch.zeros(len(where), dtype=torch.bool).index_fill(0, new[spot[0]], True)
        for positions, which in zip(rows.setdefault(spot, ([], [])), (is_new, ~is_new), strict=True):
            positions += where[which].flatten().tolist()
    return [_Rows(*spot, tuple(made), tuple(old)) for spot, (made, old) in rows.items()]


def _channels(axes: AxisGraph, new: Mapping[str, Tensor]) -> list[_Channels]:
    channels: dict[tuple[str, str], list[int]] = {}
    for key, units in new.items():
        for slot in axes[key].slots:
            name, _, leaf = slot.name.rpartition(".")
            if leaf == "running_var":
                positions = slot.positions(axes[key].size)[units]
                channels.setdefault((key, name), []).extend(positions.flatten().tolist())
    return [_Channels(*spot, tuple(positions)) for spot, positions in channels.items()]


def _sums(
    model: nn.Module, spots: Sequence[_Rows | _Channels], batches: Sequence[Batch]
) -> dict[_Rows | _Channels, tuple[Tensor, Tensor]]:
    """Return mean and variance of the outputs of rows and of the inputs of channels, in the order of execution."""
    watch = _Watch({id(model.get_parameter(s.name)): s.name for s in spots if isinstance(s, _Rows)})
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: watch.add(f"{name}:", args[0], 1)
        )
        for name in {spot.name for spot in spots if isinstance(spot, _Channels)}
    ]
    device = device_of(model)
    try:
        with evaluating(model), torch.no_grad(), watch:
            for batch in batches:
                model(*moved(batch.args, device), **moved(dict(batch.kwargs), device))
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, (count, total, square) in watch.sums.items():
        mean = total / count
        variance = (square / count - mean**2).clamp_min(0) * (count / max(count - 1, 1))
        for spot in spots:
            channels = spot.name if isinstance(spot, _Rows) else f"{spot.name}:"
            if channels == name and len(mean) > max(spot.new):
                result[spot] = (mean, variance)
    return result


class _Watch(TorchFunctionMode):
    """Torch function mode that sums the outputs of watched weights, channel by channel."""

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
