"""The comparison of runs: one table of what differs, size, speed and quality, and what makes it unfair."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from regrow.reports import quantities as q
from regrow.reports.figures import Drawing, draw_front
from regrow.reports.records import Run
from regrow.reports.summary import Summary, SummaryTable, summarise

EVALUATION = ("tasks", "data", "scenario", "train", "test", "validation", "eval_tokens", "seq_len")
"""Settings in which runs must agree, or their quality cannot be compared."""


@dataclass(frozen=True)
class Comparison:
    """What the page of several runs shows."""

    headline: str
    table: SummaryTable
    alarms: list[str]
    runs: list[Run]
    summaries: list[Summary]

    def draw(self) -> Drawing | None:
        """Draw quality against size."""
        pairs = zip(self.runs, self.summaries, strict=True)
        points = [(run.name, summary.size, summary.quality) for run, summary in pairs]
        lower = any(row.seen is not None for run in self.runs for row in run.quality)
        quality = "perplexity, geometric mean (log scale)" if lower else "accuracy"
        return draw_front(points, "parameters", quality, lower=lower)


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs, on the text domains and tasks on which all were evaluated; a domain is seen if all runs saw it."""
    measured = [{row.name: row.seen for row in run.quality if row.after is not None} for run in runs]
    shared = {name: [domains[name] for domains in measured] for name in measured[0] if all(name in d for d in measured)}
    compared = []
    for run in runs:
        rows = [row for row in run.quality if row.name in shared]
        rows = [row if row.seen is None else replace(row, seen=all(shared[row.name])) for row in rows]
        compared.append(replace(run, quality=rows))
    summaries, differing = [summarise(run) for run in compared], find_differences(runs)
    models = {run.model for run in runs}
    headline = f"{len(runs)} runs of {models.pop() if len(models) == 1 else f'{len(models)} models'}"
    if shared:
        headline += f", compared on {', '.join([*shared][:8])}{' and others' * (len(shared) > 8)}"
    alarms = [f"{run.name}: {alarm}" for run, one in zip(runs, summaries, strict=True) for alarm in one.alarms]
    if unfair := [name for name in differing if name in EVALUATION]:
        alarms.insert(0, f"The runs differ in {', '.join(unfair)}: their quality cannot be compared.")
    elif len({_evaluated(run) for run in runs}) > 1:
        alarms.insert(0, "The runs differ in tasks or in what was evaluated: their quality cannot be compared.")
    if any(len(set(seen)) > 1 for seen in shared.values()):
        alarms.append("The runs were calibrated on different text: unseen is what at least one of them did not see.")
    return Comparison(headline, _tabulate(headline, runs, summaries, differing), alarms, compared, summaries)


def find_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that all runs have and in which they differ: name → one value per run."""
    tables = [run.defaults | run.settings for run in runs]
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    columns = {name: [table[name] for table in tables] for name in shared}
    return {name: values for name, values in columns.items() if len(set(values)) > 1 and name != "run"}


def _tabulate(
    title: str, runs: Sequence[Run], summaries: Sequence[Summary], differing: dict[str, list[str]]
) -> SummaryTable:
    """Return a row per run, and one of what was before them where that is the same for all."""
    figures = [{row.label: row for row in summary.figures} for summary in summaries]
    labels = list(dict.fromkeys(label for known in figures for label in known))
    rows, before = [], []
    for i, (run, known) in enumerate(zip(runs, figures, strict=True)):
        after = [known[label].after if label in known else q.NONE for label in labels]
        rows.append([run.name, *(values[i] for values in differing.values()), *after])
    for label in labels:
        sides = {known[label].before if label in known else q.NONE for known in figures}
        before.append(sides.pop() if len(sides) == 1 else q.NONE)
    if any(value != q.NONE for value in before):
        rows.insert(0, ["before", *[q.NONE] * len(differing), *before])
    return SummaryTable(title, ["Run", *differing, *labels], rows)


def _evaluated(run: Run) -> tuple[object, ...]:
    return (*run.course.tasks, *(value is None for value in (run.course.accuracies or [[]])[-1]))
