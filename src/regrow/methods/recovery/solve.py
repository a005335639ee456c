"""Ridge regression from sums: the change of a layer's weight and bias that brings its output closest to a target."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

CHUNK = 8192  # the number of rows summed at a time
EXACT = 1e-2  # if a candidate ridge is below this, sums are computed in float64
MIXTURES = 64  # the number of random mixtures of the outputs on which candidates are compared


@dataclass(frozen=True)
class Sums:
    """Sufficient statistics of a least squares problem with inputs x and residuals r (target − output)."""

    gram: Tensor  # Σ x xᵀ, `[k, k]`
    cross: Tensor  # Σ x rᵀ, `[k, out]`
    residual_energy: float  # Σ |r|²
    target_energy: float  # Σ |target|²
    rows: int  # the number of rows

    @classmethod
    def over_rows(
        cls, inputs: Tensor, residual: Tensor, target: Tensor, *, fast: bool = False, onto: "Sums | None" = None
    ) -> "Sums":
        """Return the float64 sums over all rows, added to ``onto``, whose tensors change in place.

        ``residual``: target − output. All have one row per position, ``[positions, channels]``. ``onto``: earlier sums;
        ``None``: none. ``fast``: products are in the rows' precision.
        """
        if onto is None:
            k, out = inputs.shape[1], residual.shape[1]
            gram, cross = (torch.zeros(k, n, dtype=torch.float64, device=inputs.device) for n in (k, out))
            onto = cls(gram, cross, 0.0, 0.0, 0)
        gram, cross, r_energy, t_energy = onto.gram, onto.cross, onto.residual_energy, onto.target_energy
        for x, r, t in zip(*(rows.split(CHUNK) for rows in (inputs, residual, target)), strict=True):
            if fast:
                gram += x.T @ x
                cross += x.T @ r
                r_energy += _energy(r)
                t_energy += _energy(t)
                continue
            x, r = x.double(), r.double()
            gram.addmm_(x.T, x)
            cross.addmm_(x.T, r)
            r_energy += float(r.square().sum())
            t_energy += float(t.double().square().sum())
        return cls(gram, cross, r_energy, t_energy, onto.rows + len(inputs))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def mixed(self) -> "Sums":
        """Return the sums for :data:`MIXTURES` random mixtures of the outputs, in float32; energies are of all."""
        size = self.cross.shape[1], MIXTURES
        mixtures = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / MIXTURES**0.5
        return replace(self, gram=self.gram.float(), cross=(self.cross @ mixtures.to(self.cross.device)).float())

    def relative(self, energy: float) -> float:
        """Return an energy of residuals (a sum of squares) divided by that of the target."""
        return energy / max(self.target_energy, 1e-300)

    def energy_after(self, change: Tensor) -> float:
        """Return Σ |r − changeᵀ x|², the energy of the residuals that a change ``[k, out]`` leaves."""
        linear, quadratic = float((change * self.cross).sum()), float((change * (self.gram @ change)).sum())
        return self.residual_energy - 2 * linear + quadratic


def _energy(rows: Tensor) -> float:
    """Return the sum of squares of all entries, accumulated in float64."""
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2


def solve_ridge(sums: Sums, ridge: float) -> Tensor:
    """Return the change D ``[k, out]`` that minimises Σ |r − Dᵀ x|² + ridge · mean(diag Σ x xᵀ) · |D|².

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> change = torch.tensor([[3.0], [-1.0]])
    >>> torch.allclose(solve_ridge(Sums.over_rows(x, x @ change, x @ change), 1e-12), change.double())
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
    """The result of :meth:`RidgeCandidates.choose`: the change of a layer, and how it was chosen."""

    # The change of the weight, `[k, out]`, fitted to all rows; `None` if no candidate lowers the error.
    change: Tensor | None
    ridge: float  # its ridge; 0 without a change
    shrinkage: float  # the factor of the least squares solution in it; 0 without a change
    before: float  # the error before, relative to the energy of the target, on rows that are not fitted
    after: float  # that error with the change fitted to the other rows
    seen: float  # the mean error on left-out sources with the change fitted to all of them


