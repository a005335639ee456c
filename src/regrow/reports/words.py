"""Sentences and key numbers of a pruning run's page: what was done, and what it cost."""

from collections.abc import Callable
from typing import Any

from regrow.reports import quantities as q
from regrow.reports.findings import GRID
from regrow.reports.records import KeyNumber, Run, Summary

_UNITS: dict[str, Callable[[float | None], str]] = {
    "bytes": q.octets,
    "kv_cache": q.octets,
    "ms": lambda value: f"{q.significant(value)} ms",
}
_DONE = {"prune": "removed", "apply": "removed"}


def headline(run: Run) -> str:
    """Return one sentence on what was done to the model, and what it cost in perplexity.

    Args:
        run: A run of the summary.

    Returns:
        The sentence; without measurements it states only the requested fraction.
    """
    return f"{_deed(run)} {_price(run)}"


def details(run: Run) -> list[str]:
    """Return sentences with the figures behind the headline.

    Args:
        run: A run of the summary.
    """
    before, after = run["size"]["before"] or {}, run["size"]["after"] or {}
    lines = []
    if _both(before, after, "params_all"):
        share = q.percent(after["params_all"] / before["params_all"])
        lines.append(
            f"All parameters together went from {q.count(before['params_all'])} to "
            f"{q.count(after['params_all'])}, which is {share}."
        )
    if run["regular"]:
        lines.append(
            "The plan is regular: axes of one kind keep equally many units in every block, each block its own best. "
            "To see what this costs, compare with the same run without --regular."
        )
    parts = [
        f"from {q.significant(mean['before'])} to {q.significant(mean['after'])} over {_kinds(mean['count'])}{words}"
        for which, words in (("seen", " seen in calibration"), ("unseen", " not seen in calibration"), ("all", ""))
        if (mean := run["means"][which]) and mean["before"]
    ]
    if parts:
        parts = (
            parts[:-1] if len(parts) > 1 else parts
        )  # the mean over all only if seen and unseen domains are not distinguished
        lines.append(f"Perplexity, as a geometric mean, went {' and '.join(parts)}.")
    return lines


def key_numbers(run: Run) -> list[KeyNumber]:
    """Return the numbers at the head of the page, as ``label``, ``value`` and a line ``below`` each.

    Args:
        run: A run of the summary.
    """
    before, after = run["size"]["before"] or {}, run["size"]["after"] or {}
    result: list[KeyNumber] = []

    def add(label: str, value: str, below: str) -> None:
        result.append({"label": label, "value": value, "below": below})

    if _both(before, after, "params_counted"):
        share = after["params_counted"] / before["params_counted"]
        figures = f"{q.count(after['params_counted'])} of {q.count(before['params_counted'])}"
        add("Weights" if run["verb"] == "grow" else "Weights kept", q.percent(share), figures)
    elif run["keep"] is not None:
        add("Requested fraction", q.percent(run["keep"]), f"of {run['measure'] or 'weights'}")
    if budget := run["budget"]:
        unit = _UNITS.get(budget["measure"], q.count)
        label = f"{budget['measure']} at {budget['context']:,} tokens" if budget["context"] else budget["measure"]
        was = f", before {unit(budget['before'])}" if budget["before"] else ""
        guess = f"; predicted {unit(budget['predicted'])}" if budget["predicted"] else ""
        add(label, unit(budget["after"]), f"allowed at most {unit(budget['asked'])}{was}{guess}")
    named = [(which, run["means"][which]) for which in ("seen", "unseen") if run["means"][which]]
    for which, mean in named or [("all domains", run["means"]["all"])]:
        if mean and mean["ratio"]:
            figures = f"{q.significant(mean['before'])} → {q.significant(mean['after'])}, {_kinds(mean['count'])}"
            add(f"Perplexity, {which}", q.factor(mean["ratio"]), figures)
        elif mean:
            add(f"Perplexity, {which}", q.significant(mean["after"]), _kinds(mean["count"]))
    accuracy = _accuracy(run)
    if accuracy and not run["perplexity"]:
        add("Accuracy", q.percent(accuracy[1]), f"before {q.percent(accuracy[0])}{_tasks(accuracy[2])}")
    if _both(before, after, "bytes"):
        formats = " → ".join(dict.fromkeys(side["dtype"] for side in (before, after) if side["dtype"]))
        add(
            "Size on disk",
            q.octets(after["bytes"]),
            f"before {q.octets(before['bytes'])}{', ' * bool(formats)}{formats}",
        )
    elif _both(before, after, "macs"):
        figures = f"{q.count(after['macs'])} of {q.count(before['macs'])}"
        add("MACs left", q.percent(after["macs"] / before["macs"]), figures)
    fast, slow = run["speed"]["after"] or {}, run["speed"]["before"] or {}
    if fast.get("tokens_per_s"):
        rate = f"{q.significant(fast['tokens_per_s'])} tokens/s"
        if slow.get("tokens_per_s"):
            ratio = q.factor(fast["tokens_per_s"] / slow["tokens_per_s"])
            add("Throughput", ratio, f"{q.significant(slow['tokens_per_s'])} → {rate}")
        else:
            add("Throughput", rate, "after")
    proof = next((row for row in run["verify"] if row["holds"] is not None), None)
    if proof:
        figures = f"max difference {q.power(proof['max_abs_diff'])}, {proof['dtype']}"
        law = "Grown = original" if run["verb"] == "grow" else "Masked = shrunk"
        add(law, "holds" if proof["holds"] else "broken", figures)
    return result


