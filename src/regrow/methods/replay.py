"""Replay: a small memory of earlier examples is learned again with every batch.

Chaudhry et al., On tiny episodic memories (arXiv 1902.10486); with ``answers`` above 0 DER++, Buzzega et al., NeurIPS
2020 (arXiv 2004.07211), which also holds the answers that the network gave:  loss + α |z − z_then|² + β CE. The memory
is filled by reservoir sampling, so each example seen is in it with equal chance.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.learner import Along, Learner, Stand
from regrow.tasks import Examples

CITATION = "Chaudhry et al., On tiny episodic memories in continual learning, 2019; Buzzega et al., DER++, NeurIPS 2020"


@dataclass(frozen=True)
class Settings:
    """The memory's.

    Args:
        memory: How many examples it holds.
        answers: DER++'s α, on old answers; 0: plain replay.
        labels: β, on old labels.
    """

    memory: int = 500
    answers: float = 0.0
    labels: float = 1.0


def build(settings: Settings) -> "Replay":
    """The learner."""
    return Replay(settings=settings)


@dataclass
class Replay(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    def begin(self, at: Stand) -> None:
        """An empty memory at the first task."""
        self.values.setdefault("seen", 0)
        self.values.setdefault("step", 0)

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """The loss on the batch, and on as many examples of the memory."""
        logits = at.logits(batch.inputs)
        loss = F.cross_entropy(logits, batch.labels)
        self.values["step"] += 1
        filled = min(self.values["seen"], self.settings.memory)
        if filled and at.number:
            picked = torch.randint(filled, (min(len(batch), filled),), generator=at.drawn(6, self.values["step"]))
            inputs, labels, then = (self.tensors[name].values[picked] for name in ("inputs", "labels", "logits"))
            again = at.logits(inputs)
            loss = loss + self.settings.labels * F.cross_entropy(again, labels)
            if self.settings.answers:
                known = torch.isfinite(then) & torch.isfinite(again)
                away = torch.where(known, again - then, 0.0)
                loss = loss + self.settings.answers * away.square().sum() / known.sum()
        self._remember(at, batch, logits.detach())
        return loss

    def _remember(self, at: Stand, batch: Examples, logits: Tensor) -> None:
        if at.epoch:  # each example is offered once
            return
        if "inputs" not in self.tensors:
            for name, like in (("inputs", batch.inputs), ("labels", batch.labels), ("logits", logits)):
                shape = (self.settings.memory, *like.shape[1:])
                self.tensors[name] = Along(torch.zeros(shape, dtype=like.dtype), shape)
        generator = at.drawn(7, self.values["step"])
        for i in range(len(batch)):
            seen = self.values["seen"]
            place = seen if seen < self.settings.memory else int(torch.randint(seen + 1, (), generator=generator))
            if place < self.settings.memory:
                for name, rows in (("inputs", batch.inputs), ("labels", batch.labels), ("logits", logits)):
                    self.tensors[name].values[place] = rows[i]
            self.values["seen"] = seen + 1
