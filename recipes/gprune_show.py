"""The tables of docs/reproductions/gprune.md, from what ``gprune_tables.py`` wrote.

    python recipes/gprune_show.py main recipes/results/gprune.jsonl
    python recipes/gprune_show.py ablation recipes/results/gprune.jsonl
    python recipes/gprune_show.py choice recipes/results/gprune.jsonl
    python recipes/gprune_show.py observation recipes/results/gprune_observation.json   (draws an .svg beside it)

Perplexities are geometric means over the kinds of text. Differences are paired: mean over windows of the unseen kinds
of the negative log-likelihood per token, against the control (``main``) or the full method (``ablation``), with the
standard error over windows (each the mean of its draws; beyond 2.1 of it is 5 % at 16 windows) and the span over draws.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gprune_tables import BASES, FOLDS

from regrow.reports import behaviour
from regrow.reports.findings import findings
from regrow.reports.reading import RunFolder

Row = dict[str, Any]
CAPPED = 50.0


@dataclass(frozen=True)
class Cell:
    """The draws of one arm at one keep and fold."""

    arm: str
    keep: float
    fold: int
    rows: tuple[Row, ...]

    def logs(self, seen: bool) -> list[float]:
        """Per draw, the log of the geometric mean perplexity over kinds."""
        rows = [[statistics.fmean(row["nll"][kind]) for kind in self.kinds(seen)] for row in self.rows]
        return [statistics.fmean(row) for row in rows if row]

    def kinds(self, seen: bool) -> list[str]:
        """The kinds measured that calibration saw, or those it did not."""
        return [kind for kind in self.rows[0]["nll"] if (kind in FOLDS[self.fold]) == seen]

    def perplexity(self, seen: bool) -> str:
        """Mean ± sd over draws."""
        return spread([math.exp(min(log, CAPPED)) for log in self.logs(seen)])

    def against(self, other: "Cell") -> str:
        """The paired difference to another arm on unseen kinds, over the draws that both have."""
        theirs = {row["draw"]: row for row in other.rows}
        both = [(row, theirs[row["draw"]]) for row in self.rows if row["draw"] in theirs]
        if other is self or not both:
            return ""
        each = [
            [x - y for kind in self.kinds(seen=False) for x, y in zip(a["nll"][kind], b["nll"][kind], strict=True)]
            for a, b in both
        ]
        windows = [statistics.fmean(row) for row in zip(*each, strict=True)]
        error = statistics.stdev(windows) / math.sqrt(len(windows))
        draws = [statistics.fmean(row) for row in each]
        told = f", draws {min(draws):+.3f} to {max(draws):+.3f}" if len(draws) > 1 else ""
        return f"{statistics.fmean(windows):+.3f} ± {error:.3f}{told}"

    def mean(self, *path: str) -> str:
        """The mean over draws of a number that rows hold."""
        found = []
        for row in self.rows:
            value: Any = row
            for name in path:
                value = (value or {}).get(name)
            found += [] if value is None else [value]
        return f"{statistics.fmean(found):.2f}" if found else ""


def cells(rows: Sequence[Row], table: str) -> Iterator[Cell]:
    """The arms of a table, by keep and fold, in the order they were written in."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        of, named, arm = row["arm"].partition(": ")
        if (of if named else "main") == table:
            found.setdefault((row["keep"], row["fold"], arm if named else of), []).append(row)
    for (keep, fold, arm), mine in sorted(found.items(), key=lambda item: (-item[0][0], item[0][1])):
        yield Cell(arm, keep, fold, tuple(mine))


