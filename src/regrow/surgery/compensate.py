"""The tensors that a plan leads to: cut or widened, with the means of dropped inputs in biases, and folded divisors."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from math import prod, sqrt

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Dim, Fold, Role, size_of
from regrow.core.plan import Plan, PlanError
from regrow.scoring.compensate import find_holders, sharing_module
from regrow.surgery.layout import Layout, lay_out_dims, resize, units_after
from regrow.tracing.model_state import select_state
from regrow.tracing.own_run import as_double


class PlannedTensors:
    """The parameters and buffers after a plan, each computed by :meth:`load` when it is needed.

    ``sizes``: axis key → units after the plan; ``units``: key of a changed axis → the layout of its units; ``biases``:
    bias → the weight whose dropped inputs it takes up. ``PlanError`` is raised if a weight has no bias that can.
    """

    def __init__(self, model: nn.Module, axes: AxisGraph, plan: Plan) -> None:
        self.model, self.axes, self.plan = model, axes, plan
        self.sizes, self._before = plan.sizes(axes), axes.sizes()
        self.units = {key: units_after(change, axes[key]) for key, change in plan.changes.items() if not change.idle}
        self.biases = {bias_of(weight): weight for weight in plan.means}
        self._folds = {
            fold.weight: (fold, divisor_size(fold, self._before), divisor_size(fold, self.sizes)) for fold in axes.folds
        }
        self._layouts: dict[str, dict[int, Layout]] = {}
        self._roles: dict[str, dict[int, set[Role]]] = {}
        for slot in (slot for key in plan.changes for slot in axes[key].slots):
            self._roles.setdefault(slot.name, {}).setdefault(slot.dim, set()).add(slot.role)
        grown = [(key, change.fill.seed, axes[key].next_id) for key, change in sorted(plan.changes.items())]
        self._seed = zlib.crc32(repr(grown).encode())
        self._check_means()

    @property
    def rewrites(self) -> bool:
        """Whether the plan rewrites entries that stay: adds means to a bias, or changes a divisor."""
        return bool(self.biases) or any(map(self._is_rescaled, self._folds))

    def layouts(self, name: str) -> dict[int, Layout]:
        """Return dimension → the layout of its entries after the plan, for the dimensions of a tensor that change."""
        if name not in self._layouts:
            self._layouts[name] = lay_out_dims(self.axes.shapes.get(name, ()), self._before, self.units)
        return self._layouts[name]

    def changes(self, name: str) -> bool:
        """Whether the plan changes the tensor ``name``, or adds it."""
        return bool(self.layouts(name)) or name in self.biases or self._is_rescaled(name)

    def computes(self, name: str) -> bool:
        """Whether entries of the tensor ``name`` may be computed (folded, compensated, new) rather than selected."""
        has_new = any(bool(layout.is_new.any()) for layout in self.layouts(name).values())
        return has_new or name in self._folds or name in self.biases

    def load(self, name: str, exact: bool = False) -> Tensor:
        """Return the tensor ``name`` after the plan: as the network will hold it, or (``exact``) unrounded float64."""
        tensor = select_state(self.model, [name]).get(name)  # none of a bias that compensation adds
        tensor = None if tensor is None else tensor.detach()
        if tensor is not None and self.layouts(name):
            tensor = resize(name, tensor, self.layouts(name), self._roles.get(name, {}), self._seed, exact)
        if weight := self.biases.get(name):
            tensor = self.compensated_bias(weight, tensor, exact)
        assert tensor is not None
        tensor = as_double(tensor) if exact else tensor
        if self._is_rescaled(name):
            fold, before, after = self._folds[name]
            factor = sqrt(before / after if fold.kind == "norm" else 1 / (before / after))  # see Fold
            tensor = ((tensor.double() + fold.plus) * factor - fold.plus).to(tensor.dtype)
        return tensor

    def compensated_bias(self, weight: str, bias: Tensor | None, exact: bool = False) -> Tensor:
        """Return a layer's bias with the means of its dropped inputs: b′ = b + Σ_dropped W[:, i] · E[x_i].

        ``bias`` is b after the plan; ``None``: b is the layer's own.
        """
        (dim, own_bias), matrix = self._read_layer(weight), self.model.get_parameter(weight).detach()
        means = sorted(self.plan.means[weight].items())
        constants = torch.tensor([mean for _, mean in means], dtype=torch.float64, device=matrix.device)
        positions = torch.tensor([position for position, _ in means], device=matrix.device)
        columns = matrix.index_select(dim, positions).double().movedim(dim, 0)
        lost = torch.einsum("i...,i->...", columns, constants)
        lost = lost.reshape(lost.shape[0], -1).sum(1)  # a convolution without padding: every tap sees the mean
        for other, layout in self.layouts(weight).items():
            lost = lost if other == dim else lost.index_select(0, layout.source.to(lost.device))
        bias = own_bias if bias is None else bias
        new_bias = lost if bias is None else bias.detach().double() + lost
        return new_bias if exact else new_bias.to(matrix.dtype)

    def _read_layer(self, weight: str) -> tuple[int, Tensor | None]:
        """Return a weight's dimension that consumes axes, and its layer's bias; ``PlanError`` if it can have none."""
        path, _, leaf = weight.rpartition(".")
        dim, parameters = consumed_dim(self.axes, weight), self.model.get_submodule(path)._parameters
        if leaf != "weight" or dim is None or "bias" not in parameters:
            raise PlanError(f"{weight} has no bias that could take up the means of dropped inputs")
        return dim, parameters["bias"]

    def _check_means(self) -> None:
        """Raise ``PlanError`` unless each weight's layer can take up the means of its dropped inputs."""
        held = find_holders(self.model) if self.biases else {}
        for name, row in self.plan.means.items():
            dim, _ = self._read_layer(name)
            if (sharing := sharing_module(self.model, name, held)) is not None:
                raise PlanError(
                    f"means are given for {name}, which {sharing or 'the model'} holds too and would read without "
                    "them; leave them out"
                )
            layout, inputs = self.layouts(name).get(dim), self.model.get_parameter(name).shape[dim]
            if layout is None or bool(torch.isin(torch.tensor(list(row)), layout.kept).any()) or max(row) >= inputs:
                raise PlanError(f"the plan gives means for inputs of {name} that it does not drop")

    def _is_rescaled(self, name: str) -> bool:
        """Whether the plan changes a divisor that is folded into the tensor ``name``."""
        return name in self._folds and self._folds[name][1] != self._folds[name][2]


