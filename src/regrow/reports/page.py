"""The report page of run folders: a single HTML file that needs no network and no script, or Markdown."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from regrow.reports import cells, comparison, figures, findings, quantities, search, words
from regrow.reports.drawing import Drawing
from regrow.reports.reading import ReportError
from regrow.reports.runs import KeyNumber, Run, Summary
from regrow.reports.summary import summarise
from regrow.store.atomic import PAGE, write_text
from regrow.store.errors import StoreError

_LAST = {"stages": "History of the network", "ran": "Command and settings", "notes": "Notes and limits"}
# A section is one file in templates/sections, which finds its drawings under the names in FIGURES.
SECTIONS = {
    "prune": {
        "perplexity": "Quality",
        "behaviour": "Rank changes across text domains",
        "widths": "Widths",
        "cost": "Cost",
        "reconstruction": "Reconstruction",
        "proof": "Proof",
        **_LAST,
    },
    "learn": {
        "known": "Accuracy matrix",
        "growth": "Growth",
        "shape": "Widths and size",
        "owned": "Owned and free weights",
        **_LAST,
    },
    "search": {
        "found": "Final network",
        "epochs": "Course of the search",
        "passed": "Intermediate networks",
        "levels": "Levels",
        "memory": "Memory",
        **_LAST,
    },
}
COMPARED_SECTIONS = {
    "results": "Results",
    "front": "Quality against size",
    "sizes": "Cost",
    "setup": "Commands and settings",
    "remarks": "Notes and limits",
}
FIGURES: dict[str, dict[str, Callable[[Run], Drawing | None]]] = {
    "prune": {
        "perplexity": figures.perplexity,
        "spectrum": lambda run: figures.spectrum(run.findings),
        "widths": figures.widths,
    },
    "learn": {"size": figures.learned_size},
    "search": {"size": figures.search_size, "front": figures.search_front},
}


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write the report page of one run, or of a comparison of several.

    Args:
        folders: The run folders; two or more make a comparison.
        out: The HTML file to write; it is replaced only once the page is complete.

    Returns:
        The file written.

    Raises:
        ReportError: If a folder is not a run folder, or if jinja2 or matplotlib is not installed.
        StoreError: If the file cannot be written.
    """
    page = to_html(summarise(folders))
    out = Path(out)
    write_text(out, page)
    return out


def write_run_page(folder: Path) -> None:
    """Write the page of a run into its folder, as it finishes; if the page cannot be made, log why and go on."""
    try:
        write_page([folder], folder / PAGE)
    except StoreError:  # such as a full disk: the run fails, too, and can be resumed
        raise
    except Exception as error:
        logging.getLogger("regrow").warning(f"no page was written: {error}; `regrow report RUN` writes it later")


def to_html(summary: Summary) -> str:
    """Return the report page of a summary, as HTML.

    Args:
        summary: The result of :func:`regrow.reports.summarise`.

    Raises:
        ReportError: If jinja2 or matplotlib is not installed.
    """
    shown_if: dict[str, object]
    if len(summary.runs) > 1:
        context, sections = _compared(summary), COMPARED_SECTIONS
        front = comparison.compared_quality(summary, context["table"])
        drawings = {"front": front, "accuracy": comparison.compared_accuracy(summary)}
        shown_if = {"front": front, "sizes": not all(run.course or run.search for run in summary.runs)}
    else:
        (run,) = summary.runs
        kind = "learn" if run.course else "search" if run.search else "prune"
        context, sections = _single(run), SECTIONS[kind]
        drawings = {name: draw(run) for name, draw in FIGURES[kind].items()}
        shown_if = {
            "behaviour": run.findings,
            "reconstruction": run.reconstruction,
            "owned": run.course and any(row.owned or row.free for row in run.course.records),
            "passed": run.search and run.search.front,
            "memory": run.search and run.search.stages,
            "stages": run.stages,
        }
    shown = [(name, title) for name, title in sections.items() if shown_if.get(name, True)]
    return _render("page.html", context | {"figures": drawings, "sections": shown})


def to_markdown(summary: Summary) -> str:
    """Return the report of a summary as Markdown, without figures.

    Args:
        summary: The result of :func:`regrow.reports.summarise`.

    Raises:
        ReportError: If jinja2 is not installed.
    """
    if len(summary.runs) > 1:
        return _render("comparison.md", _compared(summary)).strip() + "\n"
    return _render("report.md", _single(summary.runs[0])).strip() + "\n"


@dataclass(frozen=True)
class HeadText:
    """What the head of a page says."""

    headline: str
    details: list[str]
    keys: list[KeyNumber]
    alarms: list[str]  # what a reader must not overlook


def describe(run: Run) -> HeadText:
    """Return what the head of the page of a run says."""
    alarms = search.alarms(run)
    if any(row.holds is False for row in run.verify):
        alarms.append(words.proof(run))
    if not run.file.finished:
        alarms.append("The run is unfinished or was interrupted: this page shows what it has recorded so far.")
    if course := run.course:
        details, keys = words.learned_details(run, course), words.learned_numbers(course)
        return HeadText(words.learned_headline(run, course), details, keys, alarms)
    if result := run.search:
        details, keys = search.details(run, result), search.key_numbers(result)
        return HeadText(search.headline(run, result), details, keys, alarms)
    return HeadText(words.headline(run), words.details(run), words.key_numbers(run), alarms)


def _single(run: Run) -> dict[str, Any]:
    brand = [part for part in (run.file.verb, run.name, (run.file.finished or "")[:10]) if part]
    return {"title": f"{run.model}: {run.label}", "brand": brand, "head": describe(run), "run": run, "runs": [run]}


def _compared(summary: Summary) -> dict[str, Any]:
    table, runs = comparison.compare(summary), summary.runs
    alarms = [*table.alarms, *(f"{run.label}: {alarm}" for run in runs for alarm in describe(run).alarms)]
    return {
        "title": table.headline,
        "brand": ["comparison"],
        "head": HeadText(table.headline, table.details, [], alarms),
        "table": table,
        "differences": comparison.differences(runs),
        "runs": runs,
    }


def _render(template: str, context: Mapping[str, Any]) -> str:
    return str(_environment().get_template(template).render(context))


@cache
def _environment() -> Any:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise ReportError("a page needs jinja2: pip install 'regrow[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("regrow.reports", "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plain = ("significant", "count", "octets", "percent", "factor", "duration", "power", "moment", "spread")
    environment.filters |= {name: getattr(quantities, name) for name in plain}
    environment.filters |= {
        "of": lambda record, name: getattr(record, name, None),
        "md": _markdown,
        "svg": Markup,  # the drawings escape every word themselves
    }
    environment.globals |= {module.__name__.rpartition(".")[2]: module for module in (cells, findings, search, words)}
    return environment


def _markdown(value: Any) -> str:
    """Escape a text so that Markdown shows it literally."""
    named = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return "".join(f"\\{c}" if c in "\\`*_{}[]#!|~" else named.get(c, c) for c in str(value))
