"""The page that compares runs: its table, its sentences, and the settings in which the runs differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from regrow.reports import quantities as q
from regrow.reports import search, words
from regrow.reports.drawing import Drawing
from regrow.reports.figures import draw_front, draw_lines
from regrow.reports.runs import Course, Run, SearchRun, Summary, geometric_mean

MAX_LINES = 24


@dataclass(frozen=True)
class TableCell:
    """A cell of the table: its value, whether no run of the same size or less is better, and a line below it."""

    value: str
    best: bool = False
    below: str = ""


@dataclass
class TableOfRuns:
    """What the page of several runs says."""

    headline: str  # what is compared
    lede: str  # what the table shows
    note: str  # the meaning of its columns
    rows: list[tuple[str, list[TableCell]]]  # the label of a run and its cells
    columns: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)  # which run leads
    alarms: list[str] = field(default_factory=list)  # why the runs cannot be compared
    means: list[float | None] = field(default_factory=list)  # of pruning runs: the mean perplexity over shared domains

    def add(self, head: str, values: Sequence[str], best: Sequence[bool] = (), below: Sequence[str] = ()) -> None:
        """Add a column: the values of the runs, which of them lead, and what is below them."""
        self.columns.append(head)
        for i, (_, cells) in enumerate(self.rows):
            cells.append(TableCell(values[i], bool(best) and best[i], below[i] if below else ""))


def compare(summary: Summary) -> TableOfRuns:
    """Return what the page of several runs says: of pruning, of learning, or of searches."""
    courses, searches = [run.course for run in summary.runs], [run.search for run in summary.runs]
    if all(courses):
        return _compare_courses(summary.runs, [course for course in courses if course])
    if all(searches):
        return _compare_searches(summary.runs, [result for result in searches if result])
    return _compare_pruning(summary)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings in which runs differ: name → one value per run, the default where none was given."""
    stated = [run.settings | run.method_settings for run in runs]
    whole = [run.defaults | table for run, table in zip(runs, stated, strict=True)]
    names = dict.fromkeys(name for table in stated for name in table)
    if len({run.method for run in runs}) == 1:
        names |= dict.fromkeys(name for name in whole[0] if all(name in table for table in whole))
    columns = {name: [table.get(name, q.NONE) for table in whole] for name in names}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def compared_accuracy(summary: Summary) -> Drawing | None:
    """Draw the mean accuracy of learning runs over the tasks learned so far, after each task."""
    courses = [(run.label, run.course.matrix.matrix) for run in summary.runs if run.course]
    lines = [(label, [q.mean(row[: i + 1]) for i, row in enumerate(rows)]) for label, rows in courses[:MAX_LINES]]
    title = "Average accuracy over the tasks learned, after each task"
    return draw_lines("fig-courses", title, "tasks learned", [("", q.percent_tick, lines)], floor=None)


def compared_quality(summary: Summary, table: TableOfRuns) -> Drawing | None:
    """Draw the quality of runs against their size: the final accuracy of learning runs, the perplexity of others."""
    courses = [(run.label, run.course) for run in summary.runs if run.course]
    if len(courses) == len(summary.runs):
        title = "Final average accuracy against parameters"
        sizes = [(label, course.parameters, course.matrix.average) for label, course in courses]
        return draw_front("fig-courses-size", title, sizes, "parameters at the end", "final average accuracy")
    if not table.means:
        return None
    title, below = "Perplexity against the fraction of weights kept", "perplexity, geometric mean (log scale)"
    kept = [(run.label, run.kept, mean) for run, mean in zip(summary.runs, table.means, strict=True)]
    return draw_front("fig-front", title, kept, "weights kept", below, lower=True)


