"""The page that compares runs: its table, its sentences, and the settings in which the runs differ."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from regrow.reports import quantities as q
from regrow.reports import search, words
from regrow.reports.drawing import Drawing
from regrow.reports.figures import draw_front, draw_lines
from regrow.reports.records import geometric_mean
from regrow.reports.runs import Course, Run, SearchRun, Summary

MAX_LINES = 24


@dataclass(frozen=True)
class TableCell:
    """A cell of the table: its value, whether no run of the same size or less is better, and a line below it."""

    value: str
    best: bool = False
    below: str = ""


@dataclass(frozen=True)
class TableOfRuns:
    """What the page of several runs says.

    Args:
        headline: What is compared.
        details: Which run leads.
        alarms: Why the runs cannot be compared.
        lede: What the table shows.
        columns: The heads of its columns.
        rows: A run's label and its cells each.
        note: The meaning of the columns.
        means: The mean perplexity of each pruning run over the shared text domains.
    """

    headline: str
    details: list[str]
    lede: str
    columns: list[str]
    rows: list[tuple[str, list[TableCell]]]
    note: str
    alarms: list[str] = field(default_factory=list)
    means: list[float | None] = field(default_factory=list)


def compare(summary: Summary) -> TableOfRuns:
    """Return what the page of several runs says: of pruning, of learning, or of searches."""
    courses, searches = [run.course for run in summary.runs], [run.search for run in summary.runs]
    if all(courses):
        return _compare_courses(summary, [course for course in courses if course])
    if all(searches):
        return _compare_searches(summary, [result for result in searches if result])
    return _compare_pruning(summary)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings in which runs differ: name → one value per run, the default where none was given."""
    listed = [{pair.name: pair.value for pair in (*run.settings, *run.method_settings)} for run in runs]
    whole = [{p.name: p.value for p in run.defaults} | table for run, table in zip(runs, listed, strict=True)]
    names = dict.fromkeys(name for table in listed for name in table)
    if len({run.method for run in runs}) == 1:
        names |= dict.fromkeys(name for name in whole[0] if all(name in table for table in whole))
    columns = {name: [table.get(name, q.NONE) for table in whole] for name in names}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def compared_perplexity(summary: Summary, means: Sequence[float | None]) -> Drawing | None:
    """Draw the mean perplexity of pruning runs against the fraction of weights kept."""
    points = [(run.label, run.kept, after) for run, after in zip(summary.runs, means, strict=True)]
    title, below = "Perplexity against the fraction of weights kept", "perplexity, geometric mean (log scale)"
    return draw_front("fig-front", title, points, "weights kept", below, lower=True)


def compared_accuracy(summary: Summary) -> Drawing | None:
    """Draw the mean accuracy of learning runs over the tasks learned so far, after each task."""
    courses = [(run.label, run.course) for run in summary.runs[:MAX_LINES] if run.course]
    lines = [(label, [q.mean(row[: i + 1]) for i, row in enumerate(course.matrix.matrix)]) for label, course in courses]
    title = "Average accuracy over the tasks learned, after each task"
    return draw_lines("fig-courses", title, "tasks learned", [("", q.percent_tick, lines)], floor=None)


def compared_sizes(summary: Summary) -> Drawing | None:
    """Draw the final average accuracy of learning runs against parameters."""
    points = [(run.label, run.course.parameters, run.course.matrix.average) for run in summary.runs if run.course]
    title, words = "Final average accuracy against parameters", ("parameters at the end", "final average accuracy")
    return draw_front("fig-courses-size", title, points, *words)


