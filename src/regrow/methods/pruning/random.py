"""Random pruning: cut random units; a control that every importance metric has to beat."""

from dataclasses import dataclass
from typing import Annotated

from regrow.methods.pruning.pruner import Pruner, simple_pruner
from regrow.scoring.metrics import random
from regrow.settings.constraints import CheckedSettings, OneOf

CITATION = "No paper: uniform random scores, a control."


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``random``: seed, allocation and compensation.

    Args:
        seed: Seed of the scores; each axis has its own random stream, so the order of axes does not matter.
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of all units.
        compensate: Whether the mean of dropped inputs is added to biases (needs sources).
    """

    seed: int = 0
    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = False


def build(settings: Settings) -> Pruner:
    """Return the random pruner: random scores, the same fraction of every axis, no compensation by default."""
    return simple_pruner("random", settings, (), lambda task: random(task.axes, units=task.units, seed=settings.seed))
