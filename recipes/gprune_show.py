"""The tables of docs/reproductions/gprune.md, from what ``gprune_tables.py`` wrote.

    python recipes/gprune_show.py main recipes/results/gprune.jsonl
    python recipes/gprune_show.py main recipes/results/gprune.jsonl --against "flap mlp, outer blocks whole"
    python recipes/gprune_show.py ablation recipes/results/gprune.jsonl
    python recipes/gprune_show.py learning recipes/results/gprune.jsonl
    python recipes/gprune_show.py choice recipes/results/gprune.jsonl
    python recipes/gprune_show.py observation recipes/results/gprune_observation.json   (draws an .svg beside it)

Perplexities are geometric means over text domains. Differences are paired: mean over windows of the unseen domains
of the negative log-likelihood per token, against the baseline (``main``) or the full method (``ablation``), with the
standard error over windows (each the mean of its draws; beyond 2.1 of it is 5 % at 16 windows) and the span over draws.
The baseline is ``--against``: LLM-Pruner's Taylor score on MLP neurons, compensated, first and last blocks unpruned;
where that was not run, the best of FLAP and Wanda-sp on MLP neurons. ``learning`` counts the runs whose loss on
held-out calibration windows was higher after the last step than at the start.
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
from regrow.reports.reading import RunRecord

Row = dict[str, Any]
CAPPED = 50.0
BASELINE = "llm_pruner mlp"


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

    def paired(self, other: "Cell") -> tuple[float, float, list[float]] | None:
        """Nats per token above another arm on unseen domains, over the draws that both have: mean, error, each draw."""
        theirs = {row["draw"]: row for row in other.rows}
        both = [(row, theirs[row["draw"]]) for row in self.rows if row["draw"] in theirs]
        if other is self or not both:
            return None
        each = [
            [x - y for kind in self.kinds(seen=False) for x, y in zip(a["nll"][kind], b["nll"][kind], strict=True)]
            for a, b in both
        ]
        windows = [statistics.fmean(row) for row in zip(*each, strict=True)]
        error = statistics.stdev(windows) / math.sqrt(len(windows))
        return statistics.fmean(windows), error, [statistics.fmean(row) for row in each]

    def against(self, other: "Cell") -> str:
        """That difference ± its standard error, and the span over draws."""
        if (found := self.paired(other)) is None:
            return ""
        mean, error, draws = found
        span = f", draws {min(draws):+.3f} to {max(draws):+.3f}" if len(draws) > 1 else ""
        return f"{mean:+.3f} ± {error:.3f}{span}"

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


def main_table(rows: Sequence[Row], against: str = BASELINE) -> Iterator[str]:
    """One block per keep and fold, then GPrune's perplexity on unseen domains relative to baselines."""
    every = [cell for cell in cells(rows, "main") if cell.arm != "dense"]
    dense = next((row for row in rows if row["arm"] == "dense"), None)
    for fold, unseen in enumerate(reversed(FOLDS)) if dense else ():
        plain = Cell("dense", 1.0, fold, (dense,))
        told = f"unseen ({', '.join(unseen)}) {plain.perplexity(False)}, seen {plain.perplexity(True)}"
        yield f"Dense, fold {fold}: {told}."
    yield from ("", f"| keep | fold | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 2) + "|")
    relative: list[str] = []
    for keep, fold in sorted({(cell.keep, cell.fold) for cell in every}, key=lambda pair: (-pair[0], pair[1])):
        block = {cell.arm: cell for cell in every if (cell.keep, cell.fold) == (keep, fold)}
        controls = [cell for arm, cell in block.items() if arm.startswith("control")]
        best = min(controls, key=lambda cell: statistics.fmean(cell.logs(False))) if controls else None
        baseline = block.get(against, best)
        for arm, cell in block.items():
            robust = [part for one in ("base", "gprune") if (part := cell.mean("robust_among_cut", one))]
            row = (
                f"**{arm}**" if cell is baseline else arm,
                cell.perplexity(False),
                cell.perplexity(True),
                cell.against(baseline) if baseline else "",
                " → ".join(robust),
                cell.mean("seconds"),
                str(len(cell.rows)),
            )
            yield f"| {keep} | {fold} | {' | '.join(row)} |"
        relative += _relative(keep, fold, block, baseline)
    yield from ("", "| keep | fold | perplexity, unseen domains | figure |", "|---|---|---|---|", *relative)


_UNSEEN, _SEEN = "PPL, unseen domains", "PPL, calibration domains"
_COLUMNS = ("arm", _UNSEEN, _SEEN, "difference to the baseline, nats/token", "robust among cut", "seconds", "draws")


def _relative(keep: float, fold: int, block: dict[str, Cell], baseline: Cell | None) -> Iterator[str]:
    def level(arm: str) -> float | None:
        return statistics.fmean(block[arm].logs(False)) if arm in block else None

    parts = ("mlp", "all")
    for base in BASES:
        pooled = block.get(f"{base} pooled")
        for other, what in ((baseline, baseline and baseline.arm), (pooled, f"{base} pooled, all units")):
            for part in parts:
                mine = block.get(f"gprune {base} {part}")
                found = mine.paired(other) if mine and other else None
                if found:
                    less, error = 100 * math.expm1(found[0]), 100 * math.exp(found[0]) * found[1]
                    yield f"| {keep} | {fold} | gprune {base} {part} against {what} | {less:+.1f} ± {error:.1f} % |"
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
            yield f"| {keep} | {fold} | max ÷ min over base metrics, {part}: base → gprune | {span} |"


def ablation_table(rows: Sequence[Row], table: str = "ablation") -> Iterator[str]:
    """One row per change, against the full method (learned arms) or the full method not learned (the others)."""
    every = list(cells(rows, table))
    dense = next((cell for cell in every if cell.arm == "dense"), None)
    if dense:
        yield f"Dense: unseen {dense.perplexity(False)}, seen {dense.perplexity(True) if dense.kinds(True) else '–'}."
    columns = ("arm", _UNSEEN, _SEEN, "difference to ‡, nats/token", "held-out loss", "robust among cut", "draws")
    yield from ("", f"| {' | '.join(columns)} |")
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


def learning_table(rows: Sequence[Row]) -> Iterator[str]:
    """How often the loss on held-out calibration windows is higher after the last step than at the start."""
    counts: dict[tuple[float, str], list[bool]] = {}
    runs = [row for row in rows if len(row.get("history") or ()) > 1 and not row["arm"].startswith("choice")]
    for row in runs:
        units = "MLP neurons" if row["only"] == "mlp" else "with attention"
        first, *_, last = (one["held_out"] for one in row["history"])
        counts.setdefault((row["keep"], units), []).append(last > first)
    yield from ("| keep | units | ended higher than it started | runs |", "|---|---|---|---|")
    for (keep, units), higher in sorted(counts.items(), key=lambda item: (-item[0][0], item[0][1])):
        yield f"| {keep} | {units} | {sum(higher)} | {len(higher)} |"


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
    told = findings(RunRecord(Path(), {}, findings={"spectrum": json.loads(path.read_text())["rows"]["wifv raw"]}))
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
    parser.add_argument("table", choices=("main", "ablation", "validation", "learning", "choice", "observation"))
    parser.add_argument("results", type=Path, help="what gprune_tables.py wrote")
    parser.add_argument("--model", default="smollm2-135m", help="of which model")
    parser.add_argument("--against", default=BASELINE, help="main: the arm that differences are to")
    args = parser.parse_args()
    if args.table == "observation":
        draw_observation(args.results)
        return
    rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    rows = [row for row in rows if row["model"] == args.model]
    tables = {"main": partial(main_table, against=args.against), "ablation": ablation_table, "choice": choice_table}
    tables["learning"] = learning_table
    tables["validation"] = partial(ablation_table, table="validation")
    print("\n".join(tables[args.table](rows)))


if __name__ == "__main__":
    main()
