"""Scores: one number per unit per axis, and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How much each unit matters: higher is more worth keeping.

    Args:
        values: Axis key → one float64 number per unit, ``[size]``.
        metric: The name of the measure: ``"wifv"``, ``"magnitude"``.
        sources: The names of the sources it was measured on; empty for measures that need none.
        tokens: How many positions were seen.
    """

    values: Mapping[str, Tensor]
    metric: str
    sources: tuple[str, ...] = ()
    tokens: int = 0
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, key: str) -> Tensor:
        return self.values[key]
