"""Elastic weight consolidation (EWC): a quadratic penalty keeps parameters near their values after the last task.

Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796); the running sum over tasks after Schwarz et al., Progress & Compress
(ICML 2018):  loss + λ/2 Σ F (θ − θ*)²,  F ← γ F + F_task,  F_task = E[(∂ log p(y|x) / ∂θ)²] with y sampled from
the network's own predictions (the true Fisher information, not the squared gradient of a batch). Unlike there, the
penalty is a proximal step after each step of the optimizer,  θ ← θ* + (θ − θ*) / (1 + η λ F),  stable at every λ.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import select_logits
from regrow.protection.factors import Factors, sample_log_likelihood, widen
from regrow.protection.learner import Protection, ProtectionState, build_learner
from regrow.scoring.gradients import evaluation_mode
from regrow.settings.constraints import CheckedSettings, Count, Fraction, NonNegative
from regrow.training.learner import Context, Learner, Stream, make_tensor

CITATION = "Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of elastic weight consolidation: penalty strength, decay of older Fisher information, sample count.

    Args:
        strength: λ, the strength of the penalty.
        decay: γ, the factor on the Fisher information of earlier tasks whenever a task's is added, 0 to 1.
        samples: The number of examples, taken one by one, on which a task's Fisher information is estimated.
    """

    strength: NonNegative = 100.0
    decay: Fraction = 1.0
    samples: Count = 200


def build(settings: Settings) -> Learner[ProtectionState]:
    """Return the learner that trains with elastic weight consolidation."""
    protection = Protection(lambda lr: {"pull": lr * settings.strength}, partial(_add_fisher, settings))
    return replace(build_learner(protection), lr=0.02)


def _add_fisher(settings: Settings, factors: Factors, context: Context) -> dict[str, AxisTensor]:
    """Return the diagonals of the Fisher information with that of the present task, per label; clear gradients."""
    parameters = context.parameters()
    fisher = {name: widen(torch.zeros_like(p)) for name, p in parameters.items()}
    order = torch.randperm(len(context.task.train), generator=context.generator(Stream.FISHER_EXAMPLES))
    generator = context.generator(Stream.FISHER_LABELS)
    chosen = order[: settings.samples].tolist()
    with evaluation_mode(context.model):
        for i in chosen:
            context.model.zero_grad(set_to_none=True)
            example = context.task.train.take(torch.tensor([i]))
            logits = select_logits(context.logits(example.inputs), example.labels)
            if not len(logits):
                continue  # without a label
            sample_log_likelihood(logits, generator).backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    fisher[name] += widen(parameter.grad).square() / (len(chosen) * len(logits))
    context.model.zero_grad(set_to_none=True)
    result = {}
    for name, value in fisher.items():
        before = factors.get(f"{name} diagonal")
        total = value if before is None else settings.decay * before.values + value
        result[f"{name} diagonal"] = make_tensor(context, name, total)
    return result
