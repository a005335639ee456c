"""Read run folders, which may be hostile or incomplete, into typed records.

A file or a line that does not fit its schema is left out, and named.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regrow.core.errors import ResourceError
from regrow.core.limits import parse_json
from regrow.reports.cells import FoundNetwork, read_found
from regrow.reports.quantities import in_words
from regrow.reports.records import ROWS, AxisKind, BoundedPerplexity, Course, PairedDifference, Quality, Run
from regrow.store import metrics
from regrow.store.convert import convert, read_json
from regrow.store.errors import StoreError, check_readable
from regrow.store.replacing import WORK, settle
from regrow.store.run_record import read_run as read_run_json
from regrow.store.schemas import AxisRows, RunJson

MAX_RUNS = 64
NEEDED = {"learn": ("metrics.jsonl",), "search": ("metrics.jsonl", "shapes.json")}
"""Command → the files that its page needs; of other commands metrics.jsonl and axes.json."""
_MODELS = {
    "dense": "before",
    "before": "before",
    "cut": "cut",
    "pruned": "changed",
    "after": "changed",
    "recovered": "recovered",
}
"""Name of a model in metrics.jsonl → the step of which it is the result; ``cut``: before its layers are fitted."""
_LONGEST, _LONGEST_COMMAND = 300, 8000
"""Characters of a name, and of a command or a note."""
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]+"
)
_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class ReportError(ValueError):
    """Raised for a folder that is not a run folder, or a page that cannot be written."""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders for :func:`to_html`.

    Args:
        folders: The run folders, in the order of a comparison. Only ``run.json`` must exist in each.

    Returns:
        What is known of each run; ``problems`` of a run says in words what is not.

    Raises:
        ReportError: If there is no folder, more than 64, or one without a valid ``run.json``.
    """
    if not 0 < len(folders) <= MAX_RUNS:
        raise ReportError(f"a report is made of 1 to {MAX_RUNS} run folders; got {len(folders)}")
    runs = [_read(Path(folder)) for folder in folders]
    names = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.name} #{i}") if names[run.name] > 1 else run for i, run in enumerate(runs, 1)]


def _read(path: Path) -> Run:
    settle(path)
    if not (path / "run.json").is_file() and (path / WORK / "run.json").is_file():
        path = path / WORK  # it is not finished
    try:
        file = convert(clean(read_run_json(path), _LONGEST_COMMAND), RunJson, path / "run.json")
    except StoreError as error:
        raise ReportError(str(error)) from error
    needed = NEEDED.get(file.verb, ("metrics.jsonl", "axes.json"))
    problems = [f"{name} is missing" for name in needed if not (path / name).is_file()]

    @contextlib.contextmanager
    def leave_out() -> Iterator[None]:
        try:
            yield
        except (StoreError, ResourceError) as error:
            problems.append(clean(str(error).replace(f"{path}/", "")))

    rows, axes, found = list[Any](), AxisRows([], []), FoundNetwork()
    with leave_out():
        for where, what, row in _read_lines(path / "metrics.jsonl", problems):
            with leave_out():
                rows.append(convert(row, ROWS[what], where, "left out"))
    with leave_out():
        if (data := read_json(path / "axes.json")) is not None:
            axes = convert(clean(data), AxisRows, "axes.json", "left out")
    with leave_out():
        if file.verb == "search" and (data := read_json(path / "shapes.json")) is not None:
            found = read_found(clean(data))
    here, settings = path.resolve(), file.settings
    model = in_words(settings.get("model", settings.get("space"))).rstrip("/\\").replace("\\", "/")
    method = settings.get("method_settings", settings.get("recovery_settings"))
    given = {name: value for name, value in settings.items() if name not in ("pruning", "method_settings")}
    return Run(
        name=clean(here.parent.name if here.name == WORK else here.name) or "run",
        file=file,
        model=model.rpartition("/")[2],
        method=in_words(settings.get("method", f"regrow {file.verb}")),
        code=model if _CODE.fullmatch(model) else "",
        is_text=(path / "tokenizer_config.json").is_file(),
        settings=_in_words(given | (method if isinstance(method, dict) else {})),
        defaults=_in_words(file.defaults),
        rows=rows,
        quality=_collect_quality(rows),
        sizes={_MODELS[row.model]: row for row in rows if isinstance(row, metrics.SizeRow) and row.model in _MODELS},
        widths=_collect_widths(axes, retraced=file.verb == "recover"),
        course=_read_course(rows),
        found=found,
        problems=problems[:20],
    )