def _compare_pruning(summary: Summary) -> TableOfRuns:
    runs, sources = summary.runs, summary.kinds
    domains = [{row.source: row for row in run.perplexity} for run in runs]
    means = [geometric_mean([table[source] for source in sources]) for table in domains]
    seen = [{table[source].seen for table in domains} for source in sources]
    heads = [
        f"{source}{' (seen)' if s == {True} else ' (unseen)' if s == {False} else ''}"
        for source, s in zip(sources, seen, strict=True)
    ]
    columns: list[list[tuple[float | None, float | None, float | None]]] = []
    if sources:
        columns.append([(mean.after, mean.ratio, None) if mean else (None, None, None) for mean in means])
    for source in sources:
        columns.append([(table[source].ppl("after"), table[source].ratio, table[source].error) for table in domains])
    rows: list[tuple[str, list[TableCell]]] = [(run.label, [TableCell(q.percent(run.kept))]) for run in runs]
    for column in columns:
        leads = q.leaders([run.kept or 1.0 for run in runs], [None if ppl is None else -ppl for ppl, _, _ in column])
        for (_, cells), (ppl, ratio, error), lead in zip(rows, column, leads, strict=True):
            spread = f" ± {q.spread(error, ratio)}" * (error is not None)
            cells.append(TableCell(q.significant(ppl), lead, f"{q.factor(ratio)}{spread}" if ratio else ""))
    dense = [[ppl for table in domains if (ppl := table[source].ppl("before"))] for source in sources]
    same = all(len(values) == len(runs) and max(values) / min(values) < 1.001 for values in dense)
    if sources and same:
        first = [values[0] for values in dense]
        before = [math.exp(q.mean([math.log(ppl) for ppl in first]) or 0.0), *first]
        rows.insert(0, ("before", [TableCell(q.percent(1)), *(TableCell(q.significant(ppl)) for ppl in before)]))
    who = f"{len(runs)} runs of {_one_of({run.model for run in runs}, 'models')}"
    shared = f", compared on {words.domains(len(sources))}." if sources else "; no text domain is common to all."
    best: dict[int, tuple[float, str]] = {}
    for run, mean in zip(runs, means, strict=True):
        if mean and run.kept:
            level = round(100 * run.kept)
            best[level] = min(best.get(level, (math.inf, "")), (mean.after, run.label))
    parts = [
        f"{at}{q.SPACE}% of the weights kept: {q.significant(p)} ({label})"
        for at, (p, label) in sorted(best.items())[::-1]
    ]
    leading = f"Lowest perplexity, as a geometric mean over the text domains. {'; '.join(parts[:5])}."
    return TableOfRuns(
        f"{who}{shared}",
        [leading] if parts else [],
        "Perplexity on the text domains on which all runs were evaluated; lower is better. A value is marked if no run "
        "that keeps as little has a lower one. The factor below it is after ÷ before.",
        ["Kept", *(["Geometric mean"] if sources else []), *heads],
        rows,
        "± is half the 95 % interval of differences paired per window. Seen and unseen: by all runs in calibration."
        + " The runs did not measure the same perplexity before: compare factors, not values." * (not same),
        means=[mean.after if mean else None for mean in means],
    )


