"""Commands on one network: ``regrow show``, ``apply``, ``grow`` and ``export``."""

import shlex
from pathlib import Path
from typing import Any

import click

from regrow.cli import command
from regrow.cli.command import Verb
from regrow.cli.completion import complete
from regrow.cli.runs import recorded_run
from regrow.cli.screen import format_number, print_table, say, say_peak, show_progress
from regrow.settings import export as exporting
from regrow.settings import grow as growing

GROW_EPILOG = """\b
Examples
  regrow grow smollm2-135m --mlp +25% --out RUN
  regrow grow ./my-llama --heads +1 --mlp +25% --source mail=letters/ --out RUN
  regrow grow resnet50 --channels +32 --blocks layer3=+2 --out RUN
  regrow grow smollm2-135m --blocks +2 --on mail=letters/ --steps 500 --train new --out RUN
  regrow grow vit_b_16 --axis 'encoder.layers.encoder_layer_0.mlp.*=+64' --dry-run plan.json
"""
EXPORT_EPILOG = """\b
Formats
  transformers   a folder that from_pretrained loads without regrow; if layers differ in width, it contains a small
                 modelling file and loads with trust_remote_code=True
  gguf           a file for llama.cpp; --dtype f16 (default), f32, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0
  onnx           a file for onnxruntime; --dtype int8 quantises the weights
  torchvision    a state_dict, and a Python file that builds the network with torchvision

\b
Examples
  regrow export RUN --to transformers --out my-model
  regrow export RUN --to gguf --dtype q8_0 --out my-model.gguf
"""


@click.command(cls=Verb, epilog=command.MODEL_HELP)
@click.argument("model", shell_complete=complete)
@click.option("--all", "everything", is_flag=True, help="List every frozen axis, instead of one row per reason.")
@command.code
@command.dtype
@command.input_shape
def show(model: str, everything: bool, code: str, dtype: str, input: str) -> None:
    """List the axes of MODEL and what a unit costs.

    It says which axes can be cut, and why the others are frozen. Of a run folder, the runs that made its network are
    listed too, with what each changed and where its copy is.
    """
    from regrow.jobs.models import ModelSpec, trace_model
    from regrow.nets.loaded import format_shape

    command.announce_code(model, code)
    with show_progress() as progress:
        loaded, axes = trace_model(ModelSpec(model, dtype=dtype, input=input), progress, code)
    for part in axes.tables(everything=everything):
        print_table(part.title, part.columns, part.rows, part.numbers)
    method = "on fake data, as torch.export does" if axes.recorded == "export" else "by recording one eager run"
    say(f"traced {method}")
    say(f"MACs are those of one example, with dense kernels, of an input of {format_shape(loaded.example)}")
    for note in axes.notes:
        say(f"note: {note}")
    if axes.unreached:
        say(f"not reached by the example: {len(axes.unreached)} parameters, {', '.join(axes.unreached[:3])} …")
    say(axes.summary())
    if Path(model, "run.json").is_file():
        _say_history(Path(model))


def _say_history(run: Path) -> None:
    """Print the runs that made the network in a run folder, in order, with their commands and model copies."""
    from regrow.jobs.parents import read_stages

    stages = read_stages(run)
    rows = []
    for row in (stage.record for stage in stages):
        sizes = format_number(row["before"] or None), format_number(row["parameters"])
        rows.append((row["name"], row["verb"], row["changed"], *sizes))
    columns = ("run", "command", "changed", "parameters before", "after")
    print_table("History of the network", columns, rows, numbers=(3, 4))
    for stage in stages:
        say(f"{stage.record['name']}: {stage.record['command']}")
        say(f"  the model before it: {stage.snapshot or 'not kept'}")


