"""``regrow apply``: apply a plan from a file, or all plans of a ledger, to a model."""

from pathlib import Path
from typing import Any

import click

from regrow.cli import flags, options
from regrow.cli.boundary import Verb
from regrow.cli.screen import say, working


@click.command(cls=Verb, name="apply", epilog=flags.MODEL_HELP)
@click.argument("plan", type=options.PATH)
@click.argument("model")
@click.option("--out", required=True, type=options.PATH, help="The folder to write the changed model to.")
@options.code
@flags.dtype
@flags.input_shape
def apply(plan: Path, model: str, out: Path, code: str, dtype: str, input: str) -> None:
    """Apply PLAN (a plan from `prune --dry-run`, or a run's ledger.json) to MODEL and save the result.

    A plan may cut, grow or restore units. To restore, pass the ledger.json that also holds the cut.
    """
    from regrow.jobs.models import ModelSpec, load_model
    from regrow.jobs.parents import read_parent
    from regrow.store import SHAPES, write_model
    from regrow.store.ledger import Ledger, replay
    from regrow.store.replacing import clear_leftovers, replace_folder
    from regrow.tracing import trace

    if not plan.is_file():
        raise click.UsageError(f"{plan} is not a file; write a plan with `regrow prune … --dry-run {plan}`")
    plans = _plans(plan)
    clear_leftovers(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise click.UsageError(f"{out} exists and is not empty; choose another folder, or delete it")
    options.say_code(model, code)
    with working() as progress:
        loaded = load_model(ModelSpec(model, dtype=dtype, input=input), progress, code)
        axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
        replay(loaded.model, axes, plans)
        with replace_folder(out) as made:
            write_model(loaded, made)
            earlier = read_parent(Path(model)).plans if Path(model, SHAPES).is_file() else ()
            for part in (*earlier, *plans):
                Ledger(made / "ledger.json").append(part)
    say(f"{len({key for part in plans for key in part.changes})} axes changed; the model is in {out}")


def _plans(path: Path) -> list[Any]:
    from regrow.core.limits import parse_json, read_text
    from regrow.store.ledger import Ledger, read_plan

    try:
        text = read_text(path, 2**30)
        return list(Ledger(path).plans()) if '"regrow-ledger/' in text[:100] else [read_plan(parse_json(text))]
    except (ValueError, OSError) as error:
        raise click.UsageError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