def _compare_courses(summary: Summary, courses: list[Course]) -> TableOfRuns:
    runs = summary.runs
    scenarios = [next((pair.value for pair in run.settings if pair.name == "scenario"), "") for run in runs]
    ends = [(course.matrix.matrix or [[]])[-1] for course in courses]
    evaluated = {
        (tuple(course.matrix.tasks[: len(course.matrix.matrix)]), tuple(v is None for v in end), scenario)
        for course, end, scenario in zip(courses, ends, scenarios, strict=True)
    }
    figures: list[tuple[str, str, Callable[[float | None], str], int]] = [
        ("Final average", "average", q.percent, 1),
        ("Average during learning", "average_along", q.percent, 1),
        ("Learning", "learning", q.percent, 1),
        ("Forgetting", "forgetting", q.points, -1),
        ("Backward transfer", "backward_transfer", q.points, 1),
        ("Forward transfer", "forward_transfer", q.points, 1),
    ]
    rows: list[tuple[str, list[TableCell]]] = [(run.label, []) for run in runs]
    for _, name, write, sign in figures:
        values = [getattr(course.matrix, name) for course in courses]
        leads = q.leaders([course.parameters for course in courses], [None if v is None else sign * v for v in values])
        for (_, cells), value, lead in zip(rows, values, leads, strict=True):
            cells.append(TableCell(write(value), lead))
    for (_, cells), course, end in zip(rows, courses, ends, strict=True):
        shocks = [abs(e.after - e.before) for e in course.events if e.after is not None and e.before is not None]
        seconds = [row.seconds for row in course.records if row.seconds is not None]
        first = course.records[0].parameters if course.records else None
        rest = [q.count(course.parameters), q.count(first), q.count(len(course.events))]
        rest += [q.percent(max(shocks, default=None)), q.significant(sum(seconds) if seconds else None)]
        cells.extend(TableCell(value) for value in [*rest, *(q.percent(value) for value in end[:20])])
    counts = sorted({len(course.matrix.matrix) for course in courses})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    tasks = f"{n} task{'s' * (counts[-1] != 1)}{' in sequence' * (counts[-1] > 1)}"
    known = [
        (v, run.label, course.parameters)
        for run, course in zip(runs, courses, strict=True)
        if (v := course.matrix.average) is not None
    ]
    details = []
    if len(known) > 1 and len(evaluated) == 1:
        (most, best, size), (least, worst, _) = max(known, key=lambda k: k[0]), min(known, key=lambda k: k[0])
        details.append(
            f"{best} has the highest final average accuracy, {q.percent(most)}, with {q.count(size)} parameters; "
            f"{worst} the lowest, {q.percent(least)}."
        )
    longest = max(courses, key=lambda course: len(course.matrix.tasks)).matrix.tasks
    columns = ["Parameters", "After the first task", "Growths", "Largest change by growth", "Seconds", *longest[:20]]
    return TableOfRuns(
        f"{len(runs)} runs of {_one_of({run.model for run in runs}, 'networks')}, each trained on {tasks}.",
        details,
        "Accuracy of each network, as means over the tasks. A value is marked if no run with as few parameters is "
        "better.",
        [*(label for label, *_ in figures), *columns],
        rows,
        "Final average: over all tasks, after the last. Average during learning: over the tasks learned, after each. "
        "Learning: of each task just after learning it. Forgetting: best earlier accuracy minus final. Backward "
        "transfer: final minus just after learning. Forward transfer: before a task is learned, minus the untrained "
        "network. Largest change by growth: of the mean accuracy. The last columns: final accuracy of each task.",
        ["The runs differ in tasks or in what was evaluated: their accuracies cannot be compared."]
        * (len(evaluated) > 1),
    )


def _compare_searches(summary: Summary, searches: list[SearchRun]) -> TableOfRuns:
    runs, names = summary.runs, ("data", "train", "test", "validation")
    data = {tuple(pair.value for pair in run.settings if pair.name in names) for run in runs}
    leads = q.leaders([result.test.nonzero for result in searches], [result.test.accuracy for result in searches])
    rows = []
    for run, result, lead in zip(runs, searches, leads, strict=True):
        cells = [TableCell(result.target or q.NONE), TableCell(q.percent(result.test.accuracy), lead)]
        sizes = [q.percent(result.network.accuracy), q.count(result.test.parameters), q.count(result.test.nonzero)]
        seconds = q.significant(sum(run.seconds.values()) if run.seconds else None)
        rows.append((run.label, cells + [TableCell(value) for value in (*sizes, seconds)]))
    details = [note for method, note in search.RECONSTRUCTED.items() if any(run.method == method for run in runs)]
    known = [
        (v, run.label) for run, result in zip(runs, searches, strict=True) if (v := result.test.accuracy) is not None
    ]
    if len(known) > 1 and len(data) == 1:
        most, best = max(known, key=lambda pair: pair[0])
        details.append(f"{best} has the highest test accuracy: {q.percent(most)}.")
    return TableOfRuns(
        f"{len(runs)} searches of {_one_of({run.model for run in runs}, 'spaces')}.",
        details,
        "The final network of each search. A test accuracy is marked if no network with as few nonzero parameters "
        "has a higher one.",
        ["Target", "Test", "Validation", "Parameters", "Nonzero", "Seconds"],
        rows,
        "Test: the final network, after further training if there was any. Validation: at the end of the search.",
        ["The searches used different data: their accuracies cannot be compared."] * (len(data) > 1),
    )


def _one_of(names: set[str], plural: str) -> str:
    return next(iter(names)) if len(names) == 1 else f"{len(names)} {plural}"
