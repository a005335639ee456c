"""Replay: a small memory of earlier examples is learned again with every batch.

Chaudhry et al., On tiny episodic memories (arXiv 1902.10486); with ``answers`` above 0 DER++, Buzzega et al., NeurIPS
2020 (arXiv 2004.07211), which also holds the answers that the network gave:  loss + α |z − z_then|² + β CE; with
``own`` ER-ACE, Caccia et al., ICLR 2022 (arXiv 2104.05025), where new classes push old ones down through the memory
alone. The memory is filled by reservoir sampling, so each example seen is in it with equal chance: once, in the first
epoch of its task; for DER++ in every epoch, as its authors do, so that answers of a network that has learned are held.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.data import reservoir
from regrow.learner import Learner, Stand
from regrow.tasks import Examples, among

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


def build(settings: Settings) -> "Replay":
    """The learner."""
    return Replay(settings=settings)


@dataclass
class Replay(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """The loss on the batch, and on as many examples of the memory."""
        size, logits = self.settings.memory, at.logits(batch.inputs)
        loss = F.cross_entropy(among(logits, at.own) if self.settings.own else logits, batch.labels)
        if held := reservoir.recall(self, at, size, len(batch), "inputs", "labels", "logits"):
            inputs, labels, then = held
            again = at.remembered(inputs, labels)
            loss = loss + self.settings.labels * F.cross_entropy(again, labels)
            if self.settings.answers:
                known = torch.isfinite(then) & torch.isfinite(again)
                away = torch.where(known, again - then, 0.0)
                loss = loss + self.settings.answers * away.square().sum() / known.sum()
        if self.settings.answers or not at.epoch:
            reservoir.offer(self, at, size, inputs=batch.inputs, labels=batch.labels, logits=logits.detach().float())
        return loss
