"""``regrow recover``: recover quality that pruning lost."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import options
from regrow.cli.flags import Given
from regrow.cli.results import say_outcome
from regrow.cli.runs import recorded_run, run_command
from regrow.distributed import ProcessRank, read_ranks
from regrow.settings.recover import TRAINED, Settings

if TYPE_CHECKING:
    pass

EPILOG = """\b
Examples
  regrow recover RUN --by refit --tokens 32768 --out RUN2
  regrow recover RUN2 --by lora --tokens 200000 --set rank=32 --out RUN3
  torchrun --no-python --nproc-per-node 2 regrow recover RUN --by distil --fsdp --out RUN4
"""


@run_command(Settings, EPILOG, distributed=True)
@options.code
@options.needed_memory
@options.track
@click.option(
    "--fsdp", is_flag=True, help="With torchrun: shard both models and the training state among all processes."
)
def recover(given: Given[Settings], code: str, memory: str, track: str, fsdp: bool, out: Path) -> None:
    """Recover quality that pruning lost: train the model of RUN on the sources of its pruning run."""
    settings, ranks = given.build(), read_ranks()
    if ranks.several and settings.by not in TRAINED:
        raise click.UsageError(f"--by {settings.by} runs in one process, unlike lora and distil; leave out torchrun")
    if ranks.several and memory:
        raise click.UsageError("--memory predicts a recovery in one process; leave it out, or start without torchrun")
    if fsdp and not ranks.several:
        raise click.UsageError("--fsdp shards among several processes; start them with torchrun, or leave it out")
    from regrow.jobs.recover import run

    options.say_code(code, settings.by)
    _check_windows(settings, ranks)
    if fsdp:
        from regrow.distributed.fsdp import return_freed_memory

        return_freed_memory()
    with recorded_run("model", say_outcome, out, code=code, memory=memory, track=track) as invocation:
        run(settings, invocation, fsdp=fsdp)


def _check_windows(settings: Settings, ranks: ProcessRank) -> None:
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
