"""The comparison of runs: one table of what differs, size, speed and quality, and what makes it unfair."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from regrow.reports import quantities as q
from regrow.reports.figures import Drawing, draw_front
from regrow.reports.records import Run
from regrow.reports.summary import Summary, Table, summarise

EVALUATION = ("tasks", "data", "scenario", "train", "test", "validation", "eval_tokens", "seq_len")
"""Settings in which runs must agree, or their quality cannot be compared."""


@dataclass(frozen=True)
class Comparison:
    """What the page of several runs shows."""

    headline: str
    table: Table
    alarms: list[str]
    summaries: list[Summary]
    lower: bool  # whether quality is a perplexity, which is better the lower it is

    def draw(self) -> Drawing | None:
        """Draw quality against size."""
        points = [(row[0], one.size, one.quality) for row, one in zip(self._runs(), self.summaries, strict=True)]
        quality = "perplexity, geometric mean (log scale)" if self.lower else "accuracy"
        return draw_front(points, "parameters", quality, lower=self.lower)

    def _runs(self) -> list[list[str]]:
        return self.table.rows[-len(self.summaries) :]


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs, on the text domains and tasks on which all were evaluated."""
    shared = [row.name for row in runs[0].quality if all(row.name in measured(run) for run in runs)]
    runs = [replace(run, quality=[row for row in run.quality if row.name in shared]) for run in runs]
    summaries, differing = [summarise(run) for run in runs], find_differences(runs)
    quantities = dict.fromkeys(figures.label for summary in summaries for figures in summary.figures)
    tables = [{figures.label: figures for figures in summary.figures} for summary in summaries]
    rows = []
    for i, (run, table) in enumerate(zip(runs, tables, strict=True)):
        after = [table[label].after if label in table else q.NONE for label in quantities]
        rows.append([run.name, *(values[i] for values in differing.values()), *after])
    sides = [{table[label].before if label in table else q.NONE for table in tables} for label in quantities]
    before = [values.pop() if len(values) == 1 else q.NONE for values in sides]
    if any(value != q.NONE for value in before):
        rows.insert(0, ["before", *[q.NONE] * len(differing), *before])
    alarms = [f"{run.name}: {alarm}" for run, one in zip(runs, summaries, strict=True) for alarm in one.alarms]
    if unfair := [name for name in differing if name in EVALUATION]:
        alarms.insert(0, f"The runs differ in {', '.join(unfair)}: their quality cannot be compared.")
    elif len({_evaluated(run) for run in runs}) > 1:
        alarms.insert(0, "The runs differ in tasks or in what was evaluated: their quality cannot be compared.")
    models = {run.model for run in runs}
    headline = f"{len(runs)} runs of {models.pop() if len(models) == 1 else f'{len(models)} models'}"
    if shared:
        headline += f", compared on {', '.join(shared[:8])}{' and others' * (len(shared) > 8)}"
    lower = any(row.seen is not None for run in runs for row in run.quality)
    return Comparison(headline, Table(headline, ["Run", *differing, *quantities], rows), alarms, summaries, lower)


def measured(run: Run) -> set[str]:
    """Return the text domains and tasks on which a run was evaluated at its end."""
    return {row.name for row in run.quality if row.after is not None}


def find_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that all runs have and in which they differ: name → one value per run."""
    tables = [run.defaults | run.settings for run in runs]
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    columns = {name: [table[name] for table in tables] for name in shared}
    return {name: values for name, values in columns.items() if len(set(values)) > 1 and name != "run"}


def _evaluated(run: Run) -> tuple[object, ...]:
    return (*run.course.tasks, *(value is None for value in (run.course.accuracies or [[]])[-1]))
