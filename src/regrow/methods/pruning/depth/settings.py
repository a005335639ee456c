"""Settings of depth pruning."""

from dataclasses import dataclass
from typing import Annotated

from regrow.scoring.spaces import OUTER_BLOCKS
from regrow.settings.constraints import OneOf, Range, check_constraints


@dataclass(frozen=True)
class Settings:
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

    def __post_init__(self) -> None:
        check_constraints(self)
