"""The Kronecker gate: preconditions each layer's steps with Kronecker factors (K-FAC) of the earlier tasks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from regrow.allocation.levels import margin
from regrow.core.axes import axes_in
from regrow.core.axes.axis import AxisTensor
from regrow.core.sources import logits_in
from regrow.core.tasks import Examples, mask_classes, run_network
from regrow.scoring.gradients import evaluation_mode
from regrow.surgery.compensate import bias_of
from regrow.training.learner import Context, Stream
from regrow.training.state import derived


@dataclass(frozen=True)
class Gate:
    """A layer's preconditioner (1 + s A ⊗ B)⁻¹: it shrinks weight changes in directions that earlier tasks used.

    The change Δ of the weights and the bias (last column), ``[m outputs, n inputs + 1]``, becomes
    Q_B ((Q_Bᵀ Δ Q_A) ∘ 1 / (1 + s λ_B λ_Aᵀ)) Q_Aᵀ  with the eigenvectors Q and eigenvalues λ of both factors. Source:
    Kao et al., Natural Continual Learning (NeurIPS 2021), without its pull to earlier parameters; factors as in Ritter
    et al., Online Structured Laplace Approximations (NeurIPS 2018).
    """

    inputs: Tensor  # Q_A, [n + 1, n + 1]
    outputs: Tensor  # Q_B, [m, m]
    multipliers: Tensor  # of each pair of directions: 1 / (1 + s λ_B λ_A), from 0 (blocked) to 1 (free), [m, n + 1]
    input_multipliers: Tensor  # of input directions alone: 1 / (1 + s λ_A), [n + 1]

    @classmethod
    def from_factors(cls, inputs: Tensor, outputs: Tensor, strength: float) -> "Gate":
        """Return the preconditioner of A (``inputs``), B (``outputs``), s (``strength``; 0: all directions are free).

        >>> gate = Gate.from_factors(torch.diag(torch.tensor([9.0, 0.0])), torch.eye(1), strength=1.0)
        >>> gate.shrink(torch.ones(1, 2)).tolist()
        [[0.10000000149011612, 1.0]]
        """
        (l_a, q_a), (l_b, q_b) = (torch.linalg.eigh(factor.double()) for factor in (inputs, outputs))
        l_a, l_b = l_a.clamp_min(0), l_b.clamp_min(0)
        both, inputs_alone = 1 / (1 + strength * l_b[:, None] * l_a), 1 / (1 + strength * l_a)
        return cls(q_a.to(inputs), q_b.to(inputs), both.to(inputs), inputs_alone.to(inputs))

    @property
    def free(self) -> float:
        """The mean multiplier over all directions: 1 if the layer may change freely, 0 if it may not change."""
        return float(self.multipliers.mean())

    def shrink(self, change: Tensor) -> Tensor:
        """Return a change of weights and bias, ``[m, n + 1]``, shrunk in the directions that earlier tasks used."""
        inside = (self.outputs.T @ change @ self.inputs).mul_(self.multipliers)
        return self.outputs @ inside @ self.inputs.T

    def project(self, rows: Tensor) -> Tensor:
        """Return rows, ``[units, n + 1]``, projected away from inputs that earlier tasks used: (1 + s A)⁻¹ · row.

        A row has a unit's weights and its bias. The inverse is over the inputs that it reads (its non-zero entries) and
        the bias; other entries stay 0.

        >>> gate = Gate.from_factors(torch.diag(torch.tensor([9.0, 1.0, 0.0])), torch.eye(1), strength=1.0)
        >>> gate.project(torch.tensor([[1.0, 0.0, 2.0]])).round(decimals=3).tolist()
        [[0.10000000149011612, 0.0, 2.0]]
        """
        result, scaled_a = (
            torch.zeros_like(rows),
            (self.inputs * (1 / self.input_multipliers - 1)) @ self.inputs.T,
        )  # s A
        for row, projected in zip(rows, result, strict=True):
            reads = row != 0
            reads[-1] = True  # the bias
            within = scaled_a[reads][:, reads].double()
            within.diagonal().add_(1)
            projected[reads] = torch.linalg.solve(within, row[reads].double()).to(row)
        return result


class ThresholdedWeight(NamedTuple):
    """A weight with thresholds, for :meth:`SparseGrowState.thresholded`."""

    weight: Tensor
    threshold: Tensor  # per unit, or one; detached
    kept: Tensor  # which entries stay: those from the threshold up, and owned ones; bool, of the weight's shape


@dataclass(frozen=True)
class SparseGrowState:
    """The state of SparseGrow; tensors are by name of a parameter or a weight."""

    owned: Mapping[str, AxisTensor] = field(default_factory=dict)  # which entries earlier tasks own
    threshold: Mapping[str, AxisTensor] = field(default_factory=dict)  # t, below which entries of a weight are masked
    old: Mapping[str, AxisTensor] = field(default_factory=dict)  # units that existed before the growth in this task
    # Factors of earlier tasks, summed: inputs × inputs, inputs × the constant input of the bias, outputs' gradients.
    read: Mapping[str, AxisTensor] = field(default_factory=dict)
    bias: Mapping[str, AxisTensor] = field(default_factory=dict)
    used: Mapping[str, AxisTensor] = field(default_factory=dict)
    inputs: AxisTensor | None = None  # the replay memory
    labels: AxisTensor | None = None
    base: dict[str, int] = field(default_factory=dict)  # the initial size of every axis
    steps: int = 0  # of training, so far
    free: dict[str, float] = field(default_factory=dict)  # the fraction of directions that a layer's gate lets through
    seen: int = 0  # examples offered to the memory
    recalled: int = 0  # draws from the memory
    frozen: Mapping[str, tuple[Tensor, Tensor]] = derived(dict)  # entries not trained in this task, and their values
    gates: Mapping[str, Gate] = derived(dict)  # by name of a layer's weight
    last: dict[str, Tensor] = derived(dict)  # a layer's parameters after the gate was last applied

    @property
    def rows(self) -> dict[str, AxisTensor | None]:
        """The memory's tensors by field name, one row per stored example; ``None`` while it is empty."""
        return {"inputs": self.inputs, "labels": self.labels}

    def thresholded(self, context: Context) -> Iterator[ThresholdedWeight]:
        """Yield each weight that has thresholds, with these and its mask; the first two may be changed in place."""
        parameters = context.parameters()
        for name in context.weights:
            if name in self.threshold:
                weight, threshold = parameters[name], self.threshold[name].values.detach()
                kept = (margin(weight.detach(), threshold) >= 0) | self.owned[name].values
                yield ThresholdedWeight(weight, threshold, kept)


