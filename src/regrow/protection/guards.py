"""Guards: they shrink the changes of parameters in directions that matter to earlier tasks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.core.axes.axis import AxisTensor
from regrow.nets.devices import choose_precision
from regrow.protection.factors import Factors, diagonal_of, layer_parameters, layers_of, widen
from regrow.training.learner import Context

LARGE = 512  # eigenvectors from here on are in bfloat16 where a processor multiplies in it
CLASS_DAMPING = 10.0  # ours; as large a part of the mean as makes all classes about equally important


@dataclass(frozen=True)
class Guard:
    """The curvature of earlier tasks' losses in a layer's parameters, and how far these are from their anchor.

    The curvature of a layer is A ⊗ B, which is diagonal in the eigenvectors of A and B: λ_B λ_Aᵀ. Of a parameter
    without Kronecker factors it is the Fisher diagonal. Source: Ritter et al., Online Structured Laplace Approximations
    (NeurIPS 2018); the multiplied steps: Kao et al., Natural Continual Learning (NeurIPS 2021).
    """

    names: Sequence[str]  # of the weight and the bias, or of one parameter
    curvature: Tensor  # [m, n + 1], or of the parameter's shape
    inputs: Tensor | None  # the eigenvectors of A, [n + 1, n + 1]; None: A is a diagonal
    outputs: Tensor | None  # the eigenvectors of B, [m, m]; None: B is a diagonal
    anchor: Tensor  # weight and bias at the end of the last task, side by side, [m, n + 1]
    last: Tensor  # the same after the guard was last applied; changes in place
    moved: Tensor  # last − anchor, in the eigenvectors; changes in place

    def read(self, model: nn.Module) -> tuple[list[nn.Parameter], Tensor]:
        """Return the parameters, and their values side by side, ``[m, n + 1]``; without a bias its column is 0."""
        parameters = [model.get_parameter(name) for name in self.names]
        rows = side_by_side(parameters)
        if rows.shape != self.anchor.shape:
            rows = torch.cat([rows, self.anchor[:, rows.shape[1] :]], 1)
        return parameters, rows

    def to_directions(self, change: Tensor) -> Tensor:
        """Return a change of weight and bias, ``[m, n + 1]``, in the eigenvectors: Q_Bᵀ Δ Q_A."""
        change = change if self.outputs is None else multiply(self.outputs.T, change)
        return change if self.inputs is None else multiply(change, self.inputs)

    def to_entries(self, directions: Tensor) -> Tensor:
        """Return the change of weight and bias whose :meth:`to_directions` are given: Q_B X Q_Aᵀ."""
        directions = directions if self.outputs is None else multiply(self.outputs, directions)
        return directions if self.inputs is None else multiply(directions, self.inputs.T)

    def free(self, strength: float) -> float:
        """Return the mean of 1 / (1 + s λ) over all directions: 1 if the layer may change freely, 0 if not at all."""
        return float((1 / (1 + strength * self.curvature)).mean())


Guards = Mapping[str, Guard]  # by name of a weight, or of a parameter without Kronecker factors


def build_guards(
    factors: Factors, context: Context, anchor: Mapping[str, AxisTensor], damping: float, skip: Collection[str] = ()
) -> dict[str, Guard]:
    """Return the guards of all parameters with factors but ``skip``, around ``anchor``, name → earlier parameters.

    ``damping`` is added to the diagonal of hidden layers' B, whose mean is 1, so that unused units are not wholly free.
    In class-incremental learning :data:`CLASS_DAMPING` is added to that of output layers: probabilities of old classes
    stay when all their logits fall, so that B alone lets new classes take their examples.
    """
    is_low = choose_precision(context.model) == "bfloat16"
    guards, parameters, head = {}, context.parameters(), dict.fromkeys(context.head, 0.0)
    if context.compares_tasks:
        head = dict.fromkeys(head, CLASS_DAMPING)
    for name in (name for name in layers_of(factors) if name not in skip):
        names = layer_parameters(parameters, name)
        inputs = input_moments(factors, name, 0 if len(names) == 1 else context.number)
        outputs = factors[f"{name} outputs"].values / context.number
        diagonal_of(outputs).add_(head.get(name, damping))
        (l_a, q_a), (l_b, q_b) = (_decompose(factor, is_low) for factor in (inputs, outputs))
        guards[name] = _place(names, l_b[:, None] * l_a, (q_a, q_b), context, anchor)
    for key in (key for key in factors if key.endswith(" diagonal")):
        name = key.removesuffix(" diagonal")
        if name not in skip:
            curvature = side_by_side([factors[key].values])
            guards[name] = _place([name], curvature, (None, None), context, anchor)
    return guards


def input_moments(factors: Factors, name: str, constant: int) -> Tensor:
    """Return A of a layer with the constant input of its bias, ``[n + 1, n + 1]``; if A is a diagonal, ``[n + 1]``.

    ``constant``: the second moment of that input; 0: there is no bias, and no step may count it for the weights.
    """
    inputs, bias = factors[f"{name} inputs"].values, factors.get(f"{name} bias")
    if bias is None:
        return torch.cat([inputs.flatten(), inputs.new_tensor([constant])])
    means = bias.values.flatten()
    if not constant:
        means = torch.zeros_like(means)
    rows = torch.cat([inputs.reshape(len(means), -1), means[None]])
    return torch.cat([rows, torch.cat([means, means.new_tensor([constant])])[:, None]], 1)


def _decompose(factor: Tensor, is_low: bool) -> tuple[Tensor, Tensor | None]:
    """Return the eigenvalues of a factor, at least 0, and its eigenvectors; ``None`` if the factor is a diagonal.

    ``is_low``: large eigenvectors are in bfloat16. Rounding does not add up, since :attr:`Guard.moved` is in float32.
    """
    if factor.dim() == 1:
        return factor, None
    try:
        values, vectors = torch.linalg.eigh(factor if is_low and len(factor) >= LARGE else factor.double())
        fine = bool(vectors.isfinite().all())
    except RuntimeError:  # float32 does not converge where many entries are 0
        fine = False
    if not fine:
        values, vectors = torch.linalg.eigh(factor.double())
    return values.clamp_min(0).to(factor), lower_precision(vectors.to(factor), is_low)


def lower_precision(vectors: Tensor, is_low: bool) -> Tensor:
    """Return vectors, ``[n, k]``, in bfloat16 if ``is_low`` and they are long."""
    return vectors.to(torch.bfloat16) if is_low and len(vectors) >= LARGE else vectors


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return a product in the lower precision of the two; the result has the higher one."""
    low, high = sorted((left.dtype, right.dtype), key=lambda dtype: dtype.itemsize)
    return (left.to(low) @ right.to(low)).to(high)


