"""``regrow learn`` and ``regrow search``: train a network on one task after the other; search a space of networks."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import command
from regrow.cli.command import Flag, Stated, Verb
from regrow.cli.runs import recorded_run
from regrow.cli.screen import say
from regrow.settings import learn as learning
from regrow.settings import search as searching

if TYPE_CHECKING:
    pass

LEARN_EPILOG = """\b
Examples
  regrow learn permuted:digits:5 --method sparsegrow --out RUN
  regrow learn split:fashion/:5 --scenario class --method replay --set memory=500 --out RUN
  regrow learn digits --model PRUNED_RUN --method naive --out RUN
  regrow learn news code --model smollm2-135m --method naive --batch-size 4 --train 200 --test 50 --out RUN
  torchrun --no-python --nproc-per-node 2 regrow learn split:fashion/:5 --method ewc --out RUN
  regrow learn --resume RUN --task rotated:digits:3          add tasks to a finished run
"""
SEARCH_EPILOG = """\b
Examples
  regrow search cells:4-3-2 --data digits --target 0.2 --out RUN
  regrow search cells:8-6-3 --data cifar/ --target params=50k --stages 3 --epochs 30 --retrain 60 --out RUN
  regrow search mobile:8-2 --data cifar/ --target macs=2M --stride 1 --memory 1GiB --out RUN
  regrow search resnet:16-3 --data fashion/ --target macs=2M --out RUN
  regrow search RUN --data cifar/ --target macs=50% --epochs 10 --retrain 10 --out RUN2
  regrow search mynets:tiny --data fashion/ --target 0.2 --out RUN
  torchrun --no-python --nproc-per-node 2 regrow search cells:8-6-3 --data cifar/ --target params=50k --out RUN
  regrow search smollm2-135m --data news --target 0.9 --epochs 3 --retrain 0 --batch-size 2 --out RUN
"""
_resumed = partial(click.option, cls=Flag, heading="Resuming a run")


@click.command(
    cls=Verb,
    resumed=("resume", "out"),
    settings=learning.Settings,
    instead="resume",
    distributed=True,
    epilog=LEARN_EPILOG,
)
@command.run_folder()
@_resumed("--resume", type=command.PATH, help="Resume the run in this folder, or add tasks to it.")
@_resumed(
    "--task",
    "added",
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
@command.code
@command.track
def learn(
    stated: Stated[learning.Settings],
    out: Path | None,
    resume: Path | None,
    added: tuple[str, ...],
    without_old: bool,
    total: int | None,
    code: str,
    track: str,
) -> None:
    """Train a network on TASKS in sequence; writes a folder with the network, the accuracy matrix and every plan."""
    from regrow.jobs.learn import extend, run

    if resume:
        if "tasks" in stated.values or out:
            raise click.UsageError(
                "--resume writes to the folder of its run; leave out TASKS and --out, and give new tasks with --task"
            )
        if stated.options:
            raise click.UsageError(f"--resume uses the settings of its run; leave out {', '.join(stated.options)}")
        command.say_code(code)
        call = partial(extend, more=added, without_old=without_old, total=total)
    else:
        if added or without_old or total is not None:
            raise click.UsageError(
                "--task, --total and --without-old need --resume RUN; for a new run, give the tasks as TASKS"
            )
        settings = stated.build()
        command.say_code(settings.model, code, settings.method)
        call = partial(run, settings)
    folder = resume or out
    with recorded_run("network", folder, code=code, track=track) as invocation:
        call(invocation)
    say(f"to add tasks: regrow learn --resume {folder} --task TASKS")


@click.command(cls=Verb, resumed=("out",), settings=searching.Settings, distributed=True, epilog=SEARCH_EPILOG)
@command.run_folder(required=True)
@command.code
@command.track
def search(stated: Stated[searching.Settings], code: str, track: str, out: Path) -> None:
    """Search SPACE for a network within the target size and train it; writes a folder with the network and a report.

    A part of the training examples is held out for validation; the test set is used once, at the end.
    """
    settings = stated.build()
    command.say_code(settings.space, code, settings.method)
    from regrow.jobs.search import run

    with recorded_run("network", out, code=code, track=track) as invocation:
        run(settings, invocation)
    say(f"load it with regrow.load({str(out)!r})")
