"""Synaptic intelligence: each parameter is held by what its own path gave to the loss.

Zenke, Poole, Ganguli, ICML 2017 (arXiv 1703.04200):  w ← w − g · Δθ along the path,  Ω ← Ω + w / (Δ² + ξ) at a task's
end,  loss + c Σ Ω (θ − θ*)².  Where we differ: g is the gradient that moves the network, springs included (the paper's
is that of the task's loss alone), and a path that gave less than nothing makes no spring.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.learner import Learner, Stand, along
from regrow.tasks import Examples

CITATION = "Zenke et al., Continual learning through synaptic intelligence, ICML 2017"


@dataclass(frozen=True)
class Settings:
    """SI's.

    Args:
        strength: c, of the springs.
        damping: ξ, what keeps a short path from counting for much.
    """

    strength: float = 0.1
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.strength < 0 or self.damping <= 0:
            raise ValueError(
                f"strength is at least 0 and damping above 0; got strength={self.strength:g}, damping={self.damping:g}"
            )


def build(settings: Settings) -> "SI":
    """The learner."""
    return SI(settings=settings)


@dataclass
class SI(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    def begin(self, at: Stand) -> None:
        """A new path begins here."""
        for name, parameter in at.parameters().items():
            self.tensors.setdefault(f"weight {name}", along(at, name))
            self.tensors[f"path {name}"] = along(at, name)
            self.tensors[f"anchor {name}"] = along(at, name, parameter.detach().clone())
            self.tensors[f"last {name}"] = along(at, name, parameter.detach().clone())

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """The loss and the springs."""
        loss = super().loss(at, batch)
        if at.number:
            for name, parameter in at.parameters().items():
                away = parameter - self.tensors[f"anchor {name}"].values
                loss = loss + self.settings.strength * (self.tensors[f"weight {name}"].values * away.square()).sum()
        return loss

    def stepped(self, at: Stand) -> None:
        """Add to each parameter's path what its last step gave to the loss."""
        with torch.no_grad():
            for name, parameter in at.parameters().items():
                last = self.tensors[f"last {name}"].values
                if parameter.grad is not None:
                    self.tensors[f"path {name}"].values.addcmul_(parameter.grad, parameter - last, value=-1)
                last.copy_(parameter)

    def end(self, at: Stand) -> None:
        """Turn each path into a spring's strength."""
        with torch.no_grad():
            for name, parameter in at.parameters().items():
                moved = parameter - self.tensors[f"anchor {name}"].values
                gain = self.tensors[f"path {name}"].values / (moved.square() + self.settings.damping)
                self.tensors[f"weight {name}"].values += gain.clamp_min(0)
