"""The page of a search: the found network, the course of the search, and warnings such as collapse."""

from contextlib import suppress
from typing import Any

from msgspec.structs import replace

from regrow.core.amounts import Target, parse_bytes
from regrow.reports import cells
from regrow.reports import quantities as q
from regrow.reports.reading import FolderContent
from regrow.reports.rows import FoundNetwork, LevelTotals, PassTimes, PlannedStages, SearchEpoch, StagePeaks
from regrow.reports.runs import KeyNumber, Run, SearchRun

LEVELS = ("operations", "filters", "weights")

COLLAPSE, BARE = 0.5, 0.75
"""The fractions of skips, and of operations without weights, from which on a warning of collapse is shown."""

OVERSHOT = 0.8
"""The fraction of the allowed size below which a network is reported as too small."""

MOVED = 1e-3
"""The largest change of logits at a commit that restores nothing, before a warning is shown."""

RECONSTRUCTED = {
    "mgas": "MGAS is reconstructed: the paper's body was not available, so it follows the abstract and the authors' "
    "public code; what these leave open is ours.",
    "gold_nas": "GOLD-NAS is reconstructed from notes on the authors' code; neither code nor paper was available.",
}
"""Method → the note that must accompany its results."""

_UNITS = {
    "params": "parameters",
    "nonzero": "nonzero parameters",
    "macs": "MACs per example",
    "bytes": "bytes",
    "ms": "ms per pass",
}


def read_search(folder: FolderContent) -> SearchRun:
    """Return the measurements of a search."""
    settings, levels = folder.run.settings, folder.last("levels")
    target, retrain = q.in_words(settings.get("target")), settings.get("retrain")
    totals, network = levels or LevelTotals({}), folder.last("found") or FoundNetwork()
    measure = totals.measure or (target.partition("=")[0] if "=" in target else "params")
    counted = getattr(network, {"params": "parameters"}.get(measure, measure), None)
    planned, memory = folder.last("stages") or PlannedStages(), folder.of("memory")
    asked, budget = totals.asked or None, None
    with suppress(ValueError):
        asked = asked or Target.parse(target).amount or None
    with suppress(ValueError):
        budget = parse_bytes(q.in_words(settings.get("memory")))
    return SearchRun(
        target=target,
        measure=measure,
        asked=asked,
        reached=totals.size if counted is None or (measure == "nonzero" and totals.size is not None) else counted,
        retrained=retrain if isinstance(retrain, int) and retrain > 0 else 0,
        inherited=settings.get("inherit") is True,
        epochs=_last_of_each(folder.of("epoch")),
        front=_last_of_each(folder.of("front")),
        commits=folder.of("commit"),
        stages=_stages(planned, memory),
        recomputed=planned.recomputed or any(row.recomputed for row in memory),
        budget=budget,
        latency=folder.last("latency") or PassTimes(),
        levels=levels,
        network=network,
        test=folder.last("test") or FoundNetwork(),
        cells=folder.found.cells,
        blocks=folder.found.blocks,
    )


def unit(result: SearchRun) -> str:
    """Return the unit in which a search counts sizes, in words."""
    return _UNITS.get(result.measure, "parameters")


def headline(run: Run, result: SearchRun) -> str:
    """Return one sentence on the network that a run found, and its test accuracy."""
    deed, left = f"{run.method or 'regrow search'} searched {run.model}", result.network
    if left.parameters is None:
        return f"{deed}. The search is not finished."
    some = "" if left.nonzero in (None, left.parameters) else f", {q.count(left.nonzero)} of them nonzero"
    deed += f" and found a network of {q.count(left.parameters)} parameters{some}."
    if result.test.accuracy is None:
        return f"{deed} It was not tested."
    state = _trained(result).capitalize() if result.retrained else "With the weights of the search"
    return f"{deed} {state}, it has a test accuracy of {q.percent(result.test.accuracy)}."


def explain_unsearched(run: Run) -> str:
    """Return a note if a run did not search weights because its target counts zeroed ones; else an empty text."""
    result = run.search
    if result is None or run.method != "mgas" or result.measure not in ("params", "macs", "bytes"):
        return ""
    return f"Weights were not searched, since a target in {result.measure} counts weights that are 0; nonzero does not."


def details(run: Run, result: SearchRun) -> list[str]:
    """Return the sentences below a run's headline: the origin of the method, and what was done."""
    lines = [line for line in (RECONSTRUCTED.get(run.method), explain_unsearched(run)) if line]
    if result.epochs:
        n, m = len(result.epochs), len({row.stage for row in result.epochs})
        after = "further training" if result.inherited else "training from scratch"
        anew = f", and {result.retrained} of {after}" if result.retrained and run.file.finished else ""
        lines.append(f"{n} epoch{'s' * (n != 1)} of search in {m} stage{'s' * (m != 1)}{anew}.")
    if result.test.accuracy is not None:
        lines.append("A part of the training data was held out for validation; the test set was used once, at the end.")
    return lines


