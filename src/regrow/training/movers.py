"""What moves a network and what its learner learns: optimisers, which go along when shapes change and are stored."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from regrow.axes import AxisGraph
from regrow.axis_tensor import AxisTensor
from regrow.learner import Learner, Stand
from regrow.plan import Plan
from regrow.surgery.parametrize import resize_axis_tensor


class Movers:
    """One optimiser for the network, in its first group; the learner's own tensors behind it, or in another of theirs.

    Args:
        at: Where the network stands.
        learner: Whose tensors learn too.
        optimizer: ``sgd`` (momentum 0.9, Nesterov) or ``adamw``.
        lr: Learning rate of the network's parameters.
        weight_decay: Of the network's parameters.
    """

    def __init__(self, at: Stand, learner: Learner, optimizer: str, lr: float, weight_decay: float) -> None:
        groups: list[dict[str, Any]] = [{"params": []}]
        self.network: torch.optim.Optimizer
        if optimizer == "adamw":
            self.network = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
        else:
            self.network = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
        self.optimizers: list[torch.optim.Optimizer] = [self.network]
        if learner.optimizer == "adam":
            self.optimizers.append(torch.optim.Adam([{"params": []}], betas=(0.5, 0.999)))
        self.join(at, learner)

    def rate(self, lr: float) -> None:
        """The network's parameters move at another rate from now on."""
        self.network.param_groups[0]["lr"] = lr

    def clear(self) -> None:
        """No gradients any more."""
        for mover in self.optimizers:
            mover.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Everything moves by its gradient."""
        for mover in self.optimizers:
            mover.step()

    def join(self, at: Stand, learner: Learner) -> None:
        """Every parameter that is there now, and every tensor that learns, in exactly one group; nothing else."""
        self.network.param_groups[0]["params"] = [p for p in at.parameters().values() if p.requires_grad]
        by_rate: dict[float, list[Tensor]] = {}
        for one in learner.tensors.values():
            if one.lr is not None:
                one.values.requires_grad_()
                by_rate.setdefault(one.lr, []).append(one.values)
        own = self.optimizers[-1]
        del own.param_groups[1 if own is self.network else 0 :]
        for rate, tensors in by_rate.items():
            own.add_param_group({"params": tensors, "lr": rate, "weight_decay": 0.0})
        known = {id(p) for mover in self.optimizers for group in mover.param_groups for p in group["params"]}
        for mover in self.optimizers:
            for lost in [moved for moved in mover.state if id(moved) not in known]:
                del mover.state[lost]

    def exchange(self, old: Tensor, new: AxisTensor, axes: AxisGraph, plan: Plan) -> None:
        """A learned tensor of the learner's has another shape: what moved the old one moves the new one on."""
        for mover in self.optimizers:
            if memory := mover.state.pop(old, {}):
                mover.state[new.values] = {
                    what: resize_axis_tensor(AxisTensor(value, new.dims), axes, plan).values
                    if isinstance(value, Tensor) and value.dim()
                    else value
                    for what, value in memory.items()
                }

    def moments(self, at: Stand, learner: Learner) -> dict[str, dict[str, Any]]:
        """What the optimisers remember: name → what → tensor."""
        return {
            name: dict(mover.state[one])
            for name, one in _learned(at, learner)
            for mover in self.optimizers
            if one in mover.state
        }

    def recall(self, at: Stand, learner: Learner, moments: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember what others of before remembered."""
        for name, one in _learned(at, learner):
            if name in moments:
                mover = self.optimizers[-1] if name.startswith("learner ") else self.network
                mover.state[one] = {
                    what: value.clone() if isinstance(value, Tensor) else value for what, value in moments[name].items()
                }


def _learned(at: Stand, learner: Learner) -> Iterator[tuple[str, Tensor]]:
    yield from at.parameters().items()
    for name, one in learner.tensors.items():
        if one.lr is not None:
            yield f"learner {name}", one.values
