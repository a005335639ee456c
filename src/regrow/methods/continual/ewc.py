"""Elastic weight consolidation (EWC): a quadratic penalty keeps parameters near their values after the last task.

Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796); the running sum over tasks after Schwarz et al., Progress & Compress
(ICML 2018):  loss + λ/2 Σ F (θ − θ*)²,  F ← γ F + F_task,  F_task = E[(∂ log p(y|x) / ∂θ)²] with y sampled from
the network's own predictions (the true Fisher information, not the squared gradient of a batch).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.protection.factors import sample_log_likelihood
from regrow.settings.constraints import CheckedSettings, Count, Fraction, NonNegative
from regrow.training.hooks import copy_parameters, quadratic_loss
from regrow.training.learner import Boundary, Context, Event, Learner, Loss, Step, Stream, make_tensor, set_train_mode

CITATION = "Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of elastic weight consolidation: penalty strength, decay of older Fisher information, sample count.

    Args:
        strength: λ, the strength of the penalty.
        decay: γ, the factor on the Fisher information of earlier tasks whenever a task's is added, 0 to 1.
        samples: The number of examples, taken one by one, on which a task's Fisher information is estimated.
    """

    strength: NonNegative = 10.0
    decay: Fraction = 1.0
    samples: Count = 200


@dataclass(frozen=True)
class EwcState:
    """What EWC carries from task to task, by parameter name; empty before the end of the first task."""

    # The diagonal of the Fisher information, summed over tasks (with `decay`).
    fisher: Mapping[str, AxisTensor] = field(default_factory=dict)
    anchor: Mapping[str, AxisTensor] = field(default_factory=dict)  # the parameters at the end of the last task


def build(settings: Settings) -> Learner[EwcState]:
    """Return the learner that trains with elastic weight consolidation."""

    def compute_loss(state: EwcState, context: Context, step: Step) -> Loss:
        return quadratic_loss(context, step, settings.strength / 2, state.fisher, state.anchor)

    def consolidate(state: EwcState, context: Context, boundary: Boundary) -> EwcState:
        set_train_mode(state, context, boundary)
        if boundary.event != Event.TASK_END:
            return state
        measured = _measure_fisher(context, settings.samples)
        before = {name: state.fisher.get(name, make_tensor(context, name)).values for name in measured}
        fisher = {name: make_tensor(context, name, settings.decay * before[name] + measured[name]) for name in before}
        return EwcState(fisher, copy_parameters(context))

    return Learner(EwcState(), loss=compute_loss, boundary=consolidate, classes_only=True)


def _measure_fisher(context: Context, samples: int) -> dict[str, Tensor]:
    """Return parameter name → diagonal of the current task's Fisher information, estimated in eval mode.

    ``samples``: the largest number of examples that are drawn. Gradients are cleared; the network's mode is restored.
    """
    was_training, parameters = context.model.training, context.parameters()
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    order = torch.randperm(len(context.task.train), generator=context.generator(Stream.FISHER_EXAMPLES))[:samples]
    generator = context.generator(Stream.FISHER_LABELS)
    context.model.eval()
    for i in order.tolist():
        context.model.zero_grad(set_to_none=True)
        logits = context.logits(context.task.train.take(torch.tensor([i])).inputs)
        sample_log_likelihood(logits, generator).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                fisher[name] += parameter.grad.square() / len(order)
    context.model.zero_grad(set_to_none=True)
    context.model.train(was_training)
    return fisher
