"""Commands that several processes run together, started by torchrun or accelerate launch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from regrow.cli import boundary, screen
from regrow.distributed import Ranks, read_ranks


@contextmanager
def processes() -> Iterator[Ranks]:
    """Connect this process with those that share its run; yields its rank. Only rank 0 prints results.

    Every rank ends with one line on the error stream once another one has failed or ended.
    """
    ranks = read_ranks()
    if not ranks.several:
        yield ranks
        return
    from regrow.distributed.group import connected

    screen.out.quiet = screen.out.quiet or not ranks.leads
    with connected(ranks, _end, lambda error: boundary.failure_of(error).line):
        yield ranks


def _end(line: str) -> None:
    """End the process, whatever its main thread waits for."""
    sys.stderr.write(f"regrow: {screen.printable(' '.join(line.split()))}\n")
    sys.stderr.flush()
    os._exit(boundary.ENVIRONMENT)
