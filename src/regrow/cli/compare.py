"""``regrow compare``: compare several runs on one page."""

from functools import partial
from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.screen import say


@click.command(cls=Verb, needs="regrow.reports")
@click.argument("runs", nargs=-1, required=True, type=options.PATH)
@click.option("--out", default="comparison.html", show_default=True, type=options.PATH, help="The HTML file to write.")
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Compare two or more RUNS on one HTML page, and print the table."""
    from regrow.reports import summarise, to_markdown, write_page
    from regrow.store.outputs import PAGES, check_output, write_output

    if len(runs) < 2:
        raise click.UsageError("compare takes two runs or more; `regrow report RUN` makes the page of one")
    check_output(out, PAGES, streams=True)
    say(to_markdown(summarise(list(runs))), lines=True)
    say(f"page: {write_page(list(runs), out, partial(write_output, suffixes=PAGES))}")