def consumed_dim(axes: AxisGraph, weight: str) -> int | None:
    """Return the index of the one dimension of a weight that consumes axes; ``None`` if there is none, or several."""
    dims = axes.consumed.get(weight, frozenset())
    return next(iter(dims)) if len(dims) == 1 else None


def bias_of(weight: str) -> str:
    """Return the name of the bias beside a weight: ``a.bias`` for ``a.weight``."""
    return weight.removesuffix("weight") + "bias"


def bias_dim(axes: AxisGraph, bias: str) -> Dim:
    """Return the dimension (size or axes) that a layer's bias has or would have: the output dimension of its weight."""
    weight = bias.removesuffix("bias") + "weight"
    read = consumed_dim(axes, weight)
    return next(dim for i, dim in enumerate(axes.shapes[weight]) if i != read)


def divisor_size(fold: Fold, sizes: Mapping[str, int]) -> int:
    """Return the divisor of a fold at given axis sizes: the product of the sizes of its dimensions."""
    return prod(size_of(dim, sizes) for dim in fold.over)


def rescale_epsilons(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int]
) -> tuple[dict[str, float], tuple[Fold, ...]]:
    """Return ``module:attribute`` → epsilon ε′ = ε·n_old/n_new of a norm, if that changes; and all folds, with these.

    ``sizes``: axis key → units after a plan.
    """
    epsilons: dict[str, float] = {}
    folds = []
    for fold in axes.folds:
        before, after = divisor_size(fold, axes.sizes()), divisor_size(fold, sizes)
        if before != after and fold.epsilon:
            path, _, name = fold.epsilon.partition(":")
            # Where the attribute is None, the norm takes the epsilon of its precision.
            known = getattr(model.get_submodule(path), name) is not None
            epsilon = fold.value if known else torch.finfo(model.get_parameter(fold.weight).dtype).eps
            epsilons[fold.epsilon] = epsilon * (before / after)
            fold = replace(fold, value=epsilons[fold.epsilon])
        folds.append(fold)
    return epsilons, tuple(folds)
