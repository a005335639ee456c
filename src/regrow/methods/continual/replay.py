"""Experience replay (ER, DER++, ER-ACE): every batch comes with examples from a small memory of earlier ones.

Chaudhry et al., On tiny episodic memories (arXiv 1902.10486); with ``logit_weight`` above 0 DER++, Buzzega et al.,
NeurIPS 2020 (arXiv 2004.07211), which also stores the logits at that time:  loss + α |z − z_then|² + β CE; with
``asymmetric_loss`` ER-ACE, Caccia et al., ICLR 2022 (arXiv 2104.05025), where the logits of old classes are lowered by
the memory's loss alone. ER and DER++ replay from the first task on, as their authors' code does: else DER++ remembers
logits that still change fast. The memory is filled by reservoir sampling, so each example is in it with equal
probability: in the first epoch of a task; for DER++ in every epoch, as its authors do, so that it holds logits of a
network that has learned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import class_loss
from regrow.core.tasks import mask_classes
from regrow.settings.constraints import CheckedSettings, Count, NonNegative
from regrow.training.hooks import add_to_replay_memory, draw_from_replay_memory, inputs_of, name_inputs
from regrow.training.learner import Context, Learner, Loss, Step

CITATION = "Chaudhry et al., On tiny episodic memories in continual learning, 2019; Buzzega et al., DER++, NeurIPS 2020"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of experience replay: memory size, and the weights of the losses on replayed examples.

    Args:
        memory: The number of examples that the memory holds.
        logit_weight: DER++'s α, the weight of the squared difference from the stored logits; 0: plain replay.
        label_weight: β, the weight of the cross-entropy on replayed labels.
        asymmetric_loss: Whether the loss on the current batch is computed over the classes of its task only (ER-ACE).
    """

    memory: Count = 500
    logit_weight: NonNegative = 0.0
    label_weight: NonNegative = 1.0
    asymmetric_loss: bool = False


@dataclass(frozen=True)
class ReplayState:
    """The replay memory, and counters for its sampling."""

    # Its tensors by name, `[examples, ...]`: inputs, labels, and the network's logits when they were stored
    rows: Mapping[str, AxisTensor] = field(default_factory=dict)
    seen: int = 0  # the number of examples offered to the memory
    recalled: int = 0  # the number of times that examples were drawn from it


def build(settings: Settings) -> Learner[ReplayState]:
    """Return the learner that trains with experience replay."""

    def compute_loss(state: ReplayState, context: Context, step: Step) -> Loss:
        batch = step.batch
        if settings.asymmetric_loss and context.classes is None:
            raise ValueError("asymmetric_loss=true is of tasks with classes of their own: take --scenario class")
        logits = context.logits(batch.inputs)
        task_logits = mask_classes(logits, context.task_classes) if settings.asymmetric_loss else logits
        loss = class_loss(task_logits, batch.labels)
        n = 0 if settings.asymmetric_loss and not context.number else len(batch)  # ER-ACE: from the second task on
        rows = draw_from_replay_memory(state.rows, state.seen, state.recalled, context, settings.memory, n)
        if rows:
            replayed = context.replay_logits(inputs_of(rows), rows["labels"])
            loss = loss + settings.label_weight * class_loss(replayed, rows["labels"])
            if settings.logit_weight:
                # −∞: classes that were, or are, not among those to predict
                finite = torch.isfinite(rows["logits"]) & torch.isfinite(replayed)
                change = torch.where(finite, replayed - rows["logits"], 0.0)
                loss = loss + settings.logit_weight * change.square().sum() / finite.sum()
        return Loss(loss, (logits.detach().float(), bool(rows)))

    def fill_memory(state: ReplayState, context: Context, step: Step) -> ReplayState:
        batch, (logits, has_drawn) = step.batch, step.aux
        state = replace(state, recalled=state.recalled + has_drawn)
        if context.epoch and not settings.logit_weight:
            return state
        rows = {**name_inputs(batch.inputs), "labels": batch.labels}
        if settings.logit_weight:
            rows["logits"] = logits
        memory = add_to_replay_memory(state.rows, state.seen, context, settings.memory, rows)
        return replace(state, rows=memory, seen=state.seen + len(batch))

    return Learner(ReplayState(), loss=compute_loss, after_step=fill_memory, classes_only=True)
