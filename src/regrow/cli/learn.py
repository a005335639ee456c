"""``regrow learn``: train a network on one task after the other (continual learning)."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.flags import Flag, Given
from regrow.cli.runs import recorded_run
from regrow.cli.screen import number, say, table
from regrow.settings.learn import Settings

if TYPE_CHECKING:
    from regrow.store.run_folder import RunFolder

EPILOG = """\b
Examples
  regrow learn permuted:digits:5 --method sparsegrow --out RUN
  regrow learn split:fashion/:5 --scenario class --method replay --set memory=500 --out RUN
  regrow learn digits --model PRUNED_RUN --method naive --out RUN
  regrow learn news code --model smollm2-135m --method naive --batch-size 4 --train 200 --test 50 --out RUN
  torchrun --no-python --nproc-per-node 2 regrow learn split:fashion/:5 --method ewc --out RUN
  regrow learn --resume RUN --task rotated:digits:3          add tasks to a finished run
"""
_resumed = partial(click.option, cls=Flag, heading="Resuming a run")


@click.command(
    cls=Verb, resumed=("resume", "out"), settings=Settings, instead="resume", distributed=True, epilog=EPILOG
)
@options.run_folder()
@_resumed("--resume", type=options.PATH, help="Resume the run in this folder, or add tasks to it.")
@_resumed(
    "--task",
    "more",
    multiple=True,
    metavar="TASKS",
    help="With --resume: further sequences of tasks to learn. Repeatable.",
)
@_resumed(
    "--total",
    type=int,
    help="With --resume: the total number of task sequences after this call; allows a sequence to be learned again.",
)
@_resumed(
    "--without-old",
    is_flag=True,
    help="With --resume: continue if data of earlier tasks are missing; accuracy on those tasks is then not measured.",
)
@options.code
@options.track
def learn(
    given: Given[Settings],
    out: Path | None,
    resume: Path | None,
    more: tuple[str, ...],
    without_old: bool,
    total: int | None,
    code: str,
    track: str,
) -> None:
    """Train a network on TASKS in sequence; writes a folder with the network, the accuracy matrix and every plan."""
    from regrow.jobs.learn import extend, run

    if resume:
        if "tasks" in given.values or out:
            raise click.UsageError(
                "--resume writes to the folder of its run; leave out TASKS and --out, and give new tasks with --task"
            )
        if given.options:
            raise click.UsageError(f"--resume uses the settings of its run; leave out {', '.join(given.options)}")
        options.say_code(code)
        call = partial(extend, more=more, without_old=without_old, total=total)
    else:
        if more or without_old or total is not None:
            raise click.UsageError(
                "--task, --total and --without-old need --resume RUN; for a new run, give the tasks as TASKS"
            )
        settings = given.build()
        options.say_code(settings.model, code, settings.method)
        call = partial(run, settings)
    folder = resume or out
    with recorded_run("network", _tell, folder, code=code, track=track) as invocation:
        call(invocation)
    say(f"to add tasks: regrow learn --resume {folder} --task TASKS")


def _tell(folder: "RunFolder") -> None:
    rows = folder.metrics()
    matrix = folder.last("matrix")
    sizes = {row["task"]: row for row in rows if row["what"] == "task"}
    shown = [  # earlier rows have no entries for tasks that were added later
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
        ("average during learning", "average_along", ".3f"),
        ("learning accuracy", "learning", ".3f"),
        ("forgetting", "forgetting", ".3f"),
        ("backward transfer", "backward_transfer", "+.3f"),
        ("forward transfer", "forward_transfer", "+.3f"),
    )
    for row in [row for row in rows if row["what"] == "gone"][-1:]:
        say(f"note: data are missing, so accuracy was not measured on {', '.join(row['tasks'])}")
    say(", ".join(f"{words} {matrix[name]:{form}}" for words, name, form in names if matrix[name] is not None))
