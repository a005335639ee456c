"""Kronecker-factored Laplace: a quadratic penalty in the directions that earlier tasks used, around their parameters.

Ritter, Botev, Barber, NeurIPS 2018 (arXiv 1805.07810):  loss + s/2 Σ Δᵀ (A ⊗ B) Δ  over all layers, with the change Δ
of weight and bias since the last task, and the factors A, B summed over tasks. Unlike there, the penalty is taken by a
proximal step every few steps, Δ ← (1 + η k s A ⊗ (B + d))⁻¹ Δ, which is stable at every strength s and rate η; B is
divided by its mean diagonal, and hidden layers are damped by d. Parameters without factors have Fisher diagonals.
By default the steps themselves are shrunk in these directions, too, as in natural continual learning (Kao et al.,
NeurIPS 2021); ``gate=0`` leaves that out. Growth and the detection of boundaries are ours.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from regrow.protection.factors import add_factors
from regrow.protection.growth import Growth
from regrow.protection.learner import Protection, ProtectionState, build_learner
from regrow.settings.constraints import CheckedSettings, Count, Fraction, NonNegative, OneOf, Range
from regrow.training.learner import Learner

PROJECTION = 15.0  # the strength at which new units are projected away from earlier inputs
CITATION = "Ritter, Botev, Barber, Online structured Laplace approximations, NeurIPS 2018 (arXiv 1805.07810)"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of Kronecker-factored Laplace: strength and damping of the penalty, and how its factors are measured.

    Args:
        strength: s, the strength of the penalty.
        gate: The last k steps are also divided by 1 + gate · A ⊗ (B + d), as in ``ncl``; 0: they are not.
        damping: d, the importance of a hidden unit that earlier tasks did not use, as a fraction of the mean.
        samples: The number of examples of each task on which its factors are measured.
        limit: The largest size of the factors, as a multiple of the network's. Beyond it their leading eigenvectors and
            diagonals are kept.
        every: k, the number of steps between two proximal steps.
        boundaries: ``known``: factors are measured when a task ends; ``detected``: where the loss jumps, on examples
            that are kept since the last jump.
        grow: When hidden layers are widened: ``never``; ``start``: as a task begins, after the first; ``late``: for the
            last 30 % of its epochs.
        width: The number of new units of a layer, as a fraction of its initial size.
        multiple: Numbers of new units are multiples of this.
        cap: The largest allowed size of the network, as a multiple of its initial parameters, at least 1.
        directions: Where new units point: ``data``: to differences of inputs of the present task, away from those of
            earlier tasks; ``projected``: at random, away from those; ``random``.
        seed: Seed of the new units' weights.
    """

    strength: NonNegative = 0.5
    gate: NonNegative = 2.0
    damping: NonNegative = 0.1
    samples: Count = 2000
    limit: NonNegative = 100.0
    every: Count = 4
    boundaries: Annotated[str, OneOf("known", "detected")] = "known"
    grow: Annotated[str, OneOf("never", "start", "late")] = "never"
    width: Fraction = 0.125
    multiple: Count = 1
    cap: Annotated[float, Range(1)] = 1.5
    directions: Annotated[str, OneOf("data", "projected", "random")] = "data"
    seed: Annotated[int, Range(0)] = 0


def build(settings: Settings) -> Learner[ProtectionState]:
    """Return the learner that trains with Kronecker-factored Laplace."""

    def shrink(lr: float) -> dict[str, float]:
        return {"pull": lr * settings.strength, "gate": settings.gate}

    s = settings
    growth = Growth(s.grow, s.width, s.multiple, s.cap, s.directions, PROJECTION, s.seed)
    if s.boundaries == "detected" and s.grow != "never":
        raise ValueError(f"grow={s.grow} needs known boundaries, got boundaries=detected; leave one of them out")
    recent = s.samples if s.boundaries == "detected" else 0
    return build_learner(
        Protection(shrink, partial(add_factors, samples=s.samples), s.damping, s.limit, s.every, growth, recent)
    )
