"""Plans of growth from amounts as users write them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from regrow.allocation.widening import PARTS, Part, Widening, deepening, widening
from regrow.core.amounts import Increase
from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.fills import FILLS
from regrow.core.plan import Change, Fill, Plan
from regrow.core.sources import preserve_random_state
from regrow.tracing.stacks import find_stacks

Amount = int | str
"""An increase as users write it: ``"+25%"``, ``"+32"`` or ``32``."""


@dataclass(frozen=True)
class GrowthSpec:
    """How much a network grows, and how new units are initialised.

    Args:
        parts: ``"mlp"``, ``"heads"`` or ``"channels"`` → the increase of every axis of that kind.
        axis: Axis key or pattern → its increase.
        blocks: Path or pattern of a stack of blocks → how many copies of blocks are inserted; ``"*"``: every stack.
        fill: How new units are initialised.
        round_to: Widths become multiples of this.
        regular: Whether axes with the same role in several blocks get one width.
    """

    parts: Mapping[Part, Increase] = field(default_factory=dict)
    axis: Mapping[str, Increase] = field(default_factory=dict)
    blocks: Mapping[str, Increase] = field(default_factory=dict)
    fill: Fill = field(default_factory=Fill)
    round_to: int = 1
    regular: bool = False

    @classmethod
    def parse(
        cls,
        parts: Mapping[Part, Amount],
        axis: Mapping[str, Amount],
        blocks: Mapping[str, Amount],
        *,
        fill: str = "zero_out",
        seed: int = 0,
        round_to: int = 1,
        regular: bool = False,
    ) -> "GrowthSpec":
        """Parse the amounts as users write them; parts whose amount is empty or 0 do not grow.

        Args:
            parts: ``"mlp"``, ``"heads"`` or ``"channels"`` → the amount.
            axis: Axis key or pattern → the amount.
            blocks: Path or pattern of a stack → the amount.
            fill: One of ``regrow.core.fills.FILLS``.
            seed: The random seed of the fill.
            round_to: As the field.
            regular: As the field.

        Raises:
            InputError: If nothing grows, or an amount or the fill is not allowed; names the argument.
        """
        if fill not in FILLS:
            raise InputError(f"fill must be one of {', '.join(FILLS)}, got {fill!r:.40}; for example fill='zero_out'")
        if round_to < 1:
            raise InputError(f"round_to must be at least 1, got {round_to}; for example round_to=64")
        grown = {part: _increase(part, parts[part]) for part in PARTS if parts.get(part)}
        named = {name: _increase(f"axis {name!r}", amount) for name, amount in axis.items()}
        deeper = {name: _increase("blocks", amount) for name, amount in blocks.items()}
        if not grown and not named and not deeper:
            raise InputError("nothing grows: give mlp, heads, channels, blocks or axis, for example mlp='+25%'")
        return cls(grown, named, deeper, Fill(fill, seed), round_to, regular)

    def record(self) -> dict[str, Any]:
        """Return the amounts as JSON data, as plans store them."""
        amounts: dict[str, str] = {part: str(one) for part, one in self.parts.items()}
        named = {"axis": self.axis, "blocks": self.blocks}
        amounts_by_name = {
            what: {name: str(one) for name, one in given.items()} for what, given in named.items() if given
        }
        return {"method": "grow", **amounts, **amounts_by_name, "fill": self.fill.rule}


def plan_growth(model: nn.Module, axes: AxisGraph, spec: GrowthSpec) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan of a growth, and notes on axes of the wanted kinds that cannot be widened.

    Args:
        model: The network; it is left unchanged.
        axes: Its axes.
        spec: How much it grows.

    Raises:
        ValueError: If the network has nothing of a kind or name that can be widened; the message says why.
    """
    pairs = spec.fill.rule == "pair"
    wide = widening(axes, spec.parts, spec.axis, round_to=spec.round_to, regular=spec.regular, even=pairs)
    with preserve_random_state():
        insert = deepening(find_stacks(model, axes), spec.blocks) if spec.blocks else {}
    plan = Plan(changes_of(axes, wide.grow, spec.fill), origin=spec.record(), insert=insert)
    plan.check(axes)
    return plan, _notes(wide)


def changes_of(axes: AxisGraph, grow: Mapping[str, int], fill: Fill) -> dict[str, Change]:
    """Return the changes of a plan that adds units.

    Args:
        axes: The network's axes.
        grow: Axis key → how many units are added.
        fill: How they are initialised.
    """
    keys = [key for key in grow if grow[key]]
    units = {key: (axes[key].size, tuple(range(axes[key].size)), axes[key].slots, axes[key].ids) for key in keys}
    return {key: Change(*units[key], grow=grow[key], fill=fill) for key in keys}


def _increase(name: str, amount: Amount) -> Increase:
    try:
        return Increase.parse(amount)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def _notes(wide: Widening) -> tuple[str, ...]:
    reasons: dict[str, list[str]] = {}
    for key, why in wide.refused.items():
        reasons.setdefault(why, []).append(key)
    return tuple(
        f"{len(keys)} {'axis keeps its' if len(keys) == 1 else 'axes keep their'} width ({keys[0]}"
        f"{', …' if len(keys) > 1 else ''}): {why}"
        for why, keys in reasons.items()
    )
