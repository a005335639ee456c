"""Replay: a small memory of earlier examples is learned again with every batch.

Chaudhry et al., On tiny episodic memories (arXiv 1902.10486); with ``answers`` above 0 DER++, Buzzega et al., NeurIPS
2020 (arXiv 2004.07211), which also holds the answers that the network gave:  loss + α |z − z_then|² + β CE; with
``own`` ER-ACE, Caccia et al., ICLR 2022 (arXiv 2104.05025), where new classes push old ones down through the memory
alone. The memory is filled by reservoir sampling, so each example seen is in it with equal chance: once, in the first
epoch of its task; for DER++ in every epoch, as its authors do, so that answers of a network that has learned are held.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from regrow.axis_tensor import AxisTensor
from regrow.tasks import among
from regrow.training import reservoir
from regrow.training.learner import Context, Learner, Loss, Step

CITATION = "Chaudhry et al., On tiny episodic memories in continual learning, 2019; Buzzega et al., DER++, NeurIPS 2020"


@dataclass(frozen=True)
class Settings:
    """The memory's.

    Args:
        memory: How many examples it holds.
        answers: DER++'s α, on old answers; 0: plain replay.
        labels: β, on old labels.
        own: Examples at hand are told apart among the classes of their task only (ER-ACE).
    """

    memory: int = 500
    answers: float = 0.0
    labels: float = 1.0
    own: bool = False

    def __post_init__(self) -> None:
        if self.memory < 1 or self.answers < 0 or self.labels < 0:
            raise ValueError(
                "memory is at least 1, answers and labels are at least 0; got "
                f"memory={self.memory}, answers={self.answers:g}, labels={self.labels:g}"
            )


@dataclass(frozen=True)
class ReplayState:
    """The memory: inputs, labels and logits of examples, and how many were offered and how often it was read."""

    inputs: AxisTensor | None = None
    labels: AxisTensor | None = None
    logits: AxisTensor | None = None
    seen: int = 0
    recalled: int = 0


def build(settings: Settings) -> Learner[ReplayState]:
    """The learner."""

    def compute_loss(state: ReplayState, context: Context, step: Step) -> Loss:
        batch = step.batch
        logits = context.logits(batch.inputs)
        loss = F.cross_entropy(among(logits, context.task_classes) if settings.own else logits, batch.labels)
        rows = reservoir.draw(_memory(state), context, settings.memory, len(batch))
        if rows:
            again = context.replay_logits(rows["inputs"], rows["labels"])
            loss = loss + settings.labels * F.cross_entropy(again, rows["labels"])
            if settings.answers:
                known = torch.isfinite(rows["logits"]) & torch.isfinite(again)
                away = torch.where(known, again - rows["logits"], 0.0)
                loss = loss + settings.answers * away.square().sum() / known.sum()
        return Loss(loss, (logits.detach().float(), bool(rows)))

    def remember(state: ReplayState, context: Context, step: Step) -> ReplayState:
        logits, read = step.aux
        memory = _memory(state)
        if read:
            memory = replace(memory, recalled=memory.recalled + 1)
        if settings.answers or not context.epoch:
            rows = {"inputs": step.batch.inputs, "labels": step.batch.labels, "logits": logits}
            memory = reservoir.offer(memory, context, settings.memory, rows)
        return ReplayState(**memory.rows, seen=memory.seen, recalled=memory.recalled)

    return Learner(ReplayState(), loss=compute_loss, after_step=remember)


def _memory(state: ReplayState) -> reservoir.Reservoir:
    rows = {"inputs": state.inputs, "labels": state.labels, "logits": state.logits}
    filled = {name: one for name, one in rows.items() if one is not None}
    return reservoir.Reservoir(filled, state.seen, state.recalled)
