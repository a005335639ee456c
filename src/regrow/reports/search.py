"""The page of a search: the found network, the course of the search, and warnings such as collapse."""

import re
from typing import Any

from regrow.amounts import parse_bytes
from regrow.reports import blocks, cells, topology
from regrow.reports import quantities as q
from regrow.reports.reading import MAX_ITEMS, JsonObject, RunRecord, items, mapping, number, size, text
from regrow.reports.records import KeyNumber, Run, search_of

Lines = dict[str, list[JsonObject]]

LEVELS = ("operations", "filters", "weights")
MAX_EPOCHS = 5_000
MAX_COMMITS = 2_000
MAX_STAGES = 64

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
_SIZES = ("parameters", "nonzero", "macs", "bytes")


def search(folder: RunRecord) -> dict[str, Any] | None:
    """Return the measurements of a search for its page.

    Args:
        folder: A run folder.

    Returns:
        ``target`` (as requested), ``measure``, ``unit``, ``asked`` and ``reached`` (in that unit, counted on
        the found network where a row says so), ``retrained``,
        ``trained`` (in words), ``epochs``, ``commits``, ``front`` (networks that the last stage passed), ``stages``
        (memory of each), ``recomputed``, ``clock`` (ms), ``budget``, ``levels``, ``found``, ``test``, ``cells``,
        ``topology``, ``notation`` and
        ``blocks``; ``None`` if it is a run of another kind.
    """
    if folder.run.get("verb") != "search":
        return None
    settings = mapping(folder.run.get("settings"))
    lines: Lines = {}
    for line in folder.metrics:
        lines.setdefault(text(line.get("what")), []).append(line)
    last = {what: mapping((lines.get(what) or [{}])[-1]) for what in ("levels", "found", "test", "stages", "latency")}
    target, levels = text(settings.get("target"), 40), last["levels"]
    measure = text(levels.get("measure")) or (target.partition("=")[0] if "=" in target else "params")
    sizes = {name: size(last["found"].get(name)) for name in _SIZES}
    counted, recorded = sizes.get({"params": "parameters"}.get(measure, measure)), number(levels.get("size"), 0)
    reached = recorded if counted is None or (measure == "nonzero" and recorded is not None) else counted
    return {
        "target": target,
        "unit": _UNITS.get(measure, "parameters"),
        "asked": number(levels.get("asked"), 0) or _target_number(target),
        "measure": measure,
        "reached": reached,
        "retrained": size(settings.get("retrain")),
        "trained": "trained further" if settings.get("inherit") is True else "retrained from scratch",
        "epochs": _epochs(lines.get("epoch", [])),
        "commits": [_commit(line) for line in lines.get("commit", [])[:MAX_COMMITS]],
        "front": _front(lines.get("front", [])),
        "stages": _stages(last["stages"], lines.get("memory", [])),
        "recomputed": any(line.get("recomputed") is True for line in [last["stages"], *lines.get("memory", [])]),
        "clock": {name: number(last["latency"].get(name), 0) for name in ("whole", "found")},
        "budget": _budget(settings.get("memory")),
        "levels": [
            {
                "level": level,
                "saved": number(mapping(levels.get("saved")).get(level), 0),
                "kept": number(mapping(levels.get("kept")).get(level), 0, 1),
            }
            for level in LEVELS
        ]
        if levels
        else [],
        "found": {"accuracy": number(last["found"].get("accuracy"), 0, 1)} | sizes,
        "test": {
            "accuracy": number(last["test"].get("accuracy"), 0, 1),
            "images": size(last["test"].get("images")),
            **{name: size(last["test"].get(name)) for name in _SIZES},
        },
        "cells": cells.cells(folder.origin),
        "topology": (topologies := topology.topology(folder.origin)),
        "notation": topology.notation(topologies),
        "blocks": blocks.blocks(folder.origin),
    }


def headline(run: Run) -> str:
    """Return one sentence on the network that a run found, and its test accuracy."""
    found = search_of(run)
    deed = f"{run['method'] or 'regrow search'} searched {run['model']}"
    if (many := found["found"]["parameters"]) is None:
        return f"{deed}. The search is not finished."
    nonzero = found["found"]["nonzero"]
    some = "" if nonzero in (None, many) else f", {q.count(nonzero)} of them nonzero"
    deed += f" and found a network of {q.count(many)} parameters{some}."
    if (right := found["test"]["accuracy"]) is None:
        return f"{deed} It was not tested."
    state = found["trained"].capitalize() if found["retrained"] else "With the weights of the search"
    return f"{deed} {state}, it has a test accuracy of {q.percent(right)}."


def explain_unsearched(run: Run) -> str:
    """Return a note if a run did not search weights because its target counts zeroed ones; else an empty text."""
    measure = search_of(run)["measure"]
    if run["method"] != "mgas" or measure not in ("params", "macs", "bytes") or search_of(run)["topology"]:
        return ""
    return f"Weights were not searched, since a target in {measure} counts weights that are 0; nonzero does not."


