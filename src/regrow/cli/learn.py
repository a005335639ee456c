"""``regrow learn``: a network that learns one task after the other."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.report import RunPage
from regrow.cli.screen import number, say, table, working
from regrow.settings.words import parse_pairs

EPILOG = """\b
TASKS are sequences: permuted:DATA:10, rotated:DATA:10, split:DATA:5, or DATA for a single task. DATA is digits
(scikit-learn's) or a folder with the four files of MNIST or Fashion-MNIST.

\b
Examples
  regrow learn permuted:digits:5 --method sparsegrow --out RUN
  regrow learn split:fashion/:5 --scenario class --method replay --set memory=500 --out RUN
  regrow learn --resume RUN --task rotated:digits:3          tasks that came later
"""


@click.command(cls=Verb, resumed=("resume", "out"), epilog=EPILOG)
@click.argument("tasks", nargs=-1)
@click.option("--method", default="sparsegrow", show_default=True, help="What learns: see `regrow methods`.")
@click.option(
    "--model",
    default="mlp:100-100",
    show_default=True,
    help="mlp:100-100 (hidden widths), resnet:16-3 (width, stages), resnet-gn:16-3 (with GroupNorm).",
)
@click.option("--out", type=options.PATH, help="The run folder. The same command resumes a stopped run.")
@click.option("--resume", type=options.PATH, help="Go on with the run of this folder.")
@click.option("--task", "more", multiple=True, metavar="TASKS", help="With --resume: what it is to learn now.")
@click.option(
    "--total",
    type=int,
    help="With --resume: how many sequences of tasks the run has in the end; to learn the same sequence once more.",
)
@click.option(
    "--without-old",
    is_flag=True,
    help="With --resume: data of tasks that are over may be gone; what is still known of those is not measured then.",
)
@click.option(
    "--scenario",
    default="domain",
    show_default=True,
    type=click.Choice(["domain", "class", "task"]),
    help="Answers are chosen among all classes, those seen so far, or those of the task (which is then told).",
)
@click.option("--epochs", default=5, show_default=True, type=int, help="Passes over each task.")
@click.option("--batch-size", default=64, show_default=True, type=int, help="Examples per step.")
@click.option("--optimizer", default="sgd", show_default=True, type=click.Choice(["sgd", "adamw"]))
@click.option("--lr", default=0.01, show_default=True, type=float, help="Learning rate.")
@click.option("--weight-decay", default=0.0, show_default=True, type=float)
@click.option("--train", default=0, type=int, help="Learn from at most so many examples per task; 0: all.")
@click.option("--test", default=0, type=int, help="Evaluate on at most so many; 0: all.")
@click.option("--classes", default=0, type=int, help="Outputs at least; classes of tasks that come later need some.")
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="What losses are taken in; weights stay in float32.",
)
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of the method.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of weights, orders and everything drawn.")
def learn(
    tasks: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    more: tuple[str, ...],
    without_old: bool,
    total: int | None,
    pairs: Any,
    **given: Any,
) -> None:
    """Learn TASKS one after the other, and leave a folder with the network, the accuracy matrix and every plan."""
    from regrow.commands.learn import Settings, extend, run

    page = RunPage("network")
    if resume:
        if tasks or out:
            raise click.UsageError(
                "--resume goes on in its own folder, so leave out TASKS and --out, and name tasks with --task"
            )
        if told := [f"--{name.replace('_', '-')}" for name in given if _given(name)] + ["--set"] * bool(pairs):
            raise click.UsageError(f"--resume goes on with the settings of its run; leave out {', '.join(told)}")
        with working() as progress:
            folder = extend(resume, more, progress, without_old=without_old, total=total, write_page=page)
    else:
        if more or without_old or total is not None:
            raise click.UsageError(
                "--task, --total and --without-old are of a run that goes on, with --resume RUN; a new run names TASKS "
                "alone"
            )
        if not tasks:
            raise click.UsageError("name what is to be learned, for example `regrow learn permuted:digits:5 --out RUN`")
        if out is None:
            raise click.UsageError("--out names the folder of the run, for example --out run")
        with working() as progress:
            settings = Settings(tasks, method_settings=parse_pairs(pairs), **given)
            folder = run(settings, out, progress, write_page=page)
    _tell(folder)
    page.tell(folder.path)
    say(f"further tasks: regrow learn --resume {folder.path} --task TASKS")


def _given(name: str) -> bool:
    """Whether an option was written, rather than left at its default."""
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


def _tell(folder: Any) -> None:
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
