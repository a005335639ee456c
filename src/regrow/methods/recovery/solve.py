"""Ridge regression from sums: the change of a layer's weight and bias that brings its output closest to a target."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

CHUNK = 8192  # the number of rows summed at a time
EXACT = 1e-2  # below this ridge, sums are exact to float64


@dataclass(frozen=True)
class Sums:
    """Sufficient statistics of a least squares problem with inputs x and residuals r (target − output)."""

    gram: Tensor  # Σ x xᵀ, `[k, k]`
    cross: Tensor  # Σ x rᵀ, `[k, out]`
    missing: float  # Σ |r|², the energy of the residuals
    wanted: float  # Σ |target|², the energy of the target
    rows: int  # the number of rows

    @classmethod
    def of(
        cls, inputs: Tensor, missing: Tensor, target: Tensor, *, fast: bool = False, onto: "Sums | None" = None
    ) -> "Sums":
        """Compute the sums over all rows in float64, chunk by chunk."""
        if onto is None:
            k, out = inputs.shape[1], missing.shape[1]
            gram, cross = (torch.zeros(k, n, dtype=torch.float64, device=inputs.device) for n in (k, out))
            lost = wanted = 0.0
        else:
            gram, cross, lost, wanted = onto.gram, onto.cross, onto.missing, onto.wanted
        for x, r, t in zip(*(part.split(CHUNK) for part in (inputs, missing, target)), strict=True):
            if fast:
                gram += x.T @ x
                cross += x.T @ r
                lost, wanted = lost + _energy(r), wanted + _energy(t)
                continue
            x, r = x.double(), r.double()
            gram.addmm_(x.T, x)
            cross.addmm_(x.T, r)
            lost += float(r.square().sum())
            wanted += float(t.double().square().sum())
        return cls(gram, cross, lost, wanted, len(inputs) + (onto.rows if onto else 0))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.missing + other.missing,
            self.wanted + other.wanted,
            self.rows + other.rows,
        )

    def relative(self, left: float) -> float:
        """Return an energy of residuals relative to the energy of the target."""
        return left / max(self.wanted, 1e-300)

    def left(self, change: Tensor) -> float:
        """Return Σ |r − changeᵀ x|², the energy of the residuals that a change leaves."""
        return self.missing - 2 * float((change * self.cross).sum()) + float((change * (self.gram @ change)).sum())


def _energy(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2


def ridged(sums: Sums, ridge: float) -> Tensor:
    """Return the change D ``[k, out]`` that minimises Σ |r − Dᵀ x|² + ridge · mean(diag Σ x xᵀ) · |D|².

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


@dataclass(frozen=True)
class Choice:
    """The change of a layer, and how it was chosen."""

    # The change of the weight, `[k, out]`, fitted to all rows; `None` if no candidate lowers the error.
    change: Tensor | None
    ridge: float  # its ridge; 0 without a change
    shrinkage: float  # the factor of the least squares solution in it; 0 without a change
    before: float  # the error before, relative to the energy of the target, on rows that are not fitted
    after: float  # that error with the change fitted to the other rows
    seen: float  # the mean error on left-out sources with the change fitted to all of them


def _bias_alone(sums: Sums, bias: bool) -> Tensor:
    """Return the change that adds the mean residual to the bias, ``[k, out]``; 0 without a bias."""
    start = torch.zeros_like(sums.cross)
    if bias and sums.rows:
        start[-1] = sums.cross[-1] / sums.rows
    return start


def _left(held: Sums, start: Tensor, change: Tensor, shrinkages: Sequence[float]) -> dict[float, float]:
    """Return shrinkage → Σ |r − (start + shrinkage · (change − start))ᵀ x|²."""
    if tuple(shrinkages) == (1.0,):
        return {1.0: held.left(change)}
    step = change - start
    shifted = held.cross - torch.outer(held.gram[:, -1], start[-1])
    origin = held.missing - float((start[-1] * (held.cross[-1] + shifted[-1])).sum())
    slope, curve = float((step * shifted).sum()), float((step * (held.gram @ step)).sum())
    return {factor: origin - 2 * factor * slope + factor * factor * curve for factor in shrinkages}


@dataclass(frozen=True)
class RidgeCandidates:
    """The solutions that are tried for each layer, and the positions on which they are judged."""

    ridges: tuple[float, ...]  # the candidate ridges
    shrinkages: tuple[float, ...] = (1.0,)  # the candidate factors of the least squares solution
    # Whether the parts of the text are sources, of which one is left out at a time; else there are two, and the second
    # is held out.
    left_out: bool = False

    def sum_rows(self, inputs: Tensor, target: Tensor, missing: Tensor, onto: Sums | None) -> Sums:
        """Return the sums over rows, as precise as the candidates need."""
        return Sums.of(inputs, missing, target, fast=self.left_out and min(self.ridges) >= EXACT, onto=onto)

    def choose(self, parts: Sequence[Sums], *, bias: bool) -> Choice:
        """Choose ridge and shrinkage on parts that are not fitted, and solve for the change with them on all parts.

        error(ridge, shrinkage) = mean over judged parts m of |r − Dᵀ x|² / |target|², with D fitted to the others
        """
        errors: dict[tuple[float, float], list[float]] = {}
        missing = []
        for m, held in enumerate(parts):
            if not self.left_out and not m:
                continue
            missing.append(held.relative(held.missing))
            fit = reduce(add, [*parts[:m], *parts[m + 1 :]])
            start = _bias_alone(fit, bias)
            for ridge in self.ridges:
                change = ridged(fit, ridge)
                for shrinkage, left in _left(held, start, change, self.shrinkages).items():
                    errors.setdefault((ridge, shrinkage), []).append(held.relative(left))
        losses = {key: math.fsum(several) / len(several) for key, several in errors.items()}
        before, best = math.fsum(missing) / len(missing), min(losses, key=lambda key: losses[key])
        choice = Choice(None, 0.0, 0.0, before, before, before)
        if losses[best] < before:
            (ridge, shrinkage), total = best, reduce(add, parts)
            change = ridged(total, ridge)
            if shrinkage != 1:
                change = torch.lerp(_bias_alone(total, bias), change, shrinkage)
            seen = [part.relative(part.left(change)) for part in parts] if self.left_out else [math.nan]
            choice = Choice(change, ridge, shrinkage, before, losses[best], math.fsum(seen) / len(seen))
        return choice

    def record(self, name: str, choice: Choice) -> dict[str, Any]:
        """Return what is recorded of a layer, as JSON data."""
        row = {"weight": name, "before": choice.before, "after": choice.after, "ridge": choice.ridge}
        if self.left_out or self.shrinkages != (1.0,):
            row["shrinkage"] = choice.shrinkage
        if self.left_out:
            row["seen"] = choice.seen
        return row
