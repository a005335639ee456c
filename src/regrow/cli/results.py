"""What commands print of the quality of the networks of a run: before and after the cut, and after its repair."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regrow.cli.screen import number, say, say_peak, table

if TYPE_CHECKING:
    from regrow.store.run_folder import RunFolder

MODELS = ("dense", "cut", "pruned", "recovered")
"""The networks of a run in order; ``cut`` is the pruned one before layers are fitted."""


def say_quality(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print perplexity per source, and accuracy per task, of every network of a run.

    Args:
        rows: The rows of ``metrics.jsonl``.
    """
    perplexities = {(row.get("model"), row.get("source")): row for row in rows if row["what"] == "perplexity"}
    models = [name for name in MODELS if any(name == model for model, _ in perplexities)]
    if len(models) > 1:
        last = {source: row for (model, source), row in perplexities.items() if model == models[-1]}
        several, lines = len({bool(row.get("seen")) for row in last.values()}) > 1, []
        for source, row in last.items():
            label = f"{source} ({'seen' if row.get('seen') else 'unseen'})" if several else source
            values = [perplexities.get((model, source), {}).get("ppl") for model in models]
            lines.append((label, *map(number, values), *_compare(values)))
        title, columns = "Perplexity on the evaluation half of each source", ["source", *models, "× dense"]
        if len(models) > 2:
            title += ", and the fraction of the lost log-perplexity that was recovered"
            columns.append("fraction")
        table(title, columns, lines, numbers=range(1, len(columns)))
    tasks: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["what"] == "choice":
            tasks.setdefault(row["task"], {})[row["model"]] = row
    for task, known in tasks.items():
        ordered = [known[model] for model in MODELS if "acc" in known.get(model, {})]
        if ordered:
            course = " → ".join(f"{row['acc']:.3f}" for row in ordered)
            say(f"accuracy on {task}: {course} (n = {ordered[-1]['n']})")


def _compare(values: Sequence[float | None]) -> list[str]:
    """Return the ratio of the last perplexity to the first and, of three, what the repair brought back of the loss."""
    dense, cut, last = values[0], values[1], values[-1]
    cells = [f"{last / dense:.3f}" if last and dense else "–"]
    if len(values) > 2:
        lost = math.log(cut / dense) if cut and dense else 0
        cells.append(f"{100 * math.log(cut / last) / lost:.0f} %" if lost > 0 and cut and last else "–")
    return cells


def say_outcome(folder: "RunFolder") -> None:
    """Print what the last recovery of a run did, the quality of its networks, and the peak of its memory.

    Args:
        folder: The folder of the run.
    """
    rows = folder.metrics()
    for row in [row for row in rows if row["what"] == "recovery"][-1:]:
        say(f"recovered by {row['by']} on {number(row['tokens'])} tokens in {row['seconds']:.0f} s")
        if "note" in row:
            say(f"note: {row['note']}")
    say_quality(rows)
    if memory := folder.run().get("memory"):
        say_peak(memory)
