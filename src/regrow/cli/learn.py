"""``regrow learn`` and ``regrow search``: train a network on one task after the other; search a space of networks."""

from functools import partial
from pathlib import Path

import click

from regrow.cli import command
from regrow.cli.command import GroupedOption, Verb
from regrow.cli.runs import recorded_run
from regrow.settings import learn as learning
from regrow.settings import search as searching

LEARN_EPILOG = """\b
Examples
  regrow learn permuted:digits:5 --method sparsegrow --out RUN
  regrow learn split:fashion/:5 --scenario class --method replay --set memory=500 --out RUN
  regrow learn news code --model smollm2-135m --method naive --batch-size 4 --train 200 --test 50 --out RUN
  regrow learn --resume RUN --task rotated:digits:3          add tasks to a finished run
"""
SEARCH_EPILOG = """\b
Examples
  regrow search cells:4-3-2 --data digits --target params=20% --out RUN
  regrow search mobile:8-2 --data cifar/ --target macs=2M --stride 1 --memory 1GiB --out RUN
  regrow search mynets:tiny --data fashion/ --target params=20% --out RUN         your own network
  regrow search RUN --data cifar/ --target macs=50% --epochs 10 --retrain 10 --out RUN2
"""
_resumed = partial(click.option, cls=GroupedOption, heading="Resuming a run")


@click.command(cls=Verb, settings=learning.Settings, distributed=True, epilog=LEARN_EPILOG)
@command.run_folder
@_resumed("--resume", common=True, type=command.PATH, help="Resume the run in this folder, or add tasks to it.")
@_resumed(
    "--task",
    "added",
    common=True,
    multiple=True,
    metavar="TASKS",
    help="With --resume: further sequences of tasks to learn. Repeatable.",
)
@_resumed(
    "--without-old",
    is_flag=True,
    help="With --resume: continue if data of earlier tasks are missing; accuracy on those tasks is then not measured.",
)
@command.code
def learn(
    settings: learning.Settings | None,
    out: Path | None,
    resume: Path | None,
    added: tuple[str, ...],
    without_old: bool,
    code: str,
) -> None:
    """Train a network on TASKS in sequence.

    Writes a folder with the network, the accuracy matrix and every plan.
    """
    from regrow.jobs.learn import extend, learn_named

    if settings is None:
        if out:
            raise click.UsageError(f"--resume writes to the folder of its run; leave out --out {out}")
        command.announce_code(code)
        call = partial(extend, sequences=added, without_old=without_old)
    else:
        if added or without_old:
            raise click.UsageError("--task and --without-old need --resume RUN; for a new run, give the tasks as TASKS")
        command.announce_code(settings.model, code, settings.method)
        call = partial(learn_named, settings)
    with recorded_run(resume or out, code=code) as invocation:
        call(invocation)


@click.command(cls=Verb, settings=searching.Settings, distributed=True, epilog=SEARCH_EPILOG)
@command.run_folder
@command.code
def search(settings: searching.Settings, code: str, out: Path) -> None:
    """Search SPACE for a network of a target size.

    The network is trained; writes a folder with it and a report.
    A part of the training examples is held out for validation; the test set is used once, at the end.
    """
    command.announce_code(settings.space, code, settings.method)
    from regrow.jobs.search import search_named

    with recorded_run(out, code=code) as invocation:
        search_named(settings, invocation)
