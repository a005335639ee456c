"""``regrow grow``: widen or deepen a model such that its outputs do not change."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.flags import Given
from regrow.cli.runs import recorded_run
from regrow.cli.screen import number, say, table, working
from regrow.settings.grow import Settings

if TYPE_CHECKING:
    from regrow.store.run_folder import RunFolder

EPILOG = """\b
Examples
  regrow grow smollm2-135m --mlp +25% --out RUN
  regrow grow ./my-llama --heads +1 --mlp +25% --round 64 --source mail=letters/ --out RUN
  regrow grow resnet50 --channels +32 --fill split --out RUN
  regrow grow ./my-llama --blocks +4 --out RUN
  regrow grow resnet50 --blocks layer3=+2 --out RUN
  regrow grow smollm2-135m --blocks +2 --on mail=letters/ --steps 500 --train new --out RUN
  regrow grow PRUNED_RUN --mlp +10% --regular --out RUN
  regrow grow vit_b_16 --axis 'encoder.layers.encoder_layer_0.mlp.*=+64' --dry-run
"""


@click.command(cls=Verb, resumed=("out",), settings=Settings, epilog=EPILOG)
@options.run_folder()
@click.option("--dry-run", is_flag=True, help="Only print what would grow.")
@click.option("--plan", type=options.PATH, help="With --dry-run: also write the plan here; `regrow apply` runs it.")
@options.code
@options.track
def grow(given: Given[Settings], out: Path | None, dry_run: bool, plan: Path | None, code: str, track: str) -> None:
    """Widen or deepen MODEL such that its outputs do not change; writes a folder with the model and a report.

    Outputs before and after are compared, in float64 and in the model's precision, and the largest change is printed.
    Axes for which no exact way is known (under LayerNorm or GroupNorm) are refused with the reason.
    """
    settings = given.build()
    if plan and not dry_run:
        raise click.UsageError("--plan is for --dry-run, a run keeps its plan in ledger.json; add --dry-run")
    options.say_code(settings.model, code)
    if dry_run:
        _show_plan(settings, plan, code)
        return
    from regrow.jobs.grow import run

    with recorded_run("model", _tell, out, code=code, track=track) as invocation:
        run(settings, invocation)


def _show_plan(settings: Settings, path: Path | None, code: str) -> None:
    from functools import partial

    from regrow.jobs.grow import carry_out, open_named
    from regrow.jobs.recording import ActiveRun, Invocation
    from regrow.store.atomic import JSON, write_output

    with working() as progress:
        inputs = partial(open_named, settings, Invocation(code=code, progress=progress))
        result = carry_out(settings, inputs, ActiveRun(progress=progress), grows=False)
    plan, axes = result.plan, result.axes
    rows = [(key, change.size, change.after, f"+{change.grow}") for key, change in plan.changes.items()]
    if rows:
        table("What would grow", ("axis", "units", "after", ""), rows, numbers=(1, 2, 3))
    say(f"{len(rows)} of {len(axes)} axes grow")
    for stack, insertion in plan.insert.items():
        copies = ", ".join(f"{copy.of} → {copy.position}" for copy in insertion.copies)
        say(f"{stack}: {insertion.size} → {insertion.after} blocks; copies (block → its new place): {copies}")
    if path:
        write_output(path, plan.to_json() + "\n", JSON)
        say(f"plan written to {path}; run it with `regrow apply {path} {settings.model} --out FOLDER`")


def _tell(folder: "RunFolder") -> None:
    rows = folder.metrics()
    sizes = {row["model"]: row for row in rows if row["what"] == "size"}
    before, after = sizes["before"], sizes["after"]
    share = after["params_all"] / max(before["params_all"], 1) - 1
    say(f"parameters: {number(before['params_all'])} → {number(after['params_all'])} (+{100 * share:.2f} %)")
    for row in rows:
        if row["what"] == "verify":
            change = f"{number(row['relative_change'], 2)} of the largest output, in {row['output_dtype']}"
            say(f"outputs before and after differ by at most {number(row['output_change'], 2)} ({change})")
            if row["dtype"] == "float64":
                difference, bound = (number(row[name], 2) for name in ("max_abs_diff", "bound"))
                say(f"in float64 by {difference} (bound {bound})")
        if row["what"] == "training":
            loss = f"{number(row['loss_before'])} → {number(row['loss_after'])}"
            say(f"trained {row['train']} parameters for {row['steps']} steps; loss on the training data {loss}")
    for note in folder.run().get("notes", ()):
        say(f"note: {note}")
