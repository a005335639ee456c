"""Ridge regression from sums: the change of a layer's weight and bias that brings its output closest to a target."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

CHUNK = 8192
"""The number of rows summed at a time."""
EXACT = 1e-2
"""Below this ridge, sums are exact to float64."""


@dataclass(frozen=True)
class Sums:
    """Sufficient statistics of a least squares problem with inputs x and residuals r (target − output).

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
    def of(
        cls, inputs: Tensor, missing: Tensor, target: Tensor, *, fast: bool = False, onto: "Sums | None" = None
    ) -> "Sums":
        """Compute the sums over all rows in float64, chunk by chunk.

        Args:
            inputs: x, ``[rows, k]``.
            missing: r = target − output, ``[rows, out]``.
            target: The target, ``[rows, out]``.
            fast: Whether products are computed in the precision of the data within a chunk, and only chunks are added
                in float64: half the time for float32, with a relative error of about 1e-6.
            onto: Sums over other rows, to which these are added; their matrices are changed.
        """
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
        """Return an energy of residuals relative to the energy of the target.

        Args:
            left: The energy of the residuals.
        """
        return left / max(self.wanted, 1e-300)

    def left(self, change: Tensor) -> float:
        """Return Σ |r − changeᵀ x|², the energy of the residuals that a change leaves.

        Args:
            change: The change of the weight, ``[k, out]``.
        """
        return self.missing - 2 * float((change * self.cross).sum()) + float((change * (self.gram @ change)).sum())


