"""Sentences and key numbers of the pages of pruning and learning runs: what was done, and what it cost."""

from collections.abc import Callable
from typing import NamedTuple

from regrow.reports import quantities as q
from regrow.reports.rows import FittedLayer
from regrow.reports.runs import Course, KeyNumber, Run

SEEN = "fitted sources"
RECONSTRUCTED = (
    "SparseGrow is reconstructed: the paper's body was not available, so it follows the abstracts and the public code "
    "of a predecessor. What these leave open is ours."
)


class MatrixFigure(NamedTuple):
    """A figure that follows from an accuracy matrix; the higher the better, times ``sign``."""

    name: str
    label: str
    write: Callable[[float | None], str]
    meaning: str
    sign: int = 1


MATRIX_FIGURES = (
    MatrixFigure("average", "Final average accuracy", q.percent, "over all tasks, after the last"),
    MatrixFigure("average_along", "Average during learning", q.percent, "over the tasks learned, after each"),
    MatrixFigure("learning", "Learning accuracy", q.percent, "of each task, just after learning it"),
    MatrixFigure("backward_transfer", "Backward transfer", q.points, "at the end, minus just after learning"),
    MatrixFigure("forgetting", "Forgetting", q.points, "best earlier accuracy minus final", sign=-1),
    MatrixFigure("forward_transfer", "Forward transfer", q.points, "before learning the task, minus untrained"),
)
_DOMAINS = {"seen": "on text domains seen in calibration", "unseen": "on unseen ones"}


def headline(run: Run) -> str:
    """Return one sentence on what was done to the model, and what it cost in quality."""
    who = run.method or f"regrow {run.file.verb}"
    if (left := run.size.left) is not None:
        deed = "removed {} of" if left <= 1 else "added {} to"
        weights = "linear weights" if run.perplexity else "convolution and linear weights"
        deed = f"{who} {deed.format(q.percent(abs(1 - left)))} the {weights} of {run.model}."
    elif run.keep is not None:
        deed = f"{who} was to keep {q.percent(run.keep)} of the {run.measure or 'weights'} of {run.model}."
    else:
        deed = f"{who} on {run.model}."
    return f"{deed} {_price(run)}"


def details(run: Run) -> list[str]:
    """Return sentences with the figures behind the headline."""
    before, after, lines = run.size.before, run.size.after, []
    if before and after and before.params_all:
        share = q.percent(after.params_all / before.params_all)
        sizes = f"{q.count(before.params_all)} to {q.count(after.params_all)}"
        lines.append(f"All parameters together went from {sizes}, which is {share}.")
    if run.regular:
        lines.append(
            "The plan is regular: axes of one kind keep equally many units in every block, each block its own best. "
            "To see what this costs, compare with the same run without --regular."
        )
    parts = [
        f"from {q.significant(means.before)} to {q.significant(means.after)} {where}"
        for which, where in _DOMAINS.items()
        if (means := run.means[which]) and means.before
    ]
    if parts:
        lines.append(f"Perplexity, as a geometric mean, went {' and '.join(parts)}.")
    return lines


def key_numbers(run: Run) -> list[KeyNumber]:
    """Return the numbers at the head of the page."""
    before, after, budget, result = run.size.before, run.size.after, run.budget, list[KeyNumber]()
    if before and after and (left := run.size.left) is not None:
        figures = f"{q.count(after.params_counted)} of {q.count(before.params_counted)}"
        result.append(KeyNumber("Weights" if run.file.verb == "grow" else "Weights kept", q.percent(left), figures))
    elif run.keep is not None:
        result.append(KeyNumber("Requested fraction", q.percent(run.keep), f"of {run.measure or 'weights'}"))
    if budget and budget.asked is not None and budget.after is not None:
        label = budget.measure + f" at {budget.context:,} tokens" * bool(budget.context)
        was = f", before {q.measured(budget.before, budget.measure)}" * bool(budget.before)
        guess = f"; predicted {q.measured(budget.predicted, budget.measure)}" * bool(budget.predicted)
        allowed = f"allowed at most {q.measured(budget.asked, budget.measure)}{was}{guess}"
        result.append(KeyNumber(label, q.measured(budget.after, budget.measure), allowed))
    for which in _DOMAINS:
        if means := run.means[which]:
            sides = f"{q.significant(means.before)} → {q.significant(means.after)}, " * bool(means.before)
            value = q.factor(means.ratio) if means.ratio else q.significant(means.after)
            result.append(KeyNumber(f"Perplexity, {which}", value, f"{sides}{domains(means.count)}"))
    if (accuracy := _accuracy(run)) and not run.perplexity:
        result.append(KeyNumber("Accuracy", q.percent(accuracy[1]), f"before {q.percent(accuracy[0])}{accuracy[2]}"))
    if before and after and before.bytes:
        formats = " → ".join(dict.fromkeys(side.dtype for side in (before, after) if side.dtype))
        below = f"before {q.octets(before.bytes)}{', ' * bool(formats)}{formats}"
        result.append(KeyNumber("Size on disk", q.octets(after.bytes), below))
    if proof := next((row for row in run.verify if row.holds is not None), None):
        below = f"max difference {q.power(proof.max_abs_diff)}, {proof.dtype}"
        result.append(KeyNumber(law(run), "holds" if proof.holds else "broken", below))
    return result


def law(run: Run) -> str:
    """Return the name of the equality that a run checks."""
    return "Grown = original" if run.file.verb == "grow" else "Masked = shrunk"


