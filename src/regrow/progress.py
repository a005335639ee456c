"""The callback through which long work reports its progress."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being done)."""


def silent(done: int, total: int, what: str) -> None:
    """Ignore a progress report: the callback for work that shows nothing.

    Args:
        done: Steps done.
        total: Steps in all.
        what: What is being done.
    """
