"""What pages and the command line say of a run: a sentence, a small table, warnings, and the command to go on."""

import math
import shlex
from contextlib import suppress

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
    Summary,
    SummaryRow,
    SummaryTable,
    TrainingRow,
    mean_perplexities,
)
from regrow.store.metrics import (
    BudgetRow,
    DistillationRow,
    MissingTasksRow,
    ReconstructionRow,
    RecoveryRow,
    TestRow,
    VerifyRow,
)

# What a target counts → its name on pages, where that is not the one of the command line.
MEASURES = {
    "params": "parameters",
    "nonzero": "nonzero parameters",
    "macs": "MACs",
    "kv_cache": "key-value cache",
    "ms": "time per pass",
}
# Methods whose results must be shown with a note that they were written without the full paper.
RECONSTRUCTED = ("gprune", "sparsegrow", "mgas")
# The fraction of the allowed size below which a found network is reported as too small.
OVERSHOT = 0.8
# The fraction by which a measured time may exceed its target without a warning.
TIMING_ERROR = 0.01
# From which factor of perplexity, or which loss of accuracy, on a network is said to be much worse.
POOR_PERPLEXITY, POOR_ACCURACY = 1.25, 0.05
# The largest change of a logit at a commit of a search that is not reported.
MOVED = 1e-3


def summarise(run: Run) -> Summary:
    """Return what the head of a run's page says: its result in a sentence, figures, details and warnings."""
    summarisers = {"learn": _summarise_learning, "search": _summarise_search}
    summary = summarisers.get(run.file.verb, _summarise_change)(run)
    if not run.file.finished:
        summary.alarms.append("The run is unfinished or was interrupted: this page shows what it has recorded so far.")
    if names := [name for name in RECONSTRUCTED if name in run.method.split("+")]:
        summary.details.append(
            f"{names[0]} is reconstructed from abstracts and public code, since no full paper was available; "
            "what these leave open is ours."
        )
    return summary


def name_measure(measure: str) -> str:
    """Return the name on pages of the measure that a target limits: ``"params"`` → ``"parameters"``."""
    return MEASURES.get(measure, measure)


def _summarise_change(run: Run) -> Summary:
    """Summarise a run that cut, grew or recovered a network."""
    before, after = run.sizes.get("before"), run.sizes.get("recovered", run.sizes.get("changed"))
    sentence, figures, budget = f"{run.method} on {run.model}", list[SummaryRow](), run.last_of(BudgetRow)
    limit = f"allowed at most {q.amount(budget.asked, budget.measure)}" if budget and budget.asked is not None else ""
    if before and after:
        remark = f"{q.percent(after.params_all / before.params_all)} left" if before.params_all else ""
        if limit and budget and budget.measure == "params":
            remark, limit = f"{remark}; {limit}", ""
        figures.append(SummaryRow("Parameters", q.count(after.params_all), q.count(before.params_all), remark))
        bytes_after, bytes_before = q.decimal_bytes(after.bytes), q.decimal_bytes(before.bytes)
        figures.append(SummaryRow("Size on disk", bytes_after, bytes_before, after.dtype))
        if before.params_all:
            kept = after.params_all / before.params_all
            verb = "removed {} of" if kept <= 1 else "added {} to"
            sentence = f"{run.method} {verb.format(q.percent(abs(1 - kept)))} the parameters of {run.model}"
    if limit and budget:
        measure = budget.measure
        label = f"Target: {name_measure(measure)}" + (f" at {budget.context:,} tokens" if budget.context else "")
        limit += f"; predicted {q.amount(budget.predicted, measure)}" if budget.predicted else ""
        figures.append(SummaryRow(label, q.amount(budget.after, measure), q.amount(budget.before, measure), limit))
    figures += _tabulate_times(run)
    _, quality = mean_perplexities(run.quality)
    ratios, is_poor = list[str](), False
    for seen, text in ((True, "seen text"), (False, "unseen text")):
        first, last = mean_perplexities([row for row in run.quality if row.seen is seen])
        if last is not None:
            ratio = q.factor(last / first) if first else ""
            is_poor = is_poor or (first is not None and last > POOR_PERPLEXITY * first)
            figures.append(SummaryRow(f"Perplexity, {text}", q.significant(last), q.significant(first), ratio))
            ratios += [f"{ratio} on {text}"] if ratio else []
    if ratios:
        sentence += f": perplexity is {' and '.join(ratios)}"
    lines = _describe_training(run)
    if len(ratios) == 1 and any(row.seen for row in run.quality):
        lines.append("Other text loses more than the sources of the run: measure some with --unseen.")
    if tasks := [row for row in run.quality if row.seen is None and row.lost is not None]:
        first, last = q.mean([row.value("before") for row in tasks]), q.mean([row.after for row in tasks])
        remark = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0].name
        is_poor = is_poor or (first or 0.0) - (last or 0.0) > POOR_ACCURACY
        figures.append(SummaryRow("Accuracy", q.percent(last), q.percent(first), remark))
        if quality is None:
            quality = last
            sentence += f": accuracy went from {q.percent(first)} to {q.percent(last)}"
    if quality is None and run.file.verb == "grow" and run.rows_of(VerifyRow) and not is_broken(run):
        sentence += ", and its outputs are unchanged"
    elif quality is None:
        sentence += ", and the loss in quality was not measured"
    alarms = [describe_proof(run)] if is_broken(run) else []
    alarms += ["Its quality is much worse than before: train it, or cut less."] if is_poor else []
    size = after.params_all if after else None
    return Summary(f"{sentence}.", figures, lines, size, quality, alarms)


