"""Training a found network anew: what a search set to 0 stays 0.

As MG-DARTS trains its networks (the authors' code): from scratch, weight masks fixed, pictures moved and mirrored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from regrow.axis_tensor import AxisTensor
from regrow.data.augment import cut_out, shift_and_flip
from regrow.learner import Learner, Stand
from regrow.tasks import Examples

CITATION = "Liu et al., MG-DARTS (arXiv 2310.15074), code"


@dataclass(frozen=True)
class Settings:
    """How.

    Args:
        clip: Most norm of the gradient.
        augment: Whether pictures are moved and mirrored.
        cutout: Side of the square that is cut out of each picture, pixels; 0: none is.
    """

    clip: float = 5.0
    augment: bool = True
    cutout: int = 0


def build(settings: Settings) -> "Retrain":
    """The learner."""
    return Retrain(settings=settings)


@dataclass
class Retrain(Learner):
    """See the module; ``masked`` says which entries stay 0."""

    settings: Settings = field(default_factory=Settings)

    def masked(self, at: Stand, found: Mapping[str, Tensor]) -> None:
        """Keep at 0 what is 0 in the weights of a found network.

        Args:
            at: The network with drawn weights.
            found: The same network's parameters as the search left them.
        """
        for name in at.weights:
            if not bool(found[name].all()):
                self.tensors[f"stays {name}"] = AxisTensor(found[name].detach() != 0, at.axes.shapes[name])

    def standing(self, at: Stand) -> Mapping[str, Tensor]:
        """The weights with their zeros."""
        parameters = at.parameters()
        stays = {name.removeprefix("stays "): one.values for name, one in self.tensors.items()}
        return {name: parameters[name] * here for name, here in stays.items()}

    def answering(self, at: Stand, number: int) -> Mapping[str, Tensor]:
        """The same when it is evaluated."""
        return {name: value.detach() for name, value in self.standing(at).items()}

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """Cross-entropy on moved pictures."""
        inputs = shift_and_flip(batch.inputs) if self.settings.augment else batch.inputs
        return F.cross_entropy(self.asked(at, cut_out(inputs, self.settings.cutout)), batch.labels)

    def gate(self, at: Stand) -> None:
        """Gradients are clipped."""
        nn.utils.clip_grad_norm_(at.parameters().values(), self.settings.clip)
