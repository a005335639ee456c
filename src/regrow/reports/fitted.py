"""The least squares after a cut: its layers as a table, a figure and in words, fitted and left-out sources apart."""

import math
from typing import TYPE_CHECKING, Any

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import Canvas, Drawing, draw
from regrow.reports.panels import stack_panels
from regrow.reports.reading import JsonObject, mapping, number, objects, size, text
from regrow.reports.records import FittedLayer, ReconstructionTable, Run
from regrow.reports.widths import block_of, group_rows, kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_KINDS = 6
SEEN, UNSEEN = "fitted sources", "left-out sources"


def reconstruction(lines: list[JsonObject]) -> ReconstructionTable | None:
    """Return the layers that a run fitted after its cut; ``None`` without any.

    Args:
        lines: The rows ``reconstruction`` of the run's measurements.
    """
    if not lines:
        return None
    line = lines[-1]
    layers = [_layer(row) for row in objects(line.get("layers"))]
    left_out = [f"{text(name)} was not fitted: {text(why, 300)}" for name, why in mapping(line.get("left_out")).items()]
    by_source = "choose_on" in line
    rows = [
        {**layer, "kind": kind_of({}, key), "block": block_of({}, key)}
        for layer in layers
        if (key := layer["weight"].removesuffix(".weight")) and layer["before"] is not None
    ]
    return {
        "tokens": size(line.get("tokens")),
        "dense": line.get("target") == "dense",
        "where": UNSEEN if by_source else "held-out text",
        "layers": layers,
        "kinds": group_rows(rows),
        "recovered": {name: _share(layers, name) for name in ("after", "seen")},
        "left_out": left_out[:20],
    }


def figure(run: Run) -> Drawing | None:
    """Draw, per layer, the error of its outputs before and after the fit, on fitted and on left-out sources.

    Args:
        run: A run of the summary.
    """
    fit = run["reconstruction"]
    kinds = (fit["kinds"] if fit else [])[:MAX_KINDS]
    if fit is None or not kinds:
        return None
    both = any(row["seen"] is not None for kind in kinds for row in kind["rows"])
    entries = [("before the fit", palette.INK, "_", 1.0), (f"after, {fit['where']}", palette.ACCENT, "o", 1.0)]
    entries += [(f"after, {SEEN}", palette.MUTED, "o", 1.0)] * both

    def heading(kind: dict[str, Any]) -> str:
        parts = [f"{q.percent(_share(kind['rows'], 'after'))} recovered on {fit['where']}"]
        if both:
            parts.append(f"{q.percent(_share(kind['rows'], 'seen'))} on {SEEN}")
        return ", ".join(parts)

    def panel(axes: "Axes", kind: dict[str, Any]) -> None:
        rows = kind["rows"]
        for name, colour in (("seen", palette.MUTED), ("after", palette.ACCENT)):
            known = [row for row in rows if row[name] is not None]
            low, high = ([row[side] for row in known] for side in (name, "before"))
            axes.vlines([row["depth"] for row in known], low, high, color=palette.FAINT, linewidth=1.6)
            place = [row["depth"] for row in known]
            axes.plot(place, low, "o", color=colour, markersize=7, markeredgecolor=palette.PAPER, clip_on=False)
        ends = ([row["depth"] + side for row in rows] for side in (-0.37, 0.37))
        axes.hlines([row["before"] for row in rows], *ends, color=palette.INK, linewidth=1.8)
        top = max(row[name] or 0 for row in rows for name in ("before", "after", "seen"))
        axes.set_ylim(0, 1.06 * top or 1)
        axes.yaxis.set_major_formatter(lambda value, _: q.tick(value))

    def paint(canvas: Canvas) -> None:
        stack_panels(canvas, kinds, 128, panel, heading, entries)

    description = "; ".join(f"{kind['kind']}: {heading(kind)}" for kind in kinds)
    return draw("fig-reconstruction", "Error of the fitted layers' outputs, before and after", description, paint)


def describe(run: Run) -> list[str]:
    """Return sentences on what the least squares recovered, per layer and in perplexity; empty if there was none.

    Args:
        run: A run of the summary.
    """
    fit = run["reconstruction"]
    if fit is None:
        return []
    tokens = "" if fit["tokens"] is None else f" on {fit['tokens']:,} tokens"
    layers = "1 layer" if len(fit["layers"]) == 1 else f"{len(fit['layers'])} layers"
    own = "what they would return uncut, with the network before them as it is after the cut"
    goal = "what they return in the network before the cut" if fit["dense"] else own
    lines = [f"After the cut, {layers} that read removed units were fitted to {goal}{tokens}."]
    every: list[dict[str, Any]] = [dict(row) for row in fit["layers"]]
    for name, where in (("after", fit["where"]), ("seen", SEEN)):
        known = [row for row in every if row["before"] is not None and row[name] is not None]
        if known:
            means = [q.significant(math.fsum(row[side] for row in known) / len(known)) for side in ("before", name)]
            share = f" ({q.percent(fit['recovered'][name])} less)" if fit["recovered"][name] is not None else ""
            lines.append(f"Their mean relative error on {where} went from {means[0]} to {means[1]}{share}.")
    parts = [
        f"{q.percent(mean['recovered'])} on text domains {words}"
        for which, words in (("seen", "seen in calibration"), ("unseen", "not seen in calibration"))
        if (mean := run["means"][which]) and mean["recovered"] is not None
    ]
    if parts and run["outcome"] == "Reconstructed":
        lines.append(f"Of the log-perplexity that the cut lost, this recovered {' and '.join(parts)}.")
    return lines


def _layer(row: JsonObject) -> FittedLayer:
    before, after, seen = (number(row.get(name), 0) for name in ("before", "after", "seen"))
    return {
        "weight": text(row.get("weight")),
        "before": before,
        "after": after,
        "seen": seen,
        "recovered": 1 - after / before if before and after is not None else None,
        "recovered_seen": 1 - seen / before if before and seen is not None else None,
        "ridge": number(row.get("ridge"), 0),
        "shrinkage": number(row.get("shrinkage"), 0, 1),
    }


def _share(rows: Any, name: str) -> float | None:
    """Return by which fraction the sum of the layers' errors fell; ``None`` if that was not measured."""
    known = [(row["before"], row[name]) for row in rows if row["before"] is not None and row[name] is not None]
    before = math.fsum(pair[0] for pair in known)
    return 1 - math.fsum(pair[1] for pair in known) / before if before else None