def _tabulate_times(run: Run) -> list[SummaryRow]:
    """Return the row of the measured time of a forward pass, if a run measured it before and after its change."""
    times = run.last_of(PassTimes)
    if times is None or not times.whole or not times.found:
        return []
    tokens = f"of {times.tokens:,} tokens" if times.tokens else ""
    remark = f"{times.whole / times.found:.2f} times as fast{f', on {times.device}' if times.device else ''}"
    label = " ".join(filter(None, ("Time per pass", tokens)))
    return [SummaryRow(label, q.amount(times.found, "ms"), q.amount(times.whole, "ms"), remark)]


def _describe_training(run: Run) -> list[str]:
    """Return sentences on what followed a cut or a growth, if anything: least squares, recovery, training."""
    lines, unit = [], "tokens" if any(row.seen is not None for row in run.quality) else "examples"
    if fit := run.last_of(ReconstructionRow):
        lines.append(f"After the cut, {len(fit.layers)} layers were fitted by least squares on {fit.tokens:,} {unit}.")
    if taught := run.last_of(DistillationRow):
        lines.append(f"Then it was trained on {taught.tokens:,} tokens to predict what the model before the cut does.")
    lines += [f"Recovered by {row.by} on {row.tokens:,} {unit}." for row in run.rows_of(RecoveryRow)]
    if row := run.last_of(TrainingRow):
        losses = f"from {q.significant(row.loss_before)} to {q.significant(row.loss_after)}"
        lines.append(f"Trained {row.train} parameters for {row.steps:,} steps; loss on the training data {losses}.")
    return lines


def _summarise_learning(run: Run) -> Summary:
    """Summarise a run that learned tasks in sequence."""
    results, growths = run.task_results, len(run.rows_of(Commit))
    n, sizes = len(results.accuracies), [record.parameters for record in results.records]
    tasks = "1 task" if n == 1 else f"{n} tasks{' in sequence' if n else ''}"
    sentence = f"{run.method} trained {run.model} on {tasks}."
    figures = list[SummaryRow]()
    details = ["The network did not grow."] if sizes and not growths else []
    if end := results.end:
        measured = sum(value is not None for value in results.accuracies[-1][:n]) if n else 0
        over = "all tasks" if measured == n else f"the {measured} tasks that could be evaluated"
        sentence += f" Final average accuracy: {q.percent(end.average)}, over {over}."
        untrained = q.percent(q.mean(end.before))
        figures.append(SummaryRow("Final average accuracy", q.percent(end.average), untrained, f"over {over}"))
        remark = "of each task, just after learning it"
        figures.append(SummaryRow("Learning accuracy", q.percent(end.learning), remark=remark))
        figures.append(SummaryRow("Forgetting", q.points(end.forgetting), remark="best earlier accuracy minus final"))
    if results.records and (nats := results.records[-1].nats):
        each = [f"{name} {q.significant(value)}" for name, value in zip(results.names, nats, strict=False)]
        figures.append(SummaryRow("Final loss, nats per token", q.significant(q.mean(nats)), remark=", ".join(each)))
    if sizes:
        counted = "1 growth" if growths == 1 else f"{growths} growths"
        remark = f"{q.count(sizes[0])} after the first task; {counted}" if growths else ""
        figures.append(SummaryRow("Parameters", q.count(sizes[-1]), remark=remark))
        if (stored := results.records[-1].remembered) is not None:
            remark = "what it stores beside the network: masks, factors, examples"
            figures.append(SummaryRow("Memory of the method", q.decimal_bytes(stored), remark=remark))
    if row := run.last_of(MissingTasksRow):
        details.append(f"Data of {', '.join(row.tasks)} were missing, so the figures are means over the other tasks.")
    return Summary(sentence, figures, details, sizes[-1] if sizes else None, end.average if end else None)


