"""``regrow undo``: return to the model before a run."""

from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.screen import say

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
    from regrow.commands.undo import read_stages
    from regrow.commands.undo import undo as undo_run

    last = read_stages(run)[-1].record
    folder = undo_run(run, out)
    what = "run" if (folder / "run.json").is_file() else "model"
    say(f"undone: regrow {last['verb']} ({last['changed']}); {folder} holds the {what} before it")
