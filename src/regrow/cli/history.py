"""``regrow history``: list the runs that made a network."""

from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.screen import number, say, table

EPILOG = """\b
Examples
  regrow undo RUN --out BEFORE     write what RUN started from to a new folder
  regrow undo RUN                  replace RUN by what it started from
"""


@click.command(cls=Verb, epilog=EPILOG)
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
    rows = [
        (
            stage.record["name"],
            stage.record["verb"],
            stage.record["changed"],
            number(stage.record["before"] or None),
            number(stage.record["parameters"]),
        )
        for stage in stages
    ]
    columns = ("run", "command", "changed", "parameters before", "after")
    table("History of the network", columns, rows, numbers=(3, 4))
    for stage in stages:
        say(f"{stage.record['name']}: {stage.record['command']}")
        say(f"  the model before it: {stage.snapshot or 'not kept'}")
