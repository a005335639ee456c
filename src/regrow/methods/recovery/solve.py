"""Least squares from sums: what is added to a layer's weight and bias so that it comes closer to a target."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 8192
"""Rows summed at a time in float64."""


@dataclass(frozen=True)
class Sums:
    """What least squares needs to know of inputs x and of what is missing r (target − output): float64 sums over rows.

    Args:
        gram: Σ x xᵀ, ``[k, k]``.
        cross: Σ x rᵀ, ``[k, out]``.
        missing: Σ |r|².
        wanted: Σ |target|².
        rows: How many.
    """

    gram: Tensor
    cross: Tensor
    missing: float
    wanted: float
    rows: int

    @classmethod
    def of(cls, inputs: Tensor, missing: Tensor, target: Tensor) -> "Sums":
        """The sums over rows ``[rows, k]``, ``[rows, out]`` and ``[rows, out]``, chunk by chunk."""
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
        """Σ |r − change ᵀ x|², what a change ``[k, out]`` leaves missing."""
        return self.missing - 2 * float((change * self.cross).sum()) + float((change * (self.gram @ change)).sum())


def ridged(sums: Sums, ridge: float) -> Tensor:
    """The change D ``[k, out]`` that minimises Σ |r − Dᵀ x|² + ridge · mean(diag Σ x xᵀ) · |D|².

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
    """The change that all rows together ask for, with the ridge under which the held-out rows miss least.

    Args:
        fit: Sums over the rows to learn from.
        held: Sums over others.
        ridges: What there is to choose from.

    Returns:
        The change, its ridge, and what the held-out rows miss under what the others ask for; no change and 0 if they
        miss least as it is.
    """
    found = {ridge: held.left(ridged(fit, ridge)) for ridge in ridges}
    best = min(found, key=lambda ridge: found[ridge])
    if not found[best] < held.missing:
        return None, 0.0, held.missing
    return ridged(fit + held, best), best, found[best]