def _compare_pruning(summary: Summary) -> TableOfRuns:
    runs, sources = summary.runs, summary.domains
    domains = [{row.source: row for row in run.perplexity} for run in runs]
    means = [geometric_mean([table[source] for source in sources]) for table in domains]
    who = f"{len(runs)} runs of {_one_of({run.model for run in runs}, 'models')}"
    shared = f", compared on {words.domains(len(sources))}." if sources else "; no text domain is common to all."
    table = TableOfRuns(
        f"{who}{shared}",
        "Perplexity on the text domains on which all runs were evaluated; lower is better. A value is marked if no run "
        "that keeps as little has a lower one. The factor below it is after ÷ before.",
        "± is half the 95 % interval of differences paired per window. Seen and unseen: by all runs in calibration.",
        [(run.label, []) for run in runs],
        means=[mean.after if mean else None for mean in means],
    )
    table.add("Kept", [q.percent(run.kept) for run in runs])

    def add(head: str, values: Sequence[float | None], ratios: Sequence[str]) -> None:
        leads = q.leaders([run.kept or 1.0 for run in runs], [None if ppl is None else -ppl for ppl in values])
        table.add(head, [q.significant(ppl) for ppl in values], leads, ratios)

    if sources:
        add("Geometric mean", table.means, [q.factor(mean.ratio) if mean and mean.ratio else "" for mean in means])
    for source in sources:
        rows = [row[source] for row in domains]
        seen = {row.seen for row in rows}
        which = " (seen)" if seen == {True} else " (unseen)" if seen == {False} else ""
        spreads = ["" if row.error is None else f" ± {q.spread(row.error, row.ratio)}" for row in rows]
        ratios = [f"{q.factor(row.ratio)}{text}" if row.ratio else "" for row, text in zip(rows, spreads, strict=True)]
        add(f"{source}{which}", [row.ppl("after") for row in rows], ratios)
    dense = [[ppl for row in domains if (ppl := row[source].ppl("before"))] for source in sources]
    if all(len(values) == len(runs) and max(values) / min(values) < 1.001 for values in dense):
        if sources:
            first = [values[0] for values in dense]
            before = [math.exp(q.mean([math.log(ppl) for ppl in first]) or 0.0), *first]
            cells = [TableCell(q.percent(1)), *(TableCell(q.significant(ppl)) for ppl in before)]
            table.rows.insert(0, ("before", cells))
    else:
        table.note += " The runs did not measure the same perplexity before: compare factors, not values."
    best: dict[int, tuple[float, str]] = {}
    for run, mean in zip(runs, means, strict=True):
        if mean and run.kept:
            level = round(100 * run.kept)
            best[level] = min(best.get(level, (math.inf, "")), (mean.after, run.label))
    parts = [
        f"{level}{q.SPACE}% of the weights kept: {q.significant(ppl)} ({label})"
        for level, (ppl, label) in sorted(best.items(), reverse=True)[:5]
    ]
    if parts:
        table.details = [f"Lowest perplexity, as a geometric mean over the text domains. {'; '.join(parts)}."]
    return table