def _energy(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2


def ridged(sums: Sums, ridge: float, *, standardize: bool = False, bias: bool = False) -> Tensor:
    """Return the change D ``[k, out]`` that minimises Σ |r − Dᵀ x|² + ridge · Σ_i s_i · |D_i|².

    s_i is the mean diagonal of Σ x xᵀ; or, if ``standardize``, (Σ x xᵀ)_ii, and 0 for the bias.

    Args:
        sums: The sums over the rows.
        ridge: The ridge, as a multiple of s.
        standardize: Whether each input is penalised in proportion to its own sum of squares.
        bias: Whether the last input is the constant 1 of a bias.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> wanted = torch.tensor([[3.0], [-1.0]])
    >>> torch.allclose(ridged(Sums.of(x, x @ wanted, x @ wanted), 1e-12), wanted.double())
    True
    """
    gram = sums.gram.clone()
    if standardize:
        own = gram.diagonal()[: len(gram) - bias]
        own.copy_(torch.where(own > 0, own * (1 + ridge), 1.0))  # the change of an input that is always 0 is 0
    else:
        gram.diagonal().add_(ridge * gram.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):  # no ridge, and inputs that depend on one another
        return torch.linalg.pinv(gram, hermitian=True) @ sums.cross
    return torch.cholesky_solve(sums.cross, factor)


@dataclass(frozen=True)
class Choice:
    """The change of a layer, and how it was chosen.

    Args:
        change: The change of the weight, ``[k, out]``, fitted to all rows; ``None`` if no candidate lowers the error.
        ridge: Its ridge; 0 without a change.
        shrinkage: The factor of the least squares solution in it; 0 without a change.
        before: The error before, relative to the energy of the target, on rows that are not fitted.
        after: That error with the change fitted to the other rows.
        seen: That error with the change fitted to all rows; NaN where it is not measured.
    """

    change: Tensor | None
    ridge: float
    shrinkage: float
    before: float
    after: float
    seen: float = math.nan


def choose_held_out(
    fit: Sums,
    held: Sums,
    ridges: Sequence[float],
    shrinkages: Sequence[float] = (1.0,),
    *,
    bias: bool = False,
    standardize: bool = False,
) -> Choice:
    """Choose ridge and shrinkage on held-out rows, and solve for the change with them on all rows.

    Args:
        fit: Sums over the training rows.
        held: Sums over the held-out rows.
        ridges: The candidate ridges.
        shrinkages: The candidate factors, above 0 and at most 1, of the difference between the least squares solution
            and the one that changes the bias alone.
        bias: Whether the last input is the constant 1 of a bias.
        standardize: As for :func:`ridged`.
    """
    solve = partial(ridged, standardize=standardize, bias=bias)
    return _choose([(fit, held)], lambda: fit + held, ridges, shrinkages, bias, solve)


def choose_left_out(
    sources: Sequence[Sums],
    ridges: Sequence[float],
    shrinkages: Sequence[float] = (1.0,),
    *,
    bias: bool = False,
    standardize: bool = False,
) -> Choice:
    """Choose ridge and shrinkage on left-out sources, and solve for the change with them on all sources.

    error(ridge, shrinkage) = mean over m of |r − Dᵀ x|² / |target|² on source m, with D fitted to all other sources

    Args:
        sources: Sums over the rows of each source, at least two.
        ridges: The candidate ridges.
        shrinkages: As for :func:`choose_held_out`.
        bias: As for :func:`choose_held_out`.
        standardize: As for :func:`ridged`.
    """
    solve = partial(ridged, standardize=standardize, bias=bias)
    folds = ((reduce(add, [*sources[:m], *sources[m + 1 :]]), held) for m, held in enumerate(sources))
    choice = _choose(folds, lambda: reduce(add, sources), ridges, shrinkages, bias, solve)
    errors = [held.relative(held.missing if choice.change is None else held.left(choice.change)) for held in sources]
    return replace(choice, seen=math.fsum(errors) / len(errors))


def _choose(
    folds: Iterable[tuple[Sums, Sums]],
    whole: Callable[[], Sums],
    ridges: Sequence[float],
    shrinkages: Sequence[float],
    bias: bool,
    solve: Callable[[Sums, float], Tensor],
) -> Choice:
    """Choose the candidate with the least mean relative error over (fitted, judged) sums."""
    errors: dict[tuple[float, float], list[float]] = {}
    missing = []
    for fit, held in folds:
        missing.append(held.relative(held.missing))
        start = _bias_alone(fit, bias)
        for ridge in ridges:
            for shrinkage, left in _left(held, start, solve(fit, ridge), shrinkages).items():
                errors.setdefault((ridge, shrinkage), []).append(held.relative(left))
    losses = {key: math.fsum(several) / len(several) for key, several in errors.items()}
    before, best = math.fsum(missing) / len(missing), min(losses, key=lambda key: losses[key])
    if not losses[best] < before:
        return Choice(None, 0.0, 0.0, before, before)
    (ridge, shrinkage), total = best, whole()
    change = solve(total, ridge)
    if shrinkage != 1:
        change = torch.lerp(_bias_alone(total, bias), change, shrinkage)
    return Choice(change, ridge, shrinkage, before, losses[best])


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
    return {one: origin - 2 * one * slope + one * one * curve for one in shrinkages}


@dataclass(frozen=True)
class RidgeCandidates:
    """The solutions that are tried for each layer, and the positions on which they are judged.

    Args:
        ridges: The candidate ridges.
        shrinkages: The candidate factors of the least squares solution.
        left_out: Whether the parts of the text are sources, of which one is left out at a time; else there are two, and
            the second is held out.
        standardize: As for :func:`ridged`.
    """

    ridges: tuple[float, ...]
    shrinkages: tuple[float, ...]
    left_out: bool = False
    standardize: bool = False

    def sum_rows(self, inputs: Tensor, target: Tensor, missing: Tensor, onto: Sums | None = None) -> Sums:
        """Return the sums over rows, as precise as the candidates need.

        Args:
            inputs: The inputs of the layer, ``[rows, k]``.
            target: The outputs that it should have, ``[rows, out]``.
            missing: The target minus the current output, ``[rows, out]``.
            onto: Sums over other rows, to which these are added; they are used up.
        """
        return Sums.of(inputs, missing, target, fast=self.left_out and min(self.ridges) >= EXACT, onto=onto)

    def choose(self, parts: Sequence[Sums], *, bias: bool) -> Choice:
        """Choose the change of a layer.

        Args:
            parts: The sums over the rows of each part of the text.
            bias: Whether the last input is the constant 1 of a bias.
        """
        if self.left_out:
            return choose_left_out(parts, self.ridges, self.shrinkages, bias=bias, standardize=self.standardize)
        fit, held = parts
        more = {"bias": bias, "standardize": self.standardize}
        return choose_held_out(fit, held, self.ridges, self.shrinkages, **more)

    def record(self, name: str, choice: Choice) -> dict[str, Any]:
        """Return what is recorded of a layer, as JSON data.

        Args:
            name: The name of its weight.
            choice: Its change.

        Returns:
            ``weight``; ``before`` and ``after``: the relative error on held-out positions, or the mean over left-out
            sources; ``ridge``; ``shrinkage`` if it was chosen, and ``seen``, the error on the sources that were fitted,
            if sources were left out.
        """
        more = {"shrinkage": choice.shrinkage} if self.left_out or self.shrinkages != (1.0,) else {}
        more |= {"seen": choice.seen} if self.left_out else {}
        return {"weight": name, "before": choice.before, "after": choice.after, "ridge": choice.ridge, **more}
