"""The callbacks through which long work reports its progress and its measurements."""

from collections.abc import Callable
from typing import Protocol

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being done)."""


def silent(done: int, total: int, what: str) -> None:
    """Ignore a progress report: the callback for work that shows nothing.

    Args:
        done: Steps done.
        total: Steps in all.
        what: What is being done.
    """


class Log(Protocol):
    """The type of a function that records a row of measurements."""

    def __call__(self, kind: str, /, **row: object) -> None:
        """Record a row of measurements.

        Args:
            kind: ``task``: the values are added to the row of the current task; ``status``: ``text`` is shown beside
                the progress; any other: a row of the run's ``metrics.jsonl``.
            **row: The values, as JSON data.
        """
        ...


def discard(kind: str, /, **row: object) -> None:
    """Ignore a row of measurements."""
