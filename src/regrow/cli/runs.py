"""Commands that write a run folder with its report page: their options, and their course on the screen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.processes import processes
from regrow.cli.screen import say, working
from regrow.core.amounts import format_bytes

if TYPE_CHECKING:
    from regrow.jobs.recording import Invocation
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
        more: dict[str, Any] = {"settings": settings, "epilog": epilog, "distributed": distributed}
        command = click.command(cls=Verb, resumed=("out",), **more)
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
        """Write the page into the folder.

        Args:
            folder: The complete folder of the run.

        Raises:
            StoreError: If the disk is full, or the file cannot be written.
        """
        from regrow.reports import write_page
        from regrow.store.errors import StoreError

        self.error = None
        try:
            write_page([folder], folder / PAGE)
        except StoreError:
            raise
        except Exception as error:
            self.error = error

    def tell(self, path: Path, tell_result: "Callable[[RunFolder], None]") -> None:
        """Print the result of a run, and where its page is, or why there is none.

        Args:
            path: The folder of the finished run.
            tell_result: Prints the result.

        Raises:
            Exception: If writing the page failed for another reason than a missing package.
        """
        from regrow.reports import ReportError
        from regrow.store.run_folder import RunFolder

        folder = RunFolder(path)
        snapshot = folder.run().get("snapshot")  # an error if the folder was deleted meanwhile
        tell_result(folder)
        if snapshot:
            size = format_bytes(snapshot["bytes"])
            say(f"{path / 'before'} holds what the run started from, {size}: `regrow undo {path}`")
        if self.error is not None:
            say(f"the {self.what} is in {path}; no page was written: {self.error}")
            if not isinstance(self.error, ReportError):
                raise self.error
        elif (path / PAGE).is_file():
            say(f"{self.what} and page are in {path}; open {path / PAGE}")


@contextmanager
def recorded_run(
    what: str, tell: "Callable[[RunFolder], None]", out: Path | None, *, code: str = "", memory: str = "", track: str
) -> "Iterator[Invocation]":
    """Yield how a command is called, for the ``with`` block to run it; shows progress, and then the result.

    Where folder and page are is printed last. Of several processes, only rank 0 prints and writes the page.

    Args:
        what: The name of the folder's content beside the page: ``model`` or ``network``.
        tell: Prints the result.
        out: The run folder, which the block writes.
        code: The value of ``--code``.
        memory: The value of ``--memory``.
        track: The value of ``--track``.

    Raises:
        UsageError: If there is no folder to write.
    """
    if out is None:
        raise click.UsageError("--out names the folder of the run, for example --out run")
    from regrow.jobs.recording import Invocation

    page = RunPage(what)
    with processes() as ranks:
        if not ranks.leads:
            yield Invocation(out, code, memory, ranks=ranks)
            return
        with working() as progress:
            yield Invocation(out, code, memory, track, ranks, say, progress, page)
        page.tell(out, tell)
