"""``regrow prune``: a smaller model, and what it cost."""

from pathlib import Path
from typing import Any

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.recover import tell
from regrow.cli.report import RunPage
from regrow.cli.screen import number, say, table, working
from regrow.settings.words import parse_pairs

EPILOG = f"""{options.MODEL_HELP}

\b
Examples
  regrow prune smollm2-135m --keep 0.9 --source news --source code --source manual --source talk --out RUN
  regrow prune ./my-llama --target bytes=200M --regular --round 64 --source mail=letters/ --out RUN
  regrow prune ./my-llama --method wanda_sp --keep 0.8 --only mlp --source mail=letters/ --out RUN
  regrow prune resnet18 --method magnitude --keep 0.7 --source photos=images/ --finetune 2 --out RUN
  regrow prune --again RUN --out RUN2
"""


@click.command(cls=Verb, resumed=("out",), epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--method", default="flap", show_default=True, help="What decides: see `regrow methods`.")
@click.option(
    "--keep",
    metavar="FRACTION",
    help="How much stays, of the weights of a decoder's linear layers (image models: convolutions and linear layers).",
)
@click.option(
    "--target",
    default="",
    metavar="UNIT=AMOUNT",
    help="What stays at most, instead of --keep: params=100M (all parameters), macs=2G (dense, of one example), "
    "bytes=200M (of the file, in the dtype it is loaded in), kv_cache=50M@4096 (bytes of keys and values at 4096 "
    "tokens), ms=120 or ms=120@512 (a pass of so many tokens, measured on this device).",
)
@click.option("--out", type=options.PATH, help="The run folder. The same command resumes a stopped run.")
@options.source
@click.option("--unseen", multiple=True, metavar="NAME[=PATH]", help="A kind to evaluate on only.")
@click.option(
    "--only", multiple=True, metavar="PATTERN", help="Cut only where every tensor's name fits (mlp, layers.1*)."
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out where any tensor's name fits.")
@click.option(
    "--mark",
    "marks",
    multiple=True,
    default=["neutral"],
    show_default=True,
    type=click.Choice(["neutral", "competed", "folded", "restated"]),
    help="Cut axes of this kind (see `regrow show`); folded takes in a residual width. Repeat it for several.",
)
@click.option(
    "--round",
    "round_to",
    default=1,
    show_default=True,
    type=int,
    help="Widths are multiples of this (8, 64), where an axis has so many units; the budget still holds.",
)
@click.option(
    "--regular",
    is_flag=True,
    help="One width per kind of axis in all blocks, as an ordinary model has; each block keeps its own best units.",
)
@click.option(
    "--measure",
    default="params",
    show_default=True,
    type=click.Choice(["params", "macs", "bytes", "kv_cache", "ms"]),
    help="What --keep counts.",
)
@click.option("--base", metavar="METHOD", help="What gprune wraps: flap (default), wanda_sp, llm_pruner or magnitude.")
@click.option(
    "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of the method (`regrow methods NAME`)."
)
@click.option("--tokens", default=4096, show_default=True, type=int, help="Calibration tokens per source; or images.")
@options.eval_tokens
@options.seq_len
@click.option(
    "--finetune", default=0, show_default=True, type=int, help="Epochs of fine-tuning after the cut (image models)."
)
@click.option("--recover", default="", metavar="NAME", help="Win back what was lost: bias, refit, lora or distil.")
@click.option(
    "--recover-tokens",
    default=32768,
    show_default=True,
    type=int,
    help="Tokens (or images) that --recover learns from.",
)
@click.option(
    "--seed", default=0, show_default=True, type=int, help="Which windows are drawn; the same seed, the same plan."
)
@options.dtype
@options.device
@options.input_shape
@click.option(
    "--no-verify", is_flag=True, help="Skip the proof that masked = shrunk (it needs 16 bytes per parameter)."
)
@click.option("--dry-run", type=options.PATH, help="Only write the plan to this file; `regrow apply` runs it.")
@options.code
@click.option("--again", type=options.PATH, help="Repeat the run of this folder with its settings.")
def prune(
    model: str | None,
    keep: str | None,
    out: Path | None,
    dry_run: Path | None,
    again: Path | None,
    code: str,
    **given: Any,
) -> None:
    """Prune MODEL to a fraction of its weights and leave a folder that loads, with a page that says what was lost."""
    from regrow.commands.prune import plan_only, run

    if code and not again:
        raise click.UsageError(f"--code is for --again; name the function in the place of MODEL: regrow prune {code}")
    settings = _again(again, code) if again else _settings(model, keep, given)
    options.check_json(dry_run, settings.model, *settings.sources, *settings.unseen)
    options.say_code(settings.model)
    if dry_run:
        from regrow.store.outputs import JSON, write_output

        with working() as progress:
            plan = plan_only(settings, progress)
        write_output(dry_run, plan.to_json() + "\n", JSON)
        for note in plan.origin.get("notes", ()):
            say(f"note: {note}")
        say(f"plan written to {dry_run}: {len(plan.changes)} axes change")
        say(f"run it with `regrow apply {dry_run} {settings.model} --out FOLDER`")
        return
    if out is None:
        raise click.UsageError("--out names the folder of the run, for example --out run")
    page = RunPage("model")
    with working() as progress:
        folder = run(settings, out, progress, write_page=page)
    _tell(folder)
    if settings.recover:
        tell(folder.metrics())
    page.tell(folder.path)


def _settings(model: str | None, keep: str | None, given: dict[str, Any]) -> Any:
    from regrow.commands.prune import Settings

    if model is None:
        raise click.UsageError("name the model to prune, for example `regrow prune smollm2-135m --keep 0.9 --out run`")
    target, measure = given["target"], given["measure"]
    if (keep is None) == (not target):
        raise click.UsageError("say how much stays, by one of --keep 0.8 and --target bytes=200M")
    if target:
        unit = options.checked_target(target)
        if measure not in ("params", unit):
            raise click.UsageError(f"--target counts {unit}, --measure {measure} is what --keep counts: leave it away")
    pairs, no_verify, base = given.pop("pairs"), given.pop("no_verify"), given.pop("base")
    return Settings(
        model,
        keep=options.fraction(keep, "--keep") if keep is not None else None,
        method_settings=parse_pairs(pairs) | ({"base": base} if base else {}),
        proof=not no_verify,
        **given,
    )


def _again(folder: Path, code: str) -> Any:
    from regrow.commands.folder import RunFolder
    from regrow.commands.prune import Settings
    from regrow.nets import ModelError

    data = (RunFolder.started(folder) or RunFolder.open(folder)).run()
    if data.get("verb") != "prune":
        raise click.UsageError(f"{folder} holds a run of {data.get('verb')!r}; --again repeats a pruning run")
    try:
        return Settings.from_json(data["settings"], code)
    except ModelError as error:
        raise click.UsageError(f"{folder}: {error}") from None


def _tell(folder: Any) -> None:
    rows = folder.metrics()
    sizes = {row["model"]: row for row in rows if row["what"] == "size"}
    dense, pruned = sizes["dense"], sizes["pruned"]
    say(
        f"kept {pruned['params_counted'] / max(dense['params_counted'], 1):.4f} of the counted weights "
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
                f"asked for at most {number(row['asked'])}"
            )
    quality = {(row["model"], row["source"]): row for row in rows if row["what"] == "perplexity"}
    lines = [
        (name, number(before), number(row["ppl"]), f"× {row['ppl'] / before:.3f}")
        for (model, name), row in quality.items()
        if model == "pruned" and row["ppl"] is not None and (before := quality.get(("dense", name), {}).get("ppl"))
    ]
    if lines:
        table(
            "Perplexity on the evaluation half of each kind", ("kind", "dense", "pruned", ""), lines, numbers=(1, 2, 3)
        )
    shares = {(row["model"], row["task"]): row for row in rows if row["what"] == "choice"}
    for (model, task), row in shares.items():
        if model == "pruned" and ("dense", task) in shares:
            say(f"accuracy on {task}: {shares['dense', task]['acc']:.3f} → {row['acc']:.3f} (n = {row['n']})")
    for row in rows:
        if row["what"] == "verify":
            difference, bound = (number(row[name], 2) for name in ("max_abs_diff", "bound"))
            say(f"masked = shrunk: largest difference {difference} in float64 (bound {bound})")
