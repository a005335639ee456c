"""Magnitude pruning: cut the units with the smallest weight norms. Needs no data."""

from dataclasses import dataclass
from typing import Annotated

from regrow.methods.pruning.pruner import Pruner, baseline_pruner
from regrow.settings.constraints import CheckedSettings, OneOf

CITATION = (
    "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710; "
    "structured form of An et al., arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``magnitude``: allocation and compensation.

    Args:
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to biases (needs sources; the original does not do it).
    """

    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = False


def build(settings: Settings) -> Pruner:
    """Return the magnitude pruner: column norms, the same fraction of every axis ("mag-sp" in FLAP's repository)."""
    return baseline_pruner("magnitude", settings)
