"""The tensors that a plan leads to: cut or widened, with the means of dropped inputs in biases, and folded divisors."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Dim, Fold, Role, size_of
from regrow.core.plan import NONE, Plan, PlanError
from regrow.scoring.compensate import holders, sharing_module
from regrow.surgery.layout import Layout, Layouts, lay_out_dims, resize, units_after
from regrow.surgery.undo_store import Constant
from regrow.tracing.model_state import select_state
from regrow.tracing.own_run import as_double


class PlannedTensors:
    """The parameters and buffers that a plan leads to, each computed when it is asked for."""

    def __init__(self, model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
        self.model, self.axes, self.plan = model, axes, plan
        self.sizes, self._before = plan.sizes(axes), axes.sizes()
        self.units = {key: units_after(change, axes[key]) for key, change in plan.changes.items() if not change.idle}
        self.biases = {bias_of(weight): weight for weight in plan.means}
        self._folds = {
            fold.weight: (fold, divisor_size(fold, self._before), divisor_size(fold, self.sizes)) for fold in axes.folds
        }
        self._lays: dict[str, dict[int, Layout]] = {}
        self._roles: dict[str, dict[int, set[Role]]] = {}
        for slot in (slot for key in plan.changes for slot in axes[key].slots):
            self._roles.setdefault(slot.name, {}).setdefault(slot.dim, set()).add(slot.role)
        grown = [(key, change.fill.seed, axes[key].next_id) for key, change in sorted(plan.changes.items())]
        self._seed = zlib.crc32(repr(grown).encode())
        check_means(model, axes, plan.means, self.lays)

    def lays(self, name: str) -> dict[int, Layout]:
        """Return dimension → the layout of its entries after the plan, for the dimensions of a tensor that change."""
        if name not in self._lays:
            self._lays[name] = lay_out_dims(self.axes.shapes.get(name, ()), self._before, self.units)
        return self._lays[name]

    def changes(self, name: str) -> bool:
        """Whether the plan changes a tensor."""
        return bool(self.lays(name)) or name in self.biases or self._is_rescaled(name)

    def computes(self, name: str) -> bool:
        """Whether entries of a tensor may be computed (folded, compensated, new), instead of selected as they are."""
        return name in self._folds or name in self.biases or any(bool(x.is_new.any()) for x in self.lays(name).values())

    def load(self, name: str, exact: bool = False) -> Tensor:
        """Return a tensor after the plan: as the network will hold it, or in float64 without rounding (``exact``)."""
        tensor = select_state(self.model, [name]).get(name)  # none of a bias that compensation adds
        tensor = None if tensor is None else tensor.detach()
        if tensor is not None and self.lays(name):
            tensor = resize(name, tensor, self.lays(name), self._roles.get(name, {}), self._seed, exact)
        if weight := self.biases.get(name):
            means = self.plan.means[weight]
            tensor = compensate(self.model, self.axes, weight, means, self.lays(weight), tensor, exact)
        assert tensor is not None
        tensor = as_double(tensor) if exact else tensor
        if self._is_rescaled(name):
            fold, before, after = self._folds[name]
            tensor = rescale(tensor, torch.tensor(before), after, fold)
        return tensor

    def _is_rescaled(self, name: str) -> bool:
        return name in self._folds and self._folds[name][1] != self._folds[name][2]


def offsets(
    model: nn.Module, axes: AxisGraph, plan: Plan, lays: Layouts, biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the biases, by name, that compensate for the dropped inputs for which a plan has means."""
    check_means(model, axes, plan.means, lambda name: lays.get(name, {}))
    return {
        bias_of(name): compensate(model, axes, name, means, lays[name], biases.get(bias_of(name)))
        for name, means in plan.means.items()
    }


def check_means(
    model: nn.Module,
    axes: AxisGraph,
    means: Mapping[str, Mapping[int, float]],
    lays: Callable[[str], Mapping[int, Layout]],
) -> None:
    """Raise ``PlanError`` unless each weight's layer can take up the means of its dropped inputs."""
    held = holders(model) if means else {}
    for name, row in means.items():
        dim, _ = check_bias(model, axes, name)
        if (sharing := sharing_module(model, name, held)) is not None:
            raise PlanError(
                f"means are given for {name}, which {sharing or 'the model'} holds too and would read without them; "
                "leave them out"
            )
        lay, inputs = lays(name).get(dim), model.get_parameter(name).shape[dim]
        if lay is None or bool(torch.isin(torch.tensor(list(row)), lay.kept).any()) or max(row) >= inputs:
            raise PlanError(f"the plan gives means for inputs of {name} that it does not drop")


