"""``regrow apply``: run a plan that was written before."""

from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.screen import say, working


@click.command(name="apply", epilog=options.MODEL_HELP)
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where the changed model goes.")
@options.dtype
def apply(plan: Path, model: str, out: Path, dtype: str) -> None:
    """Apply PLAN (a file from `prune --dry-run`) to MODEL and save the result."""
    from regrow.plan import Plan
    from regrow.runs import save
    from regrow.runs.pruning_run import Settings, load_model
    from regrow.surgery import apply as cut
    from regrow.tracing import trace

    if not plan.is_file():
        raise click.UsageError(f"{plan} is not a file; write a plan with `regrow prune … --dry-run {plan}`")
    try:
        made = Plan.from_json(plan.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise click.UsageError(f"{plan}: {error}") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise click.UsageError(f"{out} exists and is not empty; choose another folder, or delete it")
    with working() as progress:
        loaded = load_model(Settings(model, dtype=dtype), progress)
        axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
        cut(loaded.model, axes, made)
        save(loaded, out)
    say(f"{len(made.changes)} axes changed; the model is in {out}")
