"""How many units, and where: scores and a budget → the units kept.

``cost.Cost`` says what a network costs at given sizes, ``cost_of`` what a budget counts of it; ``rank`` and
``uniform`` choose units under a budget; ``ratios`` solves for shares that meet one while they are learned; ``stages``
cuts a search where memory has one.
"""

from collections.abc import Callable, Mapping

from regrow.allocation.cost import Cost
from regrow.allocation.priced import cost_of, payers
from regrow.allocation.ranked import BudgetError, rank
from regrow.allocation.solved import module_costs, ratios, soft_step
from regrow.allocation.stages import MemoryBudgetError, MemoryStages, stages
from regrow.allocation.uniform import uniform

ALLOCATIONS: Mapping[str, Callable[..., dict[str, tuple[int, ...]]]] = {"ranked": rank, "uniform": uniform}
"""Name → (axes, scores, budget, *, minimum, share) → axis key → units kept."""


def allocation(name: str) -> Callable[..., dict[str, tuple[int, ...]]]:
    """The allocation of a name.

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
