"""Several processes on one run: torchrun or accelerate starts them, rank 0 leads and writes, all share the work.

Who this process is needs no torch; ``parallel`` connects the processes, passes records and tensors between them and
trains one network by all.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from regrow.core.errors import InputError, ResourceError

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessRank:
    """The rank of this process among those that share a run.

    Args:
        rank: The number of this process, from 0.
        size: How many processes there are.
        local: The number of this process on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes the run folder and talks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this rank: every ``size``-th one, from its own number on; all if there is one process.

        >>> ProcessRank(1, 3).share("abcde")
        'be'
        """
        return items if self.size == 1 else items[self.rank :: self.size]

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


SINGLE = ProcessRank()  # a process that works alone


def read_ranks(environment: Mapping[str, str] = os.environ) -> ProcessRank:
    """Return the rank of this process from the variables of torchrun or accelerate; ``SINGLE`` without them.

    Raises InputError if WORLD_SIZE is neither 1 nor a number above RANK. Without LOCAL_RANK, ``local`` is RANK.

    >>> read_ranks({"RANK": "1", "WORLD_SIZE": "4"})
    ProcessRank(rank=1, size=4, local=1)
    """
    size, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
    if size in ("", "1"):
        return SINGLE
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise InputError(
            f"WORLD_SIZE and RANK are the number of processes and that of this one, got {size!r} and {rank!r}; "
            "start them with torchrun, or unset WORLD_SIZE"
        )
    local = environment.get("LOCAL_RANK", rank)
    return ProcessRank(int(rank), int(size), int(local) if local.isdecimal() else int(rank))


def choose_rank_device(name: str, ranks: ProcessRank, gpus: int, environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of this process's device: of several processes, each gets a GPU of its own, or all the CPU.

    ``name``: what the user chose; returned as it is for a single process. ``gpus``: how many this process can use;
    ``environment``: its CUDA_VISIBLE_DEVICES may show each process one GPU only, as number 0. Raises InputError for a
    name other than ``auto``, ``cpu``, ``cuda`` and that of its own GPU, and ResourceError if there are too few GPUs.

    >>> choose_rank_device("cuda", ProcessRank(3, 4, local=1), 2), choose_rank_device("auto", ProcessRank(1, 2), 0)
    ('cuda:1', 'cpu')
    """
    if not ranks.several or name == "cpu":
        return name
    if name == "auto" and not gpus:
        return "cpu"
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    # Some launchers show each process a GPU of its own, which is its number 0.
    number = 0 if gpus == 1 and visible and "," not in visible else ranks.local
    device = f"cuda:{number}"
    if name not in ("auto", "cuda", device):
        raise InputError(
            f"several processes run on the CPU or on a GPU each, got --device {name}; use cpu, or cuda: {ranks} gets "
            f"{device}"
        )
    if number >= gpus:
        raise ResourceError(
            f"{ranks} needs {device}, and this machine has {gpus} GPUs; start a process per GPU, or use --device cpu"
        )
    return device
