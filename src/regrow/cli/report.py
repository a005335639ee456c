"""``regrow report``: write the report page of a run."""

from functools import partial
from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.runs import PAGE
from regrow.cli.screen import say


@click.command(cls=Verb, needs="regrow.reports")
@click.argument("run", type=options.PATH)
@click.option("--out", type=options.PATH, help="The HTML file to write; default: RUN/report.html.")
@click.option("--markdown", is_flag=True, help="Print the report as Markdown instead.")
def report(run: Path, out: Path | None, markdown: bool) -> None:
    """Write the report page of RUN: one HTML file that needs no internet connection."""
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
    from regrow.store.run_record import unfinished_folder

    begun = unfinished_folder(run) if not (run / "run.json").is_file() else None
    return (begun or run) / PAGE
