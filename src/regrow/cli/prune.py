"""``regrow prune`` and ``regrow recover``: prune a model, win back quality, and print what was lost."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import command
from regrow.cli.command import Stated, Verb
from regrow.cli.runs import recorded_run
from regrow.cli.screen import say, working
from regrow.core.names import names_code
from regrow.distributed import ProcessRank, read_ranks
from regrow.settings import recover as recovery
from regrow.settings.prune import Settings, name_folders

if TYPE_CHECKING:
    pass

EPILOG = """\b
Examples
  regrow prune smollm2-135m --keep 0.9 --source news --source code --source manual --source talk --out RUN
  regrow prune ./my-llama --method fisher --only mlp --keep 0.7 --source mail=letters/ --source code \\
    --source generated --reconstruct --out RUN
  regrow prune ./my-llama --target bytes=200M --regular --round 64 --source mail=letters/ --out RUN
  regrow prune ./my-llama --method wanda_sp --keep 0.8 --only mlp --source mail=letters/ --out RUN
  regrow prune resnet18 --method magnitude --keep 0.7 --source photos=images/ --finetune 2 --out RUN
  regrow prune ./my-llama --keep 0.8 --keep 0.7 --method flap --method wanda_sp --source news --out PLANS
  regrow prune ./llama-8b --memory 6GiB --source mail=letters/ --out RUN        read one block at a time
  regrow prune RUN --keep 0.9 --source news --out RUN2       prune the result of another run further
  torchrun --no-python --nproc-per-node 2 regrow prune ./my-llama --source mail=letters/ --out RUN
"""
RECOVER_EPILOG = """\b
Examples
  regrow recover RUN --by refit --tokens 32768 --out RUN2
  regrow recover RUN2 --by lora --tokens 200000 --set rank=32 --out RUN3
  torchrun --no-python --nproc-per-node 2 regrow recover RUN --by distil --out RUN4
"""


@click.command(cls=Verb, resumed=("out",), settings=Settings, distributed=True, epilog=EPILOG)
@command.run_folder()
@click.option("--dry-run", type=command.PATH, help="Only write the plan to this JSON file; `regrow apply` applies it.")
@command.code
@command.memory(
    "How much memory the run may use, like 4GiB. If the model does not fit, it is read one block at a time, with the "
    "same result; how is printed first. For text models in a transformers folder or run folder, or packaged ones."
)
@command.track
def prune(
    stated: Stated[Settings],
    out: Path | None,
    dry_run: Path | None,
    code: str,
    memory: str,
    track: str,
) -> None:
    """Prune MODEL to a fraction of its weights; writes a folder with the model and a report of the loss in quality."""
    settings = stated.build()
    if names_code(settings.model) and code:
        raise click.UsageError(
            f"--code is for a run folder; name the function in the place of MODEL: regrow prune {code}"
        )
    command.say_code(settings.model, code, settings.method)
    _check_several(stated, dry_run)
    if dry_run:
        if read_ranks().several:
            raise click.UsageError("--dry-run runs in one process; start it without torchrun")
        _write_plan(settings, dry_run, code, memory)
        return
    if read_ranks().several and settings.device != "cpu":
        line = f"several processes run on the CPU alone; leave out --device {settings.device}, or torchrun"
        raise click.UsageError(line)
    if stated.varied:
        _prune_several(stated.build_all(), out, code=code, memory=memory, track=track)
        return
    from regrow.jobs.prune import run

    with recorded_run("model", out, code=code, memory=memory, track=track) as invocation:
        run(settings, invocation)


def _check_several(stated: Stated[Settings], dry_run: Path | None) -> None:
    """Raise UsageError if several plans are asked for where only one can be made."""
    words = " ".join(f"--{name} {value}" for name, values in stated.varied.items() for value in values)
    ranks = read_ranks()
    if words and ranks.several:
        line = f"several plans ({words}) are made in one process, and this is {ranks}"
        raise click.UsageError(f"{line}; start it without torchrun, or give one value")
    if words and dry_run:
        raise click.UsageError(f"--dry-run {dry_run} takes one plan, got {words}; give one value, or use --out instead")


def _prune_several(runs: list[Settings], out: Path | None, *, code: str, memory: str, track: str) -> None:
    """Prune with several methods or fractions: one calibration, and one run folder per plan below ``out``."""
    from regrow.jobs.calibration import SharedWork, is_finished
    from regrow.jobs.prune import check_plans, run
    from regrow.jobs.recording import Invocation
    from regrow.store.errors import StoreError

    if out is None:
        raise click.UsageError("--out names the folder of the plans, for example --out plans")
    if (out / "run.json").exists():
        raise StoreError(f"{out} is a run folder; several plans need a folder for one each: choose another")
    plans, shared = name_folders(runs), SharedWork()
    missing = {name: settings for name, settings in plans.items() if not is_finished(settings, out / name)}
    with working() as progress:
        later = dict(list(missing.items())[1:])  # the first is checked as it begins
        check_plans(later, Invocation(out, code, memory, progress=progress), shared)
    for name, settings in plans.items():
        if name not in missing:
            say(f"{name}: finished before")
            continue
        say(name)
        with recorded_run("model", out / name, code=code, memory=memory, track=track) as invocation:
            run(settings, invocation, shared)


def _write_plan(settings: Settings, path: Path, code: str, memory: str) -> None:
    from regrow.jobs.prune import plan_named
    from regrow.jobs.recording import Invocation
    from regrow.store.atomic import JSON, write_output

    with working() as progress:
        plan = plan_named(settings, Invocation(code=code, memory=memory, announce=say, progress=progress))
    write_output(path, plan.to_json() + "\n", JSON)
    for note in plan.notes:
        say(f"note: {note}")
    say(f"plan written to {path}: {len(plan.changes)} axes change")
    say(f"apply it with `regrow apply {path} {settings.model} --out FOLDER`")


@click.command(cls=Verb, resumed=("out",), settings=recovery.Settings, distributed=True, epilog=RECOVER_EPILOG)
@command.run_folder(required=True)
@command.code
@command.memory(
    "How much memory the run may use, like 4GiB. What it needs is printed first, term by term; a run that needs "
    "more is refused. For text models."
)
@command.track
def recover(stated: Stated[recovery.Settings], code: str, memory: str, track: str, out: Path) -> None:
    """Recover quality that pruning lost: train the model of RUN on the sources of its pruning run."""
    settings, ranks = stated.build(), read_ranks()
    if ranks.several and settings.by not in recovery.TRAINED:
        raise click.UsageError(f"--by {settings.by} runs in one process, unlike lora and distil; leave out torchrun")
    if ranks.several and memory:
        raise click.UsageError("--memory predicts a recovery in one process; leave it out, or start without torchrun")
    from regrow.jobs.recover import run

    command.say_code(code, settings.by)
    _check_windows(settings, ranks)
    with recorded_run("model", out, code=code, memory=memory, track=track) as invocation:
        run(settings, invocation)


def _check_windows(settings: recovery.Settings, ranks: ProcessRank) -> None:
    """Raise UsageError unless the processes can share the batches of a step evenly."""
    from regrow.methods import MethodKind, find_method

    default = find_method(MethodKind.RECOVERY, settings.by).defaults(()).get("windows", 1)
    windows = settings.recovery_settings.get("windows", default)
    if isinstance(windows, int) and windows % ranks.size:
        even = max(1, round(windows / ranks.size)) * ranks.size
        raise click.UsageError(
            f"{ranks.size} processes cannot share the {windows} batches of a step (windows) evenly; use --set "
            f"windows={even}"
        )