def _compare_courses(runs: Sequence[Run], courses: Sequence[Course]) -> TableOfRuns:
    ends = [(course.matrix.matrix or [[]])[-1] for course in courses]
    evaluated = {
        (
            tuple(course.matrix.tasks[: len(course.matrix.matrix)]),
            tuple(value is None for value in end),
            run.settings.get("scenario"),
        )
        for run, course, end in zip(runs, courses, ends, strict=True)
    }
    counts = sorted({len(course.matrix.matrix) for course in courses})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    tasks = f"{n} task{'s' * (counts[-1] != 1)}{' in sequence' * (counts[-1] > 1)}"
    table = TableOfRuns(
        f"{len(runs)} runs of {_one_of({run.model for run in runs}, 'networks')}, each trained on {tasks}.",
        "Accuracy of each network, as means over the tasks. A value is marked if no run with as few parameters is "
        "better.",
        " ".join(f"{figure.label}: {figure.meaning}." for figure in words.MATRIX_FIGURES)
        + " Largest change by growth: of the mean accuracy. The last columns: final accuracy of each task.",
        [(run.label, []) for run in runs],
    )
    sizes = [course.parameters for course in courses]
    for figure in words.MATRIX_FIGURES:
        values = [getattr(course.matrix, figure.name) for course in courses]
        leads = q.leaders(sizes, [None if value is None else figure.sign * value for value in values])
        table.add(figure.label, [figure.write(value) for value in values], leads)
    shocks = [
        [abs(e.after - e.before) for e in course.events if e.after is not None and e.before is not None]
        for course in courses
    ]
    seconds = [[row.seconds for row in course.records if row.seconds is not None] for course in courses]
    firsts = [course.records[0].parameters if course.records else None for course in courses]
    table.add("Parameters", [q.count(size) for size in sizes])
    table.add("After the first task", [q.count(first) for first in firsts])
    table.add("Growths", [q.count(len(course.events)) for course in courses])
    table.add("Largest change by growth", [q.percent(max(changes, default=None)) for changes in shocks])
    table.add("Seconds", [q.significant(sum(values) if values else None) for values in seconds])
    longest = max(courses, key=lambda course: len(course.matrix.tasks)).matrix.tasks
    for i, task in enumerate(longest[:20]):
        table.add(task, [q.percent(end[i] if i < len(end) else None) for end in ends])
    known = [
        (average, run.label, course.parameters)
        for run, course in zip(runs, courses, strict=True)
        if (average := course.matrix.average) is not None
    ]
    if len(evaluated) > 1:
        table.alarms = ["The runs differ in tasks or in what was evaluated: their accuracies cannot be compared."]
    elif len(known) > 1:
        (most, best, size), (least, worst, _) = max(known, key=lambda k: k[0]), min(known, key=lambda k: k[0])
        table.details = [
            f"{best} has the highest final average accuracy, {q.percent(most)}, with {q.count(size)} parameters; "
            f"{worst} the lowest, {q.percent(least)}."
        ]
    return table


def _compare_searches(runs: Sequence[Run], searches: Sequence[SearchRun]) -> TableOfRuns:
    table = TableOfRuns(
        f"{len(runs)} searches of {_one_of({run.model for run in runs}, 'spaces')}.",
        "The final network of each search. A test accuracy is marked if no network with as few nonzero parameters "
        "has a higher one.",
        "Test: the final network, after further training if there was any. Validation: at the end of the search.",
        [(run.label, []) for run in runs],
        details=[note for method, note in search.RECONSTRUCTED.items() if any(run.method == method for run in runs)],
    )
    accuracies = [result.test.accuracy for result in searches]
    table.add("Target", [result.target or q.NONE for result in searches])
    leads = q.leaders([result.test.nonzero for result in searches], accuracies)
    table.add("Test", [q.percent(accuracy) for accuracy in accuracies], leads)
    table.add("Validation", [q.percent(result.network.accuracy) for result in searches])
    table.add("Parameters", [q.count(result.test.parameters) for result in searches])
    table.add("Nonzero", [q.count(result.test.nonzero) for result in searches])
    seconds = [sum(run.file.seconds.values()) if run.file.seconds else None for run in runs]
    table.add("Seconds", [q.significant(value) for value in seconds])
    names = ("data", "train", "test", "validation")
    known = [(value, run.label) for run, value in zip(runs, accuracies, strict=True) if value is not None]
    if len({tuple(run.settings.get(name) for name in names) for run in runs}) > 1:
        table.alarms = ["The searches used different data: their accuracies cannot be compared."]
    elif len(known) > 1:
        most, best = max(known, key=lambda pair: pair[0])
        table.details.append(f"{best} has the highest test accuracy: {q.percent(most)}.")
    return table


def _one_of(names: set[str], plural: str) -> str:
    return next(iter(names)) if len(names) == 1 else f"{len(names)} {plural}"
