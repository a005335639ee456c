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
from regrow.reports.quantities import format_setting, shorten
from regrow.reports.records import ROWS, AxisKind, BoundedPerplexity, PairedDifference, Quality, Run, TaskResults
from regrow.store import metrics
from regrow.store.convert import convert, read_json
from regrow.store.errors import StoreError, check_readable
from regrow.store.replacing import WORK, settle
from regrow.store.run_record import read_run as read_run_json
from regrow.store.schemas import AxisRows, RunJson

MAX_RUNS = 64
# Command → the files that its page needs; of other commands metrics.jsonl and axes.json.
NEEDED = {"learn": ("metrics.jsonl",), "search": ("metrics.jsonl", "shapes.json")}
_MODELS = {"dense": "before", "pruned": "changed", "after": "changed"}
_MODELS |= {name: name for name in ("before", "cut", "recovered")}
"""Name of a model in metrics.jsonl → the step of which it is the result; ``cut``: before its layers are fitted."""
# Characters of a name, and of a command or a note, beyond which a text is cut.
_MAX_NAME, _MAX_COMMAND = 300, 8000
# Characters that are not printed, or change the direction of text.
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]+"
)
_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:function


class ReportError(ValueError):
    """Raised for a folder that is not a run folder, or a page for which a package is missing."""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders into records, for :func:`to_html`; damaged files are left out and named.

    Args:
        folders: The run folders, in the order of a comparison. Only ``run.json`` must exist in each.

    Returns:
        What is known of each run; ``problems`` of a run says in words what is not.

    Raises:
        ReportError: If there is no folder, more than 64, or one without a valid ``run.json``.
    """
    if not 0 < len(folders) <= MAX_RUNS:
        raise ReportError(f"a report is made of 1 to {MAX_RUNS} run folders; got {len(folders)}")
    runs = [_read_run(Path(folder)) for folder in folders]
    names = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.name} #{i}") if names[run.name] > 1 else run for i, run in enumerate(runs, 1)]


def _read_run(path: Path) -> Run:
    """Read a run folder, finished or not; ReportError without a valid ``run.json``; ``problems`` names other faults.

    A replacement of the folder that was killed is completed first (:func:`regrow.store.replacing.settle`).
    """
    settle(path)
    if not (path / "run.json").is_file() and (path / WORK / "run.json").is_file():
        path = path / WORK  # it is not finished
    try:
        file = convert(clean(read_run_json(path), _MAX_COMMAND), RunJson, path / "run.json")
    except StoreError as error:
        raise ReportError(str(error)) from error
    needed = NEEDED.get(file.verb, ("metrics.jsonl", "axes.json"))
    problems = [f"{name} is missing" for name in needed if not (path / name).is_file()]

    @contextlib.contextmanager
    def leave_out() -> Iterator[None]:
        """Context manager: an error of a file or line becomes a problem of the run, and what follows is read."""
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
    model = format_setting(settings.get("model", settings.get("space"))).rstrip("/\\").replace("\\", "/")
    method_settings = settings.get("method_settings", settings.get("recovery_settings"))
    method_settings = method_settings if isinstance(method_settings, dict) else {}
    settings = {name: value for name, value in settings.items() if name not in ("pruning", "method_settings")}
    return Run(
        name=clean(here.parent.name if here.name == WORK else here.name) or "run",
        file=file,
        model=model.rpartition("/")[2],
        method=format_setting(settings.get("method", f"regrow {file.verb}")),
        code=model if _CODE.fullmatch(model) else "",
        is_text=(path / "tokenizer_config.json").is_file(),
        settings=_format_settings(settings | method_settings),
        defaults=_format_settings(file.defaults),
        rows=rows,
        quality=_collect_quality(rows),
        sizes={_MODELS[row.model]: row for row in rows if isinstance(row, metrics.SizeRow) and row.model in _MODELS},
        widths=_collect_widths(axes, retraced=file.verb == "recover"),
        task_results=_collect_task_results(rows),
        found=found,
        problems=problems[:20],
    )


def _read_lines(path: Path, problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (place for errors, kind of measurement, content) of each line of ``metrics.jsonl`` that a page reads.

    A line that is no measurement is left out and named in ``problems``, in place, unless it is the last one, which a
    crash may have cut short. A file that does not exist has no lines.
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


def clean(value: Any, max_length: int = _MAX_NAME) -> Any:
    """Return a copy of JSON data with texts as one printable line of ``max_length`` characters at most, no NaN or ∞.

    >>> clean({"a\\n\\x00b": ["abcdef", float("nan")]}, max_length=4)
    {'a b': ['abc…', None]}
    """
    if isinstance(value, str):
        return shorten(_CONTROL.sub(" ", value[: 4 * max_length]).strip(), max_length)
    if isinstance(value, Mapping):
        return {clean(key, max_length): clean(part, max_length) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [clean(part, max_length) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _collect_quality(rows: Sequence[Any]) -> list[Quality]:
    """Return a record per text domain and then per task from typed rows; of rows for one model, the last counts."""
    texts, tasks = dict[str, Quality](), dict[str, Quality]()
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
    """Return the widths of the axes that can change, grouped by name with block numbers replaced by ``*``.

    ``axes``: before and after the run. An axis that is not there afterwards was removed with its block and has width 0;
    in a network that was traced again (``retraced``), it may have another name, and is left out.
    """
    after = {axis.key: axis.size for axis in axes.after}
    kinds: dict[str, list[tuple[str, int, int]]] = {}
    for axis in axes.before:
        frozen = axis.mark == "frozen"
        size = after.get(axis.key, axis.size if frozen else 0)
        if (not frozen or size != axis.size) and not (retraced and axis.key not in after):
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", axis.label or axis.key)
            kinds.setdefault(name, []).append((axis.key, axis.size, size))
    return [AxisKind(name, members) for name, members in kinds.items()]


def _collect_task_results(rows: Sequence[Any]) -> TaskResults:
    """Return the accuracies after each task, from the last accuracy matrix of the run and the rows of later tasks."""
    records = {row.task: row for row in rows if isinstance(row, metrics.TaskRow)}
    end = next((row for row in reversed(rows) if isinstance(row, metrics.MatrixRow)), None)
    learned = {i: row.accuracy for i, row in records.items()} | dict(enumerate(end.matrix if end else []))
    count = next(i for i in range(len(learned) + 1) if i not in learned)
    accuracies, names = [learned[i] for i in range(count)], list(end.tasks if end else [])
    for i in range(len(names), max([count, *map(len, accuracies)])):
        names.append(records[i].name if i in records else f"task {i + 1}")
    finished = end if end and len(end.matrix) == count else None
    return TaskResults(names, accuracies, [records[i] for i in range(count) if i in records], finished)


def _format_settings(values: Mapping[str, object]) -> dict[str, str]:
    """Return name → value as a short text, of the first 200 settings."""
    return {name: format_setting(value) for name, value in list(values.items())[:200]}
