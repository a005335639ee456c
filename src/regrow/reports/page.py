"""The page of run folders: one HTML file that needs no network; a comparison sorts and filters by its only script."""

import logging
import shlex
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from regrow.core.errors import install_command
from regrow.reports import quantities, summary
from regrow.reports.comparison import compare
from regrow.reports.figures import Drawing, draw_quality, draw_search
from regrow.reports.reading import ReportError, read_runs
from regrow.reports.records import AxisKind, Run
from regrow.store.atomic import PAGE, write_text
from regrow.store.errors import StoreError

FIGURES: dict[str, Callable[[Run], Drawing | None]] = {"quality": draw_quality, "search": draw_search}
# Kinds of axes that a page shows as strips, besides the kind of all single axes.
MAX_STRIPS = 12


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of one run, or of a comparison of several, as an HTML file.

    Args:
        folders: The run folders; two or more make a comparison.
        out: The HTML file to write; it is replaced only once the page is complete.

    Returns:
        The file written.

    Raises:
        ReportError: If a folder is not a run folder, or if jinja2 or matplotlib is not installed.
        StoreError: If the file cannot be written.
    """
    out = Path(out)
    write_text(out, to_html(read_runs(folders)))
    return out


def write_run_page(folder: Path) -> None:
    """Write ``report.html`` into a run folder; log an error as a warning, but raise StoreError, such as a full disk."""
    try:
        write_page([folder], folder / PAGE)
    except StoreError:  # such as a full disk: the run fails, too, and can be resumed
        raise
    except Exception as error:
        logging.getLogger("regrow").warning(f"no page was written: {error}; `regrow report RUN` writes it later")


def to_html(runs: Sequence[Run]) -> str:
    """Return the page of one run, or of a comparison of several, as the text of an HTML file.

    Args:
        runs: The result of :func:`regrow.reports.read_runs`; at least one.

    Raises:
        ReportError: If jinja2 or matplotlib is not installed.
    """
    environment = _environment()
    if len(runs) > 1:
        comparison = compare(runs)
        template = environment.get_template("comparison.html")
        return str(template.render(comparison=comparison, front=comparison.draw(), runs=runs))
    (run,) = runs
    context: dict[str, Any] = {
        "run": run,
        "summary": summary.summarise(run),
        "command": summary.next_command(run),
        "strips": group_strips([kind for kind in run.widths if any(a != b for _, a, b in kind.rows)]),
        "quality": summary.quality_table(run),
        "accuracy": summary.accuracy_table(run),
        "proof": summary.describe_proof(run),
        "figures": {name: draw(run) for name, draw in FIGURES.items()},
    }
    return str(environment.get_template("run.html").render(context))


def group_strips(widths: Sequence[AxisKind]) -> list[AxisKind]:
    """Return the kinds to draw: the first ``MAX_STRIPS`` with several axes, then those of one axis, as one kind."""
    several = [kind for kind in widths if len(kind.rows) > 1][:MAX_STRIPS]
    single = [row for kind in widths if len(kind.rows) == 1 for row in kind.rows]
    return [*several, AxisKind("other layers", single)] if single else several


@cache
def _environment() -> Any:
    """Return jinja2's environment with the page's templates and filters; ReportError if jinja2 is not installed."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise ReportError(f"a page needs jinja2: {install_command('report')}") from None
    loader = jinja2.PackageLoader("regrow.reports", "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = {"count": quantities.count, "percent": quantities.percent, "duration": quantities.duration}
    # Markup is not escaped: matplotlib has escaped every text in its SVG.
    environment.filters |= formats | {"repr": repr, "quote": shlex.quote, "svg": Markup}
    script = loader.get_source(environment, "compare.js")[0]
    digest = b64encode(sha256(script.encode()).digest()).decode()  # the page's policy allows this script alone
    environment.globals["script"] = {"text": Markup(script), "digest": digest}
    return environment