GatedLayer = nn.Linear | nn.Conv2d


def _find_layers(model: nn.Module) -> dict[str, GatedLayer]:
    """Return weight name → layer, for the layers that K-FAC covers: linear and ungrouped 2-d convolutions."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def _get_layer(model: nn.Module, weight: str) -> GatedLayer:
    """Return the layer whose weight has the name ``weight``, such as ``body.0.weight``."""
    return cast(GatedLayer, model.get_submodule(weight.rpartition(".")[0]))


def parameters_of(model: nn.Module, weight: str) -> list[str]:
    """Return the names of the parameters of a layer: its weight, and its bias if it has one."""
    return [weight] if _get_layer(model, weight).bias is None else [weight, bias_of(weight)]


def join_bias(model: nn.Module, weight: str) -> Tensor:
    """Return a layer's weight and bias side by side, ``[m, n + 1]``; the last column is 0 without a bias."""
    layer = _get_layer(model, weight)
    rows = layer.weight.detach().flatten(1)
    bias = rows.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach()
    return torch.cat([rows, bias[:, None]], 1)


@torch.no_grad()
def _write_rows(model: nn.Module, weight: str, rows: Tensor) -> None:
    """Set the weight and bias of a layer, in place, to rows as :func:`join_bias` returns them."""
    layer = _get_layer(model, weight)
    layer.weight.copy_(rows[:, :-1].reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(rows[:, -1])


def measure_factors(
    model: nn.Module, batches: Iterable[Examples], generator: torch.Generator, classes: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the Kronecker factors (A, B) of the Fisher matrix of every layer that the batches reach, by weight.

    A = E[a aᵀ] over the layer's inputs a (of a convolution: patches), with a 1 appended for the bias, ``[n + 1, n +
    1]``. B = E[g gᵀ] over the gradients g of log p(y) in its outputs, divided by the mean of its diagonal, ``[m, m]``.
    Labels y are drawn with ``generator`` from the network's own predictions, among ``classes`` (``[classes]`` bool,
    ``None``: all). Gradients are cleared, and modes of modules restored. Source: Martens and Grosse, K-FAC (arXiv
    1503.05671); convolutions after Grosse and Martens (arXiv 1602.01407), with means in the place of sums.

    >>> net = nn.Sequential(nn.Linear(2, 3))
    >>> examples = Examples(torch.eye(2), torch.zeros(2))
    >>> inputs, outputs = measure_factors(net, [examples], torch.Generator().manual_seed(0))["0.weight"]
    >>> inputs.tolist(), round(outputs.diag().mean().item(), 3)
    ([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 1.0]], 1.0)
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def add(sums: dict[str, Tensor], name: str, rows: Tensor, scale: float = 1) -> None:
        products = rows.T @ rows / scale
        sums[name] = sums[name] + products if name in sums else products

    def add_outputs(name: str, gradient: Tensor) -> None:
        add(outputs, name, (gradient.movedim(1, -1) if gradient.dim() == 4 else gradient).flatten(0, -2))

    def add_inputs(name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.no_grad():
            rows = _input_rows(layer, args[0])
            add(inputs, name, torch.cat([rows, rows.new_ones(len(rows), 1)], 1), len(rows) / len(output))
        output.register_hook(partial(add_outputs, name))

    hooks = [layer.register_forward_hook(partial(add_inputs, name)) for name, layer in _find_layers(model).items()]
    examples = 0
    try:
        with evaluation_mode(model):
            for batch in batches:
                model.zero_grad(set_to_none=True)
                logs = mask_classes(logits_in(run_network(model, batch.inputs)), classes).log_softmax(
                    -1
                )  # probabilities
                labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
                logs.gather(1, labels).sum().backward()
                examples += len(batch)
    finally:
        model.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
    scaled = {name: total / total.diag().mean().clamp_min(1e-30) for name, total in outputs.items()}
    return {name: (total / examples, scaled[name]) for name, total in inputs.items()}


def _input_rows(layer: nn.Module, value: Tensor) -> Tensor:
    """Return what each output position of a layer reads of its input ``value``, ``[positions, n]``, such as patches."""
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        value = F.pad(value, [int(p) for p in layer._reversed_padding_repeated_twice], mode=mode)
        patches = F.unfold(value, layer.kernel_size, layer.dilation, 0, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return value.flatten(0, -2)


def add_factors(state: SparseGrowState, context: Context, samples: int) -> SparseGrowState:
    """Return the state with the task's Kronecker factors added, from at most ``samples`` of its examples."""
    read, bias, used = dict(state.read), dict(state.bias), dict(state.used)
    train = context.task.train
    examples = train.take(torch.randperm(len(train), generator=context.generator(Stream.FISHER_EXAMPLES))[:samples])
    labels = context.generator(Stream.FISHER_LABELS)
    measured = measure_factors(context.model, examples.batches(250), labels, context.classes)
    for name, (read_now, used_now) in measured.items():
        outputs, *inputs = context.axes.shapes[name]
        shape = context.parameters()[name].shape[1:]
        _add(read, name, read_now[:-1, :-1].reshape(shape + shape), (*inputs, *inputs))
        _add(bias, name, read_now[:-1, -1].reshape(shape), tuple(inputs))
        _add(used, name, used_now, (outputs, outputs))
    return replace(state, read=read, bias=bias, used=used)


def _add(sums: dict[str, AxisTensor], name: str, values: Tensor, dims: tuple) -> None:
    """Add values to ``sums[name]``, or store them there if it is missing; ``dims``: :attr:`AxisTensor.dims` of them."""
    before = sums.get(name)
    sums[name] = AxisTensor(values if before is None else before.values + values, dims)


def weigh_new_units(state: SparseGrowState, context: Context, share: float) -> None:
    """Give new units the mean output importance of the others, in place, so that the gate also protects their weights.

    Importance is the diagonal of B, in ``state.used``. Hidden units that were inactive in all earlier tasks get it too;
    network outputs do not: a class that no task has had is free. Behind a norm that rescales groups of units
    (GroupNorm), inputs from new units count ``share`` of the mean in ``state.read``: they are active there.
    """
    modules = dict(context.model.named_modules())
    norms = {path for path, module in modules.items() if isinstance(module, nn.GroupNorm | _InstanceNorm)}
    rescaled = {
        axis.key for axis in context.axes.units() if any(slot.name.rpartition(".")[0] in norms for slot in axis.slots)
    }
    for name in _gated_weights(state, context):
        diagonal = state.used[name].values.diagonal()
        new = diagonal == 0
        if name not in context.head:
            diagonal[new] = diagonal[~new].mean() if not bool(new.all()) else 1.0
        if rescaled & set(axes_in(context.axes.shapes[name][1])):
            inputs = state.bias[name].values.numel()
            read = state.read[name].values.view(inputs, inputs).diagonal()
            if bool(read.any()):
                read[read == 0] = share * read[read != 0].mean()


def build_gates(state: SparseGrowState, context: Context, strength: float, damping: float) -> dict[str, Gate]:
    """Return weight name → gate of every layer with Kronecker factors; ``strength`` is s of :class:`Gate`.

    ``damping`` is added to the diagonal of hidden layers' B, whose mean is 1, so that unused units are not wholly free.
    """
    gates = {}
    for name in _gated_weights(state, context):
        bias, used = state.bias[name].values.flatten(), state.used[name].values
        n = len(bias)
        inputs = bias.new_empty(n + 1, n + 1)
        inputs[:-1, :-1], inputs[-1, :-1], inputs[:-1, -1] = state.read[name].values.reshape(n, n), bias, bias
        inputs[-1, -1] = context.number
        if _get_layer(context.model, name).bias is None:  # no step changes it: it must not count for the weights
            inputs[-1], inputs[:, -1] = 0.0, 0.0
        layer_damping = 0.0 if name in context.head else damping
        outputs = used / context.number + layer_damping * torch.eye(len(used)).to(used)
        gates[name] = Gate.from_factors(inputs, outputs, strength)
    return gates


def _gated_weights(state: SparseGrowState, context: Context) -> list[str]:
    """Return the names of the weights whose layers have Kronecker factors."""
    return [name for name in _find_layers(context.model) if name in state.read]


def apply_gates(state: SparseGrowState, context: Context) -> None:
    """Shrink each gated layer's change since the gates were last applied; it and ``state.last`` change in place."""
    for name, gate in state.gates.items():
        before = state.last[name]
        _write_rows(context.model, name, before + gate.shrink(join_bias(context.model, name) - before))
        state.last[name] = join_bias(context.model, name)


def project_new_units(state: SparseGrowState, context: Context) -> None:
    """Project the input weights of new units away from the inputs that earlier tasks fed their layers; in place."""
    for name in state.gates.keys() & state.old.keys():
        rows, new = join_bias(context.model, name), ~state.old[name].values
        rows[new] = state.gates[name].project(rows[new])
        _write_rows(context.model, name, rows)
