"""Optimizers of a network and of its learner's tensors; their moments follow every plan and are stored."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.axis_tensor import AxisTensor
from regrow.core.plan import Plan
from regrow.surgery.layout import resize_axis_tensor

Moments = Mapping[str, Mapping[str, Any]]
"""Name of a parameter, or ``learner NAME`` of a learner's tensor → its optimizer state, such as momentum."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer of the network: kind, learning rate and weight decay.

    Args:
        kind: ``sgd`` (momentum 0.9, Nesterov) or ``adamw``.
        lr: Learning rate of the network's parameters.
        weight_decay: Weight decay of the network's parameters.
        build: (parameter groups) → an optimizer of the user's own, such as ``functools.partial(torch.optim.Adam,
            lr=1e-3)``, which replaces all of the above.

    Raises:
        ValueError: If a value is out of range.
    """

    kind: str = "sgd"
    lr: float = 0.01
    weight_decay: float = 0.0
    build: Callable[[Any], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("sgd", "adamw"):
            raise ValueError(f"the optimizer is sgd or adamw, got {self.kind!r}")
        if self.lr <= 0:
            raise ValueError(f"the learning rate must be above 0, got {self.lr:g}")


class Optimizers:
    """The optimizer of the network, and that of its learner's tensors if they have their own.

    Args:
        settings: The settings of the network's optimizer.
        learner: ``""``: the network's optimizer trains the learner's tensors too; ``"adam"``: Adam
            with β = (0.5, 0.999) does.
        scheduled: Whether the learning rates of the learner's tensors follow the schedule.
    """

    def __init__(self, settings: OptimizerSettings, learner: str = "", *, scheduled: bool = False) -> None:
        self.scheduled = scheduled
        groups: list[dict[str, Any]] = [{"params": []}]
        decay = settings.weight_decay
        self.network: torch.optim.Optimizer
        if settings.build is not None:
            self.network = settings.build(groups)
        elif settings.kind == "adamw":
            self.network = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=decay)
        else:
            self.network = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=decay)
        self.lr = float(self.network.param_groups[0]["lr"])
        self.all: list[torch.optim.Optimizer] = [self.network]
        if learner == "adam":
            self.all.append(torch.optim.Adam([{"params": []}], betas=(0.5, 0.999)))

    def set_rates(self, share: float) -> None:
        """Set the learning rates that follow the schedule to a fraction of their largest values.

        Args:
            share: The fraction.
        """
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
        """Take one optimizer step for everything that is trained."""
        for optimizer in self.all:
            optimizer.step()

    def collect(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor]) -> None:
        """Register exactly the given tensors for training, and discard the optimizer state of all others.

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
            for group in optimizer.param_groups:
                if group.get("foreach", False) is None and all(one.device.type == "cpu" for one in group["params"]):
                    group["foreach"] = False  # as torch decides for a CPU, but not anew in every step

    def follow(self, old: Mapping[str, AxisTensor], new: Mapping[str, AxisTensor], axes: AxisGraph, plan: Plan) -> None:
        """Resize the optimizer state of the learner's tensors by a plan; surgery does so for the network's parameters.

        Args:
            old: The learner's tensors before the plan.
            new: The learner's tensors after the plan.
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
        """Return the optimizer state of every trained tensor, by name.

        Args:
            parameters: The network's parameters by name.
            tensors: The learner's tensors by name.
        """
        return {
            name: dict(optimizer.state[one])
            for name, one in _trained(parameters, tensors)
            for optimizer in self.all
            if one in optimizer.state
        }

    def restore(
        self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor], moments: Moments
    ) -> None:
        """Set the optimizer state to what :meth:`moments` returned.

        Args:
            parameters: The network's parameters by name.
            tensors: The learner's tensors by name.
            moments: The optimizer state.
        """
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
    """Copy a tensor to the device of the trained tensor; step counts stay on their device."""
    return value.to(trained.device, copy=True) if value.dim() else value.clone()
