"""``regrow prune`` and ``regrow recover``: prune a model, win back quality, and print what was lost."""

from pathlib import Path

import click

from regrow.cli import command
from regrow.cli.command import Verb
from regrow.cli.runs import recorded_run
from regrow.cli.screen import say, show_progress
from regrow.distributed import read_ranks
from regrow.settings import recover as recovery
from regrow.settings.prune import Settings

EPILOG = """\b
Examples
  regrow prune smollm2-135m --keep 0.9 --source news --source code --source manual --source talk --out RUN
  regrow prune ./my-llama --method fisher --only mlp --keep 0.7 --source mail=letters/ --source code \\
    --source generated --reconstruct --out RUN
  regrow prune ./my-llama --target bytes=200M --regular --round 64 --source mail=letters/ --out RUN
  regrow prune resnet18 --method magnitude --keep 0.7 --source photos=images/ --finetune 2 --out RUN
  regrow prune ./llama-8b --smaller 20% --memory 6GiB --source mail=letters/ --out RUN    read one block at a time
  torchrun --no-python --nproc-per-node 2 regrow prune ./my-llama --smaller 20% --source mail=letters/ --out RUN
"""
RECOVER_EPILOG = """\b
Examples
  regrow recover RUN --by refit --tokens 32768 --out RUN2
  regrow recover RUN2 --by lora --tokens 200000 --set rank=32 --out RUN3
  torchrun --no-python --nproc-per-node 2 regrow recover RUN --by distil --out RUN4
"""


@click.command(cls=Verb, settings=Settings, distributed=True, epilog=EPILOG)
@command.run_folder
@command.dry_run
@command.code
@command.memory
def prune(settings: Settings, out: Path | None, dry_run: Path | None, code: str, memory: str) -> None:
    """Prune MODEL to a target size.

    Writes a folder with the model and a report of the loss in quality.
    """
    several = read_ranks().several
    command.announce_code(settings.model, code, settings.method)
    if several and (dry_run or settings.device != "cpu"):
        option = "--dry-run" if dry_run else f"--device {settings.device}"
        raise click.UsageError(f"{option} is for a single process; leave it out, or start without torchrun")
    if dry_run:
        _write_plan(settings, dry_run, code, memory)
        return
    from regrow.jobs.prune import prune_named

    with recorded_run(out, code=code, memory=memory) as invocation:
        prune_named(settings, invocation)


def _write_plan(settings: Settings, path: Path, code: str, memory: str) -> None:
    """Write the plan of a pruning run to the JSON file ``path``, and print how to apply it; nothing is cut.

    ``code``, ``memory``: the values of these options; empty: not given.
    """
    from regrow.jobs.prune import plan_named
    from regrow.jobs.recording import Invocation
    from regrow.store.atomic import JSON, write_output

    with show_progress() as progress:
        plan = plan_named(settings, Invocation(code=code, memory=memory, announce=say, progress=progress))
    write_output(path, plan.to_json() + "\n", JSON)
    for note in plan.notes:
        say(f"note: {note}")
    say(f"plan written to {path}: {len(plan.changes)} axes change")
    say(f"apply it with `regrow apply {path} {settings.model} --out FOLDER`")


@click.command(cls=Verb, settings=recovery.Settings, distributed=True, epilog=RECOVER_EPILOG)
@command.run_folder
@command.code
@command.memory
def recover(settings: recovery.Settings, code: str, memory: str, out: Path) -> None:
    """Recover quality that pruning lost.

    Layers of the model of RUN are fitted or trained on the sources of its pruning run.
    """
    ranks = read_ranks()
    if ranks.several and settings.by not in ("lora", "distil"):
        raise click.UsageError(f"--by {settings.by} runs in one process, unlike lora and distil; leave out torchrun")
    if ranks.several and memory:
        raise click.UsageError("--memory predicts a recovery in one process; leave it out, or start without torchrun")
    from regrow.jobs.recover import recover_named

    command.announce_code(code, settings.by)
    with recorded_run(out, code=code, memory=memory) as invocation:
        recover_named(settings, invocation)
