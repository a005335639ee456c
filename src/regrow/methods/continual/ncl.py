"""Natural continual learning (NCL): steps are small in the directions that earlier tasks used, and lead back to them.

Kao, Jensen, van de Ven, Bernacchia, Hennequin, NeurIPS 2021 (arXiv 2106.08085): with the Fisher information A ⊗ B of
earlier tasks and a prior of variance p², a step is  −η (1 + p² A ⊗ B)⁻¹ ∇ − η λ (W − W*)  around their parameters W*.
Here p² is the setting ``strength``, with B divided by its mean diagonal, and λ is ``pull``; the step is corrected after
the optimizer, every few steps, and hidden layers are damped. Parameters without factors have Fisher diagonals.
"""

from dataclasses import dataclass
from functools import partial

from regrow.protection.factors import add_factors
from regrow.protection.learner import Protection, ProtectionState, build_learner
from regrow.settings.constraints import CheckedSettings, Count, NonNegative
from regrow.training.learner import Learner

CITATION = "Kao et al., Natural continual learning: success is a journey, not (just) a destination, NeurIPS 2021"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of natural continual learning: how much steps are shrunk, and how strongly they are pulled back.

    Args:
        strength: p², the variance of the prior: the larger, the less steps move what earlier tasks used.
        pull: λ, the strength of the pull to the parameters of earlier tasks.
        damping: The importance of a hidden unit that earlier tasks did not use, as a fraction of the mean.
        samples: The number of examples of each task on which its factors are measured.
        every: The number of steps between two corrections.
    """

    strength: NonNegative = 5.0
    pull: NonNegative = 0.1
    damping: NonNegative = 0.1
    samples: Count = 2000
    every: Count = 4


def build(settings: Settings) -> Learner[ProtectionState]:
    """Return the learner that trains with natural continual learning."""

    def shrink(lr: float) -> dict[str, float]:
        return {"gate": settings.strength, "decay": lr * settings.pull}

    measure = partial(add_factors, samples=settings.samples)
    return build_learner(Protection(shrink, measure, settings.damping, every=settings.every))
