"""The rank of this process, and how many processes share the work."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from regrow.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessRank:
    """The rank of this process among those that share a run.

    Args:
        rank: The number of this process, from 0.
        size: How many processes there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes the run folder and talks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this rank: every ``size``-th one, from its own number on.

        Args:
            items: All items.

        >>> ProcessRank(1, 3).share("abcde")
        'be'
        """
        return items if self.size == 1 else items[self.rank :: self.size]

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


SINGLE = ProcessRank()
"""A process that works alone."""


def read_ranks(environment: Mapping[str, str] = os.environ) -> ProcessRank:
    """Return the rank of this process, as torchrun and accelerate launch tell it; ``SINGLE`` without them.

    Args:
        environment: The environment variables ``RANK`` and ``WORLD_SIZE``.

    Raises:
        InputError: If they are not numbers that fit together.

    >>> read_ranks({"RANK": "1", "WORLD_SIZE": "4"})
    ProcessRank(rank=1, size=4)
    """
    size, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
    if size in ("", "1"):
        return SINGLE
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise InputError(
            f"WORLD_SIZE and RANK are the number of processes and that of this one, got {size!r} and {rank!r}; "
            "start them with torchrun, or unset WORLD_SIZE"
        )
    return ProcessRank(int(rank), int(size))
