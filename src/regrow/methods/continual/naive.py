"""Controls for continual learning: plain fine-tuning, joint training on all data, and a frozen network."""

from dataclasses import dataclass
from typing import Annotated

import torch

from regrow.core.objectives import class_loss
from regrow.core.tasks import Examples
from regrow.data.datasets import join_examples
from regrow.settings.constraints import CheckedSettings, OneOf
from regrow.training.hooks import train_with_frozen_norms
from regrow.training.learner import Context, Learner, Loss, Step, Stream, set_train_mode, task_loss

CITATION = "controls"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of the controls: which one is run.

    Args:
        keep: ``nothing``: plain fine-tuning; ``data``: every batch comes with as many examples of earlier tasks, of
            which all are stored (no upper bound for small networks or short training); ``network``: no parameter
            changes after the first task.
    """

    keep: Annotated[str, OneOf("nothing", "data", "network")] = "nothing"


@dataclass(frozen=True)
class NaiveState:
    """The state of the controls: a counter that seeds the draws of ``keep=data``."""

    step: int = 0  # the number of steps in which examples of earlier tasks were drawn; it seeds the next draw


def build(settings: Settings) -> Learner[NaiveState]:
    """Return the learner of the chosen control."""

    def compute_loss(state: NaiveState, context: Context, step: Step) -> Loss:
        if settings.keep != "data" or not context.past:
            return task_loss(state, context, step)
        return _joint_loss(state, context, step.batch)

    def count_step(state: NaiveState, context: Context, step: Step) -> NaiveState:
        return NaiveState(state.step + 1) if settings.keep == "data" and context.past else state

    def freeze(state: NaiveState, context: Context, step: Step) -> NaiveState:
        if settings.keep == "network" and context.number:
            for parameter in context.parameters().values():
                parameter.grad = None
        return state

    return Learner(
        NaiveState(),
        loss=compute_loss,
        project=freeze,
        after_step=count_step,
        boundary=train_with_frozen_norms if settings.keep == "network" else set_train_mode,
        trains_on_past=settings.keep == "data",
        classes_only=settings.keep == "data",
        uses_axes=False,
    )


def _joint_loss(state: NaiveState, context: Context, batch: Examples) -> Loss:
    """Return the loss on a batch and on as many random examples of earlier tasks; every task has the same weight."""
    past = context.past
    generator = context.generator(Stream.PAST_TASKS, state.step + 1)
    task_indices = torch.randint(len(past), (len(batch),), generator=generator)  # of each drawn example
    parts = [batch]
    for i, task in enumerate(past):
        if count := int((task_indices == i).sum()):
            indices = torch.randint(len(task.train), (count,), generator=generator)
            parts.append(task.train.take(indices).to(batch.labels.device))
    joint = join_examples(parts)
    logits, labels = context.replay_logits(joint.inputs, joint.labels), joint.labels
    weight = 1 / len(past)  # of the current task relative to all earlier ones
    new = class_loss(logits[: len(batch)], labels[: len(batch)])
    old = class_loss(logits[len(batch) :], labels[len(batch) :])
    return Loss((weight * new + old) / (weight + 1))
