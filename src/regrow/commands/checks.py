"""Whether the settings of a run are of their types and within their ranges, before anything is loaded or written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from regrow.errors import InputError


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be.

    Args:
        least: The smallest.
        most: The largest.
        open: Whether ``least`` and ``most`` themselves are left out.
        like: One that is often right.
    """

    least: float
    most: float
    open: bool = False
    like: float = 0

    def holds(self, value: float) -> bool:
        """Whether a number lies in it; not-a-number and infinity never do."""
        inside = self.least < value < self.most if self.open else self.least <= value <= self.most
        return math.isfinite(value) and inside


SEED = Range(0, 2**63 - 1)
_MANY = 2**31 - 1
_RATE = Range(0, 1000, open=True, like=0.01)
_DECAY = Range(0, 1000)

PRUNE = {
    "keep": Range(0, 1.000001, open=True, like=0.8),
    "round_to": Range(1, 2**20, like=8),
    "seed": SEED,
    "tokens": Range(1, _MANY, like=4096),
    "eval_tokens": Range(1, _MANY, like=2048),
    "seq_len": Range(2, 2**20, like=256),
    "finetune": Range(0, 10**6, like=1),
    "recover_tokens": Range(1, _MANY, like=32768),
}
LEARN = {
    "epochs": Range(1, 10**6, like=5),
    "batch_size": Range(1, 2**20, like=64),
    "lr": _RATE,
    "weight_decay": _DECAY,
    "train": Range(0, _MANY),
    "test": Range(0, _MANY),
    "classes": Range(0, 2**16),
    "seed": SEED,
}
SEARCH = {
    "stages": Range(0, 99),
    "epochs": Range(0, 10**6, like=30),
    "retrain": Range(0, 10**6, like=30),
    "cutout": Range(0, 2**16),
    "batch_size": Range(1, 2**20, like=96),
    "lr": _RATE,
    "weight_decay": _DECAY,
    "train": Range(0, _MANY),
    "test": Range(0, _MANY),
    "validation": Range(0, 1, open=True, like=0.2),
    "stride": Range(1, 4, like=2),
    "seed": SEED,
}
RECOVER = {"tokens": Range(1, _MANY, like=32768), "seed": SEED}
EVALUATE = {
    "items": Range(1, _MANY, like=200),
    "eval_tokens": Range(1, _MANY, like=2048),
    "seq_len": Range(2, 2**20, like=256),
}
"""Setting → the numbers that it may be, by what is done."""


def check_settings(settings: Any, ranges: Mapping[str, Range]) -> None:
    """Assert that every setting is of its type and in its range.

    Args:
        settings: A dataclass of settings; they may come from a command line or a file.
        ranges: Which numbers are in order, by setting.

    Raises:
        InputError: If one is not; names it as an option, with its value and what it may be.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        if not _is(value, hints[field.name]):
            raise InputError(
                f"{option(field.name)} must be {_words(hints[field.name])}, got {_short(value)}; correct it"
            )
    check_numbers({name: getattr(settings, name) for name in ranges}, ranges)


def check_numbers(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Assert that numbers are in their ranges; ``None`` is always in order.

    Raises:
        InputError: Naming the first that is not.
    """
    for name, one in ranges.items():
        value = values[name]
        if value is None or one.holds(value):
            continue
        between = f"between {one.least:,g} and {one.most:,g}" if one.open else f"{one.least:,} to {one.most:,}"
        raise InputError(f"{option(name)} must be {between}, got {value}; for example {option(name)} {one.like:g}")


def option(name: str) -> str:
    """A setting as an option of the command line.

    >>> option("eval_tokens"), option("round_to")
    ('--eval-tokens', '--round')
    """
    return f"--{name.removesuffix('_to').replace('_', '-')}"


def _is(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if isinstance(hint, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(one, get_args(hint)[0]) for one in value)
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _words(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
    if isinstance(hint, UnionType):
        return " or ".join(_words(one) for one in get_args(hint))
    return "a list of texts" if get_origin(hint) is tuple else names.get(hint, "an object of names and values")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
