"""Commands that read run folders: ``report``, ``compare``, ``history``, ``undo`` and ``settings``."""

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.runs import PAGE
from regrow.cli.screen import number, say, table
from regrow.settings import grow, learn, prune, recover, search
from regrow.settings.words import format_settings, left_out

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KINDS: dict[str, type["DataclassInstance"]] = {
    "prune": prune.Settings,
    "grow": grow.Settings,
    "recover": recover.Settings,
    "learn": learn.Settings,
    "search": search.Settings,
}
UNDO_EPILOG = """\b
Examples
  regrow undo RUN --out BEFORE     write what RUN started from to a new folder
  regrow undo RUN                  replace RUN by what it started from
"""
SETTINGS_EPILOG = """\b
Examples
  regrow settings RUN --out recipe.toml
  regrow learn --config recipe.toml --seed 1 --out RUN2
"""


@click.command(cls=Verb, needs="regrow.reports")
@click.argument("runs", nargs=-1, required=True, type=options.PATH)
@click.option("--out", default="comparison.html", show_default=True, type=options.PATH, help="The HTML file to write.")
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Compare two or more RUNS on one HTML page, and print the table."""
    from regrow.reports import summarise, to_markdown

    if len(runs) < 2:
        raise click.UsageError("compare takes two runs or more; `regrow report RUN` makes the page of one")
    _write_page(runs, out, to_markdown(summarise(runs)))


@click.command(cls=Verb, needs="regrow.reports")
@click.argument("run", type=options.PATH)
@click.option("--out", type=options.PATH, help="The HTML file to write; default: RUN/report.html.")
@click.option("--markdown", is_flag=True, help="Print the report as Markdown instead.")
def report(run: Path, out: Path | None, markdown: bool) -> None:
    """Write the report page of RUN: one HTML file that needs no internet connection."""
    from regrow.reports import summarise, to_markdown, write_page
    from regrow.store.run_record import unfinished_folder

    if markdown:
        say(to_markdown(summarise([run])), lines=True)
    elif out:
        _write_page([run], out)
    else:
        begun = unfinished_folder(run) if not (run / "run.json").is_file() else None
        say(f"page: {write_page([run], (begun or run) / PAGE)}")


def _write_page(runs: "tuple[Path, ...] | list[Path]", out: Path, text: str = "") -> None:
    """Write a page to a file that the user names, once that is known to be possible, and print a text before it."""
    from regrow.reports import write_page
    from regrow.store.atomic import PAGES, check_output, write_output

    check_output(out, PAGES, streams=True)
    if text:
        say(text, lines=True)
    say(f"page: {write_page(runs, out, partial(write_output, suffixes=PAGES))}")


@click.command(cls=Verb, epilog=UNDO_EPILOG)
@click.argument("run", type=options.PATH)
@click.option("--out", type=options.PATH, help="The folder to write, new or empty; default: RUN itself is replaced.")
def undo(run: Path, out: Path | None) -> None:
    """Undo the last change of the network of RUN: return to the run or model that it started from, bit for bit."""
    from regrow.jobs.parents import read_stages
    from regrow.jobs.parents import undo as undo_run

    last = read_stages(run)[-1].record
    folder = undo_run(run, out)
    what = "run" if (folder / "run.json").is_file() else "model"
    say(f"undone: regrow {last['verb']} ({last['changed']}); {folder} holds the {what} before it")


@click.command(cls=Verb)
@click.argument("run", type=options.PATH)
def history(run: Path) -> None:
    """List the runs that made the network of RUN, with what each changed and the copy of the model before it."""
    from regrow.jobs.parents import read_stages

    stages = read_stages(run)
    rows = []
    for row in (stage.record for stage in stages):
        sizes = number(row["before"] or None), number(row["parameters"])
        rows.append((row["name"], row["verb"], row["changed"], *sizes))
    columns = ("run", "command", "changed", "parameters before", "after")
    table("History of the network", columns, rows, numbers=(3, 4))
    for stage in stages:
        say(f"{stage.record['name']}: {stage.record['command']}")
        say(f"  the model before it: {stage.snapshot or 'not kept'}")


@click.command(cls=Verb, needs="regrow.store.run_record", epilog=SETTINGS_EPILOG)
@click.argument("run", type=options.PATH)
@click.option("--out", type=options.PATH, help="The file to write, .toml; default: print it.")
def settings(run: Path, out: Path | None) -> None:
    """Write the settings of RUN to a file for --config. Names of your own code are left out."""
    from regrow.store.atomic import check_output, write_output
    from regrow.store.replacing import settle
    from regrow.store.run_record import convert_settings, read_run, unfinished_folder

    if out:
        check_output(out, (".toml",), streams=True)
    settle(run)
    data = read_run(unfinished_folder(run) or run)
    command = data["verb"]
    if command not in KINDS:
        raise click.UsageError(f"{run} holds a run of {command!r}; give one of {', '.join(KINDS)}")
    known: DataclassInstance = convert_settings(data["settings"], KINDS[command])
    text = format_settings(known)
    if out is None:
        say(text.rstrip("\n"), lines=True)
        return
    write_output(out, text, (".toml",))
    say(f"settings written to {out}")
    say(f"use them with `{shlex.join(['regrow', command, *left_out(known), '--config', str(out), '--out', 'RUN'])}`")
