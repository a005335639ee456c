"""The findings of GPrune (``findings.json``): rank changes between text domains, and the ratios of modules."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from regrow.reports.choices import levels
from regrow.reports.reading import JsonObject, RunRecord, items, mapping, number, objects, size, text
from regrow.reports.widths import block_of, group_rows, kind_of

MAX_ROWS = 1000
MAX_CELLS = 24
GRID = ("robust weak", "robust strong", "sensitive weak", "sensitive strong")

Row = dict[str, Any]

_SHARES = ("significant", "exceeds", "exceeds_null")
_CORRELATIONS = ("spearman", "spearman_shards", "spearman_within")
_CUT = ("start", "chosen", "given")
_MEASURED = ("sensitivity", "activity", "switched", *_CUT)


def findings(folder: RunRecord) -> Row | None:
    """Return the tables of a method's findings that the page knows, checked; others are left out.

    Args:
        folder: A run folder.

    Returns:
        ``method`` and ``sources``; ``allocation`` (the name of the one that was taken; empty if ratios were learned);
        ``spectrum`` (ranking spaces of one axis, as
        :func:`regrow.reports.widths.group_rows` has them) and ``tested`` (their means, one row per kind, pooled ones
        too); ``modules`` (axes with their ``cells``, likewise) and ``cells`` (the means, per kind and cell);
        ``starts``, ``history``, ``best`` (losses on held-out text); ``levels`` and ``exchanges`` of a measured
        allocation; ``robust`` (their share among the units cut) and ``notes``. ``None`` without the tables on
        behaviour.
    """
    data = folder.findings
    spaces, modules = _table(folder, "spectrum", _space), _table(folder, "modules", _module)
    history = sorted({row["step"]: row for row in _table(folder, "history", _judged)}.values(), key=lambda r: r["step"])
    if not spaces and not modules:
        return None
    chosen = [row for row in history if row["step"] == size(data.get("best_step"))]
    robust = mapping(data.get("robust_among_cut"))
    return {
        "method": text(data.get("method"), 40),
        "allocation": text(data.get("allocation"), 20),
        "sources": [name for source in items(data.get("sources")) if (name := text(source, 60))],
        "spectrum": group_rows([space for space in spaces if not space["pooled"]]),
        "tested": _tested(spaces),
        "modules": group_rows(_axes(modules)),
        "cells": _cells(modules),
        "starts": [
            {"name": text(name, 20), "held_out": loss}
            for name, value in list(mapping(data.get("starts")).items())[:10]
            if (loss := _loss(value)) is not None
        ],
        "history": history,
        "levels": group_rows(_levels(folder)),
        "exchanges": [row for row in map(_exchange, objects(data.get("exchanges"))[:MAX_ROWS]) if row],
        "best": next(iter(chosen or sorted(history, key=lambda row: row["held_out"])), None),
        "robust": {"base": _share(robust.get("base")), "cut": _share(robust.get("gprune"))},
        "notes": [line for note in items(data.get("notes")) if (line := text(note, 1000))],
    }


def _table(folder: RunRecord, name: str, read: Callable[[JsonObject], Row | None]) -> list[Row]:
    """Return the valid rows of a table; rows that are left out are recorded as a problem."""
    given = folder.findings.get(name, [])
    rows = [row for item in objects(given)[:MAX_ROWS] if (row := read(item))]
    if isinstance(given, list) and len(rows) < len(given):
        folder.problems.append(f"findings.json: {len(given) - len(rows):,} of {len(given):,} rows of {name} left out")
    return rows


def _space(item: JsonObject) -> Row | None:
    """Return a row of the spectrum; spaces of several axes are called "30 × label"."""
    key, units = text(item.get("space"), 300), size(item.get("units"), 10**9)
    shares = {name: _share(item.get(name)) for name in _SHARES}
    if not key or not units or shares["significant"] is None:
        return None
    pooled = re.match(r"(\d{1,6}) × ", key)
    place = {"key": key, "kind": kind_of(item, key), "block": block_of({}, key), "pooled": bool(pooled)}
    correlations = {name: number(item.get(name), -1.001, 1.001) for name in _CORRELATIONS}
    return place | {"axes": int(pooled[1]) if pooled else 1, "units": units} | shares | correlations


def _module(item: JsonObject) -> Row | None:
    """Return a row of modules, named "axis cell", "axis and 29 more cell", or "axis" if every axis is one module."""
    name, space, units = text(item.get("name"), 400), text(item.get("space"), 300), size(item.get("units"), 10**9)
    shares = {part: _share(item.get(part)) for part in _CUT}
    if shares["chosen"] is None:
        shares["chosen"] = _share(item.get("learned"))
    if not name or not units or shares["start"] is None:
        return None
    rest = re.fullmatch(r"( and \d+ more)?(?: (.*))?", name.removeprefix(space)) if name.startswith(space) else None
    key = space if rest else name
    trust = _share(item.get("trust"))
    return {
        "key": key,
        "kind": kind_of(item, key),
        "block": block_of({}, key),
        "pooled": bool(rest and rest[1]),
        "cell": text(rest[2], 40) if rest else "",
        "units": units,
        "sensitivity": number(item.get("sensitivity"), 0),
        "activity": _share(item.get("activity")),
        "switched": None if trust is None else 1 - min(trust, 1),
    } | shares


def _levels(folder: RunRecord) -> list[Row]:
    """Return what was measured of each axis alone, with the kind that it has in the other tables."""
    given = objects(folder.findings.get("levels"))[:MAX_ROWS]
    axes = {text(axis.get("key"), 300): axis for axis in folder.axes["before"]}
    return [row | {"kind": kind_of(axes.get(row["key"], {}), row["key"])} for row in levels(given)]


def _exchange(item: JsonObject) -> Row | None:
    losses = {name: _loss(item.get(name)) for name in ("before", "after")}
    if None in losses.values():
        return None
    row = {name: size(item.get(name)) for name in ("round", "windows")} | losses
    return row | {"fraction": _share(item.get("fraction")), "accepted": item.get("accepted") is True}


def _judged(item: JsonObject) -> Row | None:
    step, loss = size(item.get("step"), 10**9), _loss(item.get("held_out"))
    return None if step is None or loss is None else {"step": step, "held_out": loss}


def _tested(spaces: list[Row]) -> list[Row]:
    return [
        {"kind": kind, "pooled": pooled, "axes": sum(row["axes"] for row in rows)}
        | _means(rows, _SHARES + _CORRELATIONS)
        for (kind, pooled), rows in _by_kind(spaces)
    ]


def _axes(modules: list[Row]) -> list[Row]:
    """Return one row per axis that has modules of its own."""
    axes: dict[tuple[str, str], Row] = {}
    for module in modules:
        if not module["pooled"]:
            place = {name: module[name] for name in ("key", "kind", "block")}
            axis = axes.setdefault((module["kind"], module["key"]), place | {"cells": []})
            axis["cells"].append({name: module[name] for name in ("cell", "units", "switched", *_CUT)})
    return list(axes.values())


def _cells(modules: list[Row]) -> list[Row]:
    """Return, per kind of axis, the means over the modules of the same cell in all layers."""
    kinds = []
    for (kind, pooled), members in _by_kind(modules):
        words = sorted({row["cell"] for row in members}, key=_order)[:MAX_CELLS]
        rows = [{"cell": word} | _means([row for row in members if row["cell"] == word], _MEASURED) for word in words]
        kinds.append({"kind": kind, "pooled": pooled, "rows": rows, "all": _means(members, _MEASURED)})
    return kinds


def _by_kind(rows: list[Row]) -> list[tuple[tuple[str, bool], list[Row]]]:
    result: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        result.setdefault((row["kind"], row["pooled"]), []).append(row)
    return list(result.items())


def _means(rows: list[Row], names: Sequence[str]) -> Row:
    """Return the number of units, and the mean of each value over the units for which it is known."""
    result: Row = {"units": sum(row["units"] for row in rows)}
    for name in names:
        known = [(row[name], row["units"]) for row in rows if row[name] is not None]
        result[name] = sum(value * n for value, n in known) / sum(n for _, n in known) if known else None
    return result


def _order(cell: str) -> tuple[int, int, str]:
    """Return a sort key: cells of the grid in reading order, other cells by their number."""
    digits = re.search(r"\d+", cell)
    return GRID.index(cell) if cell in GRID else len(GRID), int(digits.group()[:9]) if digits else 0, cell


def _share(value: object) -> float | None:
    return number(value, 0, 1.001)


def _loss(value: object) -> float | None:
    return number(value, 0, 1e9)
