"""The callbacks through which long work reports its progress and its measurements."""

from collections.abc import Callable
from typing import Protocol

# Called with (steps done, steps in all, what is being done)
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """Ignore a progress report: the default :data:`Progress`, which shows nothing."""


class Log(Protocol):
    """The type of a function that records a row of measurements, such as a line of ``metrics.jsonl``."""

    def __call__(self, kind: str, /, **row: object) -> None:
        """Record a row of measurements of a kind, column → value."""


def discard(kind: str, /, **row: object) -> None:
    """Ignore a row of measurements: the default :class:`Log`."""