def _read_lines(path: Path, problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield the place, the kind and the content of each line that a page reads.

    A line that is not a measurement is left out and named, unless it is the last one, which a crash may have cut short.
    """
    if not path.is_file():
        return
    check_readable(path)
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path.name}: line {number}"
        try:
            row = clean(parse_json(line))
            what = convert(row, metrics.MetricsRow).what
        except ValueError:
            if line.strip() and number < len(lines):
                problems.append(f"{where} is not a measurement; left out")
            continue
        if what in ROWS:
            yield where, what, row


def clean(value: Any, longest: int = _LONGEST) -> Any:
    """Return JSON data in which every text is one printable line, and numbers that are not finite are ``None``.

    >>> clean({"a\\n\\x00b": ["abcdef", float("nan")]}, longest=4)
    {'a b': ['abc…', None]}
    """
    if isinstance(value, str):
        line = _CONTROL.sub(" ", value[: 4 * longest]).strip()
        return line if len(line) <= longest else line[: longest - 1] + "…"
    if isinstance(value, Mapping):
        return {clean(key, longest): clean(part, longest) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [clean(part, longest) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _collect_quality(rows: Sequence[Any]) -> list[Quality]:
    """Return one record per text domain and task."""
    texts: dict[str, Quality] = {}
    tasks: dict[str, Quality] = {}
    for row in rows:
        if isinstance(row, BoundedPerplexity) and row.model in _MODELS:
            quality = texts.setdefault(row.source, Quality(row.source))
            quality.seen, quality.models[_MODELS[row.model]] = row.seen, row
        elif isinstance(row, metrics.ChoiceRow) and row.model in _MODELS:
            tasks.setdefault(row.task, Quality(row.task)).models[_MODELS[row.model]] = row
        elif isinstance(row, PairedDifference) and row.source in texts:
            texts[row.source].paired = row
    return [*texts.values(), *tasks.values()]


def _collect_widths(axes: AxisRows, *, retraced: bool) -> list[AxisKind]:
    """Return the widths of the axes that can change, per kind of axis.

    An axis that is not there afterwards was removed with its block; in a network that was traced again, it may have
    another name.
    """
    after = {axis.key: axis.size for axis in axes.after}
    kinds: dict[str, list[tuple[str, int, int]]] = {}
    for axis in axes.before:
        left = after.get(axis.key, axis.size if axis.mark == "frozen" else 0)
        if (axis.mark != "frozen" or left != axis.size) and not (retraced and axis.key not in after):
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", axis.label or axis.key)
            kinds.setdefault(name, []).append((axis.key, axis.size, left))
    return [AxisKind(name, members) for name, members in kinds.items()]


def _read_course(rows: Sequence[Any]) -> Course:
    """Return the accuracies after each task, from the matrix of the run and of tasks that came later."""
    records = {row.task: row for row in rows if isinstance(row, metrics.TaskRow)}
    end = next((row for row in reversed(rows) if isinstance(row, metrics.MatrixRow)), None)
    learned = {i: row.accuracy for i, row in records.items()} | dict(enumerate(end.matrix if end else []))
    count = next(i for i in range(len(learned) + 1) if i not in learned)
    accuracies, names = [learned[i] for i in range(count)], list(end.tasks if end else [])
    for i in range(len(names), max([count, *map(len, accuracies)])):
        names.append(records[i].name if i in records else f"task {i + 1}")
    finished = end if end and len(end.matrix) == count else None
    return Course(names, accuracies, [records[i] for i in range(count) if i in records], finished)


def _in_words(values: Mapping[str, object]) -> dict[str, str]:
    return {name: in_words(value) for name, value in list(values.items())[:200]}
