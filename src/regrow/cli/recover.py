"""``regrow recover``: win back what pruning lost."""

from pathlib import Path
from typing import Any

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.report import RunPage
from regrow.cli.screen import number, say, table, working

EPILOG = """\b
Examples
  regrow recover RUN --by refit --tokens 32768 --out RUN2
  regrow recover RUN2 --by lora --tokens 200000 --set rank=32 --out RUN3
"""


@click.command(cls=Verb, resumed=("out",), epilog=EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--by", required=True, help="bias, refit, lora or distil: see `regrow methods NAME`.")
@click.option(
    "--tokens", default=32768, show_default=True, type=int, help="Tokens to learn from, of all sources; or images."
)
@click.option(
    "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of the recovery (`regrow methods NAME`)."
)
@click.option("--seed", default=0, show_default=True, type=int, help="Which windows are drawn, and in which order.")
@options.code
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The run folder. The same command resumes a stopped run.",
)
def recover(run: Path, by: str, tokens: int, pairs: tuple[str, ...], seed: int, code: str, out: Path) -> None:
    """Recover the model of RUN, a finished pruning run, on that run's own sources; RUN is only read."""
    from regrow.runs import recovery_run

    settings, page = options.settings(pairs), RunPage("model")
    options.say_code(code)
    with working() as progress:
        folder = recovery_run.run(
            run,
            out,
            by=by,
            tokens=tokens,
            settings=settings,
            seed=seed,
            code=code,
            progress=progress,
            write_page=page,
        )
    tell(folder.metrics())
    page.tell(folder.path)


def tell(rows: list[dict[str, Any]]) -> None:
    """Say what a recovery brought: per kind of text dense, pruned and recovered, and the share of the loss won back."""
    done = [row for row in rows if row["what"] == "recovery"]
    for row in done[-1:]:
        say(f"recovered by {row['by']} on {number(row['tokens'])} tokens in {row['seconds']:.0f} s")
        if "note" in row:
            say(f"note: {row['note']}")
    found = {(row["model"], row["source"]): row for row in rows if row["what"] == "perplexity"}
    lines = []
    for (model, name), row in found.items():
        if model == "recovered" and ("dense", name) in found and ("pruned", name) in found:
            dense, pruned = found["dense", name], found["pruned", name]
            lost = pruned["nll"] - dense["nll"] if None not in (pruned["nll"], dense["nll"], row["nll"]) else 0
            share = f"{100 * (pruned['nll'] - row['nll']) / lost:.0f} %" if lost > 0 else "–"
            kind = f"{name} ({'seen' if row['seen'] else 'unseen'})"
            lines.append((kind, *(number(one["ppl"]) for one in (dense, pruned, row)), share))
    if lines:
        title = "Perplexity on the evaluation half of each kind, and the share of the lost log-perplexity won back"
        table(title, ("kind", "dense", "pruned", "recovered", "won back"), lines, numbers=(1, 2, 3, 4))
    shares = {(row["model"], row["task"]): row for row in rows if row["what"] == "choice"}
    for (model, task), row in shares.items():
        if model == "recovered":
            before = " → ".join(
                f"{shares[name, task]['acc']:.3f}" for name in ("dense", "pruned") if (name, task) in shares
            )
            say(f"accuracy on {task}: {before} → {row['acc']:.3f} (n = {row['n']})")
