"""The report page of run folders: a single HTML file that needs no network and no script, or Markdown."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from regrow.reports import (
    behaviour,
    blocks,
    cells,
    choices,
    comparison,
    course,
    courses,
    epochs,
    figures,
    fitted,
    quantities,
    words,
)
from regrow.reports import search as quest
from regrow.reports import searches as quests
from regrow.reports.canvas import Drawing
from regrow.reports.reading import ReportError
from regrow.reports.records import Run, Summary, search_of
from regrow.reports.summary import summarise
from regrow.store.atomic import write_text
from regrow.store.errors import explain_os_errors

# A section is one file in templates/sections, which finds its drawings in FIGURES under the names used there.
SECTIONS = {
    "perplexity": "Quality",
    "behaviour": "Rank changes across text domains",
    "widths": "Widths",
    "scores": "Scores",
    "cost": "Cost",
    "reconstruction": "Reconstruction",
    "proof": "Proof",
    "stages": "History of the network",
    "ran": "Command and settings",
    "notes": "Notes and limits",
}
FIGURES = {
    "perplexity": figures.perplexity,
    "spectrum": behaviour.spectrum,
    "modules": behaviour.modules,
    "history": behaviour.history,
    "divergences": choices.divergences,
    "reconstruction": fitted.figure,
    "widths": figures.widths,
    "spectra": figures.spectra,
    "cost": figures.cost,
    "times": figures.times,
}
LEARNED_SECTIONS = {
    "known": "Accuracy matrix",
    "growth": "Growth",
    "shape": "Widths and size",
    "owned": "Owned and free weights",
    "stages": "History of the network",
    "ran": "Command and settings",
    "notes": "Notes and limits",
}
LEARNED_FIGURES = {
    "matrix": course.matrix,
    "course_widths": course.widths,
    "parameters": course.parameters,
    "owned": course.shares,
    "times": figures.times,
}
SEARCHED_SECTIONS = {
    "found": "Final network",
    "epochs": "Course of the search",
    "passed": "Intermediate networks",
    "levels": "Levels",
    "memory": "Memory",
    "stages": "History of the network",
    "ran": "Command and settings",
    "notes": "Notes and limits",
}
SEARCHED_FIGURES = {
    "cells": cells.picture,
    "search_size": epochs.size,
    "search_front": epochs.front,
    "search_levels": epochs.levels,
    "saved": epochs.savings_figure,
    "search_memory": epochs.memory,
    "times": figures.times,
}
COMPARED_SECTIONS = {
    "runs": "Quality",
    "front": "Quality against size",
    "sizes": "Cost",
    "setup": "Commands and settings",
    "remarks": "Notes and limits",
}
COMPARED_FIGURES = {"kinds": comparison.perplexity, "front": comparison.front}
COURSES_SECTIONS = {
    "courses": "Accuracy",
    "room": "Accuracy against size",
    "shapes": "Widths",
    "setup": "Commands and settings",
    "remarks": "Notes and limits",
}
COURSES_FIGURES = {"accuracy": courses.accuracy, "sizes": courses.sizes, "widths": courses.widths}
SEARCHES_SECTIONS = {"searches": "Results", "setup": "Commands and settings", "remarks": "Notes and limits"}


def write_page(folders: list[Path], out: Path, write: Callable[[Path, str], None] | None = None) -> Path:
    """Write the report page of one run, or of a comparison of several.

    Args:
        folders: The run folders; two or more make a comparison.
        out: The HTML file to write; its folder is made if need be. It is replaced only once the page is complete.
        write: Writes the text to the file; ``None``: any file of that name is replaced.

    Returns:
        The file written.

    Raises:
        ReportError: If a folder is not a run folder, or if jinja2 or matplotlib is not installed.
        StoreError: If the file cannot be written.
    """
    page = to_html(summarise(folders))
    out = Path(out)
    with explain_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    (write or write_text)(out, page)
    return out


def to_html(summary: Summary) -> str:
    """Return the report page of a summary, as HTML.

    Args:
        summary: The result of :func:`regrow.reports.summarise`.

    Returns:
        The whole file.

    Raises:
        ReportError: If jinja2 or matplotlib is not installed.
    """
    run, several = summary["runs"][0], len(summary["runs"]) > 1
    learned, searched = courses.are_learning_runs(summary), quests.are_search_runs(summary)
    drawings: dict[str, Drawing | None]
    if several:
        made = COURSES_FIGURES if learned else {} if searched else COMPARED_FIGURES
        sections = COURSES_SECTIONS if learned else SEARCHES_SECTIONS if searched else COMPARED_SECTIONS
        drawings = {name: make(summary) for name, make in made.items()}
    else:
        chosen = LEARNED_FIGURES if learned else SEARCHED_FIGURES if searched else FIGURES
        drawings = {name: make(run) for name, make in chosen.items()}
        sections = LEARNED_SECTIONS if learned else SEARCHED_SECTIONS if searched else SECTIONS
    # Sections that most runs lack are left out instead of shown empty.
    shown_if = {
        "behaviour": run["findings"],
        "reconstruction": run["reconstruction"],
        "owned": drawings.get("owned"),
        "memory": (run["search"] or {}).get("stages"),
        "stages": run["stages"],
    }
    absent = [name for name, there in shown_if.items() if not there]
    shown = [(name, title) for name, title in sections.items() if name not in absent]
    context = _context(summary) | {"figures": drawings, "sections": shown}
    return _environment(html=True).get_template("page.html").render(context)


def to_markdown(summary: Summary) -> str:
    """Return the report of a summary as Markdown, without figures.

    Args:
        summary: The result of :func:`regrow.reports.summarise`.

    Returns:
        The text.

    Raises:
        ReportError: If jinja2 is not installed.
    """
    return _environment(html=False).get_template("report.md").render(_context(summary)).strip() + "\n"


def _context(summary: Summary) -> dict[str, Any]:
    runs = summary["runs"]
    run = runs[0]
    if len(runs) == 1:
        subject: Any = course if run["course"] else quest if run["search"] else words
        found, parts = cells.cells_of(run), search_of(run)["blocks"] if run["search"] else []
        return {
            "title": f"{run['model']}: {run['label']}",
            "brand": [part for part in (run["verb"], run["name"], run["finished"][:10]) if part],
            "headline": subject.headline(run),
            "details": subject.details(run),
            "alarms": _alarms(run),
            "keys": subject.key_numbers(run),
            "massive": words.massive(run),
            "modules": words.modules(run),
            "learning": words.learning(run),
            "proof": words.proof(run),
            "allocation": choices.describe(run),
            "reasons": choices.reasons(run),
            "bounds": _bounds(run),
            "reconstruction": fitted.describe(run),
            "cells": [cell | {"nodes": cells.describe_nodes(cell)} for cell in found],
            "counts": cells.counts(found),
            "blocks": [block | {"sums": blocks.describe_block(block)} for block in parts],
            "run": run,
            "runs": runs,
        }
    shared: dict[str, Any] = {
        "brand": ["comparison"],
        "alarms": [f"{run['label']}: {alarm}" for run in runs for alarm in _alarms(run)],
        "keys": [],
        "differences": _differences(runs),
        "courses": [],
        "searches": [],
        "runs": runs,
    }
    if courses.are_learning_runs(summary):
        return shared | {
            "title": courses.headline(summary),
            "headline": courses.headline(summary),
            "details": courses.details(summary),
            "alarms": courses.alarms(summary) + shared["alarms"],
            "columns": courses.COLUMNS,
            "courses": courses.table(summary),
            "most": courses.MAX_LINES,
        }
    if quests.are_search_runs(summary):
        return shared | {
            "title": quests.headline(summary),
            "headline": quests.headline(summary),
            "details": quests.details(summary),
            "alarms": quests.alarms(summary) + shared["alarms"],
            "searches": quests.table(summary),
        }
    dense = words.same_dense(summary) or {}
    known = [math.log(dense[kind]) for kind in summary["kinds"] if kind in dense]
    whole = bool(known) and len(known) == len(summary["kinds"])
    return shared | {
        "title": words.comparison(summary),
        "headline": words.comparison(summary),
        "details": words.leading(summary, comparison.kept_share),
        "dense": dense if whole else {},
        "dense_mean": math.exp(sum(known) / len(known)) if whole else None,
        "kinds": summary["kinds"],
        "seen": _seen(summary),
        "table": _table(summary),
    }


def _bounds(run: Run) -> dict[str, Any]:
    """Return axis key → its row among the scores, with the highest score dropped and the lowest kept."""
    return {row["key"]: row for kind in (run["scores"] or {"kinds": []})["kinds"] for row in kind["rows"]}


def _alarms(run: Run) -> list[str]:
    """Return warnings that a reader must not overlook."""
    result = quest.alarms(run) if run["search"] else []
    if any(row["holds"] is False for row in run["verify"]):
        result.append(words.proof(run))
    if any(unit["kept"] is False for unit in (run["scores"] or {"massive": []})["massive"]):
        result.append(words.massive(run))
    if not run["finished"]:
        result.append("The run is unfinished or was interrupted: this page shows what it has recorded so far.")
    return result


def _table(summary: Summary) -> list[dict[str, Any]]:
    """Return the comparison table of runs × text domains: one row per run, its mean first."""
    rows = []
    for run in summary["runs"]:
        mean = run["means"]["shared"] or {}
        cells = [{"ppl": mean.get("after"), "ratio": mean.get("ratio"), "error": None}]
        found = {row["source"]: row for row in run["perplexity"]}
        for kind in summary["kinds"]:
            row = found[kind]
            error = 1.96 * row["ratio"] * row["delta_se"] if row["ratio"] and row["delta_se"] is not None else None
            cells.append({"ppl": row["after"]["ppl"], "ratio": row["ratio"], "error": error})
        rows.append({"label": run["label"], "kept": comparison.kept_share(run), "cells": cells})
    for column in zip(*(row["cells"] for row in rows), strict=True):
        leads = comparison.leaders(summary["runs"], [cell["ppl"] for cell in column])
        for cell, lead in zip(column, leads, strict=True):
            cell["best"] = lead
    return rows


def _seen(summary: Summary) -> dict[str, str]:
    """Return text domain → "seen" or "unseen" if that holds for all runs, else ""."""
    result: dict[str, set[Any]] = {}
    for run in summary["runs"]:
        for row in run["perplexity"]:
            result.setdefault(row["source"], set()).add(row["seen"])
    return {kind: {(True,): "seen", (False,): "unseen"}.get(tuple(seen), "") for kind, seen in result.items()}


def _differences(runs: list[Run]) -> dict[str, list[str]]:
    """Return the settings in which the runs differ: name → one value per run, the default where none was given."""
    tables = [{pair["name"]: pair["value"] for pair in run["settings"] + run["method_settings"]} for run in runs]
    taken = [{pair["name"]: pair["value"] for pair in run["defaults"]} for run in runs]
    whole = [own | table for own, table in zip(taken, tables, strict=True)]
    alike = len({run["method"] for run in runs}) == 1
    shared = [name for name in whole[0] if alike and all(name in one for one in whole)]
    names = dict.fromkeys([*(name for table in tables for name in table), *shared])
    columns = {name: [one.get(name, quantities.NONE) for one in whole] for name in names}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


@cache
def _environment(html: bool) -> Any:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise ReportError("a page needs jinja2: pip install 'regrow[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("regrow.reports", "templates"),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plain = ("significant", "count", "octets", "percent", "factor", "duration", "power", "moment")
    environment.filters |= {name: getattr(quantities, name) for name in plain}
    environment.filters |= {
        "quantity": lambda value, unit: environment.filters[unit](value),
        "spread": quantities.spread,
        "tenths": lambda value: f"{value:.1f}",
        "md": _markdown,
        "svg": Markup,  # the drawings escape every word themselves
    }
    return environment


def _markdown(value: Any) -> str:
    """Escape a text so that Markdown shows it literally."""
    named = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return "".join(f"\\{c}" if c in "\\`*_{}[]#!|~" else named.get(c, c) for c in str(value))
