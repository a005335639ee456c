"""Kronecker factors of the Fisher information (K-FAC), and gradient preconditioners made of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regrow.core.sources import logits_in
from regrow.core.tasks import Examples, among, run_network


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
    sums = {name: _Sums(module) for name, module in layers(model).items()}
    training, many = model.training, 0
    model.eval()
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            said = among(logits_in(run_network(model, batch.inputs)), classes).log_softmax(-1)
            drawn = torch.multinomial(said.detach().exp().cpu(), 1, generator=generator).to(said.device)
            said.gather(1, drawn).sum().backward()
            many += len(batch)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for one in sums.values():
            one.close()
    return {name: one.factors(many) for name, one in sums.items() if one.inputs is not None}


class _Sums:
    """Accumulates both Kronecker factors of one layer with hooks while the network runs."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self._hook: RemovableHandle = layer.register_forward_hook(self._seen)

    def _seen(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.no_grad():
            rows = _read(layer, args[0])
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            new = rows.T @ rows / (len(rows) / len(output))
            self.inputs = new if self.inputs is None else self.inputs + new
        output.register_hook(self._answered)

    def _answered(self, gradient: Tensor) -> None:
        rows = gradient.movedim(1, -1).flatten(0, -2) if gradient.dim() == 4 else gradient.flatten(0, -2)
        new = rows.T @ rows
        self.outputs = new if self.outputs is None else self.outputs + new

    def factors(self, many: int) -> Factors:
        """Return the factors: sums of inputs divided by ``many``, the number of examples."""
        assert self.inputs is not None and self.outputs is not None
        return Factors(self.inputs / many, self.outputs / self.outputs.diag().mean().clamp_min(1e-30))

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()


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
        (read, q_a), (used, q_b) = (torch.linalg.eigh(one.double()) for one in (factors.inputs, factors.outputs))
        read, used = read.clamp_min(0), used.clamp_min(0)
        like = factors.inputs
        parts = (q_a, q_b, 1 / (1 + strength * used[:, None] * read), 1 / (1 + strength * read))
        return cls(*(part.to(like) for part in parts))

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
            own = reads.nonzero()[:, 0]
            within = read[own][:, own].double() + torch.eye(len(own)).to(read).double()
            into[own] = torch.linalg.solve(within, row[own].double()).to(row)
        return turned


def join_bias(model: nn.Module, name: str) -> Tensor:
    """Return a layer's weight and bias side by side, ``[m, n + 1]``; the last column is 0 without a bias.

    Args:
        model: The network.
        name: The name of the layer's weight.
    """
    layer = layers(model)[name]
    rows = layer.weight.detach().flatten(1)
    bias = rows.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach()
    return torch.cat([rows, bias[:, None]], 1)


def part(model: nn.Module, name: str, rows: Tensor) -> Mapping[str, Tensor]:
    """Split rows of weights with a bias column into the layer's parameters: name → values.

    Args:
        model: The network.
        name: The name of the layer's weight.
        rows: ``[m, n + 1]``.
    """
    layer = layers(model)[name]
    result = {name: rows[:, :-1].reshape(layer.weight.shape)}
    return result if layer.bias is None else result | {f"{name.removesuffix('weight')}bias": rows[:, -1]}