def details(run: Run) -> list[str]:
    """Return the sentences below a run's headline: the origin of the method, and what was done."""
    found, lines = search_of(run), []
    if run["method"] in RECONSTRUCTED:
        lines.append(RECONSTRUCTED[run["method"]])
    if note := explain_unsearched(run):
        lines.append(note)
    if found["epochs"]:
        n, m = len(found["epochs"]), len({row["stage"] for row in found["epochs"]})
        after = "further training" if found["trained"] == "trained further" else "training from scratch"
        anew = f", and {found['retrained']} of {after}" if found["retrained"] and run["finished"] else ""
        lines.append(f"{n} epoch{'s' * (n != 1)} of search in {m} stage{'s' * (m != 1)}{anew}.")
    if found["test"]["accuracy"] is not None:
        lines.append("A part of the training data was held out for validation; the test set was used once, at the end.")
    return lines


def key_numbers(run: Run) -> list[KeyNumber]:
    """Return the figures at the head of the page, as ``label``, ``value`` and a line ``below`` each.

    Args:
        run: A run of the summary.
    """
    found, ops = search_of(run), cells.kept_operations(cells.cells_of(run))
    rows: list[KeyNumber] = []

    def add(label: str, value: Any, unit: Any, below: str) -> None:
        if value is not None:
            rows.append({"label": label, "value": unit(value), "below": below})

    test, left = found["test"], found["found"]
    state = found["trained"] if found["retrained"] else "after the search"
    add("Test accuracy", test["accuracy"], q.percent, f"{state}, on {q.count(test['images'])} examples")
    add("Validation accuracy", left["accuracy"], q.percent, "after the search")
    add("Parameters", left["parameters"], q.count, f"stored; {q.count(left['nonzero'])} nonzero")
    add("MACs", left["macs"], q.count, "of dense kernels, for one example")
    if found["asked"]:
        add("Size", found["reached"], q.count, f"of at most {q.count(found['asked'])} {found['unit']}")
    if found["clock"]["whole"]:
        below = f"ms per pass, measured; the whole space took {q.significant(found['clock']['whole'])}"
        add("Time", found["clock"]["found"], q.significant, below)
    if ops:
        skips = sum(op["kind"] == "skip" for op in ops)
        add("Skips", skips / len(ops), q.percent, f"of operations, {skips} of {len(ops)}")
        bare = sum(op["bare"] for op in ops)
        kinds = "none, skips and pools" if found["topology"] else "skips and pools"
        add("Without weights", bare / len(ops), q.percent, f"of operations, {bare} of {len(ops)}: {kinds}")
    if found["blocks"]:
        add(
            "Blocks",
            len(found["blocks"]) - blocks.count_skipped(found["blocks"]),
            q.count,
            f"of {len(found['blocks'])}",
        )
    return rows


def alarms(run: Run) -> list[str]:
    """Return warnings: collapse, nodes with one operation, missed size or memory, commits that changed outputs.

    Args:
        run: A run of the summary.
    """
    found = search_of(run)
    return [line for made in (_collapse, _thin, _off, _overshot, _moved, _memory) if (line := made(found))]


def _collapse(found: dict[str, Any]) -> str:
    ops, left = cells.kept_operations(found["cells"] or found["topology"]), found["blocks"]
    if left and blocks.count_skipped(left) >= COLLAPSE * len(left):
        return f"The search may have collapsed: {blocks.count_skipped(left)} of {len(left)} blocks do nothing."
    if not ops:
        return ""
    skips, bare = (sum(kind) / len(ops) for kind in ([op["kind"] == "skip" for op in ops], [op["bare"] for op in ops]))
    if skips >= COLLAPSE:
        return f"The search may have collapsed: {q.percent(skips)} of the kept operations are skips."
    if bare >= BARE:
        return f"The search may have collapsed: {q.percent(bare)} of the kept operations have no weights."
    return ""


def _thin(found: dict[str, Any]) -> str:
    thin = [
        f"node {j + 1} of cell {i + 1} ({node['ops'][0]['kind']})"
        for i, cell in enumerate(found["cells"])
        for j, node in enumerate(cell["nodes"])
        if len(node["ops"]) == 1
    ]
    many = f" and {len(thin) - 12} more" if len(thin) > 12 else ""
    return f"Only one operation is left in {', '.join(thin[:12])}{many}." if thin else ""


def _off(found: dict[str, Any]) -> str:
    asked, reached = found["asked"], found["reached"]
    if not asked or reached is None:
        return ""
    sizes = f"the final network has {q.count(reached)} {found['unit']}, the target is {q.count(asked)}"
    if reached > asked * (1.01 if found["measure"] == "ms" else 1):
        return f"The target was missed: {sizes}."
    return f"The target was overshot: {sizes}." if reached < OVERSHOT * asked else ""


