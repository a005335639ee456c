"""How long work tells that it goes on: one callable that whoever shows it may replace."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being done)."""


def silent(done: int, total: int, what: str) -> None:
    """Show nothing."""
