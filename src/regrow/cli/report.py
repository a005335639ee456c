"""``regrow report``: the page of a run."""

from pathlib import Path
from typing import Any

import click

from regrow.cli.boundary import Verb
from regrow.cli.screen import say


@click.command(cls=Verb)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page; RUN/report.html, unless given.")
@click.option("--markdown", is_flag=True, help="Print it as Markdown instead.")
def report(run: Path, out: Path | None, markdown: bool) -> None:
    """Write the page of RUN again: one file, no connection needed."""
    from regrow.reports import summarise, to_markdown, write_page

    if markdown:
        say(to_markdown(summarise([run])), lines=True)
    else:
        say(f"page: {write_page([run], out or run / 'report.html')}")


def page_of(folder: Any, what: str) -> None:
    """Write the page of a run that has just ended, and say where it is.

    Args:
        folder: The run's folder.
        what: What else lies in it.
    """
    from regrow.reports import ReportError, write_page

    try:
        page = write_page([folder.path], folder.path / "report.html")
    except ReportError as error:
        say(f"the {what} is in {folder.path}; no page was written: {error}")
    else:
        say(f"{what} and page are in {folder.path}; open {page}")
