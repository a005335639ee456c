"""The report page of run folders: a single HTML file that needs no network and no script, or Markdown."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from regrow.reports import cells, comparison, figures, findings, quantities, search, words
from regrow.reports.drawing import Drawing
from regrow.reports.reading import ReportError
from regrow.reports.records import KeyNumber
from regrow.reports.runs import Run, Summary
from regrow.reports.summary import summarise
from regrow.store.atomic import write_text
from regrow.store.errors import explain_os_errors

_LAST = {"stages": "History of the network", "ran": "Command and settings", "notes": "Notes and limits"}
# A section is one file in templates/sections, which finds its drawings in FIGURES under the names used there.
SECTIONS = {
    "perplexity": "Quality",
    "behaviour": "Rank changes across text domains",
    "widths": "Widths",
    "scores": "Scores",
    "cost": "Cost",
    "reconstruction": "Reconstruction",
    "proof": "Proof",
    **_LAST,
}
LEARNED_SECTIONS = {
    "known": "Accuracy matrix",
    "growth": "Growth",
    "shape": "Widths and size",
    "owned": "Owned and free weights",
    **_LAST,
}
SEARCHED_SECTIONS = {
    "found": "Final network",
    "epochs": "Course of the search",
    "passed": "Intermediate networks",
    "levels": "Levels",
    "memory": "Memory",
    **_LAST,
}
COMPARED_SECTIONS = {
    "results": "Results",
    "front": "Quality against size",
    "sizes": "Cost",
    "setup": "Commands and settings",
    "remarks": "Notes and limits",
}
Make = Callable[[Run], Drawing | None]
FIGURES: dict[str, Make] = {
    "perplexity": figures.perplexity,
    "spectrum": lambda run: figures.spectrum(run.findings),
    "widths": figures.widths,
}
LEARNED_FIGURES: dict[str, Make] = {"matrix": figures.matrix, "size": figures.learned_size}
SEARCHED_FIGURES: dict[str, Make] = {"size": figures.search_size, "front": figures.search_front}


def write_page(folders: Sequence[Path], out: Path, write: Callable[[Path, str], None] | None = None) -> Path:
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


def to_html(summary: Mapping[str, Any]) -> str:
    """Return the report page of a summary, as HTML.

    Args:
        summary: The result of :func:`regrow.reports.summarise`.

    Raises:
        ReportError: If jinja2 or matplotlib is not installed.
    """
    data = msgspec.convert(summary, Summary)
    if len(data.runs) > 1:
        context, sections = _compared(data), COMPARED_SECTIONS
        drawings = {"front": _compared_front(data, context["table"]), "accuracy": comparison.compared_accuracy(data)}
        absent = {"sizes"} if all(run.course or run.search for run in data.runs) else set()
        absent |= set() if drawings["front"] else {"front"}
    else:
        (run,) = data.runs
        context, sections, makers = _single(run), SECTIONS, FIGURES
        if run.course or run.search:
            sections = LEARNED_SECTIONS if run.course else SEARCHED_SECTIONS
            makers = LEARNED_FIGURES if run.course else SEARCHED_FIGURES
        drawings = {name: make(run) for name, make in makers.items()}
        shown_if = {
            "behaviour": run.findings,
            "scores": run.scores,
            "reconstruction": run.reconstruction,
            "owned": run.course and any(row.owned or row.free for row in run.course.records),
            "passed": run.search and run.search.front,
            "memory": run.search and run.search.stages,
            "stages": run.stages,
        }
        absent = {name for name, there in shown_if.items() if not there}
    shown = [(name, title) for name, title in sections.items() if name not in absent]
    return str(
        _environment(html=True).get_template("page.html").render(context | {"figures": drawings, "sections": shown})
    )


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Return the report of a summary as Markdown, without figures.

    Args:
        summary: The result of :func:`regrow.reports.summarise`.

    Raises:
        ReportError: If jinja2 is not installed.
    """
    data = msgspec.convert(summary, Summary)
    context = _compared(data) if len(data.runs) > 1 else _single(data.runs[0])
    template = "comparison.md" if len(data.runs) > 1 else "report.md"
    return str(_environment(html=False).get_template(template).render(context)).strip() + "\n"


def _single(run: Run) -> dict[str, Any]:
    keys: list[KeyNumber]
    if run.course:
        headline, keys = words.learned_headline(run, run.course), words.learned_numbers(run.course)
        details = words.learned_details(run, run.course)
    elif run.search:
        headline, keys = search.headline(run, run.search), search.key_numbers(run.search)
        details = search.details(run, run.search)
    else:
        headline, keys, details = words.headline(run), words.key_numbers(run), words.details(run)
    return {
        "title": f"{run.model}: {run.label}",
        "brand": [part for part in (run.verb, run.name, run.finished[:10]) if part],
        "headline": headline,
        "details": details,
        "alarms": _alarms(run),
        "keys": keys,
        "run": run,
        "runs": [run],
    }


def _compared(summary: Summary) -> dict[str, Any]:
    table, runs = comparison.compare(summary), summary.runs
    return {
        "title": table.headline,
        "brand": ["comparison"],
        "headline": table.headline,
        "details": table.details,
        "alarms": [*table.alarms, *(f"{run.label}: {alarm}" for run in runs for alarm in _alarms(run))],
        "keys": [],
        "table": table,
        "differences": comparison.differences(runs),
        "runs": runs,
    }


def _compared_front(summary: Summary, table: comparison.TableOfRuns) -> Drawing | None:
    if all(run.course for run in summary.runs):
        return comparison.compared_sizes(summary)
    return comparison.compared_perplexity(summary, table.means) if table.means else None


def _alarms(run: Run) -> list[str]:
    """Return warnings that a reader must not overlook."""
    result = search.alarms(run)
    if any(row.holds is False for row in run.verify):
        result.append(words.proof(run))
    if run.scores and any(unit.kept is False for unit in run.scores.massive):
        result.append(words.massive(run))
    if not run.finished:
        result.append("The run is unfinished or was interrupted: this page shows what it has recorded so far.")
    return result


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
