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
    """The interval in which the value of a numeric setting must lie; its ends are included unless exclusive."""

    minimum: float
    maximum: float = inf
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False

    def allows(self, value: object) -> bool:
        """Whether a value is a number in the interval; NaN, infinity and what is no number never are."""
        if not isinstance(value, int | float):
            return False
        lower = value > self.minimum if self.exclusive_minimum else value >= self.minimum
        upper = value < self.maximum if self.exclusive_maximum else value <= self.maximum
        return lower and upper and abs(value) != inf

    def __str__(self) -> str:
        if self.exclusive_minimum and self.exclusive_maximum:
            return f"between {self.minimum:,g} and {self.maximum:,g}"
        lower = f"{'above' if self.exclusive_minimum else 'at least'} {self.minimum:,g}"
        if self.maximum == inf:
            return lower
        if self.exclusive_maximum or self.exclusive_minimum:
            return f"{lower} and {'below' if self.exclusive_maximum else 'at most'} {self.maximum:,g}"
        return f"{self.minimum:,} to {self.maximum:,}"


OPEN_UNIT = Range(0, 1, exclusive_minimum=True, exclusive_maximum=True)


class OneOf:
    """A constraint: the value of a setting is one of the texts with which this is constructed."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def allows(self, value: object) -> bool:
        """Whether a value is among the texts."""
        return value in self.choices

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}"


Count = Annotated[int, Range(1)]
Fraction = Annotated[float, Range(0, 1)]
FractionBelowOne = Annotated[float, Range(0, 1, exclusive_maximum=True)]
OpenFraction = Annotated[float, OPEN_UNIT]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, exclusive_minimum=True)]


def check_constraints(settings: "DataclassInstance") -> None:
    """Raise ValueError, with the setting's default as remedy, for a value outside the constraint in its annotation."""
    for name, constraint in _constraints(type(settings)).items():
        value = getattr(settings, name)
        if not constraint.allows(value):
            default = next(field.default for field in fields(settings) if field.name == name)
            raise ValueError(f"{name} must be {constraint}, got {value!r}; for example {name}={default}")


@dataclass(frozen=True)
class CheckedSettings:
    """Base dataclass of settings whose constraints are checked on construction (:func:`check_constraints`)."""

    def __post_init__(self) -> None:
        check_constraints(self)


@cache
def _constraints(settings_class: "type[DataclassInstance]") -> dict[str, Range | OneOf]:
    """Return field name → its constraint, of the fields annotated as ``Annotated[type, constraint]``."""
    hints = get_type_hints(settings_class, include_extras=True).items()
    return {name: get_args(hint)[1] for name, hint in hints if get_origin(hint) is Annotated}
