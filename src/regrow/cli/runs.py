"""Commands that write a run folder with its report page: their options, processes, and course on the screen."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import boundary, options, screen
from regrow.cli.screen import say, working
from regrow.core.amounts import format_bytes
from regrow.distributed import ProcessRank, read_ranks

if TYPE_CHECKING:
    from regrow.store.run_folder import RunFolder

PAGE = "report.html"


def run_command(
    settings: type, epilog: str, *, distributed: bool = False
) -> Callable[[Callable[..., None]], click.Command]:
    """Return the decorator of a command that writes a run folder to ``--out``, where a stopped run is resumed.

    Args:
        settings: The dataclass of the command's settings.
        epilog: The text below its help.
        distributed: Whether several processes may run it together.
    """

    def make(function: Callable[..., None]) -> click.Command:
        command = click.command(
            cls=boundary.Verb, resumed=("out",), settings=settings, epilog=epilog, distributed=distributed
        )
        return command(options.run_folder(required=True)(function))

    return make


@dataclass
class RunPage:
    """Writes the report page of a run into its folder, as the run finishes.

    A run finishes without a page if a package is missing or the page cannot be made; if the disk cannot take the page,
    the run fails and can be resumed.

    Args:
        what: The name of the folder's other content: ``model`` or ``network``.
        error: The error that prevented the page, if any.
    """

    what: str
    error: Exception | None = None

    def __call__(self, folder: Path) -> None:
        """Write the page into the complete folder of the run."""
        from regrow.reports import write_page
        from regrow.store.errors import StoreError

        self.error = None
        try:
            write_page([folder], folder / PAGE)
        except StoreError:
            raise
        except Exception as error:
            self.error = error

    def tell(self, folder: Path) -> None:
        """Print where the page of the finished run is, or why there is none; raise an error that is a bug."""
        from regrow.reports import ReportError

        if self.error is not None:
            say(f"the {self.what} is in {folder}; no page was written: {self.error}")
            if not isinstance(self.error, ReportError):
                raise self.error
        elif (folder / PAGE).is_file():
            say(f"{self.what} and page are in {folder}; open {folder / PAGE}")


def run_with_page(
    what: str, tell: "Callable[[RunFolder], None]", run: "Callable[..., RunFolder]", *inputs: object, **more: object
) -> "RunFolder":
    """Write the folder of a run with its page while progress is shown; print the result, and where folder and page are.

    Args:
        what: The name of the folder's content beside the page: ``model`` or ``network``.
        tell: Prints the result.
        run: Writes the folder; called with ``inputs``, ``more``, ``progress`` and ``write_page``.
        *inputs: Positional arguments of ``run``.
        **more: Further keyword arguments of ``run``.

    Returns:
        The finished folder.
    """
    page = RunPage(what)
    with working() as progress:
        folder = run(*inputs, progress=progress, write_page=page, **more)
    snapshot = folder.run().get("snapshot")  # an error if the folder was deleted meanwhile
    tell(folder)
    if snapshot:
        size = format_bytes(snapshot["bytes"])
        say(f"{folder.path / 'before'} holds what the run started from, {size}: `regrow undo {folder.path}`")
    page.tell(folder.path)
    return folder


@contextmanager
def processes() -> Iterator[ProcessRank]:
    """Connect this process with those that torchrun started for its run; yields its rank. Only rank 0 prints results.

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