def key_numbers(result: SearchRun) -> list[KeyNumber]:
    """Return the figures at the head of the page."""
    test, left = result.test, result.network
    state = _trained(result) if result.retrained else "after the search"
    shown: list[tuple[str, Any, Any, str]] = [
        ("Test accuracy", test.accuracy, q.percent, f"{state}, on {q.count(test.images)} examples"),
        ("Validation accuracy", left.accuracy, q.percent, "after the search"),
        ("Parameters", left.parameters, q.count, f"stored; {q.count(left.nonzero)} nonzero"),
        ("MACs", left.macs, q.count, "of dense kernels, for one example"),
    ]
    if result.asked:
        shown.append(("Size", result.reached, q.count, f"of at most {q.count(result.asked)} {unit(result)}"))
    if whole := result.latency.whole:
        below = f"ms per pass, measured; the whole space took {q.significant(whole)}"
        shown.append(("Time", result.latency.found, q.significant, below))
    if ops := cells.operations(result.cells):
        skips, bare = sum(op.kind == "skip" for op in ops), cells.count_bare(result.cells)
        shown.append(("Skips", skips / len(ops), q.percent, f"of operations, {skips} of {len(ops)}"))
        of_all = f"of operations, {bare} of {len(ops)}: skips and pools"
        shown.append(("Without weights", bare / len(ops), q.percent, of_all))
    if many := len(result.blocks):
        shown.append(("Blocks", many - cells.count_skipped(result.blocks), q.count, f"of {many}"))
    return [KeyNumber(label, write(value), below) for label, value, write, below in shown if value is not None]


def alarms(run: Run) -> list[str]:
    """Return warnings: collapse, missed size or memory, commits that changed outputs."""
    warnings = (_collapse, _off, _moved, _memory)
    return [line for warn in warnings if run.search and (line := warn(run.search))]


def _collapse(result: SearchRun) -> str:
    parts, many = result.cells, len(result.blocks)
    if many and cells.count_skipped(result.blocks) >= COLLAPSE * many:
        return f"The search may have collapsed: {cells.count_skipped(result.blocks)} of {many} blocks do nothing."
    if not (ops := cells.operations(parts)):
        return ""
    skips, bare = sum(op.kind == "skip" for op in ops) / len(ops), cells.count_bare(parts) / len(ops)
    if skips >= COLLAPSE:
        return f"The search may have collapsed: {q.percent(skips)} of the kept operations are skips."
    if bare >= BARE:
        return f"The search may have collapsed: {q.percent(bare)} of the kept operations have no weights."
    return ""


def _off(result: SearchRun) -> str:
    if not result.asked or result.reached is None:
        return ""
    sizes = f"the final network has {q.count(result.reached)} {unit(result)}, the target is {q.count(result.asked)}"
    if result.reached > result.asked * (1.01 if result.measure == "ms" else 1):
        return f"The target was missed: {sizes}."
    return f"The target was overshot: {sizes}." if result.reached < OVERSHOT * result.asked else ""


def _moved(result: SearchRun) -> str:
    still = [row for row in result.commits if not (row.back or row.added or row.stood)]
    moved = [row for row in still if (row.logits_moved or 0) > MOVED]
    if not moved:
        return ""
    at = ", ".join(dict.fromkeys(q.count(row.epoch) for row in moved[:12]))
    return (
        f"A commit should not change outputs, but {len(moved)} of {len(result.commits)} did (after epoch {at}): "
        f"logits changed by up to {q.significant(max(row.logits_moved or 0 for row in moved))}."
    )


def _memory(result: SearchRun) -> str:
    over = [row for row in result.stages if result.budget and (row.peak or 0) > result.budget]
    peaks = [f"stage {row.stage + 1} needed {q.octets(row.peak)}" for row in over]
    return f"The memory budget of {q.octets(result.budget)} was exceeded: {', '.join(peaks)}." if peaks else ""


def _last_of_each(rows: list[SearchEpoch]) -> list[SearchEpoch]:
    """Return one row per epoch, in order; of an epoch that was run twice, the last."""
    last = {row.epoch: row for row in rows}
    return [last[epoch] for epoch in sorted(last)]


def _stages(planned: PlannedStages, measured: list[StagePeaks]) -> list[StagePeaks]:
    """Return the memory of each stage, and the last cell that it runs, counted from 1."""
    rows = {row.stage: row for row in measured}
    for i, (end, peak) in enumerate(zip(planned.ends, planned.peaks, strict=False)):
        rows[i] = replace(rows.get(i, StagePeaks(i)), last=end + 1, planned=peak)
    return [rows[stage] for stage in sorted(rows)]


def _trained(result: SearchRun) -> str:
    return "trained further" if result.inherited else "retrained from scratch"
