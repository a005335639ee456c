"""PackNet: each task gets what the earlier ones gave back, and is evaluated with its own weights if it is named.

Mallya and Lazebnik, CVPR 2018 (arXiv 1711.05769; read in the authors' code): half-way through a task the ``prune``
share of its weights with the least |w| is given back, and the others are trained on; biases and norms stay after the
first task. With the task named, task k is answered with the weights of tasks up to k; without, with all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrow.axis_tensor import AxisTensor
from regrow.learner import Learner, Stand, norms_stay
from regrow.plan import Plan

CITATION = "Mallya and Lazebnik, PackNet, CVPR 2018"


@dataclass(frozen=True)
class Settings:
    """PackNet's.

    Args:
        prune: The share of a task's weights that it gives back.
        named: Whether a task is named when it is evaluated.
    """

    prune: float = 0.5
    named: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune is a share, from 0 to below 1; got {self.prune:g}")


def build(settings: Settings) -> "PackNet":
    """The learner."""
    return PackNet(settings=settings)


@dataclass
class PackNet(Learner):
    """See the module; ``owner`` is the number of the task that has a weight, from 1, or 0."""

    settings: Settings = field(default_factory=Settings)
    values_then: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def begin(self, at: Stand) -> None:
        """All that no task owns is free."""
        for name in at.weights:
            shape = at.parameters()[name].shape
            self.tensors.setdefault(
                f"owner {name}", AxisTensor(torch.zeros(shape, dtype=torch.int32), at.axes.shapes[name])
            )
        self.values["pruned"] = False

    def plan(self, at: Stand) -> Plan | None:
        """Half-way through, what has grown least is given back; the shape stays."""
        if at.epoch == (at.epochs + 1) // 2 and not self.values["pruned"]:
            self._take(at)
        return None

    def mode(self, at: Stand) -> None:
        """As usual; norms stay in later tasks."""
        super().mode(at)
        if at.number:
            norms_stay(at.model)

    def gate(self, at: Stand) -> None:
        """Only what is the task's own moves."""
        for name, parameter in at.parameters().items():
            if parameter.grad is None:
                continue
            if f"owner {name}" in self.tensors:
                parameter.grad.masked_fill_(~self._mine(at, name), 0.0)
            elif at.number:
                parameter.grad = None
        self.values_then = {name: at.parameters()[name].detach().clone() for name in at.weights}

    def stepped(self, at: Stand) -> None:
        """Put back what momentum and decay moved."""
        with torch.no_grad():
            for name, value in self.values_then.items():
                parameter = at.parameters()[name]
                torch.where(self._mine(at, name), parameter, value, out=parameter)

    def end(self, at: Stand) -> None:
        """Give back now, if the task was too short to do it before."""
        if not self.values["pruned"]:
            self._take(at)

    def answering(self, at: Stand, number: int) -> Mapping[str, Tensor]:
        """With the task named: the weights of tasks up to it."""
        if not self.settings.named or number > at.number or not self.tensors:
            return {}
        owners = {name.removeprefix("owner "): one.values for name, one in self.tensors.items()}
        parameters = dict(at.model.named_parameters())
        return {name: parameters[name].detach() * ((o > 0) & (o <= number + 1)) for name, o in owners.items()}

    def _mine(self, at: Stand, name: str) -> Tensor:
        owner = self.tensors[f"owner {name}"].values
        return owner == at.number + 1 if self.values["pruned"] else owner == 0

    def _take(self, at: Stand) -> None:
        """Own the largest of the free weights; the others are 0 and free."""
        with torch.no_grad():
            for name in at.weights:
                weight, owner = at.parameters()[name], self.tensors[f"owner {name}"].values
                free = owner == 0
                many = int(free.sum())
                if many:
                    least = weight[free].abs().kthvalue(max(1, round(self.settings.prune * many))).values
                    gone = free & (weight.abs() <= least)
                    owner[free & ~gone] = at.number + 1
                    weight.masked_fill_(gone, 0.0)
        self.values["pruned"] = True
