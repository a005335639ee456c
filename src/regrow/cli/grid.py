"""``regrow grid``: prune with every combination of settings, on this machine or on a Ray cluster."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from regrow.cli import options
from regrow.cli.boundary import CELLS_FAILED, Verb
from regrow.cli.checks import check_words
from regrow.cli.flags import Given
from regrow.cli.screen import err, number, printable, say, table, working
from regrow.errors import InputError
from regrow.settings.grid import ROWS, GridCell, Settings, read_grid

EPILOG = """\b
Examples
  regrow grid grid.yaml --out GRID                     one cell after the other
  regrow grid grid.yaml --jobs 4 --threads 2 --out GRID
  regrow grid grid.yaml --on ray --address auto --out GRID

\b
grid.yaml
  base: {model: smollm2-135m, tokens: 4096}
  grid:
    method: [flap, wanda_sp]
    keep: [0.8, 0.7, 0.5]
    seed: [0, 1]
    source: [[news, code], [talk]]
"""


@click.command(cls=Verb, needs="regrow.commands.grid", resumed=("out",), settings=Settings, epilog=EPILOG)
@click.option(
    "--out",
    type=options.PATH,
    required=True,
    help="The folder of the grid: a run folder per cell, and grid.jsonl. The same command resumes where it was "
    "stopped, and runs cells again that failed.",
)
@options.code
@options.memory(
    "How much memory each cell may use, like 4GiB, as for `regrow prune`; with --jobs 4, four cells use it at a time."
)
def grid(given: Given[Settings], out: Path, code: str, memory: str) -> int:
    """Prune with every combination of the settings in FILE; each cell is a run of `regrow prune`."""
    from regrow.commands.cell_processes import make_engine
    from regrow.commands.grid import run

    settings = given.build()
    cells = read_grid(Path(settings.file), settings.model)
    _check(settings, cells, out)
    options.say_code(settings.model, code)
    jobs = settings.jobs or (1 if settings.on == "local" else None)
    cpus = max(settings.threads, jobs * settings.threads if jobs else os.cpu_count() or 1)
    words = [word for name, value in (("--code", code), ("--memory", memory)) if value for word in (name, value)]
    with working() as progress:
        rows = run(
            cells,
            out,
            lambda: make_engine(settings.on, address=settings.address, cpus=cpus, retries=settings.retries),
            jobs=jobs,
            threads=settings.threads,
            retries=settings.retries,
            words=words,
            progress=progress,
            announce=lambda line: err.print(printable(line), markup=False),
        )
    failed = [row["cell"] for row in rows if row["state"] == "failed"]
    _show(cells, rows, len(failed))
    say(f"a row per cell is in {out / ROWS}")
    if failed:
        say(f"what cells print is in {out / 'logs'}; the same command runs those again that failed")
    return CELLS_FAILED if failed else 0


def _check(settings: Settings, cells: Iterable[GridCell], out: Path) -> None:
    """Raise InputError if a cell names something that is not there, before any cell is run."""
    for cell in cells:
        try:
            check_words("prune", cell.settings, {"out": str(out / cell.name)})
        except (ValueError, click.ClickException) as error:
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
            raise InputError(f"{settings.file}: {cell.name}: {text}") from error


def _show(cells: Sequence[GridCell], rows: Iterable[Mapping[str, Any]], failed: int) -> None:
    """Print a table with a row for each cell."""
    keys = [key for key in cells[0].values if len({str(cell.values[key]) for cell in cells}) > 1]
    lines = []
    for row in rows:
        words = [_text(row["settings"][key]) for key in keys]
        weights = f"{row['weights'][1] / max(row['weights'][0], 1):.4f}" if "weights" in row else ""
        lines.append((*words, weights, _quality(row), number(row["seconds"], 3), row["error"] or row["state"]))
    title = f"{len(cells)} cells: {len(cells) - failed} finished, {failed} failed"
    columns = (*keys, "weights", "perplexity or accuracy", "seconds", "")
    table(title, columns, lines, numbers=range(len(keys), len(keys) + 3))


def _quality(row: Mapping[str, Any]) -> str:
    """Return the factor by which perplexity grew, as the geometric mean over sources, or the mean accuracies."""
    if pairs := [pair for pair in row.get("perplexity", {}).values() if all(pair)]:
        return f"× {math.exp(sum(math.log(after / before) for before, after in pairs) / len(pairs)):.3f}"
    if pairs := list(row.get("accuracy", {}).values()):
        before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        return f"{before:.3f} → {after:.3f}"
    return ""


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
