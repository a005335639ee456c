"""Decide how many units each axis keeps or gains, and which: importance scores and a budget → units kept.

``cost.Cost`` computes a network's parameters, MACs or bytes at given axis sizes, ``cost_of`` the cost that a budget
limits; ``rank`` and ``uniform`` choose units under a budget; ``ratios`` turns logits into pruning ratios that meet it,
differentiably; ``stages`` splits a search into stages that fit a memory budget.
"""

from collections.abc import Callable, Mapping

from regrow.allocation.cost import Cost, cost_of, payers
from regrow.allocation.ranked import BudgetError, rank, uniform
from regrow.allocation.solved import module_costs, ratios, soft_step
from regrow.allocation.stages import MemoryBudgetError, MemoryStages, stages

ALLOCATIONS: Mapping[str, Callable[..., dict[str, tuple[int, ...]]]] = {"ranked": rank, "uniform": uniform}
"""Name → allocation function: (axes, scores, budget, *, minimum, share) → axis key → units kept."""


def allocation(name: str) -> Callable[..., dict[str, tuple[int, ...]]]:
    """Return the allocation function of a name; raise ValueError if there is none.

    Args:
        name: A key of :data:`ALLOCATIONS`.

    Raises:
        ValueError: If there is none.
    """
    if name not in ALLOCATIONS:
        raise ValueError(f"units are allocated by {', '.join(ALLOCATIONS)}; got {name!r}")
    return ALLOCATIONS[name]


__all__ = [
    "ALLOCATIONS",
    "BudgetError",
    "Cost",
    "MemoryBudgetError",
    "MemoryStages",
    "allocation",
    "cost_of",
    "module_costs",
    "payers",
    "rank",
    "ratios",
    "soft_step",
    "stages",
    "uniform",
]
