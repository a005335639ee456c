"""Settings of depth pruning, the modules that it may drop, by unit type, and the neurons that it may cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from regrow.allocation.cost import cost_of
from regrow.core.axes import Axis, AxisGraph, matches
from regrow.core.axes.operations import Branch, lies_in
from regrow.core.budget import Budget
from regrow.core.scores import Scores
from regrow.methods.pruning.pruner import PruningTask
from regrow.scoring.metrics import wifv
from regrow.scoring.spaces import OUTER_BLOCKS
from regrow.settings.constraints import CheckedSettings, OneOf, Range


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``depth``: which modules are dropped, how they are chosen, and what meets the rest of the budget.

    Args:
        unit: The modules that may be dropped: ``block`` (attention and MLP together), ``attention``, ``mlp``, or
            ``any`` (attentions and MLPs, each on its own).
        search: ``greedy``: measured again after each removal; ``one_shot``: each measured once, alone.
        fill: ``neurons``: MLP neurons are cut to meet the budget exactly, in the order of FLAP, and the number of
            modules is chosen by measurement; ``none``: modules alone, as few as meet the budget.
        tokens: The tokens of each source on which a removal is measured; at least one window. How many modules are
            dropped is judged on the next windows, of twice as many; in a source without further windows, on the same.
        compensate: Whether the mean of dropped neurons is added to biases.
        spare_first: The fraction of the numbered blocks, at the beginning, whose neurons are not cut.
        spare_last: The fraction of the numbered blocks, at the end, whose neurons are not cut.
        minimum: The smallest number of neurons that stay in an MLP.
    """

    unit: Annotated[str, OneOf("block", "attention", "mlp", "any")] = "block"
    search: Annotated[str, OneOf("greedy", "one_shot")] = "greedy"
    fill: Annotated[str, OneOf("neurons", "none")] = "neurons"
    tokens: Annotated[int, Range(1)] = 512
    compensate: bool = True
    spare_first: Annotated[float, Range(0, 1, below=True)] = OUTER_BLOCKS[0]
    spare_last: Annotated[float, Range(0, 1, below=True)] = OUTER_BLOCKS[1]
    minimum: Annotated[int, Range(1)] = 1


def modules_of(axes: AxisGraph, unit: str) -> dict[str, Branch]:
    """Return the modules of a unit type that can be dropped, by path, in the order of the network.

    An attention is the innermost module that can be dropped and caches keys and values; a block is one around it; an
    MLP is the outermost module without a cache. Without caches these types cannot be distinguished: each of
    them gives the outermost modules that can be dropped.
    """
    free = {
        path: branch
        for path, branch in axes.branches.items()
        if branch.free and branch.gives != "nothing" and any(branch.holds(name) for name in axes.counted)
    }
    cached = {path for path in free if any(lies_in(one.module, path) for one in axes.caches)}
    inner = {path for path in cached if not any(other != path and lies_in(other, path) for other in cached)}
    plain = free.keys() - cached
    outer = {path for path in plain if not any(other != path and lies_in(path, other) for other in plain)}
    if not axes.caches:
        return {path: branch for path, branch in free.items() if path in outer}
    of = {"attention": inner, "mlp": outer, "any": inner | outer, "block": cached - inner}[unit]
    return {path: branch for path, branch in free.items() if path in of}


def candidates(s: Settings, axes: AxisGraph, budget: Budget) -> dict[str, Branch]:
    """Return the modules that may be dropped for a budget: all of their weights are among those that may be cut."""

    def allowed(branch: Branch) -> bool:
        own = [name for name in axes.parameters if lies_in(name, branch.module)]
        chosen = not budget.only or all(any(matches(name, one) for one in budget.only) for name in own)
        return chosen and not any(matches(name, one) for one in budget.exclude for name in own)

    return {path: branch for path, branch in modules_of(axes, s.unit).items() if allowed(branch)}


def neurons(axes: AxisGraph, units: Sequence[Axis]) -> list[Axis]:
    """Return the axes inside MLPs; in a network without attention, all."""
    if not axes.caches:
        return list(units)
    mlps = modules_of(axes, "mlp")
    return [axis for axis in units if any(all(lies_in(slot.name, path) for slot in axis.slots) for path in mlps)]


def least_cost(s: Settings, axes: AxisGraph, units: Sequence[Axis], budget: Budget) -> int:
    """Return what is left of the measure once as many neurons are cut as may be, in whole steps."""
    left = [axes[axis.key] for axis in units if axis.key in axes.axes]
    cut = neurons(axes, left) if s.fill == "neurons" else []
    return cost_of(axes, budget)({axis.key: min(axis.size, max(axis.least, s.minimum)) for axis in cut})


def score_neurons(s: Settings, task: PruningTask) -> Scores:
    """Return the weighted input variance of the neurons that may be cut; no scores if none may."""
    units = neurons(task.axes, task.units) if s.fill == "neurons" else []
    pooled = task.evidence.pooled()
    if not units:
        return Scores({}, "divergence", task.evidence.sources, pooled.tokens)
    return wifv(task.weights, task.axes, pooled, units=units)
