"""Constraints on the values of settings, declared in the annotations of their fields.

>>> @dataclass(frozen=True)
... class Settings:
...     strength: Annotated[float, Range(0)] = 10.0
...     keep: Annotated[str, OneOf("nothing", "data")] = "nothing"
...
...     def __post_init__(self) -> None:
...         check_constraints(self)
>>> Settings(strength=-1.0)
Traceback (most recent call last):
ValueError: strength must be at least 0, got -1.0; for example strength=10.0
>>> Settings(keep="all")
Traceback (most recent call last):
ValueError: keep must be one of nothing, data, got 'all'; for example keep=nothing
"""

from dataclasses import dataclass, fields
from functools import cache
from math import inf
from typing import TYPE_CHECKING, Annotated, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Range:
    """The interval in which the value of a numeric setting must lie."""

    least: float
    most: float = inf  # the upper bound; infinite: there is none
    above: bool = False
    below: bool = False

    def holds(self, value: object) -> bool:
        """Whether a number lies in the interval; NaN and infinity never do."""
        if not isinstance(value, int | float):
            return False
        lower = value > self.least if self.above else value >= self.least
        upper = value < self.most if self.below else value <= self.most
        return lower and upper and abs(value) != inf

    def __str__(self) -> str:
        if self.above and self.below:
            return f"between {self.least:,g} and {self.most:,g}"
        lower = f"above {self.least:,g}" if self.above else f"at least {self.least:,g}"
        if self.most == inf:
            return lower
        if self.below or self.above:
            return f"{lower} and {'below' if self.below else 'at most'} {self.most:,g}"
        return f"{self.least:,} to {self.most:,}"


class OneOf:
    """The texts among which the value of a setting must be."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def holds(self, value: object) -> bool:
        """Whether a value is among the texts."""
        return value in self.choices

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}"


def check_constraints(settings: "DataclassInstance") -> None:
    """Raise ValueError unless every value meets the constraint that the annotation of its field declares."""
    for name, constraint in _constraints(type(settings)).items():
        if not constraint.holds(value := getattr(settings, name)):
            default = next(field.default for field in fields(settings) if field.name == name)
            raise ValueError(f"{name} must be {constraint}, got {value!r}; for example {name}={default}")


@dataclass(frozen=True)
class CheckedSettings:
    """The base of settings whose constraints are checked when they are made."""

    def __post_init__(self) -> None:
        check_constraints(self)


@cache
def _constraints(kind: "type[DataclassInstance]") -> dict[str, Range | OneOf]:
    hints = get_type_hints(kind, include_extras=True).items()
    return {name: get_args(hint)[1] for name, hint in hints if get_origin(hint) is Annotated}
