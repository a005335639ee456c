"""``regrow report``: the page of a run."""

from pathlib import Path

import click

from regrow.cli.screen import say


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page; RUN/report.html, unless given.")
@click.option("--markdown", is_flag=True, help="Print it as Markdown instead.")
def report(run: Path, out: Path | None, markdown: bool) -> None:
    """Write the page of RUN again: one file, no connection needed."""
    from regrow.reports import summarise, to_markdown, write_page

    if markdown:
        say(to_markdown(summarise([run])))
    else:
        say(f"page: {write_page([run], out or run / 'report.html')}")
