"""Learning without forgetting: on new inputs the network goes on answering as it did.

Li and Hoiem, ECCV 2016 (arXiv 1606.09282):  loss + λ T² KL(softmax(old / T) ‖ softmax(new / T)), where the old network
is the one before the task.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.axis_tensor import AxisTensor
from regrow.learner import Learner, Stand, along
from regrow.sources import logits_in
from regrow.tasks import Examples, among

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

    def __post_init__(self) -> None:
        if self.strength < 0 or self.temperature <= 0:
            raise ValueError(
                "strength is at least 0 and temperature above 0; got "
                f"strength={self.strength:g}, temperature={self.temperature:g}"
            )


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
        for name, value in at.model.named_buffers():
            self.tensors[f"old {name}"] = AxisTensor(value.clone(), tuple(value.shape))
        self.values["known"] = self.values.get("seen", [])
        self.values["seen"] = sorted({*self.values["known"], *at.task.classes})

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """The loss, and how far the answers are from the old ones on the same inputs."""
        logits = logits_in(at.model(batch.inputs))
        loss = F.cross_entropy(among(logits, at.classes), batch.labels)
        if not at.number:
            return loss
        now, before = (x[:, self.values["known"]] / self.settings.temperature for x in (logits, self._then(at, batch)))
        distance = F.kl_div(now.log_softmax(-1), before.log_softmax(-1), reduction="batchmean", log_target=True)
        return loss + self.settings.strength * self.settings.temperature**2 * distance

    def _then(self, at: Stand, batch: Examples) -> Tensor:
        """What the network before the task would answer."""
        old = {name[4:]: one.values for name, one in self.tensors.items() if name.startswith("old ")}
        at.model.eval()
        with torch.no_grad():
            found = logits_in(torch.func.functional_call(at.model, old, (batch.inputs,)))
        at.model.train()
        return found
