"""``regrow prune``: prune a model, and print what it cost in quality."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.checks import check_json
from regrow.cli.flags import Given
from regrow.cli.processes import processes
from regrow.cli.recover import tell
from regrow.cli.runs import run_with_page
from regrow.cli.screen import number, say, say_peak, table, working
from regrow.core.references import names_code
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
  regrow prune --again RUN --out RUN3
"""


@click.command(cls=Verb, resumed=("out",), settings=Settings, instead="again", distributed=True, epilog=EPILOG)
@options.run_folder()
@click.option("--dry-run", type=options.PATH, help="Only write the plan to this JSON file; `regrow apply` applies it.")
@options.code
@options.memory(
    "How much memory the run may use, like 4GiB. If the model does not fit, it is read one block at a time, with the "
    "same result; how is printed first. For text models in a transformers folder or run folder, or packaged ones."
)
@options.track
@click.option("--again", type=options.PATH, help="Repeat the run in this folder, with its settings.")
def prune(
    given: Given[Settings],
    out: Path | None,
    dry_run: Path | None,
    again: Path | None,
    code: str,
    memory: str,
    track: str,
) -> None:
    """Prune MODEL to a fraction of its weights; writes a folder with the model and a report of the loss in quality."""
    if again and given.options:
        raise click.UsageError(f"--again repeats a run with its settings; leave out {', '.join(given.options)}")
    settings = _again(again, code) if again else given.build()
    if names_code(settings.model) and code:
        if not again:
            line = (
                f"--code is for a run folder or --again; name the function in the place of MODEL: regrow prune {code}"
            )
            raise click.UsageError(line)
        code = ""  # it is the model
    if again and dry_run:
        check_json(dry_run, settings.model, *settings.sources, *settings.unseen)
    options.say_code(settings.model, code, settings.method, settings.recover)
    _check_several(given, dry_run)
    if dry_run:
        if read_ranks().several:
            raise click.UsageError("--dry-run runs in one process; start it without torchrun")
        _write_plan(settings, dry_run, code, memory)
        return
    if read_ranks().several and settings.device != "cpu":
        line = f"several processes run on the CPU alone; leave out --device {settings.device}, or torchrun"
        raise click.UsageError(line)
    if out is None:
        raise click.UsageError("--out names the folder of the run, for example --out run")
    if given.varied:
        _prune_several(given.build_all(), out, code=code, memory=memory, track=track)
        return
    from regrow.jobs.prune import run

    with processes() as ranks:
        if not ranks.leads:
            run(settings, out, code=code, memory=memory, ranks=ranks)
            return
        more: dict[str, object] = {"track": track, "announce": say, "ranks": ranks}
        run_with_page("model", _show_result, run, settings, out, code=code, memory=memory, **more)


def _check_several(given: Given[Settings], dry_run: Path | None) -> None:
    """Raise UsageError if several plans are asked for where only one can be made."""
    words = " ".join(f"--{name} {value}" for name, values in given.varied.items() for value in values)
    ranks = read_ranks()
    if words and ranks.several:
        line = f"several plans ({words}) are made in one process, and this is {ranks}"
        raise click.UsageError(f"{line}; start it without torchrun, or give one value")
    if words and dry_run:
        raise click.UsageError(f"--dry-run {dry_run} takes one plan, got {words}; give one value, or use --out instead")


def _prune_several(runs: list[Settings], out: Path, *, code: str, memory: str, track: str) -> None:
    """Prune with several methods or fractions: one calibration, and one run folder per plan below ``out``."""
    from regrow.jobs.later_plans import is_finished
    from regrow.jobs.prune import run
    from regrow.jobs.shared_work import SharedWork
    from regrow.store.errors import StoreError

    if (out / "run.json").exists():
        raise StoreError(f"{out} is a run folder; several plans need a folder for one each: choose another")
    plans = name_folders(runs)
    complete = {name for name, settings in plans.items() if is_finished(settings, out / name)}
    shared = SharedWork(later=[settings for name, settings in plans.items() if name not in complete][1:])
    for name, settings in plans.items():
        if name in complete:
            say(f"{name}: finished before")
            continue
        say(name)
        more: dict[str, object] = {"track": track, "announce": say, "shared": shared}
        run_with_page("model", _show_result, run, settings, out / name, code=code, memory=memory, **more)


def _write_plan(settings: Settings, path: Path, code: str, memory: str) -> None:
    from regrow.jobs.prune import plan_named
    from regrow.store.atomic import JSON, write_output

    with working() as progress:
        plan = plan_named(settings, progress, code=code, memory=memory, announce=say)
    write_output(path, plan.to_json() + "\n", JSON)
    for note in plan.notes:
        say(f"note: {note}")
    say(f"plan written to {path}: {len(plan.changes)} axes change")
    say(f"apply it with `regrow apply {path} {settings.model} --out FOLDER`")


