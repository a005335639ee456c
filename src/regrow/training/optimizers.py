"""Optimizers of a network and of what its learner trains beside it; their memory follows every plan and is stored."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.axes import AxisGraph
from regrow.axis_tensor import AxisTensor
from regrow.plan import Plan
from regrow.surgery.parametrize import resize_axis_tensor

Moments = Mapping[str, Mapping[str, Any]]
"""Name of a parameter, or ``learner NAME`` of a learner's tensor → what the optimizer remembers of it."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer trains the network.

    Args:
        kind: ``sgd`` (momentum 0.9, Nesterov) or ``adamw``.
        lr: Learning rate of the network's parameters.
        weight_decay: Of the network's parameters.

    Raises:
        ValueError: If a value is out of range.
    """

    kind: str = "sgd"
    lr: float = 0.01
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("sgd", "adamw"):
            raise ValueError(f"the optimizer is sgd or adamw, got {self.kind!r}")
        if self.lr <= 0:
            raise ValueError(f"the learning rate must be above 0, got {self.lr:g}")


class Optimizers:
    """One optimizer for the network, and one for the tensors of its learner if these have their own.

    Args:
        settings: Of the network's optimizer.
        learner: ``""``: the network's optimizer trains the learner's tensors too; ``"adam"``: Adam
            with β = (0.5, 0.999) does.
        scheduled: Whether the learning rates of the learner's tensors follow the schedule.
    """

    def __init__(self, settings: OptimizerSettings, learner: str = "", *, scheduled: bool = False) -> None:
        self.lr, self.scheduled = settings.lr, scheduled
        groups: list[dict[str, Any]] = [{"params": []}]
        decay = settings.weight_decay
        self.network: torch.optim.Optimizer
        if settings.kind == "adamw":
            self.network = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=decay)
        else:
            self.network = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=decay)
        self.all: list[torch.optim.Optimizer] = [self.network]
        if learner == "adam":
            self.all.append(torch.optim.Adam([{"params": []}], betas=(0.5, 0.999)))

    def set_rates(self, share: float) -> None:
        """Set the learning rates of what follows the schedule to a share of their largest values."""
        self.network.param_groups[0]["lr"] = self.lr * share
        if self.scheduled:
            for group in self.all[-1].param_groups:
                if "largest_lr" in group:
                    group["lr"] = group["largest_lr"] * share

    def clear_gradients(self) -> None:
        """Remove all gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Change everything that is trained, by its gradient."""
        for optimizer in self.all:
            optimizer.step()

    def collect(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor]) -> None:
        """Train exactly what is there now; forget the memory of what is not there any more.

        Args:
            parameters: The network's parameters by name; those without ``requires_grad`` are not trained.
            tensors: The learner's tensors by name; those without a learning rate are not trained.
        """
        self.network.param_groups[0]["params"] = [p for p in parameters.values() if p.requires_grad]
        by_rate: dict[float, list[Tensor]] = {}
        for one in tensors.values():
            if one.lr is not None:
                one.values.requires_grad_()
                by_rate.setdefault(one.lr, []).append(one.values)
        own = self.all[-1]
        del own.param_groups[1 if own is self.network else 0 :]
        for rate, values in by_rate.items():
            own.add_param_group({"params": values, "lr": rate, "largest_lr": rate, "weight_decay": 0.0})
        known = {id(p) for optimizer in self.all for group in optimizer.param_groups for p in group["params"]}
        for optimizer in self.all:
            for lost in [one for one in optimizer.state if id(one) not in known]:
                del optimizer.state[lost]

    def follow(self, old: Mapping[str, AxisTensor], new: Mapping[str, AxisTensor], axes: AxisGraph, plan: Plan) -> None:
        """Let the memory of the learner's tensors follow a plan; that of the network's parameters follows in surgery.

        Args:
            old: The learner's tensors before the plan.
            new: The same after it.
            axes: The axes before the plan.
            plan: The plan.
        """
        for name, one in old.items():
            if one.lr is None:
                continue
            for optimizer in self.all:
                if memory := optimizer.state.pop(one.values, {}):
                    optimizer.state[new[name].values] = {
                        what: resize_axis_tensor(AxisTensor(value, one.dims), axes, plan).values
                        if isinstance(value, Tensor) and value.dim()
                        else value
                        for what, value in memory.items()
                    }

    def moments(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor]) -> Moments:
        """What the optimizers remember, by name."""
        return {
            name: dict(optimizer.state[one])
            for name, one in _trained(parameters, tensors)
            for optimizer in self.all
            if one in optimizer.state
        }

    def restore(
        self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor], moments: Moments
    ) -> None:
        """Set what the optimizers remember, as :meth:`moments` gave it."""
        for name, one in _trained(parameters, tensors):
            if name in moments:
                optimizer = self.all[-1] if name.startswith("learner ") else self.network
                optimizer.state[one] = {
                    what: _copied(value, one) if isinstance(value, Tensor) else value
                    for what, value in moments[name].items()
                }


def _trained(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor]) -> Iterator[tuple[str, Tensor]]:
    yield from parameters.items()
    for name, one in tensors.items():
        if one.lr is not None:
            yield f"learner {name}", one.values


def _copied(value: Tensor, trained: Tensor) -> Tensor:
    """A copy on the device of what is trained; numbers of steps stay where they are."""
    return value.to(trained.device, copy=True) if value.dim() else value.clone()
