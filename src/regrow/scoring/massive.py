"""Find units with massive activations, so that a report can say whether a plan removes them."""

from dataclasses import dataclass

from regrow.core.axes import AxisGraph
from regrow.core.scores import Scores

SHARE = 0.1
"""The least fraction of its axis's total energy from which a unit is called massive."""

FEWEST = 16
"""Axes with fewer units are not searched: a large fraction is nothing special there."""


@dataclass(frozen=True)
class Massive:
    """A unit with massive activations: it contributes a large fraction of its axis's energy.

    Args:
        axis: The key of its axis.
        unit: Its unit id, which survives cuts.
        share: Its fraction of the axis's total energy (0 to 1).
        ratio: Its energy divided by that of the median unit.
    """

    axis: str
    unit: int
    share: float
    ratio: float


def massive(axes: AxisGraph, energy: Scores) -> list[Massive]:
    """Return the units that contribute more than a tenth of their axis's energy, largest first.

    Args:
        axes: The network's axes.
        energy: The energy of each unit, from :func:`regrow.scoring.energy`.

    Source: the observation is Sun et al. 2024 (arXiv 2402.17762); the share as a measure is ours.
    """
    result = []
    for key, values in energy.values.items():
        axis, total, middle = axes[key], float(values.sum()), float(values.median())
        if axis.size < FEWEST or total <= 0:
            continue
        for unit in (values > SHARE * total).nonzero().flatten().tolist():
            ratio = float(values[unit]) / middle if middle > 0 else float("inf")
            result.append(Massive(key, axis.ids[unit], float(values[unit]) / total, ratio))
    return sorted(result, key=lambda one: -one.share)
