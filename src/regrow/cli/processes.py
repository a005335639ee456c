"""Commands that several processes run together, started by torchrun or accelerate launch."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from regrow.cli import boundary, screen
from regrow.distributed import ProcessRank, read_ranks


@contextmanager
def processes() -> Iterator[ProcessRank]:
    """Connect this process with those that share its run; yields its rank. Only rank 0 prints results.

    Every rank ends with one line on the error stream once another one has failed or ended. Its temporary files are in a
    folder of their own, which is deleted then, too.
    """
    ranks = read_ranks()
    if not ranks.several:
        yield ranks
        return
    from regrow.distributed.group import connected

    screen.out.quiet = screen.out.quiet or not ranks.leads
    with (
        _temporary_files() as folder,
        connected(ranks, lambda line: _end(line, folder), lambda error: boundary.failure_of(error).line),
    ):
        yield ranks


@contextmanager
def _temporary_files() -> Iterator[str]:
    """Make the temporary files of this process in a folder of their own, inside the ``with`` block; yields it."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="regrow-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = before


def _end(line: str, folder: str) -> None:
    """End the process, whatever its main thread waits for, and delete its temporary files."""
    sys.stderr.write(f"regrow: {screen.printable(' '.join(line.split()))}\n")
    sys.stderr.flush()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(boundary.ENVIRONMENT)