def main_table(rows: Sequence[Row]) -> Iterator[str]:
    """One block per keep and fold, then what became of the aims."""
    every = [cell for cell in cells(rows, "main") if cell.arm != "dense"]
    dense = next((row for row in rows if row["arm"] == "dense"), None)
    for fold, unseen in enumerate(reversed(FOLDS)) if dense else ():
        plain = Cell("dense", 1.0, fold, (dense,))
        told = f"unseen ({', '.join(unseen)}) {plain.perplexity(False)}, seen {plain.perplexity(True)}"
        yield f"Dense, fold {fold}: {told}."
    yield from ("", f"| keep | fold | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 2) + "|")
    aims = []
    for keep, fold in sorted({(cell.keep, cell.fold) for cell in every}, key=lambda pair: (-pair[0], pair[1])):
        block = {cell.arm: cell for cell in every if (cell.keep, cell.fold) == (keep, fold)}
        controls = [cell for arm, cell in block.items() if arm.startswith("control")]
        control = min(controls, key=lambda cell: statistics.fmean(cell.logs(False))) if controls else None
        for arm, cell in block.items():
            robust = [part for one in ("base", "gprune") if (part := cell.mean("robust_among_cut", one))]
            row = (
                f"**{arm}**" if cell is control else arm,
                cell.perplexity(False),
                cell.perplexity(True),
                cell.against(control) if control else "",
                " → ".join(robust),
                cell.mean("seconds"),
                str(len(cell.rows)),
            )
            yield f"| {keep} | {fold} | {' | '.join(row)} |"
        aims += _aims(keep, fold, block, control)
    yield from ("", "| keep | fold | aim | figure |", "|---|---|---|---|", *aims)


_COLUMNS = ("arm", "unseen kinds", "seen kinds", "against the control, nats", "robust among cut", "seconds", "draws")


def _aims(keep: float, fold: int, block: dict[str, Cell], control: Cell | None) -> Iterator[str]:
    def level(arm: str) -> float | None:
        return statistics.fmean(block[arm].logs(False)) if arm in block else None

    parts = ("mlp", "all")
    for base in BASES:
        for other, what in ((control and control.arm, "the control"), (f"{base} pooled", "itself pooled, all units")):
            for part in parts:
                mine, theirs = level(f"gprune {base} {part}"), level(other or "")
                if mine is not None and theirs is not None:
                    less = math.exp(mine - theirs) - 1
                    yield f"| {keep} | {fold} | gprune {base} {part} against {what} | {100 * less:+.1f} % |"
    plain = {
        "mlp": ("control flap ranked", "control wanda_sp uniform", "llm_pruner mlp"),
        "all": tuple(f"{base} pooled" for base in BASES),
    }
    for part in parts:
        spans = []
        for row in (plain[part], [f"gprune {base} {part}" for base in BASES]):
            levels = [found for arm in row if (found := level(arm)) is not None]
            spans += [math.exp(max(levels) - min(levels))] if len(levels) == len(BASES) else []
        if len(spans) == 2:
            span = f"{spans[0]:.2f} → {spans[1]:.2f}"
            yield f"| {keep} | {fold} | max ÷ min over bases, {part}: without → with | {span} |"


def ablation_table(rows: Sequence[Row], table: str = "ablation") -> Iterator[str]:
    """One row per change, against the full method (learned arms) or the full method not learned (the others)."""
    every = list(cells(rows, table))
    dense = next((cell for cell in every if cell.arm == "dense"), None)
    if dense:
        yield f"Dense: unseen {dense.perplexity(False)}, seen {dense.perplexity(True) if dense.kinds(True) else '–'}."
    yield from ("", "| arm | unseen kinds | seen kinds | against ‡, nats | held-out loss | robust among cut | draws |")
    yield "|---|---|---|---|---|---|---|"
    for reference in ("full", "unlearned: modules, switch"):
        full = next((cell for cell in every if cell.arm == reference), None)
        for cell in every:
            if cell.arm == "dense" or cell.arm.startswith("unlearned") != reference.startswith("unlearned"):
                continue
            judged = [min(one["held_out"] for one in row["history"]) for row in cell.rows if row.get("history")]
            yield (
                f"| {cell.arm}{' ‡' if cell is full else ''} | {cell.perplexity(False)} | "
                f"{cell.perplexity(True) if cell.kinds(True) else ''} | {cell.against(full) if full else ''} | "
                f"{spread(judged)} | {cell.mean('robust_among_cut', 'gprune')} | {len(cell.rows)} |"
            )


def choice_table(rows: Sequence[Row]) -> Iterator[str]:
    """Accuracy per task, in percent, with the standard error."""
    every = [row for row in rows if "choice" in row]
    tasks = [one["task"] for one in every[0]["choice"]]
    yield from (f"| keep | arm | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 3) + "|")
    for row in sorted(every, key=lambda row: -row["keep"]):
        cols = [f"{100 * one['accuracy']:.1f} ± {100 * one['error']:.1f}" for one in row["choice"]]
        mean = 100 * statistics.fmean(one["accuracy"] for one in row["choice"])
        yield f"| {row['keep']} | {row['arm'].removeprefix('choice: ')} | {' | '.join(cols)} | {mean:.1f} |"


def draw_observation(path: Path) -> None:
    """The figure of what was observed (WIFV, raw ranks)."""
    told = findings(RunFolder(Path(), {}, findings={"spectrum": json.loads(path.read_text())["rows"]["wifv raw"]}))
    drawing = behaviour.spectrum({"findings": told})
    if drawing is not None:
        path.with_suffix(".svg").write_text(drawing.file())


def spread(values: Sequence[float]) -> str:
    """Mean ± sd; nothing for nothing.

    >>> spread([1.0, 3.0]), spread([2.0])
    ('2.00 ± 1.4', '2.00')
    """
    if not values:
        return ""
    more = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{more}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("main", "ablation", "validation", "choice", "observation"))
    parser.add_argument("results", type=Path, help="what gprune_tables.py wrote")
    parser.add_argument("--model", default="smollm2-135m", help="of which model")
    args = parser.parse_args()
    if args.table == "observation":
        draw_observation(args.results)
        return
    rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    rows = [row for row in rows if row["model"] == args.model]
    tables = {"main": main_table, "ablation": ablation_table, "choice": choice_table}
    tables["validation"] = partial(ablation_table, table="validation")
    print("\n".join(tables[args.table](rows)))


if __name__ == "__main__":
    main()
