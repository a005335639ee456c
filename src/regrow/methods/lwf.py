"""Learning without forgetting: on new inputs the network goes on answering as it did.

Li and Hoiem, ECCV 2016 (arXiv 1606.09282):  loss + λ T² KL(softmax(old / T) ‖ softmax(new / T)), where the old network
is the one before the task.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.learner import Learner, Stand, along
from regrow.surgery.stand_in import standing_in
from regrow.tasks import Examples

CITATION = "Li and Hoiem, Learning without forgetting, ECCV 2016"


@dataclass(frozen=True)
class Settings:
    """LwF's.

    Args:
        strength: λ, of the old answers.
        temperature: T, how much small answers count.
    """

    strength: float = 1.0
    temperature: float = 2.0


def build(settings: Settings) -> "LwF":
    """The learner."""
    return LwF(settings=settings)


@dataclass
class LwF(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    def begin(self, at: Stand) -> None:
        """Keep the network as it is; it is the teacher."""
        for name, parameter in at.parameters().items():
            self.tensors[f"old {name}"] = along(at, name, parameter.detach().clone())
        self.values["known"] = self.values.get("seen", [])
        self.values["seen"] = sorted({*self.values["known"], *at.task.classes})

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """The loss, and how far the answers are from the old ones on the same inputs."""
        loss = super().loss(at, batch)
        if not at.number:
            return loss
        old = {name: self.tensors[f"old {name}"].values for name in at.parameters()}
        with torch.no_grad(), standing_in(at.model, old):
            before = at.logits(batch.inputs)[:, self.values["known"]] / self.settings.temperature
        now = at.logits(batch.inputs)[:, self.values["known"]] / self.settings.temperature
        distance = F.kl_div(now.log_softmax(-1), before.log_softmax(-1), reduction="batchmean", log_target=True)
        return loss + self.settings.strength * self.settings.temperature**2 * distance
