"""``regrow show``: list the axes of a network, what a unit costs, and why others are frozen."""

from math import prod
from pathlib import Path
from typing import Any

import click

from regrow.cli import flags, options
from regrow.cli.boundary import Verb
from regrow.cli.screen import number, say, table, working, write_json


@click.command(cls=Verb, epilog=flags.MODEL_HELP)
@click.argument("model")
@click.option("--json", "json_file", type=options.PATH, help="Also write the whole inventory to this JSON file.")
@click.option("--all", "everything", is_flag=True, help="List every frozen axis, instead of one row per reason.")
@click.option("--branches", is_flag=True, help="Also list the modules that can be removed as a whole.")
@options.code
@flags.dtype
@flags.input_shape
def show(
    model: str, json_file: Path | None, everything: bool, branches: bool, code: str, dtype: str, input: str
) -> None:
    """List the axes of MODEL: which can be cut, what one unit costs, and why the others are frozen."""
    from regrow.jobs.models import ModelSpec, trace_model
    from regrow.nets.loaded import written_shape
    from regrow.tracing import with_branches

    options.say_code(model, code)
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
