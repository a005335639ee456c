"""Ridge regression from sums: the change of a layer's weight and bias that brings its output closest to a target."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 8192
"""The number of rows summed at a time in float64."""


@dataclass(frozen=True)
class Sums:
    """Sufficient statistics of a least squares problem with inputs x and residuals r (target − output), in float64.

    Args:
        gram: Σ x xᵀ, ``[k, k]``.
        cross: Σ x rᵀ, ``[k, out]``.
        missing: Σ |r|², the energy of the residuals.
        wanted: Σ |target|², the energy of the target.
        rows: The number of rows.
    """

    gram: Tensor
    cross: Tensor
    missing: float
    wanted: float
    rows: int

    @classmethod
    def of(cls, inputs: Tensor, missing: Tensor, target: Tensor) -> "Sums":
        """Compute the sums over all rows, chunk by chunk.

        Args:
            inputs: x, ``[rows, k]``.
            missing: r = target − output, ``[rows, out]``.
            target: The target, ``[rows, out]``.
        """
        k, out = inputs.shape[1], missing.shape[1]
        gram, cross = (torch.zeros(k, n, dtype=torch.float64, device=inputs.device) for n in (k, out))
        lost = wanted = 0.0
        for x, r, t in zip(*(part.split(CHUNK) for part in (inputs, missing, target)), strict=True):
            x, r = x.double(), r.double()
            gram.addmm_(x.T, x)
            cross.addmm_(x.T, r)
            lost += float(r.square().sum())
            wanted += float(t.double().square().sum())
        return cls(gram, cross, lost, wanted, len(inputs))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.missing + other.missing,
            self.wanted + other.wanted,
            self.rows + other.rows,
        )

    def left(self, change: Tensor) -> float:
        """Return Σ |r − changeᵀ x|², the energy of the residuals that a change leaves.

        Args:
            change: The change of the weight, ``[k, out]``.
        """
        return self.missing - 2 * float((change * self.cross).sum()) + float((change * (self.gram @ change)).sum())


def ridged(sums: Sums, ridge: float) -> Tensor:
    """Return the change D ``[k, out]`` that minimises Σ |r − Dᵀ x|² + ridge · mean(diag Σ x xᵀ) · |D|².

    Args:
        sums: The sums over the rows.
        ridge: The ridge, as a multiple of the mean diagonal.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> wanted = torch.tensor([[3.0], [-1.0]])
    >>> torch.allclose(ridged(Sums.of(x, x @ wanted, x @ wanted), 1e-12), wanted.double())
    True
    """
    gram = sums.gram.clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):  # no ridge, and inputs that depend on one another
        return torch.linalg.pinv(gram, hermitian=True) @ sums.cross
    return torch.cholesky_solve(sums.cross, factor)


def chosen(fit: Sums, held: Sums, ridges: Sequence[float]) -> tuple[Tensor | None, float, float]:
    """Choose the ridge that is best on held-out rows, and solve for the change with it on all rows.

    Args:
        fit: Sums over the training rows.
        held: Sums over the held-out rows.
        ridges: The candidate ridges.

    Returns:
        The change, its ridge, and the residual energy of the held-out rows under the training rows' solution;
        ``None`` and 0 if no ridge lowers that energy.
    """
    losses = {ridge: held.left(ridged(fit, ridge)) for ridge in ridges}
    best = min(losses, key=lambda ridge: losses[ridge])
    if not losses[best] < held.missing:
        return None, 0.0, held.missing
    return ridged(fit + held, best), best, losses[best]
