"""What pages and the command line say of a run: a sentence, a small table, warnings, and the command to go on."""

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from regrow.core.amounts import Target, parse_bytes
from regrow.reports import quantities as q
from regrow.reports.records import (
    Commit,
    FoundRow,
    PassTimes,
    Quality,
    Run,
    SearchEpoch,
    SearchTotals,
    StageMemoryRow,
    TrainingRow,
)
from regrow.store.metrics import (
    BudgetRow,
    MissingTasksRow,
    ReconstructionRow,
    RecoveryRow,
    TestRow,
    VerifyRow,
)

MEASURES = {
    "params": "parameters",
    "nonzero": "nonzero parameters",
    "macs": "MACs",
    "kv_cache": "key-value cache",
    "ms": "time per pass",
}
"""Names of what a target counts, where they are not those of the command line."""
RECONSTRUCTED = ("gprune", "sparsegrow", "mgas", "gold_nas")
"""Methods whose results must be shown with a note on where the method is from."""
OVERSHOT = 0.8
"""The fraction of the allowed size below which a found network is reported as too small."""
MOVED = 1e-3
"""The largest change of a logit at a commit of a search that is not reported."""


@dataclass(frozen=True)
class SummaryTable:
    """A table in words; the first cell of a row is its label."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    shades: list[list[float | None]] = field(default_factory=list)  # how dark each cell is, 0 to 1


@dataclass(frozen=True)
class Figures:
    """A row of the small table: a quantity after a run and before it, and a remark."""

    label: str
    after: str
    before: str = q.NONE
    remark: str = ""


@dataclass(frozen=True)
class Summary:
    """What the head of a page says of a run, and where the run stands among others."""

    sentence: str
    figures: list[Figures]
    details: list[str]
    size: float | None  # parameters at the end
    quality: float | None  # mean perplexity, or mean accuracy
    alarms: list[str] = field(default_factory=list)


def summarise(run: Run) -> Summary:
    """Return what the head of the page of a run says."""
    if run.file.verb == "learn":
        summary = _summarise_learning(run)
    elif run.file.verb == "search":
        summary = _summarise_search(run)
    else:
        summary = _summarise_change(run)
    if not run.file.finished:
        summary.alarms.append("The run is unfinished or was interrupted: this page shows what it has recorded so far.")
    if name := next((name for name in RECONSTRUCTED if name in run.method.split("+")), ""):
        summary.details.append(
            f"{name} is reconstructed from abstracts and public code, since no full paper was available; "
            "what these leave open is ours."
        )
    return summary


def _summarise_change(run: Run) -> Summary:
    """Summarise a run that cut, grew or recovered a network."""
    before, after = run.sizes.get("before"), run.sizes.get("recovered", run.sizes.get("changed"))
    sentence, figures = f"{run.method} on {run.model}.", list[Figures]()
    if before and after:
        left = f"{q.percent(after.params_all / before.params_all)} left" if before.params_all else ""
        figures.append(Figures("Parameters", q.count(after.params_all), q.count(before.params_all), left))
        figures.append(Figures("Size on disk", q.octets(after.bytes), q.octets(before.bytes), after.dtype))
        if before.params_counted:
            kept = after.params_counted / before.params_counted
            verb = "removed {} of" if kept <= 1 else "added {} to"
            sentence = f"{run.method} {verb.format(q.percent(abs(1 - kept)))} the weights of {run.model}."
    if (budget := run.last(BudgetRow)) and budget.asked is not None:
        measure = budget.measure
        label = f"Target: {MEASURES.get(measure, measure)}" + f" at {budget.context:,} tokens" * bool(budget.context)
        remark = f"allowed at most {q.measured(budget.asked, measure)}"
        remark += f"; predicted {q.measured(budget.predicted, measure)}" * bool(budget.predicted)
        figures.append(Figures(label, q.measured(budget.after, measure), q.measured(budget.before, measure), remark))
    quality, cost = mean_perplexity(run.quality)[1], list[str]()
    for seen, text in ((True, "seen text"), (False, "unseen text")):
        first, last = mean_perplexity([row for row in run.quality if row.seen is seen])
        if last is not None:
            ratio = q.factor(last / first) if first else ""
            figures.append(Figures(f"Perplexity, {text}", q.significant(last), q.significant(first), ratio))
            cost += [f"{ratio} on {text}"] * bool(ratio)
    if cost:
        sentence += f" Perplexity is {' and '.join(cost)}."
    if tasks := [row for row in run.quality if row.seen is None and row.lost is not None]:
        first, last = q.mean([row.value("before") for row in tasks]), q.mean([row.after for row in tasks])
        remark = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0].name
        figures.append(Figures("Accuracy", q.percent(last), q.percent(first), remark))
        if quality is None:
            quality = last
            sentence += f" Accuracy went from {q.percent(first)} to {q.percent(last)}."
    if quality is None and run.file.verb == "grow" and run.of(VerifyRow) and not is_broken(run):
        sentence += " Its outputs are unchanged."
    elif quality is None:
        sentence += " The loss in quality was not measured."
    alarms = [describe_proof(run)] if is_broken(run) else []
    size = after.params_all if after else None
    return Summary(sentence, figures, _describe_training(run), size, quality, alarms)


def _describe_training(run: Run) -> list[str]:
    """Return sentences on what followed a cut or a growth."""
    lines = []
    if fit := run.last(ReconstructionRow):
        lines.append(f"After the cut, {len(fit.layers)} layers were fitted by least squares on {fit.tokens:,} tokens.")
    lines += [f"Recovered by {row.by} on {row.tokens:,} tokens." for row in run.of(RecoveryRow)]
    if done := run.last(TrainingRow):
        went = f"from {q.significant(done.loss_before)} to {q.significant(done.loss_after)}"
        lines.append(f"Trained {done.train} parameters for {done.steps:,} steps; loss on the training data {went}.")
    return lines


def _summarise_learning(run: Run) -> Summary:
    course, growths, end = run.course, len(run.of(Commit)), run.course.end
    n, sizes = len(course.accuracies), [record.parameters for record in course.records]
    sentence = f"{run.method} trained {run.model} on {n} task{'s' * (n != 1)}{' in sequence' * (n > 1)}."
    figures, details = list[Figures](), ["The network did not grow."] if sizes and not growths else []
    if end:
        measured = sum(value is not None for value in course.accuracies[-1][:n]) if n else 0
        over = "all tasks" if measured == n else f"the {measured} tasks that could be evaluated"
        sentence += f" Final average accuracy: {q.percent(end.average)}, over {over}."
        untrained = q.percent(q.mean(end.before))
        figures.append(Figures("Final average accuracy", q.percent(end.average), untrained, f"over {over}"))
        remark = "of each task, just after learning it"
        figures.append(Figures("Learning accuracy", q.percent(end.learning), remark=remark))
        figures.append(Figures("Forgetting", q.points(end.forgetting), remark="best earlier accuracy minus final"))
    if sizes:
        grew = f"{q.count(sizes[0])} after the first task; {growths} growth{'s' * (growths != 1)}" * bool(growths)
        figures.append(Figures("Parameters", q.count(sizes[-1]), remark=grew))
    for gone in run.of(MissingTasksRow)[-1:]:
        details.append(f"Data of {', '.join(gone.tasks)} were missing, so the figures are means over the other tasks.")
    return Summary(sentence, figures, details, sizes[-1] if sizes else None, end.average if end else None)


def _summarise_search(run: Run) -> Summary:
    found, test, epochs = run.last(FoundRow), run.last(TestRow), run.of(SearchEpoch)
    sentence, figures = f"{run.method} searched {run.model}", list[Figures]()
    measure, asked, reached = measure_search(run)
    if not found:
        sentence += ". The search is not finished."
    else:
        nonzero = f"{q.count(found.nonzero)} nonzero" * (found.nonzero != found.parameters)
        sentence += f" and found a network of {q.count(found.parameters)} parameters{f', {nonzero}' * bool(nonzero)}."
        figures.append(Figures("Parameters", q.count(found.parameters), remark=nonzero))
        figures.append(Figures("MACs", q.count(found.macs), remark="of one example"))
        score = q.significant(found.score) if found.accuracy is None else q.percent(found.accuracy)
        figures.append(Figures(f"Validation {found.metric}", score, remark="after the search"))
    if reached is not None and asked:
        limit = f"allowed at most {q.measured(asked, measure)}"
        figures.append(Figures(f"Target: {MEASURES.get(measure, measure)}", q.measured(reached, measure), remark=limit))
    if times := run.last(PassTimes):
        figures.append(Figures("Time per pass", q.measured(times.found, "ms"), q.measured(times.whole, "ms")))
    if test:
        trained = "trained further" if run.settings.get("inherit") == "yes" else "retrained from scratch"
        state = trained if run.settings.get("retrain", "0") != "0" else "with the weights of the search"
        sentence += f" Its test accuracy is {q.percent(test.accuracy)}, {state}."
        figures.append(Figures("Test accuracy", q.percent(test.accuracy), remark=f"on {q.count(test.images)} examples"))
    peaks, alarms = [row.peak for row in run.of(StageMemoryRow) if row.peak is not None], _warn_of_search(run)
    if peaks:
        limit, peak = run.settings.get("memory", q.NONE), q.octets(max(peaks))
        figures.append(Figures("Memory of training", peak, remark=f"allowed at most {limit}"))
        with suppress(ValueError):
            if max(peaks) > parse_bytes(limit):
                alarms.append(f"The memory budget of {limit} was exceeded: a stage needed {peak}.")
    details = [f"{len(epochs)} epochs of search in {len({row.stage for row in epochs})} stages."] if epochs else []
    if any(row.recomputed for row in run.of(StageMemoryRow)):
        details.append("To stay within the memory budget, parts were recomputed in the backward pass.")
    size, quality = found.parameters if found else None, test.accuracy if test else None
    return Summary(sentence, figures, details, size, quality, alarms)


def measure_search(run: Run) -> tuple[str, float | None, float | None]:
    """Return what the target of a search counts, how much of it was allowed, and how much the found network has."""
    totals, found = run.last(SearchTotals) or SearchTotals(), run.last(FoundRow)
    target, asked = run.settings.get("target", ""), totals.asked
    measure = totals.measure or (target.partition("=")[0] if "=" in target else "params")
    with suppress(ValueError):
        asked = asked or Target.parse(target).amount
    reached = getattr(found, {"params": "parameters"}.get(measure, measure), None)
    if reached is None or (measure == "nonzero" and totals.size is not None):
        reached = totals.size
    return measure, asked, reached


def _warn_of_search(run: Run) -> list[str]:
    """Return warnings: a missed target, and commits that changed outputs."""
    measure, asked, reached = measure_search(run)
    alarms, name = [], MEASURES.get(measure, measure)
    if asked and reached is not None:
        sizes = (
            f"the final network has {q.measured(reached, measure)}, allowed are {q.measured(asked, measure)} ({name})"
        )
        if reached > asked * (1.01 if measure == "ms" else 1):
            alarms.append(f"The target was missed: {sizes}.")
        elif reached < OVERSHOT * asked:
            alarms.append(f"The target was overshot: {sizes}.")
    still = [row for row in run.of(Commit) if not (row.back or row.grown or row.restored or row.stood)]
    moved = max((row.logits_moved or 0 for row in still), default=0)
    if moved > MOVED:
        alarms.append(f"A commit should not change outputs, but one did: logits by up to {q.significant(moved)}.")
    return alarms


def next_command(run: Run) -> str:
    """Return the command to go on with; empty for a run from Python."""
    name, verb = shlex.quote(run.name), run.file.verb
    if not run.file.finished:
        return run.file.command
    if not run.file.command.startswith("regrow "):
        return ""
    code = f" --code {run.code}" if run.code else ""
    if verb == "learn":
        return f"regrow learn --resume {name} --task TASK"
    if verb == "prune" and run.file.sources:
        return f"regrow recover {name} --by distil{code} --out {shlex.quote(f'{run.name}-recovered')}"
    if run.is_text:
        return f"regrow chat {name}"
    return f"regrow export {name} --to onnx{code} --out {shlex.quote(f'{run.name}.onnx')}"


def quality_table(run: Run) -> SummaryTable:
    """Return the perplexity on every text domain, and the accuracy on every task, of each model of the run."""
    models, rows, recovered = run.models, [], any(row.recovered is not None for row in run.quality)
    for row in run.quality[:200]:
        write = q.percent if row.seen is None else q.significant
        cells = [row.name if row.seen is None else f"{row.name} ({'seen' if row.seen else 'unseen'})"]
        for model in models:
            error = row.error(model)
            cells.append(write(row.value(model)) + (f" ± {write(error)}" if error else ""))
        cells.append(_describe_change(row))
        rows.append([*cells, q.percent(row.recovered)] if recovered else cells)
    heads = ["", *models.values(), "Change", *["Loss recovered"] * recovered]
    return SummaryTable("Perplexity of text, accuracy on tasks", heads, rows)


def accuracy_table(run: Run) -> SummaryTable:
    """Return the accuracy on each task after learning each task."""
    course, most = run.course, 40
    names = course.tasks[:most]
    columns = ["After learning", *names, "Parameters"]
    rows, shades = [], []
    before = [("nothing", course.end.before, "")] if course.end else []
    sizes = {record.task: q.count(record.parameters) for record in course.records}
    learned = [(course.tasks[i], row, sizes.get(i, q.NONE)) for i, row in enumerate(course.accuracies[:most])]
    for name, row, size in before + learned:
        values = [*row[:most], *[None] * (len(names) - len(row))]
        rows.append([name, *map(q.percent, values), size])
        shades.append([None, *values, None])
    return SummaryTable("Accuracy on each task", columns, rows, shades)


def describe_proof(run: Run) -> str:
    """Return the result of the check that a change did what its plan says, in words."""
    rows = [row for row in run.of(VerifyRow) if row.max_abs_diff is not None and row.bound is not None]
    if not rows:
        return "It was not checked that the changed model computes what it should."
    verb = "does not compute" if is_broken(run) else "computes"
    if run.file.verb == "grow":
        law = f"Grown = original: the grown model {verb} what the model computed before"
    else:
        law = f"Masked = shrunk: the cut model {verb} what the whole model computes with the removed units masked"
    figures = [
        f"{q.significant(row.max_abs_diff)}, allowed {q.significant(row.bound)}{f', {row.dtype}' * bool(row.dtype)}"
        for row in rows[-8:]
    ]
    return f"{law}. Largest difference: {'; '.join(figures)}.{' Do not use it.' * is_broken(run)}"


def is_broken(run: Run) -> bool:
    """Whether a check of a change failed."""
    return any((row.max_abs_diff or 0) > (math.inf if row.bound is None else row.bound) for row in run.of(VerifyRow))


def mean_perplexity(rows: Sequence[Quality]) -> tuple[float | None, float | None]:
    """Return geometric means over text domains before and after, of the domains measured on both sides if there are."""
    rows = [row for row in rows if row.seen is not None and row.after is not None]
    rows = [row for row in rows if row.value("before") is not None] or rows
    return _geometric_mean([row.value("before") for row in rows]), _geometric_mean([row.after for row in rows])


def _describe_change(row: Quality) -> str:
    if row.seen is None or row.lost is None:
        return q.points(row.lost)
    ratio = math.exp(max(-60.0, min(60.0, row.lost)))
    paired = row.paired and row.paired.se
    return q.factor(ratio) + (f" ± {q.significant(1.96 * ratio * paired)}" if paired else "")


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None