def _again(folder: Path, code: str) -> Settings:
    from regrow.jobs.prune_settings import read_pruning_settings
    from regrow.methods import refuse_recorded_code
    from regrow.nets import ModelError
    from regrow.store.run_folder import RunFolder
    from regrow.store.run_record import check_repeatable

    data = (RunFolder.open_unfinished(folder) or RunFolder.open(folder)).run()
    if data.get("verb") != "prune":
        raise click.UsageError(f"{folder} holds a run of {data.get('verb')!r}; --again repeats a pruning run")
    check_repeatable(folder, data)
    try:
        settings = read_pruning_settings(data["settings"], code)
    except ModelError as error:
        raise click.UsageError(f"{folder}: {error}") from None
    for name in (settings.method, settings.recover):
        refuse_recorded_code(name, str(data.get("command")))
    return settings


def _show_result(folder: "RunFolder") -> None:
    """Print the result of a pruning run, and that of its recovery, which prints nothing if there was none."""
    _tell(folder)
    _tell_reconstruction(folder)
    tell(folder)


def _tell_reconstruction(folder: "RunFolder") -> None:
    """Print how far a reconstruction brought the layers to their dense outputs; nothing without one."""
    for row in folder.metrics():
        if row["what"] != "reconstruction":
            continue
        layers, where = row.get("layers", []), "left-out sources" if "choose_on" in row else "held-out text"
        say(f"reconstructed {len(layers)} layers on {number(row['tokens'])} tokens in {row['seconds']:.0f} s")
        if layers:
            before, after = (sum(one[name] for one in layers) / len(layers) for name in ("before", "after"))
            say(f"mean relative error of their outputs on {where}: {before:.3f} → {after:.3f}")
            if all("seen" in one for one in layers):
                seen = sum(one["seen"] for one in layers) / len(layers)
                say(f"and on the fitted sources themselves: {before:.3f} → {seen:.3f}")
        for name, why in row.get("left_out", {}).items():
            say(f"note: {name} was not reconstructed: {why}")
        if "note" in row:
            say(f"note: {row['note']}")


def _tell_perplexity(rows: list[dict[str, Any]]) -> None:
    """Print perplexity per source, seen and unseen ones marked; with a reconstruction also that after the cut alone."""
    quality = {(row["model"], row["source"]): row for row in rows if row["what"] == "perplexity"}
    complete = {
        name: (before, row)
        for (model, name), row in quality.items()
        if model == "pruned" and row["ppl"] is not None and (before := quality.get(("dense", name), {}).get("ppl"))
    }
    several = len({bool(row.get("seen")) for _, row in complete.values()}) > 1
    cut = {name: quality.get(("cut", name), {}).get("ppl") for name in complete}
    fitted, lines = all(cut.values()), []
    for name, (before, row) in complete.items():
        kind = f"{name} ({'seen' if row.get('seen') else 'unseen'})" if several else name
        line = [kind, number(before), number(row["ppl"]), f"× {row['ppl'] / before:.3f}"]
        if fitted:
            lost = math.log(cut[name] / before)
            share = f"{100 * math.log(cut[name] / row['ppl']) / lost:.0f} %" if lost > 0 else "–"
            line = [*line[:2], number(cut[name]), *line[2:], share]
        lines.append(tuple(line))
    title = "Perplexity on the evaluation half of each source"
    if lines and fitted:
        title += ", and the fraction of the log-perplexity lost by the cut that the reconstruction recovered"
        table(title, ("source", "dense", "cut", "reconstructed", "", "recovered"), lines, numbers=(1, 2, 3, 4, 5))
    elif lines:
        table(title, ("source", "dense", "pruned", ""), lines, numbers=(1, 2, 3))


def _tell(folder: "RunFolder") -> None:
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
    _tell_perplexity(rows)
    shares = {(row["model"], row["task"]): row for row in rows if row["what"] == "choice"}
    for (model, task), row in shares.items():
        if model == "pruned" and ("dense", task) in shares:
            say(f"accuracy on {task}: {shares['dense', task]['acc']:.3f} → {row['acc']:.3f} (n = {row['n']})")
    for row in rows:
        if row["what"] == "verify":
            difference, bound = (number(row[name], 2) for name in ("max_abs_diff", "bound"))
            say(f"masked = shrunk: largest difference {difference} in float64 (bound {bound})")
    run = folder.run()
    for note in run.get("notes", ()):
        if "BatchNorm" in note:
            say(f"note: {note}")
    if (memory := run.get("memory")) and not run["settings"].get("recover"):  # the result of a recovery has it
        say_peak(memory)
