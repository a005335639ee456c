"""Magnitude pruning: cut the units with the smallest weight norms. Needs no data."""

from dataclasses import dataclass
from typing import Annotated

from regrow.core.scores import Need, Scores
from regrow.methods.pruning.pruner import Pruner, PruningTask, one_score
from regrow.scoring.metrics import magnitude
from regrow.scoring.spaces import normalise
from regrow.settings.constraints import CheckedSettings, Count, OneOf

CITATION = (
    "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710; "
    "structured form of An et al., arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``magnitude``: which weights the norm is of, allocation and compensation.

    Args:
        form: ``columns``: norm of the weights that read a unit; ``group``: norm of all weights that belong to it.
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to biases (needs sources; the original does not do it).
        minimum: The smallest number of units that stay in an axis.
    """

    form: Annotated[str, OneOf("columns", "group")] = "columns"
    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = False
    minimum: Count = 1


def build(settings: Settings) -> Pruner:
    """Return the magnitude pruner: column norms, the same fraction of every axis ("mag-sp" in FLAP's repository)."""
    how = "zscore" if settings.allocation == "ranked" else "none"

    def score(task: PruningTask) -> Scores:
        weights = task.weights
        return normalise(magnitude(weights, task.axes, units=task.units, form=settings.form), how)

    return one_score("magnitude", settings, {Need.WEIGHTS}, score)
