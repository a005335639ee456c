"""Commands that read run folders (``report``, ``compare``, ``history``, ``undo``, ``settings``), and ``methods``."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli.command import PATH, Verb
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
METHOD_COMMANDS = {"pruning": "prune", "recovery": "recover", "continual": "learn", "search": "search"}
"""Kind of method → the command that uses it."""
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
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--out", default="comparison.html", show_default=True, type=PATH, help="The HTML file to write.")
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Compare two or more RUNS on one HTML page, and print the table."""
    from regrow.reports import summarise, to_html, to_markdown
    from regrow.store.atomic import PAGES, write_output

    if len(runs) < 2:
        raise click.UsageError("compare takes two runs or more; `regrow report RUN` makes the page of one")
    summary = summarise(runs)
    write_output(out, to_html(summary), PAGES)
    say(to_markdown(summary), lines=True)
    say(f"page: {out}")


@click.command(cls=Verb, needs="regrow.reports")
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="The HTML file to write; default: RUN/report.html.")
@click.option("--markdown", is_flag=True, help="Print the report as Markdown instead.")
def report(run: Path, out: Path | None, markdown: bool) -> None:
    """Write the report page of RUN: one HTML file that needs no internet connection."""
    from regrow.reports import summarise, to_html, to_markdown, write_page
    from regrow.store.atomic import PAGES, write_output
    from regrow.store.run_record import unfinished_folder

    if markdown:
        say(to_markdown(summarise([run])), lines=True)
        return
    if out:
        write_output(out, to_html(summarise([run])), PAGES)
    else:
        begun = unfinished_folder(run) if not (run / "run.json").is_file() else None
        out = write_page([run], (begun or run) / PAGE)
    say(f"page: {out}")


@click.command(cls=Verb, epilog=UNDO_EPILOG)
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="The folder to write, new or empty; default: RUN itself is replaced.")
def undo(run: Path, out: Path | None) -> None:
    """Undo the last change of the network of RUN: return to the run or model that it started from, bit for bit."""
    from regrow.jobs.parents import read_stages
    from regrow.jobs.parents import undo as undo_run

    last = read_stages(run)[-1].record
    folder = undo_run(run, out)
    what = "run" if (folder / "run.json").is_file() else "model"
    say(f"undone: regrow {last['verb']} ({last['changed']}); {folder} holds the {what} before it")


@click.command(cls=Verb)
@click.argument("run", type=PATH)
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
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="The file to write, .toml; default: print it.")
def settings(run: Path, out: Path | None) -> None:
    """Write the settings of RUN to a file for --config. Names of your own code are left out."""
    from regrow.store.atomic import check_output, write_output
    from regrow.store.replacing import settle
    from regrow.store.run_record import convert_settings, read_run, unfinished_folder

    if out:
        check_output(out, (".toml",))
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


@click.command(cls=Verb, needs="torch")
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List all methods, or explain method NAME: what it does, its settings, its citation."""
    from regrow.methods import TABLES, MethodKind, added_methods, find_method

    if name is None:
        added = added_methods()
        for kind, command in METHOD_COMMANDS.items():
            known = dict(TABLES[MethodKind(kind)]) | {key: row for key, row in added.items() if row.kind == kind}
            rows = [(key, row.about.strip().splitlines()[0].rstrip(".")) for key, row in known.items()]
            table(f"Methods of `regrow {command}`", ("name", "what it does"), rows)
        say("`regrow methods NAME` explains one and lists its settings")
        return
    method = find_method(None, name)
    say(method.about.strip() + "\n", lines=True)
    helps: dict[str, str] = {}
    current = ""
    for line in (method.settings.__doc__ or "").partition("Args:")[2].splitlines():
        if match := re.match(r"\s{8}(\w+): (.*)", line):
            current = match[1]
            helps[current] = match[2]
        elif current and line.strip():
            helps[current] += " " + line.strip()
    settings = fields(method.settings)
    rows = [(f"--set {field.name}={_shown(field.default)}", helps.get(field.name, "")) for field in settings]
    table("Settings and their defaults", ("flag", "meaning"), rows)
    say(f"\nCite: {method.citation}", lines=True)


def _shown(value: object) -> str:
    """Return the default of a setting as it is typed after ``--set NAME=``."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
