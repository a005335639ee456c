"""``regrow report``: write the report page of a run."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.screen import say

PAGE = "report.html"


@click.command(cls=Verb, needs="regrow.reports")
@click.argument("run", type=options.PATH)
@click.option("--out", type=options.PATH, help="The page; RUN/report.html, unless given.")
@click.option("--markdown", is_flag=True, help="Print it as Markdown instead.")
def report(run: Path, out: Path | None, markdown: bool) -> None:
    """Write the page of RUN again: one file, no connection needed."""
    from regrow.reports import summarise, to_markdown, write_page
    from regrow.store.outputs import PAGES, check_output, write_output

    if markdown:
        say(to_markdown(summarise([run])), lines=True)
    elif out:
        check_output(out, PAGES, streams=True)
        say(f"page: {write_page([run], out, partial(write_output, suffixes=PAGES))}")
    else:
        say(f"page: {write_page([run], _place(run))}")


def _place(run: Path) -> Path:
    """Return where the page of a run is written; for an unfinished run, in its working area."""
    from regrow.run_folder import RunFolder

    begun = RunFolder.started(run) if not (run / "run.json").is_file() else None
    return (begun.path if begun else run) / PAGE


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

    def tell(self, folder: Path) -> None:
        """Print where the page is, or why there is none.

        Args:
            folder: The folder of the finished run.

        Raises:
            Exception: If writing the page failed for another reason than a missing package.
        """
        from regrow.reports import ReportError

        if self.error is not None:
            say(f"the {self.what} is in {folder}; no page was written: {self.error}")
            if not isinstance(self.error, ReportError):
                raise self.error
        elif (folder / PAGE).is_file():
            say(f"{self.what} and page are in {folder}; open {folder / PAGE}")
