"""Figures of GPrune's findings: how units' ranks differ between text domains, and what learning made of it."""

from typing import TYPE_CHECKING, Any

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, columns, depth_axis, draw, legend, steps
from regrow.reports.reading import text
from regrow.reports.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
MAX_KINDS = 3
MAX_PANELS = 10
CHANCE = 0.05
ENDS = ("start", "chosen")

_CORRELATIONS = ("spearman", "spearman_shards", "spearman_within")


def spectrum(run: Run) -> Drawing | None:
    """Draw, per layer, how many units change rank between text domains beyond noise, and how similar the orders are.

    Args:
        run: A run of the summary.
    """
    found: Row = run["findings"] or {"spectrum": []}
    kinds = found["spectrum"][:MAX_KINDS]
    if not kinds:
        return None
    means = {row["kind"]: row for row in found["tested"] if not row["pooled"]}
    description = "; ".join(
        f"{kind['kind']}: {q.percent(means[kind['kind']]['significant'])} of the units change rank beyond noise, "
        f"mean rank correlation {q.significant(means[kind['kind']]['spearman'])}"
        for kind in kinds
    )
    moved = [
        ("beyond noise", palette.ACCENT, "s", 1.0),
        ("F above 1", palette.FAINT, "s", 1.0),
        ("by chance", palette.INK, "_", 1.0),
    ]
    alike = [
        ("between domains", palette.INK, "_", 1.0),
        ("between parts", palette.ACCENT, "o", 1.0),
        ("within a domain", palette.MUTED, "o", 1.0),
    ]

    def paint(canvas: Canvas) -> None:
        head, upper, lower, gap = (52 if canvas.narrow else 32), 124, 96, 72
        step = head + 24 + upper + gap + lower + 54
        canvas.start(step * len(kinds))
        for i, kind in enumerate(kinds):
            top, mean = i * step, means[kind["kind"]]
            words = (
                f"{q.percent(mean['significant'])} change rank beyond noise, mean ρ {q.significant(mean['spearman'])}"
            )
            canvas.text(0, top + 12, text(kind["kind"], 44 if canvas.narrow else 50))
            canvas.note(words, top + 34 if canvas.narrow else top + 12, SMALL)
            legend(canvas, top + head + 8, moved)
            axes = canvas.panel(top + head + 26, upper, left=46, right=2)
            _moved(axes, kind["rows"])
            _depth(axes, kind, canvas, label=False)
            legend(canvas, top + head + 26 + upper + gap - 22, alike)
            axes = canvas.panel(top + head + 24 + upper + gap, lower, left=46, right=2)
            _alike(axes, kind["rows"])
            _depth(axes, kind, canvas)

    return draw("fig-spectrum", "Rank changes between text domains, per layer", description, paint)