def proof(run: Run) -> str:
    """Return the result of the masked = shrunk check, in words."""
    rows = [row for row in run.verify if row.holds is not None]
    whole = bool(rows) and all(row.holds for row in rows)
    if run.file.verb == "grow":
        return f"The grown model {'computes' if whole else 'was not shown to compute'} what the model computed before."
    if not rows:
        return "This run did not check that the cut model computes what the masked model computes."
    if whole:
        before = "Before its layers were fitted, the" if run.reconstruction else "The"
        return (
            f"{before} cut model computes what the full-size model computes with the removed units masked: "
            "the outputs differ by no more than rounding."
        )
    return "The cut model does not compute what the masked model computes: this cut is not exact. Do not use it."


def reconstruction(run: Run) -> list[str]:
    """Return sentences on what the least squares recovered, per layer and in perplexity; empty if there was none."""
    if (fit := run.reconstruction) is None:
        return []
    layers = "1 layer" if len(fit.layers) == 1 else f"{len(fit.layers)} layers"
    outputs = "what they would return uncut, with the network before them as it is after the cut"
    goal = "what they return in the network before the cut" if fit.target == "dense" else outputs
    lines = [f"After the cut, {layers} that read removed units were fitted to {goal}."]
    lines.append(f"The fit used {fit.tokens:,} tokens.")
    for name, where in (("after", fit.where), ("seen", SEEN)):
        known = [row for row in fit.layers if row.before is not None and getattr(row, name) is not None]
        before, after = q.mean([row.before for row in known]), q.mean([getattr(row, name) for row in known])
        share = f" ({q.percent(fitted_share(known, name))} less)" * bool(before)
        if before is not None:
            went = f"{q.significant(before)} to {q.significant(after)}"
            lines.append(f"Their mean relative error on {where} went from {went}{share}.")
    parts = [
        f"{q.percent(means.recovered)} on text domains {where}"
        for which, where in (("seen", "seen in calibration"), ("unseen", "not seen in calibration"))
        if (means := run.means[which]) and means.recovered is not None
    ]
    if parts and run.outcome == "Reconstructed":
        lines.append(f"Of the log-perplexity that the cut lost, this recovered {' and '.join(parts)}.")
    return lines


def fitted_share(layers: list[FittedLayer], name: str) -> float | None:
    """Return by which fraction the sum of the layers' errors fell; ``None`` if that was not measured."""
    known = [row for row in layers if row.before is not None and getattr(row, name) is not None]
    before = sum(row.before or 0.0 for row in known)
    return 1 - sum(getattr(row, name) for row in known) / before if before else None


def domains(count: int) -> str:
    """Return a number of text domains in words."""
    return f"{count} text domain{'s' * (count != 1)}"


def learned_headline(run: Run, course: Course) -> str:
    """Return one sentence on what was learned, and the accuracy at the end."""
    n = len(course.matrix.matrix)
    deed = f"{run.method or 'regrow learn'} trained {run.model} on {n} task{'s' * (n != 1)}{' in sequence' * (n > 1)}."
    if course.matrix.average is None:
        return f"{deed} Its accuracy on all of them was not measured."
    over = f", on average over {'all' if course.measured == n else f'the {course.measured} that could be evaluated'}"
    return f"{deed} Final accuracy: {q.percent(course.matrix.average)}{over * (n > 1)}."


def learned_details(run: Run, course: Course) -> list[str]:
    """Return sentences below the headline: the origin of the method, and how the network grew."""
    lines = [RECONSTRUCTED] if run.method == "sparsegrow" else []
    if course.gone:
        lines.append(f"Data of {', '.join(course.gone)} were missing, so the figures are means over the other tasks.")
    first, n = course.records[0].parameters if course.records else None, len(course.events)
    if n and first and course.parameters:
        lines.append(
            f"The network grew {n} time{'s' * (n != 1)}; it had {q.count(first)} parameters after the first task, "
            f"{q.count(course.parameters)} after the last."
        )
    elif not n:
        lines.append("The network did not grow.")
    return lines


def learned_numbers(course: Course) -> list[KeyNumber]:
    """Return the six figures of the accuracy matrix."""
    tasks, measured = len(course.matrix.matrix), course.measured
    over = "all tasks" if measured == tasks else f"the {measured} of {tasks} tasks that could be evaluated"
    return [
        KeyNumber(figure.label, figure.write(value), figure.meaning.replace("all tasks", over))
        for figure in MATRIX_FIGURES
        if (value := getattr(course.matrix, figure.name)) is not None
    ]


def _price(run: Run) -> str:
    parts = [(m.ratio, where) for which, where in _DOMAINS.items() if (m := run.means[which]) and m.ratio]
    if parts:
        rose = [ratio >= 1 for ratio, _ in parts]
        verb = "rose" if all(rose) else "changed" if any(rose) else "fell"
        return f"Perplexity {verb} {' and '.join(f'{q.factor(ratio)} {where}' for ratio, where in parts)}."
    if means := run.means["all"]:
        return f"Perplexity is now {q.significant(means.after)}."
    if accuracy := _accuracy(run):
        return f"Accuracy went from {q.percent(accuracy[0])} to {q.percent(accuracy[1])}{accuracy[2]}."
    if run.file.verb == "grow" and any(row.holds for row in run.verify):
        return "Its outputs are unchanged."
    return "The loss in quality was not measured."


def _accuracy(run: Run) -> tuple[float, float, str] | None:
    """Return mean accuracy before and after over the tasks measured on both sides, and on how many if on several."""
    both = [(row.before.acc, row.after.acc) for row in run.choice if row.before and row.after]
    if not both:
        return None
    before, after = q.mean([before for before, _ in both]) or 0.0, q.mean([after for _, after in both]) or 0.0
    return before, after, f", the mean of {len(both)} tasks" * (len(both) > 1)
