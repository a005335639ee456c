"""Learning without forgetting (LwF): on new inputs the network is distilled from itself before the task.

Li and Hoiem, ECCV 2016 (arXiv 1606.09282):  loss + λ T² KL(softmax(old / T) ‖ softmax(new / T)), where the old network
is the one before the task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import IGNORED, class_loss, put_classes_last
from regrow.core.sources import logits_in
from regrow.core.tasks import mask_classes, pack_batch, run_network
from regrow.settings.constraints import CheckedSettings, NonNegative, Positive
from regrow.training.hooks import copy_parameters
from regrow.training.learner import Boundary, Context, Event, Learner, Loss, Step, set_train_mode

CITATION = "Li and Hoiem, Learning without forgetting, ECCV 2016"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of learning without forgetting: strength and temperature of the distillation loss.

    Args:
        strength: λ, the weight of the distillation loss.
        temperature: T; a higher one gives classes of low probability more influence.
    """

    strength: NonNegative = 1.0
    temperature: Positive = 2.0


@dataclass(frozen=True)
class LwfState:
    """The state of LwF: the teacher, that is the network before the current task, and the classes seen."""

    old: Mapping[str, AxisTensor] = field(default_factory=dict)  # the teacher's parameters and buffers, by name
    known: list[int] = field(default_factory=list)  # the classes of earlier tasks
    seen: list[int] = field(default_factory=list)  # the classes of all tasks up to the current one


def build(settings: Settings) -> Learner[LwfState]:
    """Return the learner that trains with learning without forgetting."""

    def compute_loss(state: LwfState, context: Context, step: Step) -> Loss:
        logits = logits_in(run_network(context.model, step.batch.inputs))
        loss = class_loss(mask_classes(logits, context.classes), step.batch.labels)
        if not context.number:
            return Loss(loss)
        teacher_logits = _compute_teacher_logits(state, context, step.batch.inputs)
        known = state.known or slice(None)  # tokens have no classes of a task
        labels = step.batch.labels
        new, old = (
            (put_classes_last(x, labels)[..., known] / settings.temperature).log_softmax(-1)
            for x in (logits, teacher_logits)
        )
        counted = labels != IGNORED  # a mask: to select positions would wait for the device
        distance = (F.kl_div(new, old, reduction="none", log_target=True).sum(-1) * counted).sum() / counted.sum()
        return Loss(loss + settings.strength * settings.temperature**2 * distance)

    def keep_teacher(state: LwfState, context: Context, boundary: Boundary) -> LwfState:
        set_train_mode(state, context, boundary)
        if boundary.event != Event.TASK_START:
            return state
        old = copy_parameters(context)
        for name, value in context.model.named_buffers():
            old[name] = AxisTensor(value.clone(), tuple(value.shape))
        return LwfState(old, state.seen, sorted({*state.seen, *context.task.classes}))

    return Learner(LwfState(), loss=compute_loss, boundary=keep_teacher, classes_only=True)


def _compute_teacher_logits(state: LwfState, context: Context, inputs: Any) -> Tensor:
    """Return the logits of the network as it was before the task, ``[N, ..., classes]``, without gradients.

    It runs in eval mode; ``context.model`` keeps its parameters and is left in training mode.
    """
    old = {name: tensor.values for name, tensor in state.old.items()}
    context.model.eval()
    with torch.no_grad():
        batch = pack_batch(inputs)
        logits = logits_in(torch.func.functional_call(context.model, old, tuple(batch.args), dict(batch.kwargs)))
    context.model.train()
    return logits