def _summarise_search(run: Run) -> Summary:
    """Summarise a run that searched a network."""
    found, test, epochs = run.last_of(FoundRow), run.last_of(TestRow), run.rows_of(SearchEpoch)
    sentence, figures = f"{run.method} searched {run.model}", list[SummaryRow]()
    measure, asked, reached = search_target(run)
    if not found:
        sentence += ". The search is not finished."
    else:
        nonzero = f"{q.count(found.nonzero)} nonzero" if found.nonzero != found.parameters else ""
        ending = f", {nonzero}" if nonzero else ""
        sentence += f" and found a network of {q.count(found.parameters)} parameters{ending}."
        limit = f"allowed at most {q.amount(asked, measure)}" if asked and measure == "params" else ""
        remark = "; ".join(filter(None, (nonzero, limit)))
        figures.append(SummaryRow("Parameters", q.count(found.parameters), remark=remark))
        figures.append(SummaryRow("MACs", q.count(found.macs), remark="of one example"))
        score = q.significant(found.score) if found.accuracy is None else q.percent(found.accuracy)
        figures.append(SummaryRow(f"Validation {found.metric}", score, remark="after the search"))
    if reached is not None and asked and measure != "params":
        limit = f"allowed at most {q.amount(asked, measure)}"
        figures.append(SummaryRow(f"Target: {name_measure(measure)}", q.amount(reached, measure), remark=limit))
    figures += _tabulate_times(run)
    if test:
        trained = "retrained from scratch" if run.settings.get("fresh") == "yes" else "trained further"
        state = trained if run.settings.get("retrain", "0") != "0" else "with the weights of the search"
        sentence += f" Its test accuracy is {q.percent(test.accuracy)}, {state}."
        remark = f"on {q.count(test.images)} examples"
        figures.append(SummaryRow("Test accuracy", q.percent(test.accuracy), remark=remark))
    alarms = _warn_of_search(run)
    if peaks := [row.peak for row in run.rows_of(StageMemoryRow) if row.peak is not None]:
        limit, peak = run.settings.get("memory", q.NONE), q.decimal_bytes(max(peaks))
        figures.append(SummaryRow("Memory of training", peak, remark=f"allowed at most {limit}"))
        with suppress(ValueError):
            if max(peaks) > parse_bytes(limit):
                alarms.append(f"The memory budget of {limit} was exceeded: a stage needed {peak}.")
    details = [f"{len(epochs)} epochs of search in {len({row.stage for row in epochs})} stages."] if epochs else []
    if any(row.recomputed for row in run.rows_of(StageMemoryRow)):
        details.append("To stay within the memory budget, parts were recomputed in the backward pass.")
    size, quality = found.parameters if found else None, test.accuracy if test else None
    return Summary(sentence, figures, details, size, quality, alarms)


def search_target(run: Run) -> tuple[str, float | None, float | None]:
    """Return (measure, allowed size, size of the found network) of a search, such as ``("params", 5e4, 4.9e4)``.

    A size that is not known yet is ``None``.
    """
    totals, found = run.last_of(SearchTotals) or SearchTotals(), run.last_of(FoundRow)
    target, asked = run.settings.get("target", ""), totals.asked
    measure = totals.measure or (target.partition("=")[0] if "=" in target else "params")
    with suppress(ValueError):
        asked = asked or Target.parse(target).amount
    reached = getattr(found, {"params": "parameters"}.get(measure, measure), None)
    if reached is None or (measure == "nonzero" and totals.size is not None):
        reached = totals.size
    return measure, asked, reached


def _warn_of_search(run: Run) -> list[str]:
    """Return warnings of a search: a target that was missed or overshot, cuts of idle parts that changed outputs."""
    measure, asked, reached = search_target(run)
    alarms = []
    if asked and reached is not None:
        size = f"{q.amount(reached, measure)}, allowed are {q.amount(asked, measure)} ({name_measure(measure)})"
        sizes = f"the final network has {size}"
        if reached > asked * (1 + TIMING_ERROR if measure == "ms" else 1):
            alarms.append(f"The target was missed: {sizes}.")
        elif reached < OVERSHOT * asked:
            alarms.append(f"The target was overshot: {sizes}.")
    # Commits that only remove what was not active any more.
    neutral = [row for row in run.rows_of(Commit) if not (row.back or row.grown or row.restored or row.stood)]
    moved = max((row.logits_moved or 0 for row in neutral), default=0)
    if moved > MOVED:
        alarms.append(f"A commit should not change outputs, but one did: logits by up to {q.significant(moved)}.")
    return alarms


