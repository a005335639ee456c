"""The allocations from which GPrune's learning of pruning ratios may start."""

from regrow.allocation import BudgetError, allocation, uniform
from regrow.methods.pruning.gprune.modules import Measurement
from regrow.methods.pruning.gprune.settings import Settings
from regrow.methods.pruning.pruner import Kept, PruningTask
from regrow.scoring.base import BASES
from regrow.scoring.spaces import FEW, OUTER_BLOCKS, inner


def allocate_start(how: str, s: Settings, task: PruningTask, measured: Measurement) -> Kept:
    """Return the units of every axis that stay at the start of learning.

    Args:
        how: ``base``: as the base method allocates; ``inner``: the same fraction of every large axis outside the outer
            blocks; ``uniform``: the same fraction of every axis.
        s: The settings.
        task: The network and the budget.
        measured: The units and their scores.
    """
    base, scores = BASES[s.base], measured.views[0].scores.values
    allocate = allocation(base.allocation) if how == "base" else uniform
    outer = {"base": base.spare, "inner": OUTER_BLOCKS}.get(how, (0.0, 0.0))
    outer = (0.0, 0.0) if task.budget.regular else outer  # every block gives alike
    some = {axis.key for axis in inner(measured.units, *outer) if how != "inner" or axis.size >= FEW}
    try:
        chosen = {axis.key: scores[axis.key] for axis in measured.units if axis.key in some}
        kept = allocate(task.axes, chosen, task.budget, minimum=s.minimum)
    except BudgetError:  # what is spared has to give, too
        kept = allocate(task.axes, scores, task.budget, minimum=s.minimum)
    return {key: kept.get(key, tuple(range(len(row)))) for key, row in scores.items()}
