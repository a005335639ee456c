"""``regrow prune``: prune a model, and print what it cost in quality."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.flags import Given
from regrow.cli.results import say_outcome
from regrow.cli.runs import recorded_run
from regrow.cli.screen import number, say, working
from regrow.core.names import names_code
from regrow.distributed import read_ranks
from regrow.settings.prune import Settings, name_folders

if TYPE_CHECKING:
    from regrow.store.run_folder import RunFolder

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


@click.command(cls=Verb, resumed=("out",), settings=Settings, distributed=True, epilog=EPILOG)
@options.run_folder()
@click.option("--dry-run", type=options.PATH, help="Only write the plan to this JSON file; `regrow apply` applies it.")
@options.code
@options.memory(
    "How much memory the run may use, like 4GiB. If the model does not fit, it is read one block at a time, with the "
    "same result; how is printed first. For text models in a transformers folder or run folder, or packaged ones."
)
@options.track
def prune(
    given: Given[Settings],
    out: Path | None,
    dry_run: Path | None,
    code: str,
    memory: str,
    track: str,
) -> None:
    """Prune MODEL to a fraction of its weights; writes a folder with the model and a report of the loss in quality."""
    settings = given.build()
    if names_code(settings.model) and code:
        raise click.UsageError(
            f"--code is for a run folder; name the function in the place of MODEL: regrow prune {code}"
        )
    options.say_code(settings.model, code, settings.method)
    _check_several(given, dry_run)
    if dry_run:
        if read_ranks().several:
            raise click.UsageError("--dry-run runs in one process; start it without torchrun")
        _write_plan(settings, dry_run, code, memory)
        return
    if read_ranks().several and settings.device != "cpu":
        line = f"several processes run on the CPU alone; leave out --device {settings.device}, or torchrun"
        raise click.UsageError(line)
    if given.varied:
        _prune_several(given.build_all(), out, code=code, memory=memory, track=track)
        return
    from regrow.jobs.prune import run

    with recorded_run("model", _show_result, out, code=code, memory=memory, track=track) as invocation:
        run(settings, invocation)


def _check_several(given: Given[Settings], dry_run: Path | None) -> None:
    """Raise UsageError if several plans are asked for where only one can be made."""
    words = " ".join(f"--{name} {value}" for name, values in given.varied.items() for value in values)
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
        with recorded_run("model", _show_result, out / name, code=code, memory=memory, track=track) as invocation:
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


def _show_result(folder: "RunFolder") -> None:
    rows = folder.metrics()
    sizes = {row["model"]: row for row in rows if row["what"] == "size"}
    dense, pruned = sizes["dense"], sizes["pruned"]
    say(
        f"kept {pruned['params_counted'] / max(dense['params_counted'], 1):.4f} of the weights "
        f"({number(pruned['params_counted'])} of {number(dense['params_counted'])}), "
        f"{pruned['params_all'] / max(dense['params_all'], 1):.4f} of all parameters, "
        f"{pruned['macs'] / max(dense['macs'], 1):.4f} of the multiply–accumulates"
    )
    for row in rows:
        if row["what"] == "budget":
            context = f" at {row['context']} tokens" if row["context"] else ""
            predicted = f" ({number(row['predicted'])} predicted)" if "predicted" in row else ""
            say(
                f"{row['measure']}{context}: {number(row['after'])}{predicted}, of {number(row['before'])}; "
                f"allowed at most {number(row['asked'])}"
            )
        elif row["what"] == "verify":
            difference, bound = (number(row[name], 2) for name in ("max_abs_diff", "bound"))
            say(f"masked = shrunk: largest difference {difference} in float64 (bound {bound})")
        elif row["what"] == "reconstruction":
            _show_reconstruction(row)
    for note in folder.run().get("notes", ()):
        if "BatchNorm" in note:
            say(f"note: {note}")
    say_outcome(folder)


def _show_reconstruction(row: Mapping[str, Any]) -> None:
    """Print how far a reconstruction brought the layers to their dense outputs."""
    layers, where = row.get("layers", []), "left-out sources" if "choose_on" in row else "held-out text"
    say(f"reconstructed {len(layers)} layers on {number(row['tokens'])} tokens in {row['seconds']:.0f} s")
    if layers:
        before, after = (sum(layer[name] for layer in layers) / len(layers) for name in ("before", "after"))
        say(f"mean relative error of their outputs on {where}: {before:.3f} → {after:.3f}")
        if all("seen" in layer for layer in layers):
            seen = sum(layer["seen"] for layer in layers) / len(layers)
            say(f"and on the fitted sources themselves: {before:.3f} → {seen:.3f}")
    for name, why in row.get("left_out", {}).items():
        say(f"note: {name} was not reconstructed: {why}")
    if "note" in row:
        say(f"note: {row['note']}")