def _place(
    names: Sequence[str],
    curvature: Tensor,
    bases: tuple[Tensor | None, Tensor | None],
    context: Context,
    anchor: Mapping[str, AxisTensor],
) -> Guard:
    """Return a guard of parameters as they are now; ``bases``: eigenvectors of A and B."""
    rows = side_by_side([anchor[name].values for name in names])
    if rows.shape[1] < curvature.shape[1]:  # a layer without a bias
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], 1)
    guard = Guard(names, curvature, *bases, rows, rows.clone(), torch.zeros_like(rows))
    settle_guards({"": guard}, context.model)
    return guard


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Return a weight and a bias, or a single parameter, as a matrix in float32 or float64, ``[m, n + 1]``; a copy."""
    rows = torch.cat([tensor.detach().reshape(*(tensor.shape[:1] or (1,)), -1) for tensor in tensors], 1)
    return widen(rows)


def write_rows(tensors: Sequence[Tensor], rows: Tensor) -> None:
    """Set tensors, in place, to rows as :func:`side_by_side` returns them; further columns are left out."""
    start = 0
    for tensor in tensors:
        width = tensor.numel() // (len(tensor) if tensor.dim() else 1)
        tensor.detach().copy_(rows[:, start : start + width].reshape(tensor.shape))
        start += width


@torch.no_grad()
def apply_guards(guards: Guards, model: nn.Module, *, gate: float = 0, pull: float = 0, decay: float = 0) -> None:
    """Shrink what parameters changed since the guards were last applied, and pull them to their anchors; in place.

    In the directions with curvature λ, the last change is divided by 1 + gate · λ, and the whole distance from the
    anchor by (1 + pull · λ) (1 + decay). With pull = η s this is a proximal step of the penalty s/2 Δᵀ F Δ at rate η.
    """
    for guard in guards.values():
        parameters, now = guard.read(model)
        step = guard.to_directions(now.sub_(guard.last))
        if gate:
            step.div_(guard.curvature.mul(gate).add_(1))
        guard.moved.add_(step).div_(guard.curvature.mul(pull).add_(1).mul_(1 + decay))
        torch.add(guard.anchor, guard.to_entries(guard.moved), out=guard.last)
        write_rows(parameters, guard.last)


def settle_guards(guards: Guards, model: nn.Module) -> None:
    """Set where guards were last applied to the present parameters, in place: a resumed training starts from there."""
    for guard in guards.values():
        guard.last.copy_(guard.read(model)[1])
        guard.moved.copy_(guard.to_directions(guard.last - guard.anchor))