def compensate(
    model: nn.Module,
    axes: AxisGraph,
    name: str,
    means: Mapping[int, float],
    lays: Mapping[int, Layout],
    bias: Tensor | None,
    exact: bool = False,
) -> Tensor:
    """Return a layer's bias with the means of its dropped inputs: b′ = b + Σ_dropped W[:, i] · E[x_i]."""
    (dim, old), weight = check_bias(model, axes, name), model.get_parameter(name).detach()
    lost = mean_contribution(weight, dim, means)
    for other, lay in lays.items():
        lost = lost if other == dim else lost.index_select(0, lay.source.to(lost.device))
    bias = old if bias is None else bias
    made = lost if bias is None else bias.detach().double() + lost
    return made if exact else made.to(weight.dtype)


def check_bias(model: nn.Module, axes: AxisGraph, weight: str) -> tuple[int, Tensor | None]:
    """Return the dimension of a weight that consumes axes, and the bias of its layer, which can take up means."""
    path, _, leaf = weight.rpartition(".")
    dim, parameters = read_dim(axes, weight), model.get_submodule(path)._parameters
    if leaf != "weight" or dim is None or "bias" not in parameters:
        raise PlanError(f"{weight} has no bias that could take up the means of dropped inputs")
    return dim, parameters["bias"]


def mean_contribution(weight: Tensor, dim: int, means: Mapping[int, float]) -> Tensor:
    """Return Σ W[:, i] · E[x_i] over the inputs that have a mean, one number per output (float64)."""
    positions = sorted(means)
    constants = torch.tensor([means[i] for i in positions], dtype=torch.float64, device=weight.device)
    columns = weight.index_select(dim, torch.tensor(positions, device=weight.device)).double().movedim(dim, 0)
    lost = torch.einsum("i...,i->...", columns, constants)
    return lost.reshape(lost.shape[0], -1).sum(1)  # a convolution without padding: every tap sees the mean


def read_dim(axes: AxisGraph, weight: str) -> int | None:
    """Return the one dimension of a weight that consumes axes; ``None`` if there is none, or several."""
    reads = axes.consumed.get(weight, frozenset())
    return next(iter(reads)) if len(reads) == 1 else None


def bias_of(weight: str) -> str:
    """Return the name of the bias of the layer that has a weight."""
    return weight.removesuffix("weight") + "bias"


def bias_dim(axes: AxisGraph, bias: str) -> Dim:
    """Return the dimension of a layer's bias: the output dimension of its weight."""
    weight = bias.removesuffix("bias") + "weight"
    read = read_dim(axes, weight)
    return next(dim for i, dim in enumerate(axes.shapes[weight]) if i != read)


def divisor_size(fold: Fold, sizes: Mapping[str, int]) -> int:
    """Return the divisor of a fold: the product of the sizes of its dimensions."""
    return prod(size_of(dim, sizes) for dim in fold.over)


def fold_constants(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], known: Mapping[str, Constant] = NONE
) -> tuple[dict[str, float | None], tuple[Fold, ...], dict[str, Constant]]:
    """Return the rescaled epsilons of norms, ε′ = ε·n_old/n_new, and folds and constants with them.

    ``known`` has the constants before any cut, from which a network that is cut and widened again gets its own.
    """
    epsilons: dict[str, float | None] = {}
    folds, constants = [], dict(known)
    for fold in axes.folds:
        before, after = divisor_size(fold, axes.sizes()), divisor_size(fold, sizes)
        if before != after and fold.epsilon:
            constant = _constant_of(model, fold, before, known.get(fold.epsilon))
            epsilons[fold.epsilon] = constant.own if constant.size == after else constant.at(after)
            constants[fold.epsilon] = constant
            fold = replace(fold, value=constant.at(after))
        folds.append(fold)
    return epsilons, tuple(folds), constants


def _constant_of(model: nn.Module, fold: Fold, size: int, known: Constant | None) -> Constant:
    path, _, name = fold.epsilon.partition(":")
    epsilon = getattr(model.get_submodule(path), name)
    if known is not None and epsilon == (known.own if known.size == size else known.at(size)):
        return known
    # Where the attribute is None, the norm takes the epsilon of its precision.
    return Constant(
        epsilon, torch.finfo(model.get_parameter(fold.weight).dtype).eps if epsilon is None else fold.value, size
    )


def rescale(values: Tensor, sizes: Tensor, n: int, fold: Fold) -> Tensor:
    """Rescale entries of a gain from the divisors at which they hold to the divisor ``n``."""
    change = sizes.double() / n
    factor = (change if fold.kind == "norm" else 1 / change).sqrt().to(values.device)
    moved = ((values.double() + fold.plus) * factor - fold.plus).to(values.dtype)
    return torch.where(sizes.to(values.device) == n, values, moved)
