"""The modules that depth pruning may drop, by unit type, and the neurons that it may cut."""

from collections.abc import Sequence

from regrow.allocation.cost import cost_of
from regrow.core.axes import Axis, AxisGraph, matches
from regrow.core.branches import Branch, lies_in
from regrow.core.budget import Budget
from regrow.core.scores import Scores
from regrow.methods.pruning.depth.settings import Settings
from regrow.methods.pruning.pruner import PruningTask
from regrow.scoring.metrics import wifv


def modules_of(axes: AxisGraph, unit: str) -> dict[str, Branch]:
    """Return the modules of a unit type that can be dropped, by path, in the order of the network.

    An attention is the innermost module that can be dropped and caches keys and values; a block is one around it; an
    MLP is the outermost module without a cache. Without caches these types cannot be distinguished: each of
    them gives the outermost modules that can be dropped.

    Args:
        axes: The axes of the network, with its branches.
        unit: ``attention``, ``mlp``, ``block`` or ``any``.
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
    """Return the modules that may be dropped for a budget: all of their weights are among those that may be cut.

    Args:
        s: The settings.
        axes: The axes of the network, with its branches.
        budget: Which axes may be cut.
    """

    def allowed(branch: Branch) -> bool:
        own = [name for name in axes.parameters if lies_in(name, branch.module)]
        chosen = not budget.only or all(any(matches(name, one) for one in budget.only) for name in own)
        return chosen and not any(matches(name, one) for one in budget.exclude for name in own)

    return {path: branch for path, branch in modules_of(axes, s.unit).items() if allowed(branch)}


def neurons(axes: AxisGraph, units: Sequence[Axis]) -> list[Axis]:
    """Return the axes inside MLPs; in a network without attention, all.

    Args:
        axes: The axes of the network, with its branches.
        units: The axes that may be cut.
    """
    if not axes.caches:
        return list(units)
    mlps = modules_of(axes, "mlp")
    return [axis for axis in units if any(all(lies_in(slot.name, path) for slot in axis.slots) for path in mlps)]


def least_cost(s: Settings, axes: AxisGraph, units: Sequence[Axis], budget: Budget) -> int:
    """Return what is left of the measure once as many neurons are cut as may be, in whole steps.

    Args:
        s: The settings.
        axes: The axes of what the network is without dropped modules.
        units: The axes of the whole network that may be cut.
        budget: What is counted.
    """
    left = [axes[axis.key] for axis in units if axis.key in axes.axes]
    cut = neurons(axes, left) if s.fill == "neurons" else []
    return cost_of(axes, budget)({axis.key: min(axis.size, max(axis.least, s.minimum)) for axis in cut})


def score_neurons(s: Settings, task: PruningTask) -> Scores:
    """Return the weighted input variance of the neurons that may be cut; no scores if none may.

    Args:
        s: The settings.
        task: The network and the measurements.
    """
    units = neurons(task.axes, task.units) if s.fill == "neurons" else []
    pooled = task.evidence.pooled()
    if not units:
        return Scores({}, "divergence", task.evidence.sources, pooled.tokens)
    return wifv(task.weights, task.axes, pooled, units=units)
