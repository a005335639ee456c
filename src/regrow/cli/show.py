"""``regrow show``: list the axes of a network, what a unit costs, and why others are frozen."""

from pathlib import Path
from typing import Any

import click

from regrow.cli import flags, options
from regrow.cli.boundary import Verb
from regrow.cli.screen import number, say, table, working


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
    from regrow.nets.examples import written_shape
    from regrow.tracing import with_branches

    options.say_code(model, code)
    with working() as progress:
        loaded, axes = trace_model(ModelSpec(model, dtype=dtype, input=input), progress, code)
        if branches:
            axes = with_branches(loaded.model, axes)
    if json_file:
        _write(json_file, axes, axes.inventory(), model)
    for one in axes.tables(everything=everything):
        table(one.title, one.columns, one.rows, one.numbers)
    if branches:
        _branches_table(axes, everything)
    say(
        "traced on fake data, as torch.export does"
        if axes.recorded == "export"
        else "traced by recording one eager run"
    )
    say(f"MACs are those of one example, with dense kernels, of an input of {written_shape(loaded.example)}")
    for note in axes.notes:
        say(f"note: {note}")
    if axes.unreached:
        say(f"not reached by the example: {len(axes.unreached)} parameters, {', '.join(axes.unreached[:3])} …")
    say(axes.summary())


def _branches_table(axes: Any, everything: bool) -> None:
    lines = []
    for path, branch in axes.branches.items():
        own = [name for name in axes.parameters if name not in axes.ties and branch.holds(name)]
        if branch.free:
            others = ", ".join(other for other in branch.placeholders if other != path)
            lines.append((path, branch.gives, number(sum(_numel(axes, name) for name in own)), others))
    columns = ("module", "its placeholder", "parameters", "goes with it")
    table("What can be dropped whole", columns, lines, numbers=(2,))
    if everything:
        rest = [(path, branch.reason) for path, branch in axes.branches.items() if not branch.free]
        table("What cannot", ("module", "why"), rest)


def _numel(axes: Any, name: str) -> int:
    from math import prod

    from regrow.core.axes import size_of

    sizes = axes.sizes()
    return prod(size_of(dim, sizes) for dim in axes.shapes[name])


def _write(path: Path, axes: Any, rows: list[Any], model: str) -> None:
    import json
    from dataclasses import asdict

    from regrow.store.atomic import JSON, write_output

    data = {
        "format": "regrow-axes/1",
        "model": model,
        "recorded": axes.recorded,
        "axes": [row.record() | {"slots": [asdict(slot) for slot in axes[row.key].slots]} for row in rows],
        "branches": {
            path: {"gives": one.gives, "with": sorted(one.placeholders)} if one.free else {"reason": one.reason}
            for path, one in axes.branches.items()
        },
        "counted": list(axes.counted),
        "unreached": list(axes.unreached),
        "notes": list(axes.notes),
    }
    write_output(path, json.dumps(data, indent=1) + "\n", JSON)
    say(f"written to {path}")
