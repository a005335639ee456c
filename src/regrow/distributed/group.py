"""The connection of the processes that share a run."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from regrow.distributed.ranks import ProcessRank, choose_backend
from regrow.distributed.watch import RESUME, SILENCE, Watch, watching
from regrow.errors import ResourceError

MEETING = timedelta(minutes=5)
"""How long the processes wait for one another at the start."""
WORK = timedelta(days=7)
"""How long a rank waits for another one; ranks that have ended are noticed by ``watch``."""
_BROKEN = re.compile(r"\[[^\]]*\bgloo/[^\]]*\]|Connection (closed|reset) by peer|Broken pipe")
"""What gloo says, which raises RuntimeError, of a broken connection: its source file, or the system's words."""


@contextmanager
def connected(
    ranks: ProcessRank, lost: Callable[[str], None], describe: Callable[[BaseException], str] = str
) -> Iterator[None]:
    """Connect the processes that torchrun has started, inside the ``with`` block; they leave it together.

    Args:
        ranks: The processes.
        lost: Called from another thread with one line once a rank has ended or failed; it ends the process.
        describe: Returns the line that the other ranks print about an error of this one.

    Raises:
        ResourceError: If the processes do not find one another, or the connection breaks.
    """
    store = _meet(ranks)
    with watching(ranks, store.clone(), lost) as watch:
        try:
            _connect(ranks, store)
            yield
            dist.barrier()
        except BaseException as error:
            _leave(ranks, watch, error, describe)
            raise
    dist.destroy_process_group()


def _meet(ranks: ProcessRank) -> Any:
    try:
        return next(rendezvous("env://", ranks.rank, ranks.size, timeout=MEETING))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(
            f"{ranks} cannot reach the others ({' '.join(str(error).split())[:120]}); start {ranks.size} processes "
            "with torchrun, or with the same MASTER_ADDR and MASTER_PORT"
        ) from error


def _connect(ranks: ProcessRank, store: Any) -> None:
    backend = choose_backend(torch.cuda.device_count(), dist.is_nccl_available())
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=WORK)


def _is_broken(error: BaseException) -> bool:
    """Whether an error says that the connection to another rank broke."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


def _leave(ranks: ProcessRank, watch: Watch, error: BaseException, describe: Callable[[BaseException], str]) -> None:
    """Tell the other ranks about an error; wait for ``watch`` to say which rank ended, if the connection broke."""
    if _is_broken(error):
        time.sleep(SILENCE + 4)  # until ``watch`` ends the process
        line = f"{ranks} lost the connection to another rank ({' '.join(str(error).split())[:120]}); {RESUME}"
        watch.report(line)
        raise ResourceError(line) from error
    stopped = isinstance(error, KeyboardInterrupt)
    watch.report(f"{ranks} was stopped by Ctrl-C" if stopped else f"{ranks} failed: {describe(error)}")
