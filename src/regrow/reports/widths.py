"""The axes of a run for its page: widths before and after, scores, and units with massive activations."""

import re
from typing import Any

from regrow.reports.reading import JsonObject, RunRecord, items, mapping, number, objects, size, text
from regrow.reports.records import FrozenAxes

QUANTILES = 21


def widths(folder: RunRecord) -> tuple[list[dict[str, Any]], list[FrozenAxes]]:
    """Return the widths of the axes that can change, per kind of axis in order of depth, and the frozen ones by reason.

    Args:
        folder: A run folder; without its ``axes.json`` the plans alone are read.

    Returns:
        One entry per kind: ``kind``, ``before`` and ``after`` (sums), ``changed`` (how many axes) and ``rows`` (one
        per axis: ``key``, ``block``, ``depth``, ``before``, ``after``); and ``reason``, ``count`` per reason.
    """
    first, last = _planned(folder.plans)
    after = {text(axis.get("key")): size(axis.get("size")) for axis in folder.axes["after"]}
    rows: list[dict[str, Any]] = []
    frozen: dict[str, int] = {}
    for axis in folder.axes["before"] or [{"key": key, "size": n} for key, n in first.items()]:
        key, width = text(axis.get("key"), 300), size(axis.get("size"))
        if not key or not width:
            folder.problems.append(f"axes.json: the axis {key or 'without a key'!r} has no usable size; left out")
        elif axis.get("mark") == "frozen" and key not in last:
            reason = text(axis.get("reason"), 200) or "no reason given"
            frozen[reason] = frozen.get(reason, 0) + 1
        else:
            left = last.get(key, after.get(key))
            rows.append(
                {"key": key, "kind": kind_of(axis, key), "block": block_of(axis, key), "before": width}
                | {"after": width if left is None else left}
            )
    return _by_kind(rows), [{"reason": reason, "count": n} for reason, n in sorted(frozen.items(), key=_most)]


def scores(folder: RunRecord, kinds: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the quantiles of the scores per axis, where each axis was cut, and the units with massive activations.

    Args:
        folder: A run folder.
        kinds: Its :func:`widths`, for the kind and the depth of each axis.

    Returns:
        ``metric``, ``kinds`` (as in :func:`widths`, with ``quantiles``, ``kept_min`` and ``dropped_max`` per row), and
        ``massive`` (``key``, ``block``, ``kind``, ``unit``, ``ratio`` and whether it was ``kept``,
        ``None`` if unknown); ``None`` without any.
    """
    axes = mapping(folder.scores.get("axes"))
    survivors = _survivors(folder.plans)
    found, massive = [], []
    for row, kind in ((row, group["kind"]) for group in kinds for row in group["rows"]):
        entry = mapping(axes.get(row["key"]))
        quantiles = entry.get("quantiles")
        levels = [number(q) for q in items(quantiles, 2 * QUANTILES)]
        bounds = {name: number(entry.get(name)) for name in ("kept_min", "dropped_max")}
        if len(levels) == QUANTILES and None not in levels and levels == sorted(levels, key=lambda q: q or 0.0):
            found.append(row | {"kind": kind, "quantiles": levels} | bounds)
        elif quantiles is not None:
            folder.problems.append(f"scores.json: axis {row['key']!r} has no {QUANTILES} ascending numbers; left out")
        for unit in objects(entry.get("massive")):
            index, ratio = size(unit.get("unit")), number(unit.get("ratio"))
            if index is not None and index < row["before"] and ratio is not None:
                whole = True if row["after"] == row["before"] else None
                kept = index in survivors[row["key"]] if row["key"] in survivors else whole
                massive.append(
                    {name: row[name] for name in ("key", "block")}
                    | {"kind": kind, "unit": index, "ratio": ratio, "kept": kept}
                )
    if not found and not massive:
        return None
    massive.sort(key=lambda unit: -abs(unit["ratio"]))
    return {"metric": text(folder.scores.get("metric")), "kinds": group_rows(found), "massive": massive}


def kind_of(axis: JsonObject, key: str) -> str:
    """Return the name that axes of one kind share in all blocks: the label, or the key with ``*`` for block numbers.

    Args:
        axis: The axis's row of ``axes.json``.
        key: The axis's key.
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text(axis.get("label"), 60) or text(key, 60))


def block_of(axis: JsonObject, key: str) -> str:
    """Return the block of an axis: the recorded one, or else the key up to its first number.

    Args:
        axis: The axis's row of ``axes.json``.
        key: The axis's key.
    """
    found = re.match(r".*?\.\d+(?=\.)", key)
    return text(axis.get("block"), 80) or (found.group() if found else key.rpartition(".")[0] or key)


def group_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group rows by kind, and give each its depth: its block's number, or its place where numbers are not unique.

    Args:
        rows: One per axis, with at least its ``kind`` and ``block``.

    Returns:
        Per kind: ``kind``, whether depths are ``numbered`` by block, and its ``rows`` in the order of depth.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["kind"], []).append(row)
    kinds = []
    for kind, members in groups.items():
        numbers = [re.search(r"\d+", row["block"]) for row in members]
        depths = [int(found.group()[:9]) for found in numbers if found]
        numbered = len(set(depths)) == len(members) and max(depths) < 10 * len(members) + 10
        depths = depths if numbered else list(range(len(members)))
        rows_of = [
            {k: v for k, v in row.items() if k != "kind"} | {"depth": d} for row, d in zip(members, depths, strict=True)
        ]
        kinds.append({"kind": kind, "numbered": numbered, "rows": sorted(rows_of, key=lambda row: row["depth"])})
    return kinds


def _planned(plans: list[JsonObject]) -> tuple[dict[str, int], dict[str, int]]:
    """Return axis key → size before the first plan, and after the last plan, that changes it."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for plan in plans:
        for key, change in mapping(plan.get("changes")).items():
            entry = mapping(change)
            before, keep, back = size(entry.get("size")), entry.get("keep"), entry.get("restore", [])
            if before and isinstance(keep, list) and isinstance(back, list) and 0 < len(keep) <= before:
                first.setdefault(text(key, 300), before)
                last[text(key, 300)] = len(keep) + len(back) + (size(entry.get("grow")) or 0)
    return first, last


def _survivors(plans: list[JsonObject]) -> dict[str, set[int]]:
    """Return axis key → the ids of the units that every plan kept, or that were restored with their weights."""
    left: dict[str, set[int]] = {}
    for plan in plans:
        for key, change in mapping(plan.get("changes")).items():
            entry = mapping(change)
            total, keep, ids = size(entry.get("size"), 10**8), entry.get("keep"), entry.get("ids")
            if not total or not isinstance(keep, list):
                continue
            units = (size(unit) for unit in keep)
            kept = {unit for unit in units if unit is not None and unit < total}
            if isinstance(ids, list) and len(ids) == total:
                kept = {i for i in (size(ids[unit]) for unit in kept) if i is not None}
            name = text(key, 300)
            back = entry.get("restore") if not entry.get("fresh") else None
            known = (size(unit, 10**8) for unit in back) if isinstance(back, list) else ()
            restored = {unit for unit in known if unit is not None}
            left[name] = (left[name] & kept if name in left else kept) | restored
    return left


def _by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = group_rows(rows)
    for kind in kinds:
        kind["before"] = sum(row["before"] for row in kind["rows"])
        kind["after"] = sum(row["after"] for row in kind["rows"])
        kind["changed"] = sum(row["before"] != row["after"] for row in kind["rows"])
    return kinds


def _most(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
