"""``regrow report``: write the report page of a run."""

from functools import partial
from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.runs import PAGE
from regrow.cli.screen import say


@click.command(cls=Verb, needs="regrow.reports")
@click.argument("runs", nargs=-1, required=True, type=options.PATH)
@click.option("--out", default="comparison.html", show_default=True, type=options.PATH, help="The HTML file to write.")
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Compare two or more RUNS on one HTML page, and print the table."""
    from regrow.reports import summarise, to_markdown, write_page
    from regrow.store.atomic import PAGES, check_output, write_output

    if len(runs) < 2:
        raise click.UsageError("compare takes two runs or more; `regrow report RUN` makes the page of one")
    check_output(out, PAGES, streams=True)
    say(to_markdown(summarise(list(runs))), lines=True)
    say(f"page: {write_page(list(runs), out, partial(write_output, suffixes=PAGES))}")


@click.command(cls=Verb, needs="regrow.reports")
@click.argument("run", type=options.PATH)
@click.option("--out", type=options.PATH, help="The HTML file to write; default: RUN/report.html.")
@click.option("--markdown", is_flag=True, help="Print the report as Markdown instead.")
def report(run: Path, out: Path | None, markdown: bool) -> None:
    """Write the report page of RUN: one HTML file that needs no internet connection."""
    from regrow.reports import summarise, to_markdown, write_page
    from regrow.store.atomic import PAGES, check_output, write_output

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
