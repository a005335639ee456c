"""Commands that read run folders (``report``, ``undo``), and ``methods``."""

import re
from pathlib import Path

import click

from regrow.cli.command import PATH, Verb
from regrow.cli.completion import complete
from regrow.cli.runs import say_run
from regrow.cli.screen import print_table, say, show_lines
from regrow.store.atomic import PAGE, PAGES

REPORT_EPILOG = """\b
Examples
  regrow report RUN                            RUN/report.html
  regrow report RUN RUN2 --out both.html       compare two runs on one page
"""
UNDO_EPILOG = """\b
Examples
  regrow undo RUN --out BEFORE     write what RUN started from to a new folder
  regrow undo RUN                  replace RUN by what it started from
"""


@click.command(cls=Verb, preload="regrow.reports", epilog=REPORT_EPILOG)
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--out", type=PATH, help="The HTML file to write; default: RUN/report.html, of several comparison.html.")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Report on RUN, or compare several runs.

    The report is printed, and written as an HTML page that needs no internet.
    """
    from regrow.reports import comparison, read_runs, to_html
    from regrow.store.atomic import write_output
    from regrow.store.run_record import RUN, find_unfinished

    if out is None and len(runs) > 1:
        out = Path("comparison.html")
    elif out is None:
        run = runs[0]
        if not (run / RUN).is_file():
            run = find_unfinished(run) or run  # the page of an unfinished run lies in its working area
        out = run / PAGE
    with show_lines("writing the page"):
        records = read_runs(runs)
        write_output(out, to_html(records), PAGES)
    if len(runs) == 1:
        say_run(runs[0])
    else:
        compared = comparison.compare(records)
        cells = [compared.table.columns, *compared.table.rows]
        columns, *rows = zip(*cells, strict=True) if len(cells) <= len(cells[0]) else cells  # the short side is across
        print_table(compared.table.title, columns, rows)
        for line in compared.averages:
            say(line)
        for alarm in compared.alarms:
            say(f"note: {alarm}")
    say(f"page: {out}")


@click.command(cls=Verb, epilog=UNDO_EPILOG)
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="The folder to write, new or empty; default: RUN itself is replaced.")
def undo(run: Path, out: Path | None) -> None:
    """Return to the model before the last change of RUN.

    The run or model that RUN started from is restored bit for bit.
    """
    from regrow.jobs.parents import read_stages, undo_run

    last = read_stages(run)[-1].record
    with show_lines("copying the files before it"):
        folder = undo_run(run, out)
    what = "run" if (folder / "run.json").is_file() else "model"
    say(f"undone: regrow {last['verb']} ({last['changed']}); {folder} holds the {what} before it")


@click.command(cls=Verb, preload="regrow.methods")
@click.argument("name", required=False, shell_complete=complete)
def methods(name: str | None) -> None:
    """List all methods, or explain one.

    Of method NAME: what it does, its settings, its citation.
    """
    from regrow.cli.checks import METHOD_KINDS
    from regrow.methods import TABLES, added_methods, describe_method

    if name is None:
        added = added_methods()
        for command, kind in METHOD_KINDS.items():
            abouts = {key: TABLES[kind].describe(key).about for key in TABLES[kind]}
            abouts |= {key: row.about for key, row in added.items() if row.kind == kind}
            rows = [(key, about.strip().splitlines()[0].rstrip(".")) for key, about in abouts.items()]
            print_table(f"Methods of `regrow {command}`", ("name", "what it does"), rows)
        say("`regrow methods NAME` explains one and lists its settings")
        return
    method = describe_method(name)
    say(method.about.strip() + "\n", lines=True)
    helps: dict[str, str] = {}
    current = ""
    for line in method.settings_help.partition("Args:")[2].splitlines():
        if match := re.match(r"\s{8}(\w+): (.*)", line):
            current = match[1]
            helps[current] = match[2]
        elif current and line.strip():
            helps[current] += " " + line.strip()
    defaults = method.defaults.items()
    rows = [(f"--set {key}={_format_default(default)}", helps.get(key, "")) for key, default in defaults]
    print_table("Settings and their defaults", ("flag", "meaning"), rows)
    say(f"\nCite: {method.citation}", lines=True)


def _format_default(value: object) -> str:
    """Return the default of a method's setting as text for ``--set NAME=``: ``true``, ``0.1,0.3``."""
    if isinstance(value, tuple):
        return ",".join(map(_format_default, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