def massive(run: Run) -> str:
    """Return what became of the units with massive activations, in words; empty if there are none.

    Args:
        run: A run of the summary.
    """
    units = (run["scores"] or {"massive": []})["massive"]
    if not units:
        return ""
    cut = [unit for unit in units if unit["kept"] is False]
    unknown = [unit for unit in units if unit["kept"] is None]
    which = "1 unit has a massive activation" if len(units) == 1 else f"{len(units)} units have massive activations"
    if unknown and not cut:
        return f"{which}, far above the rest of the layer. Whether they were cut is unknown without the plan."
    fate = (
        ("It was kept." if len(units) == 1 else f"All {len(units)} were kept.")
        if not cut
        else f"Of these, {len(cut)} {'was' if len(cut) == 1 else 'were'} cut, which may explain part of the loss."
    )
    return f"{which}, far above the rest of the layer. {fate}"


def modules(run: Run) -> str:
    """Return an explanation of modules of units, and of switched ones; empty without modules.

    Args:
        run: A run of the summary.
    """
    found = run["findings"]
    if not found or not found["cells"]:
        return ""
    grid = any(row["cell"] in GRID for kind in found["cells"] for row in kind["rows"])
    what = "Units compete only within their module, and each module has its own pruning ratio."
    if grid:
        what += (
            " Sensitive units change rank between text domains more than the median unit, robust units do not; "
            "strong units score above the median, weak units do not."
        )
    return (
        f"{what} The less reliable activations are in a module, the more weight a second metric gets, by default one "
        "without activations; a module in which the second metric has more than half of the weight is called switched."
    )


def learning(run: Run) -> list[str]:
    """Return sentences on what learning or measuring the modules' ratios improved.

    Args:
        run: A run of the summary.
    """
    found = run["findings"]
    if not found:
        return []
    lines = []
    if found["starts"]:
        starts = ", ".join(f"{row['name']} {q.significant(row['held_out'])}" for row in found["starts"])
        taken = found["allocation"]
        what = "allocations compared" if taken else "possible starting points"
        lines.append(f"Loss on held-out text of the {what}: {starts}{f'; {taken} was taken' if taken else ''}.")
    if len(found["history"]) > 1:
        first, last, best = found["history"][0], found["history"][-1], found["best"]
        lines.append(
            f"Learning moved it from {q.significant(first['held_out'])} to {q.significant(best['held_out'])}, at step "
            f"{best['step']} of {last['step']}."
            if best["step"] > first["step"]
            else f"None of {last['step']} steps improved on the start."
        )
    if found["robust"]["cut"] is not None:
        share, base = (found["robust"][name] for name in ("cut", "base"))
        lines.append(
            f"Robust units (sensitivity at most the median of their layer) are {q.percent(share)} of the units cut"
            f"{'' if base is None else f'; the base method alone: {q.percent(base)}'}."
        )
    return lines


def proof(run: Run) -> str:
    """Return the result of the masked = shrunk check, in words.

    Args:
        run: A run of the summary.
    """
    rows = [row for row in run["verify"] if row["holds"] is not None]
    if run["verb"] == "grow":
        same = bool(rows) and all(row["holds"] for row in rows)
        return f"The grown model {'computes' if same else 'was not shown to compute'} what the model computed before."
    if not rows:
        return "This run did not check that the cut model computes what the masked model computes."
    if all(row["holds"] for row in rows):
        before = "Before its layers were fitted, the" if run["reconstruction"] else "The"
        return (
            f"{before} cut model computes what the full-size model computes with the removed units masked: "
            "the outputs differ by no more than rounding."
        )
    return "The cut model does not compute what the masked model computes: this cut is not exact. Do not use it."


