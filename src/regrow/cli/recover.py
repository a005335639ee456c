"""``regrow recover``: recover quality that pruning lost."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import options
from regrow.cli.flags import Given
from regrow.cli.runs import processes, run_command, run_with_page
from regrow.cli.screen import number, say, say_peak, table
from regrow.distributed import ProcessRank, read_ranks
from regrow.settings.recover import TRAINED, Settings

if TYPE_CHECKING:
    from regrow.store.run_folder import RunFolder

EPILOG = """\b
Examples
  regrow recover RUN --by refit --tokens 32768 --out RUN2
  regrow recover RUN2 --by lora --tokens 200000 --set rank=32 --out RUN3
  torchrun --no-python --nproc-per-node 2 regrow recover RUN --by distil --fsdp --out RUN4
"""

BEFORE = ("dense", "pruned")
"""The models that a recovered model is compared with."""


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
    from regrow.distributed.parallel import Parallel
    from regrow.jobs.recover import run

    options.say_code(code, settings.by)
    _check_windows(settings, ranks)
    if fsdp:
        from regrow.distributed.fsdp import return_freed_memory

        return_freed_memory()
    with processes() as ranks:
        parallel = Parallel(ranks, fsdp)
        if not ranks.leads:
            run(settings, out, code=code, parallel=parallel)
            return
        more: dict[str, object] = {"memory": memory, "announce": say, "parallel": parallel}
        run_with_page("model", tell, run, settings, out, code=code, track=track, **more)


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


def tell(folder: "RunFolder") -> None:
    """Print the result of a recovery: perplexity per text domain of all three models, and the fraction won back.

    Args:
        folder: The folder of the run; nothing is printed if it did not recover a model.
    """
    rows = folder.metrics()
    done = [row for row in rows if row["what"] == "recovery"]
    for row in done[-1:]:
        say(f"recovered by {row['by']} on {number(row['tokens'])} tokens in {row['seconds']:.0f} s")
        if "note" in row:
            say(f"note: {row['note']}")
    found = {(row.get("model"), row.get("source")): row for row in rows if row["what"] == "perplexity"}
    lines, missing = [], {}
    for (model, name), row in found.items():
        if model != "recovered":
            continue
        before = [found.get((one, name), {}) for one in BEFORE]
        if lacking := [one for one, known in zip(BEFORE, before, strict=True) if not {"nll", "ppl"} <= known.keys()]:
            missing[name] = f"the {' and the '.join(lacking)} model on {name}"
            continue
        dense, pruned = before
        lost = pruned["nll"] - dense["nll"] if None not in (pruned["nll"], dense["nll"], row["nll"]) else 0
        share = f"{100 * (pruned['nll'] - row['nll']) / lost:.0f} %" if lost > 0 else "–"
        kind = f"{name} ({'seen' if row.get('seen') else 'unseen'})"
        lines.append((kind, *(number(one["ppl"]) for one in (dense, pruned, row)), share))
    if lines:
        title = (
            "Perplexity on the evaluation half of each source, and the fraction of the lost log-perplexity recovered"
        )
        table(title, ("source", "dense", "pruned", "recovered", "fraction"), lines, numbers=(1, 2, 3, 4))
    shares = {(row.get("model"), row.get("task")): row for row in rows if row["what"] == "choice"}
    for (model, task), row in shares.items():
        if model == "recovered":
            known = {one: shares[one, task]["acc"] for one in BEFORE if "acc" in shares.get((one, task), {})}
            course = " → ".join(f"{acc:.3f}" for acc in (*known.values(), row["acc"]))
            say(f"accuracy on {task}: {course} (n = {row['n']})")
            if lacking := [one for one in BEFORE if one not in known]:
                missing[task] = f"the {' and the '.join(lacking)} model on {task}"
    if done and (memory := folder.run().get("memory")):
        say_peak(memory)
    if missing:
        say(
            f"note: metrics.jsonl has no measurement of {', '.join(missing.values())}, so these are not compared; "
            "restore the file of the pruning run, or measure them with `regrow evaluate`"
        )
