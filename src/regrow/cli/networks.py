"""Commands on one network: ``regrow show``, ``apply``, ``grow`` and ``export``."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow.cli import command
from regrow.cli.command import Stated, Verb
from regrow.cli.runs import recorded_run
from regrow.cli.screen import number, say, say_peak, table, working, write_json
from regrow.settings import export as exporting
from regrow.settings import grow as growing

if TYPE_CHECKING:
    pass

GROW_EPILOG = """\b
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
EXPORT_EPILOG = """\b
Formats
  transformers   a folder that from_pretrained loads without regrow; if layers differ in width, it contains a small
                 modelling file and loads with trust_remote_code=True
  gguf           a file for llama.cpp; --dtype f16 (default), f32, bf16 or q8_0
  onnx           a file for onnxruntime; --dtype int8 quantises the weights
  torchvision    a state_dict, and a Python file that builds the network with torchvision

\b
Examples
  regrow export RUN --to transformers --out my-model
  regrow export RUN --to gguf --dtype q8_0 --out my-model.gguf
"""


@click.command(cls=Verb, epilog=command.MODEL_HELP)
@click.argument("model")
@click.option("--json", "json_file", type=command.PATH, help="Also write the whole inventory to this JSON file.")
@click.option("--all", "everything", is_flag=True, help="List every frozen axis, instead of one row per reason.")
@click.option("--branches", is_flag=True, help="Also list the modules that can be removed as a whole.")
@command.code
@command.dtype
@command.input_shape
def show(
    model: str, json_file: Path | None, everything: bool, branches: bool, code: str, dtype: str, input: str
) -> None:
    """List the axes of MODEL: which can be cut, what one unit costs, and why the others are frozen."""
    from regrow.jobs.models import ModelSpec, trace_model
    from regrow.nets.loaded import written_shape
    from regrow.tracing import with_branches

    command.say_code(model, code)
    with working() as progress:
        loaded, axes = trace_model(ModelSpec(model, dtype=dtype, input=input), progress, code)
        if branches:
            axes = with_branches(loaded.model, axes)
    if json_file:
        write_json(json_file, _describe(axes, model))
        say(f"written to {json_file}")
    for part in axes.tables(everything=everything):
        table(part.title, part.columns, part.rows, part.numbers)
    if branches:
        _branches_table(axes, everything)
    how = "on fake data, as torch.export does" if axes.recorded == "export" else "by recording one eager run"
    say(f"traced {how}")
    say(f"MACs are those of one example, with dense kernels, of an input of {written_shape(loaded.example)}")
    for note in axes.notes:
        say(f"note: {note}")
    if axes.unreached:
        say(f"not reached by the example: {len(axes.unreached)} parameters, {', '.join(axes.unreached[:3])} …")
    say(axes.summary())


def _branches_table(axes: Any, everything: bool) -> None:
    from regrow.core.axes import size_of

    rows, sizes = [], axes.sizes()
    for path, branch in axes.branches.items():
        if branch.free:
            names = [name for name in axes.parameters if name not in axes.ties and branch.holds(name)]
            count = sum(prod(size_of(dim, sizes) for dim in axes.shapes[name]) for name in names)
            others = ", ".join(other for other in branch.placeholders if other != path)
            rows.append((path, branch.gives, number(count), others))
    columns = ("module", "its placeholder", "parameters", "goes with it")
    table("What can be dropped whole", columns, rows, numbers=(2,))
    if everything:
        rest = [(path, branch.reason) for path, branch in axes.branches.items() if not branch.free]
        table("What cannot", ("module", "why"), rest)


def _describe(axes: Any, model: str) -> dict[str, Any]:
    """Return the inventory as JSON data."""
    from dataclasses import asdict

    return {
        "format": "regrow-axes/1",
        "model": model,
        "recorded": axes.recorded,
        "axes": [asdict(row) | {"slots": [asdict(slot) for slot in axes[row.key].slots]} for row in axes.inventory()],
        "branches": {
            path: {"gives": branch.gives, "with": sorted(branch.placeholders)}
            if branch.free
            else {"reason": branch.reason}
            for path, branch in axes.branches.items()
        },
        "counted": list(axes.counted),
        "unreached": list(axes.unreached),
        "notes": list(axes.notes),
    }


@click.command(cls=Verb, name="apply", epilog=command.MODEL_HELP)
@click.argument("plan", type=command.PATH)
@click.argument("model")
@click.option("--out", required=True, type=command.PATH, help="The folder to write the changed model to.")
@command.code
@command.dtype
@command.input_shape
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
    command.say_code(model, code)
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


@click.command(cls=Verb, resumed=("out",), settings=growing.Settings, epilog=GROW_EPILOG)
@command.run_folder()
@click.option("--dry-run", is_flag=True, help="Only print what would grow.")
@click.option("--plan", type=command.PATH, help="With --dry-run: also write the plan here; `regrow apply` runs it.")
@command.code
@command.track
def grow(
    stated: Stated[growing.Settings], out: Path | None, dry_run: bool, plan: Path | None, code: str, track: str
) -> None:
    """Widen or deepen MODEL such that its outputs do not change; writes a folder with the model and a report.

    Outputs before and after are compared, in float64 and in the model's precision, and the largest change is printed.
    Axes for which no exact way is known (under LayerNorm or GroupNorm) are refused with the reason.
    """
    settings = stated.build()
    if plan and not dry_run:
        raise click.UsageError("--plan is for --dry-run, a run keeps its plan in ledger.json; add --dry-run")
    command.say_code(settings.model, code)
    if dry_run:
        _show_growth(settings, plan, code)
        return
    from regrow.jobs.grow import run

    with recorded_run("model", out, code=code, track=track) as invocation:
        run(settings, invocation)


def _show_growth(settings: growing.Settings, path: Path | None, code: str) -> None:
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


@click.command(cls=Verb, settings=exporting.Settings, epilog=EXPORT_EPILOG)
@click.option("--out", required=True, type=command.PATH, help="The file or folder to write.")
@command.code
@command.memory(
    "For gguf: read, write and compare one tensor at a time; refused if that needs more than this amount, like 1GiB. "
    "For text models in a transformers folder or a run folder, and packaged ones."
)
def export(stated: Stated[exporting.Settings], out: Path, code: str, memory: str) -> None:
    """Export RUN (a run folder, or any model that `regrow prune` takes), and check the written file by loading it."""
    settings = stated.build()
    command.say_code(settings.run, code)
    from regrow.jobs.export import run
    from regrow.jobs.recording import Invocation

    with working() as progress:
        written = run(settings, Invocation(out, code, memory, announce=say, progress=progress))
    say(f"{written.path}: {number(written.bytes)} bytes")
    for note in written.notes:
        say(f"note: {note}")
    for what, value in written.checked.items():
        say(f"checked: {what.replace('_', ' ')} {value if isinstance(value, str) else number(value)}")
    if written.memory:
        say_peak(written.memory)