def _bias_change(sums: Sums, bias: bool) -> Tensor:
    """Return the change that adds the mean residual to the bias, the last row of ``[k, out]``; 0 without ``bias``."""
    start = torch.zeros_like(sums.cross)
    if bias and sums.rows:
        start[-1] = sums.cross[-1] / sums.rows
    return start


def _energies_after(held: Sums, start: Tensor, change: Tensor, shrinkages: Sequence[float]) -> dict[float, float]:
    """Return shrinkage → Σ |r − (start + shrinkage · (change − start))ᵀ x|²; ``start`` changes the bias alone."""
    if tuple(shrinkages) == (1.0,):
        return {1.0: held.energy_after(change)}
    step = change - start
    shifted = held.cross - torch.outer(held.gram[:, -1], start[-1])  # Σ x (r − startᵀ x)ᵀ
    origin = held.residual_energy - float((start[-1] * (held.cross[-1] + shifted[-1])).sum())
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

    @property
    def fast(self) -> bool:
        """Whether float32 is precise enough: every ridge is large, and what was left out decides between them."""
        return self.left_out and min(self.ridges) >= EXACT

    def sum_rows(self, inputs: Tensor, target: Tensor, residual: Tensor, onto: Sums | None) -> Sums:
        """Return :meth:`Sums.over_rows` of rows, added to ``onto``, in the precision that the candidates need."""
        return Sums.over_rows(inputs, residual, target, fast=self.fast, onto=onto)

    def choose(self, parts: Sequence[Sums], *, bias: bool) -> Choice:
        """Choose ridge and shrinkage by the error on parts that are not fitted; return the change fitted to all.

        ``parts``: the sums of each part of the data; ``bias``: whether the last input is the constant 1 of a bias.
        error(ridge, shrinkage) = mean over judged parts m of |r − Dᵀ x|² / |target|², with D fitted to the others

        Where :attr:`fast` holds, the choice is made on random mixtures of the outputs, and the error is that of all.
        """
        chosen = self
        if self.fast and parts[0].cross.shape[1] > MIXTURES and len(self.ridges) * len(self.shrinkages) > 1:
            _, (ridge, shrinkage) = self._find_best([part.mixed() for part in parts], bias=bias)
            chosen = replace(self, ridges=(ridge,), shrinkages=(shrinkage,))
        after, (ridge, shrinkage) = chosen._find_best(parts, bias=bias)
        judged = parts if self.left_out else parts[1:]
        before = math.fsum(held.relative(held.residual_energy) for held in judged) / len(judged)
        if not after < before:
            return Choice(None, 0.0, 0.0, before, before, before)
        total = reduce(add, parts)
        change = solve_ridge(total, ridge)
        if shrinkage != 1:
            change = torch.lerp(_bias_change(total, bias), change, shrinkage)
        seen = [part.relative(part.energy_after(change)) for part in parts] if self.left_out else [math.nan]
        return Choice(change, ridge, shrinkage, before, after, math.fsum(seen) / len(seen))

    def _find_best(self, parts: Sequence[Sums], *, bias: bool) -> tuple[float, tuple[float, float]]:
        """Return the lowest mean error on parts that are not fitted, and its ridge and shrinkage."""
        errors: dict[tuple[float, float], list[float]] = {}
        for m, held in enumerate(parts):
            if not self.left_out and not m:  # the first of two parts is fitted
                continue
            fit = reduce(add, [*parts[:m], *parts[m + 1 :]])
            start = _bias_change(fit, bias)
            for ridge in self.ridges:
                change = solve_ridge(fit, ridge)
                for shrinkage, energy in _energies_after(held, start, change, self.shrinkages).items():
                    errors.setdefault((ridge, shrinkage), []).append(held.relative(energy))
        losses = {key: math.fsum(values) / len(values) for key, values in errors.items()}
        best = min(losses, key=lambda key: losses[key])
        return losses[best], best

    def record(self, name: str, choice: Choice) -> dict[str, Any]:
        """Return the record of the layer of weight ``name``: errors before and after, ridge, and more, as JSON data."""
        row = {"weight": name, "before": choice.before, "after": choice.after, "ridge": choice.ridge}
        if self.left_out or self.shrinkages != (1.0,):
            row["shrinkage"] = choice.shrinkage
        if self.left_out:
            row["seen"] = choice.seen
        return row
