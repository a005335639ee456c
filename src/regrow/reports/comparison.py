"""The comparison of runs: one table of size, speed, quality and what differs, and what makes it unfair."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from regrow.reports import quantities as q
from regrow.reports.figures import Drawing, draw_front
from regrow.reports.records import Run, Summary, SummaryTable
from regrow.reports.summary import summarise

# Settings in which runs must agree, or their quality cannot be compared.
EVALUATION = ("tasks", "data", "scenario", "train", "test", "validation", "eval_tokens", "seq_len")
# Settings of a command in which compared runs are meant to differ.
COMPARED = ("method", "by", "before", "seed", "keep", "target", "run", "out")
# Text domains and tasks that a headline names.
MAX_NAMES = 8


@dataclass(frozen=True)
class Comparison:
    """What the page of several runs shows: a headline, one table, warnings, and each run with its summary."""

    headline: str
    table: SummaryTable  # a row per run, with the settings in which they differ
    alarms: list[str]  # warnings: sentences
    averages: list[str]  # of runs that differ in their seed alone: sentences
    runs: list[Run]  # with the quality on what all runs were evaluated on alone
    summaries: list[Summary]  # one per run, in the same order

    def draw(self) -> Drawing | None:
        """Draw the runs' quality against their number of parameters; ``None`` if fewer than two different sizes."""
        pairs = zip(self.runs, self.summaries, strict=True)
        points = [(run.name, summary.size, summary.quality) for run, summary in pairs]
        lower = any(row.seen is not None for run in self.runs for row in run.quality)
        quality = "perplexity, geometric mean (log scale)" if lower else "accuracy"
        return draw_front(points, "parameters", quality, lower=lower)


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs on the text domains and tasks that all evaluated; a domain is seen if all runs calibrated on it."""
    seen_by_run = [{row.name: row.seen for row in run.quality if row.after is not None} for run in runs]
    names = [name for name in seen_by_run[0] if all(name in seen for seen in seen_by_run)]
    seen_in = {name: [seen[name] for seen in seen_by_run] for name in names}  # whether each run saw it
    compared = []
    for run in runs:
        rows = [row for row in run.quality if row.name in seen_in]
        rows = [row if row.seen is None else replace(row, seen=all(seen_in[row.name])) for row in rows]
        compared.append(replace(run, quality=rows))
    summaries = [summarise(run) for run in compared]
    differences = find_differences(runs)
    models = {run.model for run in runs}
    headline = f"{len(runs)} runs of {models.pop() if len(models) == 1 else f'{len(models)} models'}"
    if names:
        headline += f", compared on {', '.join(names[:MAX_NAMES])}{' and others' if len(names) > MAX_NAMES else ''}"
    alarms = []
    if unfair := [name for name in differences if name in EVALUATION]:
        alarms.append(f"The runs differ in {', '.join(unfair)}: their quality cannot be compared.")
    elif len({_evaluated_tasks(run) for run in runs}) > 1:
        alarms.append("The runs differ in tasks or in what was evaluated: their quality cannot be compared.")
    declared = {name for run in runs for name in run.file.settings}
    if others := [name for name in differences if name in declared and name not in (*COMPARED, *EVALUATION)]:
        alarms.append(f"The runs differ in {', '.join(others)}, too: what one gains may come from that.")
    alarms += [f"{run.name}: {alarm}" for run, summary in zip(runs, summaries, strict=True) for alarm in summary.alarms]
    if any(len(set(seen)) > 1 for seen in seen_in.values()):
        alarms.append("The runs were calibrated on different text: a domain that any of them did not see is unseen.")
    table = _tabulate(headline, runs, summaries, differences)
    averages = _average_seeds(compared, summaries)
    return Comparison(headline, table, alarms, averages, compared, summaries)


def find_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that all runs have and in which they differ: name → the value of each run, as text."""
    tables = [run.defaults | run.settings for run in runs]
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    columns = {name: [table[name] for table in tables] for name in shared}
    return {name: values for name, values in columns.items() if len(set(values)) > 1 and name != "run"}


def _average_seeds(runs: Sequence[Run], summaries: Sequence[Summary]) -> list[str]:
    """Return the mean and standard deviation of the quality of runs that differ in nothing but their seed."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i, run in enumerate(runs):
        values = run.defaults | run.settings | {"model": run.model}
        groups.setdefault(tuple(sorted((k, x) for k, x in values.items() if k not in ("seed", "run"))), []).append(i)
    lines = []
    for members in groups.values():
        if len({runs[i].settings.get("seed") for i in members}) < len(members):
            continue  # the same run twice
        results = [value for i in members if (value := summaries[i].quality) is not None]
        if len(results) > 1:
            is_text = any(row.seen is not None for i in members for row in runs[i].quality)
            scale, what = (1, "perplexity") if is_text else (100, "accuracy in %")
            names = ", ".join(runs[i].name for i in members)
            figures = f"{scale * mean(results):.4g} ± {scale * stdev(results):.2g}"
            lines.append(f"{names}: {what} {figures} (mean and standard deviation of {len(results)} seeds)")
    return lines


def _tabulate(
    title: str, runs: Sequence[Run], summaries: Sequence[Summary], differences: dict[str, list[str]]
) -> SummaryTable:
    """Return the table: a row per run of its figures after the run, then its value of each of ``differences``.

    The first row has the figures before the runs, where these are the same for all; it is missing if none is.
    """
    figures = [{row.label: row for row in summary.figures} for summary in summaries]
    labels = list(dict.fromkeys(label for by_label in figures for label in by_label))
    rows, before = [], []
    for i, (run, by_label) in enumerate(zip(runs, figures, strict=True)):
        after = [by_label[label].after if label in by_label else q.NONE for label in labels]
        rows.append([run.name, *after, *(values[i] for values in differences.values())])
    for label in labels:
        sides = {by_label[label].before if label in by_label else q.NONE for by_label in figures}
        before.append(sides.pop() if len(sides) == 1 else q.NONE)
    if any(value != q.NONE for value in before):
        rows.insert(0, ["before", *before, *[q.NONE] * len(differences)])
    return SummaryTable(title, ["Run", *labels, *differences], rows)


def _evaluated_tasks(run: Run) -> tuple[object, ...]:
    """Return a key that is equal for runs with the same tasks (names, then whether each was left out at the end)."""
    results = run.task_results
    return (*results.names, *(value is None for last in results.accuracies[-1:] for value in last))
