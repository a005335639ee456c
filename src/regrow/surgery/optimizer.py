"""Optimisers follow a change of shape: new parameters replace the old ones, and moments are cut and widened."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.core.plan import PlanError
from regrow.surgery.layout import Layout, resize_moment

FIRST = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
"""Names of first moments in optimiser state: new entries get 0."""

SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"})
"""Names of second moments in optimiser state: new entries get the mean of the kept ones."""


@dataclass(frozen=True)
class Exchange:
    """A parameter that a plan replaces or removes.

    Args:
        name: Its name.
        old: The parameter before the plan.
        lays: Dimension → the layout of its entries after the plan.
    """

    name: str
    old: nn.Parameter
    lays: Mapping[int, Layout]


def follow(
    optimizers: Sequence[Optimizer], exchanged: Sequence[Exchange], added: Sequence[str] = ()
) -> Callable[[Mapping[str, nn.Parameter]], None]:
    """Compute the optimisers' state after a plan; return a function that writes it once the new parameters exist.

    Groups, their settings and their order stay, so learning-rate schedulers keep working.

    Returns:
        A function that, given name → new parameter, changes the optimisers in place.
    """
    if problem := next((type(one).__name__ for one in optimizers if hasattr(one, "_params")), ""):
        raise PlanError(
            f"{problem} keeps all parameters in one piece and cannot follow; make a new one after the change"
        )
    known = {id(one.old): one for one in exchanged}
    states = [
        {
            id(parameter): {what: _state(what, value, known[id(parameter)]) for what, value in memory.items()}
            for parameter, memory in optimizer.state.items()
            if id(parameter) in known
        }
        for optimizer in optimizers
    ]

    def commit(made: Mapping[str, nn.Parameter]) -> None:
        for optimizer, state in zip(optimizers, states, strict=True):
            for group in optimizer.param_groups:
                left = [p for p in group["params"] if id(p) not in known or known[id(p)].name in made]
                group["params"][:] = [made[known[id(p)].name] if id(p) in known else p for p in left]
                _join(group["params"], made, added)
            for one in exchanged:
                if optimizer.state.pop(one.old, None) is not None and one.name in made:
                    optimizer.state[made[one.name]] = state[id(one.old)]

    return commit


def _join(params: list[nn.Parameter], made: Mapping[str, nn.Parameter], added: Sequence[str]) -> None:
    for name in added:
        weight = made.get(name.removesuffix("bias") + "weight")
        if any(one is weight for one in params):
            params.append(made[name])


def _state(what: str, value: object, one: Exchange) -> object:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape != one.old.shape:
        raise PlanError(
            f"the optimiser's {what!r} of {one.name} has shape {tuple(value.shape)}, not its parameter's "
            f"{tuple(one.old.shape)}: it cannot follow a change of shape; make a new optimiser after the change"
        )
    if what not in FIRST | SECOND:
        raise PlanError(
            f"the optimiser keeps {what!r} for {one.name}; what new or kept units should have of it is not known; "
            "make a new optimiser after the change"
        )
    with torch.no_grad():
        return resize_moment(value, one.lays, mean=what in SECOND)
