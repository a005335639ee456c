"""Measured allocation: pruning ratios from divergences that were measured by masking, without gradients.

Pruning an axis alone at a few sparsity levels gives a curve, d(p) = scale · p^power. The marginal divergence per cost,
as the score of each unit, makes global ranking the optimal choice for a sum of such curves. Where the divergence of the
network is no such sum, :func:`exchange` moves cost between axes and judges each exchange on the whole network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POWERS = (2.0, 4.0)
"""The range of the power of a curve. Divergences of axes alone grow about in proportion to what is cut, which would
concentrate the cut in few axes, where what others lose adds to it: at least 2 spreads it."""
FLOOR = 1e-4
"""Divergences below this fraction of the largest one are noise, and are raised to it."""
MOST = 4.0
"""The largest factor by which the scale of a curve changes in one exchange."""
STEPS = (1.0, 0.5, 0.25)
"""The fractions of a proposed exchange that are tried, until one is an improvement."""


@dataclass(frozen=True)
class Curves:
    """The divergence from the dense network as a function of the pruning ratio p of each axis: scale · p^power.

    Args:
        scale: ``[axes]`` float64, above 0.
        power: ``[axes]`` float64, above 1.
    """

    scale: Tensor
    power: Tensor

    def scaled(self, offset: Tensor) -> "Curves":
        """Return the curves multiplied by exp(offset).

        Args:
            offset: ``[axes]``.
        """
        return Curves(self.scale * offset.exp(), self.power)

    def rise(self, start: Tensor, stop: Tensor) -> Tensor:
        """Return d(stop) − d(start) of every axis, ``[axes]``.

        Args:
            start: A pruning ratio per axis, ``[axes]``.
            stop: Another one.
        """
        return self.scale * (stop**self.power - start**self.power)

    def scores(self, places: Mapping[str, Tensor], costs: Tensor) -> dict[str, Tensor]:
        """Return the logarithm of the marginal divergence per cost of each unit, by axis key, ``[size]`` each.

        Units with the lowest of these, cut until a budget is met, are those with the least sum of divergences.

        Args:
            places: Axis key → the place of each unit in the order of cutting, in (0, 1), lowest first, ``[size]``; the
                axes in the order of the curves.
            costs: The cost of all units of each axis, ``[axes]``.
        """
        first = (self.scale * self.power / costs).log()
        return {key: first[i] + (self.power[i] - 1) * place.log() for i, (key, place) in enumerate(places.items())}


def fit_curves(levels: Sequence[Sequence[float]], divergences: Sequence[Sequence[float]]) -> Curves:
    """Return the curves through the divergences of every axis, by least squares of their logarithms.

    Args:
        levels: The pruning ratios at which each axis was measured, in (0, 1]: one or more per axis.
        divergences: The divergence at each.

    >>> curves = fit_curves([[0.25, 0.5], [0.5]], [[0.01, 0.08], [0.5]])
    >>> [[round(one, 6) for one in values.tolist()] for values in (curves.power, curves.scale)]
    [[3.0, 2.0], [0.64, 2.0]]
    """
    floor = FLOOR * max((value for row in divergences for value in row), default=1.0)
    scale, power = [], []
    for at, row in zip(levels, divergences, strict=True):
        x = torch.tensor(at, dtype=torch.float64).log()
        y = torch.tensor(row, dtype=torch.float64).clamp_min(max(floor, 1e-12)).log()
        spread = float((x - x.mean()).square().sum())
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0 else 2.0
        slope = min(max(slope, POWERS[0]), POWERS[1])
        power.append(slope)
        scale.append(float((y.mean() - slope * x.mean()).exp()))
    return Curves(torch.tensor(scale, dtype=torch.float64), torch.tensor(power, dtype=torch.float64))


def propose_exchange(predicted: Tensor, measured: Tensor) -> Tensor:
    """Return the change of the logarithms of the scales that makes predicted rises of the divergence the measured ones.

    A factor that all axes have in common moves no cost, and is left out. The other ratios are shrunk towards 1, by how
    much of their variance is noise: that of their means over windows. A single axis has no other to exchange cost with.

    Args:
        predicted: The rise of the divergence that the curves predict if more of an axis is cut, ``[axes]``, above 0.
        measured: The rise of the divergence of the whole network on each window, ``[axes, windows]``; noise may make it
            negative.

    Returns:
        ``[axes]``; all 0 if nothing is proposed.
    """
    windows, means = measured.shape[1], measured.mean(1)
    common = float(means.sum() / predicted.sum())
    if common <= 0 or len(means) < 2:
        return torch.zeros_like(means)
    ratio = means / (common * predicted)
    noise = (measured.var(1) / windows / (common * predicted).square()).mean() if windows > 1 else ratio.new_zeros(())
    shrunk = 1 + (1 - noise / ratio.var().clamp_min(1e-12)).clamp_min(0) * (ratio - 1)
    return shrunk.clamp(1 / MOST, MOST).log()


@dataclass(frozen=True)
class Trial:
    """An exchange that was judged.

    Args:
        round: The number of the round, from 1.
        fraction: The fraction of the proposed exchange.
        windows: On how many windows it was judged.
        before: The mean divergence before it, on these windows.
        after: The mean divergence with it, on the same windows.
        accepted: Whether it was accepted.
    """

    round: int
    fraction: float
    windows: int
    before: float
    after: float
    accepted: bool


def exchange(
    start: Tensor,
    propose: Callable[[Tensor], Tensor],
    evaluate: Callable[[Tensor, int], Tensor],
    *,
    rounds: int,
    windows: Sequence[int],
) -> tuple[Tensor, tuple[Trial, ...]]:
    """Improve an allocation by exchanges of cost between axes, each judged on the whole network.

    An exchange is judged on few windows first, and on more only if it is an improvement there; it is accepted if it is
    one on all of them. After a round without an improvement or a proposal the search ends.

    Args:
        start: The allocation: any parameters of it, ``[axes]``, such as the logarithms of the scales of curves.
        propose: Returns a change of the allocation, ``[axes]``; all 0: there is nothing to judge.
        evaluate: Returns the divergence of the whole network at an allocation on the first so many windows,
            ``[windows]``, or on all if there are fewer; always the same windows.
        rounds: The largest number of rounds.
        windows: The numbers of windows on which exchanges are judged, ascending.

    Returns:
        The allocation, and what was judged. On the last number of windows it is never worse than the start.
    """
    allocation, trials = start, []
    best = evaluate(allocation, windows[-1]) if rounds else torch.zeros(0)
    for number in range(1, rounds + 1):
        change = propose(allocation)
        if not bool(change.any()):
            break
        for fraction in STEPS:
            candidate = allocation + fraction * change
            for many in windows:
                losses = evaluate(candidate, many)
                before, after = float(best[:many].mean()), float(losses.mean())
                better = after < before
                trials.append(Trial(number, fraction, len(losses), before, after, better and many == windows[-1]))
                if not better:
                    break
            if trials[-1].accepted:
                allocation, best = candidate, losses
                break
        else:
            break
    return allocation, tuple(trials)


def improves(before: Tensor, after: Tensor, margin: float) -> bool:
    """Whether losses fell by more than some paired standard errors; favours an allocation chosen on these windows.

    Args:
        before: The losses on some windows, ``[windows]``.
        after: The losses on the same windows, ``[windows]``.
        margin: How many standard errors of the mean difference.

    >>> before = torch.tensor([1.0, 2.0, 3.0])
    >>> improves(before, before - 0.1, 2.0), improves(before, before - torch.tensor([0.3, 0.0, -0.2]), 1.0)
    (True, False)
    """
    gain = before - after
    error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return float(gain.mean()) > margin * error