@click.command(cls=Verb, name="apply", epilog=command.MODEL_HELP)
@click.argument("plan", type=command.PATH)
@click.argument("model", shell_complete=complete)
@click.option("--out", required=True, type=command.PATH, help="The folder to write the changed model to.")
@command.code
@command.dtype
@command.input_shape
def apply(plan: Path, model: str, out: Path, code: str, dtype: str, input: str) -> None:
    """Apply PLAN to MODEL and save the result.

    PLAN is a file of `prune --dry-run`, or the ledger.json of a run. It may cut, grow or restore units. To restore,
    pass the ledger.json that also holds the cut.
    """
    from regrow.jobs.models import ModelSpec, load_model
    from regrow.jobs.parents import read_parent
    from regrow.store import SHAPES, write_model
    from regrow.store.ledger import Ledger, replay
    from regrow.store.replacing import clear_leftovers, replace_folder
    from regrow.tracing import trace

    if not plan.is_file():
        raise click.UsageError(f"{plan} is not a file; write a plan with `regrow prune … --dry-run {plan}`")
    plans = _read_plans(plan)
    clear_leftovers(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise click.UsageError(f"{out} exists and is not empty; choose another folder, or delete it")
    command.announce_code(model, code)
    with show_progress() as progress:
        loaded = load_model(ModelSpec(model, dtype=dtype, input=input), progress, code)
        progress(0, 1, "applying")
        axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
        replay(loaded.model, axes, plans)
        with replace_folder(out) as folder:
            write_model(loaded, folder)
            earlier = read_parent(Path(model)).plans if Path(model, SHAPES).is_file() else ()
            for part in (*earlier, *plans):
                Ledger(folder / "ledger.json").append(part)
    changed = {key for part in plans for key in part.changes}
    say(f"{len(changed)} axes changed; the model is in {out}")


def _read_plans(path: Path) -> list[Any]:
    """Return the plans in a ledger, in order, or the one in a plan's file; raise UsageError, which names the file."""
    from regrow.core.limits import parse_json, read_text
    from regrow.store.ledger import Ledger, read_plan

    try:
        text = read_text(path, 2**30)
        return list(Ledger(path).plans()) if '"regrow-ledger/' in text[:100] else [read_plan(parse_json(text))]
    except (ValueError, OSError) as error:
        raise click.UsageError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


@click.command(cls=Verb, settings=growing.Settings, epilog=GROW_EPILOG)
@command.run_folder
@command.dry_run
@command.code
def grow(settings: growing.Settings, out: Path | None, dry_run: Path | None, code: str) -> None:
    """Widen or deepen MODEL and keep its outputs.

    Writes a folder with the model and a report.
    Outputs before and after are compared, in float64 and in the model's precision, and the largest change is printed.
    Axes for which no exact way is known (under LayerNorm or GroupNorm) are refused with the reason.
    """
    command.announce_code(settings.model, code)
    if dry_run:
        _write_growth_plan(settings, dry_run, code)
        return
    from regrow.jobs.grow import grow_named

    with recorded_run(out, code=code) as invocation:
        grow_named(settings, invocation)


def _write_growth_plan(settings: growing.Settings, path: Path, code: str) -> None:
    """Write the plan of a growth to the JSON file ``path``, and print it; nothing grows. ``code``: as ``--code``."""
    from regrow.jobs.grow import plan_named
    from regrow.jobs.recording import Invocation
    from regrow.store.atomic import JSON, write_output

    with show_progress() as progress:
        plan, notes = plan_named(settings, Invocation(code=code, progress=progress))
    rows = [(key, change.size, change.after, f"+{change.grow}") for key, change in plan.changes.items()]
    if rows:
        print_table("What would grow", ("axis", "units", "after", ""), rows, numbers=(1, 2, 3))
    for note in notes:
        say(f"note: {note}")
    for stack, insertion in plan.insert.items():
        copies = ", ".join(f"{copy.of} → {copy.position}" for copy in insertion.copies)
        say(f"{stack}: {insertion.size} → {insertion.after} blocks; copies (block → its new place): {copies}")
    write_output(path, plan.to_json() + "\n", JSON)
    say(f"plan written to {path}; apply it with `regrow apply {path} {settings.model} --out FOLDER`")


@click.command(cls=Verb, settings=exporting.Settings, epilog=EXPORT_EPILOG)
@click.option("--out", required=True, type=command.PATH, help="The file or folder to write.")
@command.code
@command.memory
def export(settings: exporting.Settings, out: Path, code: str, memory: str) -> None:
    """Export MODEL to transformers, GGUF or ONNX.

    The written file is checked by loading it.
    """
    command.announce_code(settings.model, code)
    from regrow.jobs.export import export_named
    from regrow.jobs.recording import Invocation

    with show_progress() as progress:
        written = export_named(settings, Invocation(out, code, memory, announce=say, progress=progress))
    say(f"{written.path}: {format_number(written.bytes)} bytes")
    for note in written.notes:
        say(f"note: {note}")
    for name, value in written.checked.items():
        say(f"checked: {name.replace('_', ' ')} {value if isinstance(value, str) else format_number(value)}")
    if written.memory:
        say_peak(written.memory)
    if written.path.is_dir():
        say(f"upload it: hf upload USER/NAME {shlex.quote(str(written.path))}")
