"""Winning subnetworks: each task learns which weights it uses; those of earlier tasks are shared and stay as they are.

Kang et al., ICML 2022 (read in the authors' code): every weight has a score, a task uses the ``share`` of a layer with
the largest, the gradient passes straight through to the scores, and weights that a task used never move again. With the
task named it is answered with its own mask; without, with what any task used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.axis_tensor import AxisTensor
from regrow.learner import Learner, Stand, flags, norms_stay

CITATION = "Kang et al., Forget-free continual learning with winning subnetworks, ICML 2022"


@dataclass(frozen=True)
class Settings:
    """WSN's.

    Args:
        share: The share of each layer's weights that a task uses.
        named: Whether a task is named when it is evaluated.
        lr: Learning rate of the scores.
        seed: Of the first scores.
    """

    share: float = 0.5
    named: bool = False
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is above 0 and at most 1; got {self.share:g}")


def build(settings: Settings) -> "WSN":
    """The learner."""
    return WSN(settings=settings)


@dataclass
class WSN(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)
    still: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The weights as they were when the task began, or a run was taken up again."""

    def begin(self, at: Stand) -> None:
        """Draw the scores, at the first task."""
        self.still.clear()
        if at.number:
            return
        generator = torch.Generator().manual_seed(self.settings.seed)
        for name in at.weights:
            shape = at.parameters()[name].shape
            scores = torch.randn(shape, generator=generator) * at.parameters()[name].detach().std()
            self.tensors[f"score {name}"] = AxisTensor(scores, at.axes.shapes[name], self.settings.lr)
            self.tensors[f"used {name}"] = flags(at, name)

    def standing(self, at: Stand) -> Mapping[str, Tensor]:
        """Weights with the largest scores; the others are 0."""
        return {
            name: at.parameters()[name] * _Most.apply(self.tensors[f"score {name}"].values, self.settings.share)
            for name in at.weights
        }

    def mode(self, at: Stand) -> None:
        """As usual; norms stay in later tasks."""
        super().mode(at)
        if at.number:
            norms_stay(at.model)

    def gate(self, at: Stand) -> None:
        """Weights that a task used stay."""
        if at.number and not self.still:
            self.still = {name: at.parameters()[name].detach().clone() for name in at.weights}
        for name, parameter in at.parameters().items():
            if f"used {name}" not in self.tensors:
                parameter.grad = None if at.number else parameter.grad
            elif parameter.grad is not None:
                parameter.grad.masked_fill_(self.tensors[f"used {name}"].values, 0.0)

    def stepped(self, at: Stand) -> None:
        """Put back what momentum and decay moved."""
        with torch.no_grad():
            for name, value in self.still.items():
                parameter = at.parameters()[name]
                torch.where(self.tensors[f"used {name}"].values, value, parameter, out=parameter)

    def end(self, at: Stand) -> None:
        """Keep the task's mask, and note what it used."""
        for name in at.weights:
            mask = _most(self.tensors[f"score {name}"].values.detach(), self.settings.share)
            self.tensors[f"mask {at.number} {name}"] = AxisTensor(mask, at.axes.shapes[name])
            self.tensors[f"used {name}"].values |= mask

    def answering(self, at: Stand, number: int) -> Mapping[str, Tensor]:
        """With the task named its own mask; without, what any task used."""
        word = f"mask {number} " if self.settings.named and number <= at.number else "used "
        masks = {n.removeprefix(word): one.values for n, one in self.tensors.items() if n.startswith(word)}
        parameters = dict(at.model.named_parameters())
        return {name: parameters[name].detach() * mask for name, mask in masks.items()}


def _most(scores: Tensor, share: float) -> Tensor:
    """Where the ``share`` of the scores with the largest size lies, bool."""
    size = scores.abs()
    return size >= size.flatten().kthvalue(max(1, round((1 - share) * size.numel()))).values


class _Most(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, share: float) -> Tensor:
        return _most(scores, share).to(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None