def comparison(summary: Summary) -> str:
    """Return the headline of a page that compares pruning runs.

    Args:
        summary: A summary of several runs.
    """
    runs, kinds = summary["runs"], summary["kinds"]
    models = sorted({run["model"] for run in runs})
    what = f"{len(runs)} runs of {models[0]}" if len(models) == 1 else f"{len(runs)} runs of {len(models)} models"
    if not kinds:
        return f"{what}; there is no text domain on which all were evaluated."
    return f"{what}, compared on {_kinds(len(kinds))}."


def leading(summary: Summary, kept: Callable[[Run], float | None]) -> list[str]:
    """Return a sentence on the run of lowest perplexity at each size, at most five sizes.

    Args:
        summary: A summary of several runs.
        kept: Returns the fraction of weights that a run kept.
    """
    best: dict[int, tuple[float, str]] = {}
    for run in summary["runs"]:
        mean, share = run["means"]["shared"], kept(run)
        if mean and share:
            level = round(100 * share)
            best[level] = min(best.get(level, (float("inf"), "")), (mean["after"], run["label"]))
    parts = [
        f"{level}{q.SPACE}% of the weights kept: {q.significant(ppl)} ({label})"
        for level, (ppl, label) in sorted(best.items(), reverse=True)[:5]
    ]
    return [f"Lowest perplexity, as a geometric mean over the text domains. {'; '.join(parts)}."] if parts else []


def same_dense(summary: Summary) -> dict[str, float] | None:
    """Return text domain → perplexity before pruning, if all runs measured the same; else ``None``.

    Args:
        summary: A summary of several runs.
    """
    result: dict[str, float] = {}
    for run in summary["runs"]:
        for row in run["perplexity"]:
            value = (row["before"] or {}).get("ppl")
            if value and abs(result.setdefault(row["source"], value) / value - 1) > 1e-3:
                return None
    return result


def _deed(run: Run) -> str:
    before, after = run["size"]["before"] or {}, run["size"]["after"] or {}
    who = run["method"] or f"regrow {run['verb']}"
    if _both(before, after, "params_counted"):
        left = after["params_counted"] / before["params_counted"]
        deed = _DONE.get(run["verb"], "removed") if left <= 1 else "added"
        preposition = "of" if left <= 1 else "to"
        share = q.percent(abs(1 - left))
        weights = "linear weights" if run["perplexity"] else "convolution and linear weights"
        return f"{who} {deed} {share} {preposition} the {weights} of {run['model']}."
    if run["keep"] is not None:
        return f"{who} was to keep {q.percent(run['keep'])} of the {run['measure'] or 'weights'} of {run['model']}."
    return f"{who} on {run['model']}."


def _price(run: Run) -> str:
    seen, unseen, every = (run["means"][which] for which in ("seen", "unseen", "all"))
    parts = [
        (mean["ratio"], f"{q.factor(mean['ratio'])}{words}")
        for mean, words in ((seen, " on text domains seen in calibration"), (unseen, " on unseen ones"))
        if mean and mean["ratio"]
    ]
    if not parts and every and every["ratio"]:
        parts = [(every["ratio"], q.factor(every["ratio"]))]
    if parts:
        rose = [ratio >= 1 for ratio, _ in parts]
        verb = "rose" if all(rose) else "changed" if any(rose) else "fell"
        return f"Perplexity {verb} {' and '.join(words for _, words in parts)}."
    if every:
        return f"Perplexity is now {q.significant(every['after'])}."
    accuracy = _accuracy(run)
    if accuracy:
        return f"Accuracy went from {q.percent(accuracy[0])} to {q.percent(accuracy[1])}{_tasks(accuracy[2])}."
    if run["verb"] == "grow" and any(row["holds"] for row in run["verify"]):
        return "Its outputs are unchanged."
    return "The loss in quality was not measured."


def _accuracy(run: Run) -> tuple[float, float, int] | None:
    """Return mean accuracy before and after over the tasks measured on both sides, and the number of these tasks."""
    sides = [[(row[side] or {}).get("acc") for side in ("before", "after")] for row in run["choice"]]
    both = [pair for pair in sides if None not in pair]
    if not both:
        return None
    before, after = (sum(column) / len(both) for column in zip(*both, strict=True))
    return before, after, len(both)


def _tasks(count: int) -> str:
    return f", the mean of {count} tasks" if count > 1 else ""


def _kinds(count: int) -> str:
    return f"{count} text domain{'s' * (count != 1)}"


def _both(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    return bool(before.get(name)) and after.get(name) is not None
