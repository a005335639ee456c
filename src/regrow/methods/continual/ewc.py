"""Elastic weight consolidation: what mattered to earlier tasks is held by springs.

Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796); the running sum over tasks after Schwarz et al., Progress & Compress
(ICML 2018):  loss + λ/2 Σ F (θ − θ*)²,  F ← γ F + F_task,  F_task = E[(∂ log p(y|x) / ∂θ)²] with y drawn from the
network's own answers (the true Fisher, not the squared gradient of a batch).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.learner import Learner, Stand, along
from regrow.tasks import Examples

CITATION = "Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017"


@dataclass(frozen=True)
class Settings:
    """EWC's.

    Args:
        strength: λ, of the springs.
        decay: γ, how much of earlier tasks' Fisher stays.
        samples: Examples that the Fisher is measured on, one by one.
    """

    strength: float = 10.0
    decay: float = 1.0
    samples: int = 200

    def __post_init__(self) -> None:
        if self.strength < 0 or not 0 <= self.decay <= 1 or self.samples < 1:
            raise ValueError(
                "strength is at least 0, decay from 0 to 1, samples at least 1; got "
                f"strength={self.strength:g}, decay={self.decay:g}, samples={self.samples}"
            )


def build(settings: Settings) -> "EWC":
    """The learner."""
    return EWC(settings=settings)


@dataclass
class EWC(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """The loss and the springs."""
        loss = super().loss(at, batch)
        if at.number:
            for name, parameter in at.parameters().items():
                away = parameter - self.tensors[f"anchor {name}"].values
                loss = loss + self.settings.strength / 2 * (self.tensors[f"fisher {name}"].values * away.square()).sum()
        return loss

    def end(self, at: Stand) -> None:
        """Measure the task's Fisher, and hold on to where the parameters are now."""
        was, parameters = at.model.training, at.parameters()
        found = {name: torch.zeros_like(p) for name, p in parameters.items()}
        order = torch.randperm(len(at.task.train), generator=at.drawn(4))[: self.settings.samples]
        generator = at.drawn(5)
        at.model.eval()
        for i in order.tolist():
            at.model.zero_grad(set_to_none=True)
            chances = at.logits(at.task.train.inputs[i : i + 1]).log_softmax(-1)[0]
            drawn = int(torch.multinomial(chances.detach().exp().cpu(), 1, generator=generator))
            chances[drawn].backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    found[name] += parameter.grad.square() / len(order)
        at.model.zero_grad(set_to_none=True)
        at.model.train(was)
        for name, parameter in parameters.items():
            fisher = self.tensors.get(f"fisher {name}", along(at, name)).values
            self.tensors[f"fisher {name}"] = along(at, name, self.settings.decay * fisher + found[name])
            self.tensors[f"anchor {name}"] = along(at, name, parameter.detach().clone())
