"""Units that carry a layer by themselves, so that a reader can see whether a plan cuts them."""

from dataclasses import dataclass

from regrow.axes import AxisGraph
from regrow.scores import Scores

SHARE = 0.1
"""A unit is called massive from this share of what its layer adds."""

FEWEST = 16
"""In an axis of fewer units a large share is nothing special."""


@dataclass(frozen=True)
class Massive:
    """A unit that makes up a large share of what its layer adds.

    Args:
        axis: The key of its axis.
        unit: Its unit id.
        share: Its part of the layer's energy (0 to 1).
        ratio: Its energy as a multiple of the median unit's.
    """

    axis: str
    unit: int
    share: float
    ratio: float


def massive(axes: AxisGraph, energy: Scores) -> list[Massive]:
    """The units with a large share of their axis's energy, largest first.

    Args:
        axes: The network's axes.
        energy: What each unit adds (:func:`regrow.scoring.activations.energy`).

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