def _overshot(found: dict[str, Any]) -> str:
    """Return a warning about stages that ended with less than their allowed size.

    The final commit restores as much as the target allows, so the final size may hide that masks had removed too much.
    """
    ends = list({row["stage"]: row for row in found["epochs"]}.values())
    last_open = not found["levels"] or _off(found)  # the last stage is unfinished, or warned about already
    over = [row for row in (ends[:-1] if last_open else ends) if row["allowed"] and row["size"] is not None]
    over = [row for row in over if row["size"] < OVERSHOT * row["allowed"]][:12]
    sizes = [f"{q.count(row['size'])} of {q.count(row['allowed'])} in stage {row['stage'] + 1}" for row in over]
    back = " What was restored at the end had not been trained." * (bool(over) and over[-1] is ends[-1])
    return f"Thresholds removed too much: at the end, {', '.join(sizes)} was left.{back}" if sizes else ""


def _moved(found: dict[str, Any]) -> str:
    moved = [
        row
        for row in found["commits"]
        if not (row["back"] or row["grown"] or row["stood"]) and (row["logits_moved"] or 0) > MOVED
    ]
    if not moved:
        return ""
    most = max(moved, key=lambda row: row["logits_moved"])
    at = ", ".join(dict.fromkeys(q.count(row["epoch"]) for row in moved[:12]))
    return (
        f"A commit should not change outputs, but {len(moved)} of {len(found['commits'])} did (after epoch {at}): "
        f"logits changed by up to {q.significant(most['logits_moved'])}."
    )


def _memory(found: dict[str, Any]) -> str:
    budget = found["budget"]
    over = [row for row in found["stages"] if budget and (row["peak"] or 0) > budget]
    peaks = [f"stage {row['stage'] + 1} needed {q.octets(row['peak'])}" for row in over]
    return f"The memory budget of {q.octets(budget)} was exceeded: {', '.join(peaks)}." if peaks else ""


def _epochs(lines: list[JsonObject]) -> list[dict[str, Any]]:
    """Return one entry per epoch; of an epoch that was run twice, the last."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        epoch, stage = size(line.get("epoch"), MAX_EPOCHS), size(line.get("stage"), MAX_STAGES - 1)
        if epoch is not None and stage is not None:
            rows[epoch] = {"epoch": epoch, "stage": stage, "accuracy": number(line.get("accuracy"), 0, 1)}
            rows[epoch] |= {name: number(line.get(name), 0) for name in ("size", "allowed")}
            rows[epoch] |= {level: number(line.get(level), 0, 1) for level in LEVELS}
    return [rows[epoch] for epoch in sorted(rows)]


def _front(lines: list[JsonObject]) -> list[dict[str, Any]]:
    """Return one entry per network, smallest last; of a network that was written twice, the last."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        if (epoch := size(line.get("epoch"), MAX_EPOCHS)) is not None:
            rows[epoch] = {"epoch": epoch, "accuracy": number(line.get("accuracy"), 0, 1)}
            rows[epoch] |= {"size": number(line.get("size"), 0), "nonzero": size(line.get("nonzero"))}
    return [rows[epoch] for epoch in sorted(rows)]


def _commit(line: JsonObject) -> dict[str, Any]:
    """Return the data of one change of the network for the page; ``epoch`` is the one before it."""

    def units(name: str) -> int:
        return sum(n for value in mapping(line.get(name)).values() if (n := size(value)))

    def mean(name: str) -> float | None:
        known = [v for value in items(line.get(name), MAX_STAGES) if (v := number(value, 0, 1)) is not None]
        return sum(known) / len(known) if known else None

    return {
        "epoch": size(line.get("epoch"), MAX_EPOCHS),
        "dropped": len(items(line.get("dropped"), MAX_ITEMS)),
        "back": len(items(line.get("back"), MAX_ITEMS)),
        "cut": units("cut"),
        "grown": units("grown") + units("restored"),
        "stood": line.get("stood") is True,
        "before": mean("accuracy_before"),
        "after": mean("accuracy_after"),
        "logits_moved": number(line.get("logits_moved"), 0),
        "parameters": size(line.get("parameters")),
    }


def _stages(planned: JsonObject, measured: list[JsonObject]) -> list[dict[str, Any]]:
    """Return the memory of each stage in bytes, and the last cell that it runs, counted from 1."""
    ends, peaks = (items(planned.get(name), MAX_STAGES) for name in ("ends", "peaks"))
    rows = {
        i: {"stage": i, "last": None if (last := size(end)) is None else last + 1, "planned": size(peak)}
        for i, (end, peak) in enumerate(zip(ends, peaks, strict=False))
    }
    for line in measured:
        if (stage := size(line.get("stage"), MAX_STAGES - 1)) is not None:
            row = rows.setdefault(stage, {"stage": stage, "last": None, "planned": None})
            row |= {name: size(line.get(name)) for name in ("held", "peak", "resident", "predicted")}
    none = dict.fromkeys(("held", "peak", "resident", "predicted"))
    return [none | rows[stage] for stage in sorted(rows)]


def _budget(asked: object) -> int | None:
    try:
        return size(parse_bytes(text(asked, 40)))
    except ValueError:
        return None


def _target_number(target: str) -> float | None:
    """Return the number in a target that names its measure."""
    fit = re.fullmatch(r"(?:params|nonzero|macs|bytes|ms)=(\d{1,15}(?:\.\d{1,9})?|\.\d{1,9})([kMG]?)", target)
    return float(fit[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[fit[2]] if fit else None
