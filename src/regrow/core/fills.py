"""Fill rules: how new units get their weights such that the network's outputs do not change.

A rule is one function and one row of ``FILLS``. Everything that depends on a rule reads its row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fill:
    """How new units are initialised such that the network's outputs do not change.

    New units can be fitted to data afterwards, with the outputs unchanged: :func:`regrow.fit_new_units` and
    :func:`regrow.align_new_units` take a network that grew by ``zero_out``.

    Args:
        rule: ``zero_out``: random incoming weights, outgoing weights 0 (on the residual stream that root-mean-square
            norms run over: incoming weights 0). ``split``: copies of kept units, which share the outgoing weights
            (Net2Wider, Chen et al., 2016). ``pair``: pairs of equal random units with outgoing weights of opposite
            sign.
        seed: Seed of the random weights, and of the choice of units to copy.
    """

    rule: str = "zero_out"
    seed: int = 0


@dataclass(frozen=True)
class Growth:
    """What a fill rule knows of an axis that grew: its old units, which come first, and the new ones after them.

    Args:
        kept: How many units are kept.
        donors: The kept unit that each new one may copy, ``[new]`` int64; every unit about equally often.
        folded: Whether the axis's size is a divisor of a norm, so that new units must be 0 themselves.
        generator: The source of random numbers.
    """

    kept: int
    donors: Tensor
    folded: bool
    generator: torch.Generator

    @property
    def is_new(self) -> Tensor:
        """Which units are new, ``[kept + new]`` bool."""
        return torch.arange(self.kept + len(self.donors)) >= self.kept

    @property
    def ones(self) -> Tensor:
        """The factor 1 for every unit, ``[kept + new]`` float64."""
        return torch.ones(self.kept + len(self.donors), dtype=torch.float64)

    @property
    def order(self) -> Tensor:
        """The index of every unit, ``[kept + new]`` int64."""
        return torch.arange(self.kept + len(self.donors))


@dataclass(frozen=True)
class Filling:
    """What a fill rule makes of an axis: where the weights of new units come from, and factors on all weights.

    Args:
        donors: The kept unit whose weights each new one copies, ``[new]`` int64.
        drawn: Which units are initialised at random instead, ``[kept + new]`` bool.
        twin: The index of the unit whose random weights each one shares; mostly its own, ``[kept + new]`` int64.
        inward: The factor on the weights that make each unit, ``[kept + new]`` float64.
        outward: The factor on the weights that read each unit, ``[kept + new]`` float64.
    """

    donors: Tensor
    drawn: Tensor
    twin: Tensor
    inward: Tensor
    outward: Tensor


def _zero_out(growth: Growth) -> Filling:
    zeroed = torch.where(growth.is_new, 0.0, growth.ones)
    factors = (zeroed, growth.ones) if growth.folded else (growth.ones, zeroed)
    return Filling(growth.donors, growth.is_new, growth.order, *factors)


def _split(growth: Growth) -> Filling:
    # Unequal shares; with equal ones a unit and its copy would get equal gradients for ever.
    share = 0.5 + torch.rand(len(growth.order), dtype=torch.float64, generator=growth.generator)
    owner = torch.cat([torch.arange(growth.kept), growth.donors])
    total = torch.zeros(growth.kept, dtype=torch.float64).index_add(0, owner, share)
    outward = share / total[owner]
    return Filling(growth.donors, torch.zeros_like(growth.is_new), growth.order, growth.ones, outward)


def _pair(growth: Growth) -> Filling:
    half = len(growth.donors) // 2
    second = growth.kept + half
    twin, sign = growth.order, growth.ones
    twin[second:] = torch.arange(growth.kept, second)
    sign[second:] = -1
    return Filling(growth.donors[:half].repeat(2), growth.is_new, twin, growth.ones, sign)


@dataclass(frozen=True)
class FillRule:
    """A fill rule, and what plans must know about it.

    Args:
        fill: The function that fills new units.
        unread: Whether new units change nothing because weights of 0 make or read them: they can then be fitted to
            data, and added where weights that read the units also do something else with them.
        in_pairs: Whether units are added two by two.
    """

    fill: Callable[[Growth], Filling]
    unread: bool = False
    in_pairs: bool = False


FILLS: Mapping[str, FillRule] = {
    "zero_out": FillRule(_zero_out, unread=True),
    "split": FillRule(_split),
    "pair": FillRule(_pair, in_pairs=True),
}
"""Name → fill rule; the names are those of ``Fill.rule``."""