def modules(run: Run) -> Drawing | None:
    """Draw the fraction of its units that each module loses, at the start and as learned or chosen, over depth.

    Args:
        run: A run of the summary.
    """
    found = run["findings"] or {"cells": [], "modules": []}
    kinds = {kind["kind"]: kind for kind in found["modules"]}
    groups = [group for group in found["cells"] if not group["pooled"]]
    panels = [(kinds[group["kind"]], row) for group in groups for row in group["rows"]][:MAX_PANELS]
    if not panels:
        return None
    description = "; ".join(f"{_title(kind, mean, len(groups) > 1)}: {_change(mean)}" for kind, mean in panels)
    shares = [cell[name] or 0 for kind, _ in panels for row in kind["rows"] for cell in row["cells"] for name in ENDS]
    most = next((share for share in (0.1, 0.2, 0.4, 0.6, 0.8) if share >= max(shares)), 1.0)
    word = "chosen" if found["allocation"] else "learned"
    entries = [
        ("at the start", palette.MUTED, "o", 1.0),
        (word, palette.ACCENT, "o", 1.0),
        (f"{word}, switched", palette.INK, "D", 1.0),
    ]

    def paint(canvas: Canvas) -> None:
        across = 1 if canvas.narrow or len(panels) == 1 else 2
        gap, head, height, foot = 40, 38, 96, 36
        width = (canvas.width - gap * (across - 1)) / across
        canvas.start(46 + -(-len(panels) // across) * (head + height + foot))
        legend(canvas, 12, entries)
        for i, (kind, mean) in enumerate(panels):
            x, top = (i % across) * (width + gap), 30 + (i // across) * (head + height + foot)
            canvas.text(x, top + 18, text(_title(kind, mean, len(groups) > 1), 26))
            canvas.text(x + width, top + 18, _change(mean), color=palette.MUTED, fontsize=SMALL, ha="right")
            axes = canvas.panel(top + head, height, left=x + 46, width=width - 48)
            _given_up(axes, [(row["depth"], cell) for row in kind["rows"] for cell in row["cells"]], mean["cell"])
            _shares(axes, most)
            depth_axis(axes, [row["depth"] for row in kind["rows"]], kind["numbered"], 12 if width > 500 else 7)
            if i + across < len(panels):
                axes.set_xlabel("")

    return draw("fig-modules", "Fraction of its units that each module loses, per layer", description, paint)


def history(run: Run) -> Drawing | None:
    """Draw the loss on held-out text over the steps of learning, with the chosen allocation marked.

    Args:
        run: A run of the summary.
    """
    found: Row = run["findings"] or {"history": []}
    rows = found["history"]
    if len(rows) < 2:
        return None
    best = found["best"]
    description = "; ".join(f"step {row['step']}: {q.significant(row['held_out'])}" for row in rows[:40])
    description += f"; kept: step {best['step']}"

    def paint(canvas: Canvas) -> None:
        from matplotlib.ticker import MaxNLocator

        canvas.start(206)
        canvas.text(0, 10, "held-out loss, lower is better", color=palette.MUTED, fontsize=SMALL)
        axes = canvas.panel(26, 132, left=58, right=16)
        x, y = ([row[name] for row in rows] for name in ("step", "held_out"))
        axes.plot(x, y, color=palette.MUTED, linewidth=1.4)
        axes.plot(x, y, "o", markersize=6, color=palette.MUTED, markeredgecolor=palette.PAPER, clip_on=False)
        axes.plot(
            [best["step"]],
            [best["held_out"]],
            "o",
            markersize=10.5,
            color=palette.ACCENT,
            markeredgecolor=palette.PAPER,
        )
        room = (max(y) - min(y)) * 0.12 or max(y) * 0.1 or 1.0
        axes.set_ylim(min(y) - 2.2 * room, max(y) + room)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda value, _: q.tick(value))
        axes.set_xticks(steps(x[0], x[-1], 6))
        axes.grid(axis="y", color=palette.LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.set_xlabel("step", color=palette.MUTED, fontsize=SMALL, labelpad=4)
        place = (best["step"] - x[0]) / (x[-1] - x[0])
        axes.annotate(
            f"{q.significant(best['held_out'])}, kept",
            (best["step"], best["held_out"]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="left" if place < 0.2 else "right" if place > 0.8 else "center",
            va="center",
            color=palette.INK,
            annotation_clip=False,
        )

    return draw("fig-history", "Loss on held-out text over the steps of learning", description, paint)


def _moved(axes: "Axes", rows: list[Row]) -> None:
    for name, colour in (("exceeds", palette.FAINT), ("significant", palette.ACCENT)):
        columns(axes, [row["depth"] for row in rows], [0] * len(rows), [row[name] or 0 for row in rows], color=colour)
    axes.axhline(CHANCE, color=palette.INK, linewidth=1.2, linestyle=(0, (3, 3)))
    _levels(axes, rows, "exceeds_null")
    _shares(axes, 1)


def _alike(axes: "Axes", rows: list[Row]) -> None:
    both = [row for row in rows if row["spearman_shards"] is not None and row["spearman_within"] is not None]
    low, high = ([row[name] for row in both] for name in ("spearman_shards", "spearman_within"))
    axes.vlines([row["depth"] for row in both], low, high, color=palette.FAINT, linewidth=1.6)
    for name, colour in (("spearman_within", palette.MUTED), ("spearman_shards", palette.ACCENT)):
        known = [row for row in rows if row[name] is not None]
        _marks(axes, [row["depth"] for row in known], [row[name] for row in known], "o", colour, 7)
    _levels(axes, rows, "spearman")
    below = min((row[name] for row in rows for name in _CORRELATIONS if row[name] is not None), default=0) < 0
    axes.set_ylim(-1 if below else 0, 1)
    axes.set_yticks([-1, 0, 1] if below else [0, 0.5, 1])
    axes.yaxis.set_major_formatter(lambda value, _: q.tick(value).replace("-", "−"))


def _given_up(axes: "Axes", cells: list[tuple[int, Row]], word: str) -> None:
    """Draw the marks of the modules in the cell called ``word``."""
    mine = [(depth, cell) for depth, cell in cells if cell["cell"] == word]
    moved = [(depth, cell) for depth, cell in mine if cell["chosen"] is not None]
    low, high = ([cell[name] for _, cell in moved] for name in ENDS)
    axes.vlines([depth for depth, _ in moved], low, high, color=palette.FAINT, linewidth=1.8)
    switched = [(depth, cell) for depth, cell in moved if (cell["switched"] or 0) >= 0.5]
    trusted = [(depth, cell) for depth, cell in moved if (cell["switched"] or 0) < 0.5]
    for some, name, colour, marker, size in (
        (mine, "start", palette.MUTED, "o", 5.5),
        (trusted, "chosen", palette.ACCENT, "o", 7.5),
        (switched, "chosen", palette.INK, "D", 6.5),
    ):
        _marks(axes, [depth for depth, _ in some], [cell[name] for _, cell in some], marker, colour, size)


def _marks(axes: "Axes", xs: list[int], ys: list[float], marker: str, colour: str, size: float) -> None:
    axes.plot(xs, ys, marker, color=colour, markersize=size, markeredgecolor=palette.PAPER, clip_on=False)


def _levels(axes: "Axes", rows: list[Row], name: str) -> None:
    """Draw a short horizontal line at the value of each row."""
    known = [(row["depth"], row[name]) for row in rows if row[name] is not None]
    ends = ([depth + side for depth, _ in known] for side in (-0.37, 0.37))
    axes.hlines([value for _, value in known], *ends, color=palette.INK, linewidth=1.8)


def _shares(axes: "Axes", top: float) -> None:
    axes.set_ylim(0, top)
    axes.set_yticks([0, top / 2, top], labels=[f"{100 * share:.0f}{q.SPACE}%" for share in (0, top / 2, top)])


def _depth(axes: "Axes", kind: Row, canvas: Canvas, *, label: bool = True) -> None:
    depth_axis(axes, [row["depth"] for row in kind["rows"]], kind["numbered"], 7 if canvas.narrow else 12)
    if not label:
        axes.set_xlabel("")


def _title(kind: Row, mean: Row, several: bool) -> str:
    return ", ".join(part for part in (mean["cell"], kind["kind"] if several or not mean["cell"] else "") if part)


def _change(mean: Row) -> str:
    ends = [q.percent(mean[name]) for name in ENDS if mean[name] is not None]
    return " → ".join(ends)
