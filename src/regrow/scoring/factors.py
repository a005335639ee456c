"""Kronecker factors of the Fisher information (K-FAC), and gradient preconditioners made of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.sources import logits_in
from regrow.core.tasks import Examples, among, run_network
from regrow.scoring.gradients import evaluation_mode


@dataclass(frozen=True)
class Factors:
    """The two Kronecker factors of one layer's Fisher matrix: of its inputs and of its output gradients.

    Args:
        inputs: E[a aᵀ] over the layer's inputs a, with a 1 appended for the bias, ``[n + 1, n + 1]``. The mean also
            runs over positions; for a convolution a is a patch, in the order of the weight's entries.
        outputs: E[g gᵀ] over the gradients g of log p(y) with respect to the layer's outputs, divided by the mean of
            its diagonal, ``[m, m]``.
    """

    inputs: Tensor
    outputs: Tensor


def layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return weight name → layer, for the layers that K-FAC covers: linear and ungrouped 2-d convolutions.

    Args:
        model: The network.
    """
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def factors(
    model: nn.Module, batches: Iterable[Examples], generator: torch.Generator, classes: Tensor | None = None
) -> dict[str, Factors]:
    """Compute the two Kronecker factors of the Fisher matrix (K-FAC) of every layer that the batches reach.

    Labels y are sampled from the network's own predictions, as the true Fisher matrix requires.

    Args:
        model: The network; it runs in eval mode, its training mode is restored and its gradients are cleared.
        batches: The examples; their labels are not used.
        generator: Draws the labels y.
        classes: The classes that y is drawn from, and that compete in the softmax; all if ``None``.

    Returns:
        Name of the weight → its factors.

    Source: Martens and Grosse, K-FAC (arXiv 1503.05671); convolutions after Grosse and Martens (arXiv 1602.01407),
    with means in the place of sums over positions.

    >>> net = nn.Sequential(nn.Linear(2, 3))
    >>> result = factors(net, [Examples(torch.eye(2), torch.zeros(2))], torch.Generator().manual_seed(0))
    >>> result["0.weight"].inputs.tolist()
    [[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 1.0]]
    >>> round(result["0.weight"].outputs.diag().mean().item(), 3)
    1.0
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def add(sums: dict[str, Tensor], name: str, rows: Tensor, scale: float) -> None:
        new = rows.T @ rows / scale
        sums[name] = sums[name] + new if name in sums else new

    def add_outputs(name: str, gradient: Tensor) -> None:
        add(outputs, name, (gradient.movedim(1, -1) if gradient.dim() == 4 else gradient).flatten(0, -2), 1)

    def add_inputs(name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.no_grad():
            rows = _read(layer, args[0])
            add(inputs, name, torch.cat([rows, rows.new_ones(len(rows), 1)], 1), len(rows) / len(output))
        output.register_hook(partial(add_outputs, name))

    hooks = [layer.register_forward_hook(partial(add_inputs, name)) for name, layer in layers(model).items()]
    many = 0
    try:
        with evaluation_mode(model):
            for batch in batches:
                model.zero_grad(set_to_none=True)
                logs = among(logits_in(run_network(model, batch.inputs)), classes).log_softmax(-1)
                labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
                logs.gather(1, labels).sum().backward()
                many += len(batch)
    finally:
        model.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
    scaled = {name: total / total.diag().mean().clamp_min(1e-30) for name, total in outputs.items()}
    return {name: Factors(total / many, scaled[name]) for name, total in inputs.items()}


def _read(layer: nn.Module, value: Tensor) -> Tensor:
    """Return what each output position of a layer reads (for a convolution its patch), one row per position."""
    if isinstance(layer, nn.Conv2d):
        pad = [int(p) for p in layer._reversed_padding_repeated_twice]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        value = F.pad(value, pad, mode=mode)
        patches = F.unfold(value, layer.kernel_size, layer.dilation, 0, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return value.flatten(0, -2)


@dataclass(frozen=True)
class Gate:
    """A preconditioner that shrinks weight changes in directions that earlier tasks used, by K-FAC factors.

    The change Δ ``[m, n + 1]`` becomes  Q_B ((Q_Bᵀ Δ Q_A) ∘ 1 / (1 + s λ_B λ_Aᵀ)) Q_Aᵀ  with the eigenvectors Q and
    eigenvalues λ of both factors; that is (1 + s A ⊗ B)⁻¹ Δ.

    Source: the preconditioner of Kao et al., Natural Continual Learning (NeurIPS 2021), without its pull to the
    parameters of earlier tasks; factors as in Ritter et al., Online Structured Laplace Approximations (NeurIPS 2018).

    Args:
        inputs: Q_A, the eigenvectors of the input factor, ``[n + 1, n + 1]``.
        outputs: Q_B, the eigenvectors of the output factor, ``[m, m]``.
        open: What each pair of directions is multiplied by, from 0 (blocked) to 1 (free), ``[m, n + 1]``.
        kept: 1 / (1 + s λ_A): the same for input directions alone, ``[n + 1]``.
    """

    inputs: Tensor
    outputs: Tensor
    open: Tensor
    kept: Tensor

    @classmethod
    def of(cls, factors: Factors, strength: float) -> "Gate":
        """Make the preconditioner from Kronecker factors summed over all tasks so far.

        Args:
            factors: The summed factors of one layer.
            strength: s: how strongly directions that were used are blocked; 0 leaves all free.

        >>> gate = Gate.of(Factors(torch.diag(torch.tensor([9.0, 0.0])), torch.eye(1)), strength=1.0)
        >>> gate.through(torch.ones(1, 2)).tolist()
        [[0.10000000149011612, 1.0]]
        """
        (read, q_a), (used, q_b) = (torch.linalg.eigh(part.double()) for part in (factors.inputs, factors.outputs))
        read, used = read.clamp_min(0), used.clamp_min(0)
        parts = (q_a, q_b, 1 / (1 + strength * used[:, None] * read), 1 / (1 + strength * read))
        return cls(*(part.to(factors.inputs) for part in parts))

    @property
    def free(self) -> float:
        """The mean multiplier over all directions: 1 if the layer may change freely, 0 if it may not change."""
        return float(self.open.mean())

    def through(self, change: Tensor) -> Tensor:
        """Return a change of weights and bias, shrunk in the directions that earlier tasks used, ``[m, n + 1]``.

        Args:
            change: The change of the weights with the bias as last column, ``[m, n + 1]``.
        """
        inside = (self.outputs.T @ change @ self.inputs).mul_(self.open)
        return self.outputs @ inside @ self.inputs.T

    def away(self, rows: Tensor) -> Tensor:
        """Return rows of weights turned away from inputs that earlier tasks used: (1 + s A)⁻¹ · row, each.

        The inverse is taken over the inputs that the row reads (its non-zero entries) and the bias; all other entries
        stay 0.

        Args:
            rows: New rows of weights with the bias as last column, ``[k, n + 1]``.

        >>> gate = Gate.of(Factors(torch.diag(torch.tensor([9.0, 1.0, 0.0])), torch.eye(1)), strength=1.0)
        >>> gate.away(torch.tensor([[1.0, 0.0, 2.0]])).round(decimals=3).tolist()
        [[0.10000000149011612, 0.0, 2.0]]
        """
        turned, read = torch.zeros_like(rows), (self.inputs * (1 / self.kept - 1)) @ self.inputs.T
        for row, into in zip(rows, turned, strict=True):
            reads = row != 0
            reads[-1] = True
            within = read[reads][:, reads].double()
            within.diagonal().add_(1)
            into[reads] = torch.linalg.solve(within, row[reads].double()).to(row)
        return turned


def join_bias(model: nn.Module, name: str) -> Tensor:
    """Return a layer's weight and bias side by side, ``[m, n + 1]``; the last column is 0 without a bias."""
    layer = layers(model)[name]
    rows = layer.weight.detach().flatten(1)
    bias = rows.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach()
    return torch.cat([rows, bias[:, None]], 1)


def part(model: nn.Module, name: str, rows: Tensor) -> Mapping[str, Tensor]:
    """Split rows of weights with a bias column, ``[m, n + 1]``, into the layer's parameters: name → values."""
    layer = layers(model)[name]
    result = {name: rows[:, :-1].reshape(layer.weight.shape)}
    return result if layer.bias is None else result | {f"{name.removesuffix('weight')}bias": rows[:, -1]}