def next_command(run: Run, folder: str = "") -> str:
    """Return the shell command to go on with; empty after a run from Python; for an unfinished run its own command.

    ``folder``: the run's, as the command is to name it; empty: by its name alone.
    """
    place, verb = folder or run.name, run.file.verb
    name = shlex.quote(place)
    if not run.file.finished:
        return run.file.command
    if not run.file.command.startswith("regrow "):
        return ""
    code = f" --code {run.code}" if run.code else ""
    if verb == "learn":
        return f"regrow learn --resume {name} --task TASK"
    if verb == "prune" and run.file.sources:
        tokens = " --tokens 262144" if run.is_text else ""
        return f"regrow recover {name} --by distil{tokens}{code} --out {shlex.quote(f'{place}-recovered')}"
    if run.is_text:
        return f"regrow chat {name}"
    return f"regrow export {name} --to onnx{code} --out {shlex.quote(f'{place}.onnx')}"


def quality_table(run: Run) -> SummaryTable:
    """Return a table of a row per text domain (perplexity) and task (accuracy), a column per model, and the change."""
    models, rows, recovered = run.models, [], any(row.recovered is not None for row in run.quality)
    for row in run.quality[:200]:  # a damaged folder may name any number
        format_value = q.percent if row.seen is None else q.significant
        cells = [row.name if row.seen is None else f"{row.name} ({'seen' if row.seen else 'unseen'})"]
        for model in models:
            error = row.error(model)
            cells.append(format_value(row.value(model)) + (f" ± {format_value(error)}" if error else ""))
        cells.append(_describe_change(row))
        rows.append([*cells, q.percent(row.recovered)] if recovered else cells)
    heads = ["", *models.values(), "Change", *(["Loss recovered"] if recovered else [])]
    kinds = {"accuracy" if row.seen is None else "perplexity" for row in run.quality}
    title = kinds.pop().capitalize() if len(kinds) == 1 else "Perplexity of text, accuracy on tasks"
    return SummaryTable(title, heads, rows)


def accuracy_table(run: Run) -> SummaryTable:
    """Return a table of accuracies: a row before learning and after each task, a column per task; 40 tasks at most."""
    results, most = run.task_results, 40  # tasks in rows and columns
    names = results.names[:most]
    columns = ["After learning", *names, "Parameters"]
    rows, shades = [], []
    before = [("nothing", results.end.before, "")] if results.end else []
    sizes = {record.task: q.count(record.parameters) for record in results.records}
    learned = [(results.names[i], row, sizes.get(i, q.NONE)) for i, row in enumerate(results.accuracies[:most])]
    for name, row, size in before + learned:
        values = [*row[:most], *[None] * (len(names) - len(row))]  # tasks that were not known by then
        rows.append([name, *map(q.percent, values), size])
        shades.append([None, *values, None])
    return SummaryTable("Accuracy on each task", columns, rows, shades)


def describe_proof(run: Run) -> str:
    """Return sentences on the check of a cut or growth against what it should compute: differences and their bounds."""
    rows = [row for row in run.rows_of(VerifyRow) if row.max_abs_diff is not None and row.bound is not None]
    if not rows:
        return "It was not checked that the changed model computes what it should."
    reference = "the model before" + ("" if run.file.verb == "grow" else " with the removed units masked")
    figures = [
        f"{q.significant(row.max_abs_diff)}, allowed {q.significant(row.bound)}{f', {row.dtype}' if row.dtype else ''}"
        for row in rows[-8:]
    ]
    verdict = "Do not use it: its outputs differ from" if is_broken(run) else "Its outputs equal"
    if verdict[0] == "I" and _describe_training(run):
        verdict = "Right after the cut, its outputs equal"
    return f"{verdict} those of {reference}. Largest difference: {'; '.join(figures)}."


def is_broken(run: Run) -> bool:
    """Whether outputs differed by more than the bound in a check of the run's change; False if none was checked."""
    return any((row.max_abs_diff or 0) > row.bound for row in run.rows_of(VerifyRow) if row.bound is not None)


def _describe_change(row: Quality) -> str:
    """Return the change as text: ratio of perplexities ± half its 95 % interval, or points of accuracy; else a dash."""
    if row.seen is None or row.lost is None:
        return q.points(row.lost)
    ratio = math.exp(max(-60.0, min(60.0, row.lost)))
    error = row.paired and row.paired.se
    return q.factor(ratio) + (f" ± {q.significant(1.96 * ratio * error)}" if error else "")
