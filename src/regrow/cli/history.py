"""``regrow history``: list the runs that made a network."""

from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.screen import number, say, table


@click.command(cls=Verb)
@click.argument("run", type=options.PATH)
def history(run: Path) -> None:
    """List the runs that made the network of RUN, with what each changed and the copy of the model before it."""
    from regrow.commands.undo import read_stages

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
