"""``regrow learn``: train a network on one task after the other (continual learning)."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.flags import Flag, Given
from regrow.cli.runs import run_with_page
from regrow.cli.screen import number, say, table
from regrow.settings.learn import Settings

if TYPE_CHECKING:
    from regrow.run_folder import RunFolder

EPILOG = """\b
Examples
  regrow learn permuted:digits:5 --method sparsegrow --out RUN
  regrow learn split:fashion/:5 --scenario class --method replay --set memory=500 --out RUN
  regrow learn --resume RUN --task rotated:digits:3          tasks that came later
"""
RESUME = "Going on with a run"


@click.command(cls=Verb, resumed=("resume", "out"), settings=Settings, instead="resume", epilog=EPILOG)
@options.run_folder()
@click.option("--resume", type=options.PATH, help="Go on with the run of this folder.", cls=Flag, heading=RESUME)
@click.option(
    "--task",
    "more",
    multiple=True,
    metavar="TASKS",
    help="With --resume: what it is to learn now.",
    cls=Flag,
    heading=RESUME,
)
@click.option(
    "--total",
    type=int,
    help="With --resume: how many sequences of tasks the run has in the end; to learn the same sequence once more.",
    cls=Flag,
    heading=RESUME,
)
@click.option(
    "--without-old",
    is_flag=True,
    help="With --resume: data of tasks that are over may be gone; what is still known of those is not measured then.",
    cls=Flag,
    heading=RESUME,
)
def learn(
    given: Given[Settings],
    out: Path | None,
    resume: Path | None,
    more: tuple[str, ...],
    without_old: bool,
    total: int | None,
) -> None:
    """Learn TASKS one after the other, and leave a folder with the network, the accuracy matrix and every plan."""
    if resume:
        if "tasks" in given.values or out:
            raise click.UsageError(
                "--resume goes on in its own folder, so leave out TASKS and --out, and name tasks with --task"
            )
        if given.options:
            raise click.UsageError(
                f"--resume goes on with the settings of its run; leave out {', '.join(given.options)}"
            )
        from regrow.commands.learn import extend

        train = partial(extend, resume, more, without_old=without_old, total=total)
    else:
        if more or without_old or total is not None:
            raise click.UsageError(
                "--task, --total and --without-old are of a run that goes on, with --resume RUN; a new run names TASKS "
                "alone"
            )
        settings = given.build()
        options.say_code(settings.method)
        if out is None:
            raise click.UsageError("--out names the folder of the run, for example --out run")
        from regrow.commands.learn import run

        train = partial(run, settings, out)
    folder = run_with_page("network", train, _tell)
    say(f"further tasks: regrow learn --resume {folder.path} --task TASKS")


def _tell(folder: "RunFolder") -> None:
    rows = folder.metrics()
    matrix = folder.last("matrix")
    sizes = {row["task"]: row for row in rows if row["what"] == "task"}
    shown = [  # of tasks that came later, earlier rows tell nothing
        ["–" if value is None else f"{100 * value:.1f}" for value in row] + [""] * (len(matrix["tasks"]) - len(row))
        for row in matrix["matrix"]
    ]
    table(
        "Accuracy, per cent",
        ["after learning", *(f"{i + 1}" for i in range(len(matrix["tasks"]))), "parameters"],
        [
            [name, *cells, number(sizes[i]["parameters"]) if i in sizes else ""]
            for i, (name, cells) in enumerate(zip(matrix["tasks"], shown, strict=True))
        ],
        numbers=range(1, len(matrix["tasks"]) + 2),
    )
    names = (
        ("final average accuracy", "average", ".3f"),
        ("along the way", "average_along", ".3f"),
        ("learning accuracy", "learning", ".3f"),
        ("forgetting", "forgetting", ".3f"),
        ("backward transfer", "backward_transfer", "+.3f"),
        ("forward transfer", "forward_transfer", "+.3f"),
    )
    for row in [row for row in rows if row["what"] == "gone"][-1:]:
        say(f"note: not there any more, and not asked: {', '.join(row['tasks'])}")
    say(", ".join(f"{words} {matrix[name]:{form}}" for words, name, form in names if matrix[name] is not None))
