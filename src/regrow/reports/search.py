"""The page of a search: the found network, the course of the search, and warnings such as collapse."""

import re
from typing import Any

import msgspec
from msgspec.structs import replace

from regrow.core.amounts import parse_bytes
from regrow.reports import cells
from regrow.reports import quantities as q
from regrow.reports.reading import RunRecord
from regrow.reports.records import Amount, Fraction, KeyNumber
from regrow.reports.runs import FoundNetwork, Level, Run, SearchEpoch, SearchRun, ShapeChange, StagePeaks
from regrow.store.schemas import Count

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


class PlannedStages(msgspec.Struct, frozen=True):
    """The stages that a memory budget planned: the last part of each, and its peak of memory."""

    ends: list[Count] = []
    peaks: list[Count] = []
    recomputed: bool = False


class LevelTotals(msgspec.Struct, frozen=True):
    """The size that each level removed, and what the target asked for."""

    saved: dict[str, float] = {}
    kept: dict[str, Fraction] = {}
    measure: str = ""
    asked: Amount = None
    size: Amount = None


class PassTimes(msgspec.Struct, frozen=True):
    """Measured milliseconds of a pass through the whole space, and through the found network."""

    whole: Amount = None
    found: Amount = None


def search(folder: RunRecord) -> SearchRun | None:
    """Return the measurements of a search; ``None`` if it is a run of another kind."""
    if folder.run.verb != "search":
        return None
    settings = folder.run.settings
    target, retrain = q.in_words(settings.get("target")), settings.get("retrain")
    levels, latency = folder.last("levels", LevelTotals), folder.last("latency", PassTimes) or PassTimes()
    totals = levels or LevelTotals()
    measure = totals.measure or (target.partition("=")[0] if "=" in target else "params")
    network = folder.last("found", FoundNetwork) or FoundNetwork()
    counted = getattr(network, {"params": "parameters"}.get(measure, measure), None)
    planned, memory = folder.last("stages", PlannedStages) or PlannedStages(), folder.rows("memory", StagePeaks)
    return SearchRun(
        target=target,
        measure=measure,
        asked=totals.asked or _target_number(target),
        reached=totals.size if counted is None or (measure == "nonzero" and totals.size is not None) else counted,
        retrained=retrain if isinstance(retrain, int) and retrain > 0 else 0,
        inherited=settings.get("inherit") is True,
        epochs=_last_of_each(folder.rows("epoch", SearchEpoch)),
        front=_last_of_each(folder.rows("front", SearchEpoch)),
        commits=folder.rows("commit", ShapeChange),
        stages=_stages(planned, memory),
        recomputed=planned.recomputed or any(row.recomputed for row in memory),
        budget=_budget(settings.get("memory")),
        clock={"whole": latency.whole, "found": latency.found},
        levels=[Level(name, totals.saved.get(name), totals.kept.get(name)) for name in LEVELS if levels],
        network=network,
        test=folder.last("test", FoundNetwork) or FoundNetwork(),
        cells=cells.read_cells(folder.origin.config),
        topology=(topology := cells.read_topology(folder.origin.config)),
        notation=cells.notation(topology),
        blocks=cells.read_blocks(folder.origin.config),
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
    if result is None or run.method != "mgas" or result.measure not in ("params", "macs", "bytes") or result.topology:
        return ""
    return f"Weights were not searched, since a target in {result.measure} counts weights that are 0; nonzero does not."


def details(run: Run, result: SearchRun) -> list[str]:
    """Return the sentences below a run's headline: the origin of the method, and what was done."""
    lines = [line for line in (RECONSTRUCTED.get(run.method), explain_unsearched(run)) if line]
    if result.epochs:
        n, m = len(result.epochs), len({row.stage for row in result.epochs})
        after = "further training" if result.inherited else "training from scratch"
        anew = f", and {result.retrained} of {after}" if result.retrained and run.finished else ""
        lines.append(f"{n} epoch{'s' * (n != 1)} of search in {m} stage{'s' * (m != 1)}{anew}.")
    if result.test.accuracy is not None:
        lines.append("A part of the training data was held out for validation; the test set was used once, at the end.")
    return lines


def key_numbers(result: SearchRun) -> list[KeyNumber]:
    """Return the figures at the head of the page."""
    test, left, ops = result.test, result.network, cells.operations(result.cells or result.topology)
    state = _trained(result) if result.retrained else "after the search"
    shown: list[tuple[str, Any, Any, str]] = [
        ("Test accuracy", test.accuracy, q.percent, f"{state}, on {q.count(test.images)} examples"),
        ("Validation accuracy", left.accuracy, q.percent, "after the search"),
        ("Parameters", left.parameters, q.count, f"stored; {q.count(left.nonzero)} nonzero"),
        ("MACs", left.macs, q.count, "of dense kernels, for one example"),
    ]
    if result.asked:
        shown.append(("Size", result.reached, q.count, f"of at most {q.count(result.asked)} {unit(result)}"))
    if whole := result.clock["whole"]:
        below = f"ms per pass, measured; the whole space took {q.significant(whole)}"
        shown.append(("Time", result.clock["found"], q.significant, below))
    if ops:
        skips, bare = sum(op.kind == "skip" for op in ops), sum(op.bare for op in ops)
        kinds = "none, skips and pools" if result.topology else "skips and pools"
        shown.append(("Skips", skips / len(ops), q.percent, f"of operations, {skips} of {len(ops)}"))
        shown.append(("Without weights", bare / len(ops), q.percent, f"of operations, {bare} of {len(ops)}: {kinds}"))
    if many := len(result.blocks):
        shown.append(("Blocks", many - cells.count_skipped(result.blocks), q.count, f"of {many}"))
    return [KeyNumber(label, write(value), below) for label, value, write, below in shown if value is not None]


def alarms(run: Run) -> list[str]:
    """Return warnings: collapse, nodes with one operation, missed size or memory, commits that changed outputs."""
    warnings = (_collapse, _thin, _off, _overshot, _moved, _memory)
    return [line for warn in warnings if run.search and (line := warn(run.search))]


def _collapse(result: SearchRun) -> str:
    ops, many = cells.operations(result.cells or result.topology), len(result.blocks)
    if many and cells.count_skipped(result.blocks) >= COLLAPSE * many:
        return f"The search may have collapsed: {cells.count_skipped(result.blocks)} of {many} blocks do nothing."
    if not ops:
        return ""
    skips, bare = sum(op.kind == "skip" for op in ops) / len(ops), sum(op.bare for op in ops) / len(ops)
    if skips >= COLLAPSE:
        return f"The search may have collapsed: {q.percent(skips)} of the kept operations are skips."
    if bare >= BARE:
        return f"The search may have collapsed: {q.percent(bare)} of the kept operations have no weights."
    return ""


def _thin(result: SearchRun) -> str:
    thin = [
        f"node {j + 1} of cell {i + 1} ({node.ops[0].kind})"
        for i, cell in enumerate(result.cells)
        for j, node in enumerate(cell.nodes)
        if len(node.ops) == 1
    ]
    rest = f" and {len(thin) - 12} more" if len(thin) > 12 else ""
    return f"Only one operation is left in {', '.join(thin[:12])}{rest}." if thin else ""


def _off(result: SearchRun) -> str:
    if not result.asked or result.reached is None:
        return ""
    sizes = f"the final network has {q.count(result.reached)} {unit(result)}, the target is {q.count(result.asked)}"
    if result.reached > result.asked * (1.01 if result.measure == "ms" else 1):
        return f"The target was missed: {sizes}."
    return f"The target was overshot: {sizes}." if result.reached < OVERSHOT * result.asked else ""


def _overshot(result: SearchRun) -> str:
    """Return a warning about stages that ended with less than their allowed size.

    The final commit restores as much as the target allows, so the final size may hide that masks had removed too much.
    """
    ends = list({row.stage: row for row in result.epochs}.values())
    last_open = not result.levels or _off(result)  # the last stage is unfinished, or warned about already
    over = [row for row in (ends[:-1] if last_open else ends) if row.allowed and row.size is not None]
    over = [row for row in over if row.size < OVERSHOT * row.allowed][:12]  # type: ignore[operator]
    sizes = [f"{q.count(row.size)} of {q.count(row.allowed)} in stage {row.stage + 1}" for row in over]
    back = " What was restored at the end had not been trained." * (bool(over) and over[-1] is ends[-1])
    return f"Thresholds removed too much: at the end, {', '.join(sizes)} was left.{back}" if sizes else ""


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


def _budget(asked: object) -> int | None:
    try:
        return parse_bytes(asked) if isinstance(asked, str) else None
    except ValueError:
        return None


def _target_number(target: str) -> float | None:
    """Return the number in a target that names its measure."""
    fit = re.fullmatch(r"(?:params|nonzero|macs|bytes|ms)=(\d{1,15}(?:\.\d{1,9})?|\.\d{1,9})([kMG]?)", target)
    return float(fit[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[fit[2]] if fit else None
