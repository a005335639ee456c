"""Controls: plain training, all data kept, and nothing learned after the first task."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.learner import Learner, Stand, norms_stay
from regrow.tasks import Examples

CITATION = "controls"


@dataclass(frozen=True)
class Settings:
    """Which control.

    Args:
        keep: ``nothing``: plain training; ``data``: every batch comes with as many examples of earlier tasks, all of
            which are kept (an upper bound); ``network``: no parameter moves after the first task.
    """

    keep: str = "nothing"

    def __post_init__(self) -> None:
        if self.keep not in ("nothing", "data", "network"):
            raise ValueError(f"keep is nothing, data or network; got {self.keep!r}")


def build(settings: Settings) -> "Control":
    """The learner."""
    return Control(settings=settings)


@dataclass
class Control(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    @property
    def looks_back(self) -> bool:
        """With all data kept, it does."""
        return self.settings.keep == "data"

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """The loss; with all data kept, that of as many earlier examples too, each task as much as another."""
        if self.settings.keep != "data" or not at.past:
            return super().loss(at, batch)
        self.values["step"] = self.values.get("step", 0) + 1
        generator = at.drawn(8, self.values["step"])
        whose = torch.randint(len(at.past), (len(batch),), generator=generator)
        parts = [batch]
        for i, task in enumerate(at.past):
            if many := int((whose == i).sum()):
                picked = torch.randint(len(task.train), (many,), generator=generator)
                parts.append(Examples(task.train.inputs[picked], task.train.labels[picked]))
        inputs, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "labels"))
        logits = at.remembered(inputs, labels)
        weight = [1.0 / len(at.past), 1.0]
        new = F.cross_entropy(logits[: len(batch)], labels[: len(batch)])
        old = F.cross_entropy(logits[len(batch) :], labels[len(batch) :])
        return (weight[0] * new + weight[1] * old) / sum(weight)

    def mode(self, at: Stand) -> None:
        """As usual; with the network kept, norms stay too."""
        super().mode(at)
        if self.settings.keep == "network" and at.number:
            norms_stay(at.model)

    def gate(self, at: Stand) -> None:
        """With the network kept, nothing moves."""
        if self.settings.keep == "network" and at.number:
            for parameter in at.parameters().values():
                parameter.grad = None
