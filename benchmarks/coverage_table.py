"""The tables of coverage.py in Markdown."""

from collections.abc import Iterable, Iterator, Mapping
from statistics import median

from shared import Row, table

from nets import KINDS

GIVEN = ("it is a kernel's extent", "it is an output", "it is a dimension of the model's input", "it is a vocabulary")
"""Reasons that lie in the task and not in what can be cut."""
MARKS = ("neutral", "competed", "folded", "restated")


def page(rows: Mapping[str, Row]) -> str:
    """Totals, every network, and every miss with its reason."""
    parts = ["\n".join(table(TOTALS, totals([*rows.values()]))), *misses(rows.values())]
    for kind in KINDS:
        if own := [row for row in rows.values() if row.get("kind", row["key"].split("/")[0]) == kind]:
            parts.append("\n".join((f"### {kind}", "", *table(EACH, map(each, own)))))
    return "\n\n".join(parts)


TOTALS = (
    *("networks", "all", "traced", "least left, neutral", "every mark", "plans compared", "wrong", "refused"),
    *("widened", "wrong", "saved and loaded equal", "seconds to trace, median (most)"),
)


def totals(rows: list[Row]) -> Iterator[list[object]]:
    """One line per kind and one for all."""
    for kind in (*KINDS, ""):
        own = [row for row in rows if kind in ("", row["key"].split("/")[0])]
        done = [row for row in own if row.get("traced")]
        if not own:
            continue
        plans = [row[what] for row in done for what in ("smallest", "random") if row.get(what)]
        seconds = [row["trace_s"] for row in done]
        yield [
            kind or "**all**",
            len(own),
            len(done),
            *(_middle([row["left"][mark] for row in done]) for mark in ("neutral", "restated")),
            *(sum(plan.get(count, 0) for plan in plans) for count in ("plans", "wrong", "refused")),
            sum(bool(row.get("widened", {}).get("axes")) for row in done),
            sum(row.get("widened", {}).get("wrong", 0) for row in done),
            sum(row.get("saved") == "equal" for row in done),
            f"{median(seconds):.1f} ({max(seconds):.1f})" if seconds else "",
        ]


def _middle(shares: list[float]) -> str:
    return f"{median(shares):.1%} (worst {max(shares):.1%})" if shares else ""


EACH = (
    *("network", "traced", "s", "free / axes", "left: neutral", "+ competed", "+ folded", "+ restated"),
    *("plans", "wrong", "worst", "widened", "saved", "held most by, beside inputs, outputs, kernels"),
)


def each(row: Row) -> list[object]:
    """The line of a network."""
    name = row.get("name", row["key"].split("/")[-1])
    if not row.get("traced"):
        return [name, "no", row.get("trace_s", ""), *[""] * (len(EACH) - 4), _short(row.get("error", ""))]
    plans = [row.get(what, {}) for what in ("smallest", "random")]
    wide, held = row.get("widened", {}), next((x for x in row["frozen"] if not x["reason"].startswith(GIVEN)), {})
    count, wrong, refused = (sum(plan.get(key, 0) for plan in plans) for key in ("plans", "wrong", "refused"))
    return [
        *(name, row["traced"], row["trace_s"], f"{row['free']} / {row['axes']}"),
        *(f"{row['left'][mark]:.1%}" for mark in MARKS),
        f"{count}" + (f" ({refused} refused)" if refused else ""),
        *(wrong, f"{max((plan.get('worst', 0.0) for plan in plans), default=0.0):.0e}"),
        f"{wide['axes']} axes, {wide['worst']:.0e}" if wide.get("axes") else "no axis",
        *(_short(row.get("saved", "")), f"{held['share']:.0%}: {_short(held['reason'])}" if held else ""),
    ]


def misses(rows: Iterable[Row]) -> list[str]:
    """What was not traced, was wrong, refused, or could not be saved, with the reason."""
    lines = []
    for row in rows:
        if row.get("error"):
            lines.append(f"* {row['key']}: {_short(row['error'], 200)}")
        for what in ("smallest", "random"):
            found = row.get(what, {})
            for distance, own in found.get("sensitive", ()):
                lines.append(
                    f"* {row['key']}: {what}: masked and shrunk differ by {distance:.1e}; the cut network's own answer "
                    f"moves by {own:.1e} if its input moves by the last bit, so this decides nothing"
                )
            if found.get("wrong"):
                lines.append(f"* {row['key']}: **wrong**, {what}: {found['worst']:.1e}")
            lines += [f"* {row['key']}: {what} plan refused: {_short(why, 200)}" for why in found.get("refusals", ())]
        if row.get("widened", {}).get("wrong"):
            lines.append(f"* {row['key']}: **wrong** when widened: {row['widened']}")
        if row.get("saved", "equal") != "equal":
            lines.append(f"* {row['key']}: not saved: {_short(row['saved'], 200)}")
    return ["### Misses\n\n" + "\n".join(lines)] if lines else []


def _short(text: str, most: int = 90) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= most else text[: most - 1] + "…"
