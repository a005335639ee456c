"""Read a run folder that may be hostile or incomplete: every value is checked, and problems are collected."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from regrow.errors import InputError, ResourceError
from regrow.limits import check_regular
from regrow.reports.records import MissingFile
from regrow.store.convert import check_format, convert
from regrow.store.errors import StoreError
from regrow.store.intervals import expand_plans
from regrow.store.replacing import WORK, settle
from regrow.store.schemas import AxisRows, Findings, ScoreSummary

RUN_FORMAT = "regrow-run/2"
LEDGER_FORMAT = "regrow-ledger/2"
PLAN_FORMAT = "regrow-plan/1"

MAX_BYTES = {
    "run.json": 2**24,
    "ledger.json": 2**30,
    "axes.json": 2**28,
    "scores.json": 2**28,
    "metrics.jsonl": 2**27,
    "findings.json": 2**26,
    "shapes.json": 2**26,
}
MAX_ITEMS = 20_000
MAX_SIZE = 10**15

ABSENT = {
    "ledger.json": "the plan: which units stayed",
    "axes.json": "the widths before and after",
    "scores.json": "the scores and the massive-activation units",
    "metrics.jsonl": "every measurement: perplexity, size, speed, proof",
}
ABSENT_GROWING = {name: meaning for name, meaning in ABSENT.items() if name != "scores.json"}
ABSENT_LEARNING = {"metrics.jsonl": "every measurement: the accuracy matrix, sizes, growth"}
ABSENT_SEARCHING = {
    "metrics.jsonl": "every measurement: size and accuracy over epochs, levels, memory, the test",
    "shapes.json": "the final network",
}

JsonObject = dict[str, object]
"""A JSON object of a file, whose values may be of any type."""

_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]+"
)


class ReportError(ValueError):
    """Raised for a folder that is not a run folder, or a page that cannot be written."""


@dataclass
class RunRecord:
    """The content of a run folder's files, checked only down to "an object" and "a list of objects".

    Args:
        path: The folder.
        run: The content of ``run.json``.
        plans: The plans of this run in ``ledger.json``, in order; of a recovery, the plan of the cut.
        axes: ``axes.json``: ``"before"`` and ``"after"`` → one object per axis.
        scores: The content of ``scores.json``.
        metrics: The lines of ``metrics.jsonl``.
        findings: The content of ``findings.json``, which most methods do not write.
        origin: The record of how to build the network that a search found, from ``shapes.json``.
        missing: Files that do not exist, with what the page lacks without them.
        problems: Problems found while reading, in words.
    """

    path: Path
    run: JsonObject
    plans: list[JsonObject] = field(default_factory=list)
    axes: dict[str, list[JsonObject]] = field(default_factory=dict)
    scores: JsonObject = field(default_factory=dict)
    metrics: list[JsonObject] = field(default_factory=list)
    findings: JsonObject = field(default_factory=dict)
    origin: JsonObject = field(default_factory=dict)
    missing: list[MissingFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run folder, also for an unfinished run in its working area."""
        path = self.path.resolve()
        return path.parent.name if path.name == WORK else path.name


def read_run(path: Path) -> RunRecord:
    """Read all files of a run folder that a report needs.

    Args:
        path: The folder; it must hold a ``run.json``, any other file may be missing.

    Returns:
        The content of its files.

    Raises:
        ReportError: If there is no readable ``run.json`` of the expected format.
    """
    settle(path)
    if not (path / "run.json").is_file() and (path / WORK / "run.json").is_file():
        path = path / WORK  # it is not finished
    if not (path / "run.json").is_file():
        raise ReportError(f"{path} is not a run folder (no run.json); give the folder of a run")
    try:
        check_regular(path / "run.json")
    except InputError as error:
        raise ReportError(str(error)) from error
    problems: list[str] = []
    run = _json(path / "run.json", problems)
    if problems:
        why = problems[0].removeprefix("run.json: ").removesuffix("; left out")
        raise ReportError(f"{path / 'run.json'} cannot be read ({why}); restore it")
    try:
        check_format(run, RUN_FORMAT, path / "run.json")
    except StoreError as error:
        raise ReportError(str(error)) from error
    assert isinstance(run, dict)
    folder = RunRecord(path, run, problems=problems)
    searched = run.get("verb") == "search"
    needed = {"search": ABSENT_SEARCHING, "learn": ABSENT_LEARNING, "grow": ABSENT_GROWING}.get(
        str(run.get("verb")), ABSENT
    )
    for name, meaning in needed.items():
        if not (path / name).is_file():
            folder.missing.append({"file": name, "means": meaning})
    plans, earlier = _plans(path / "ledger.json", problems), size(mapping(run.get("parent")).get("plans")) or 0
    folder.plans = plans[-1:] if run.get("verb") == "recover" else plans[earlier:]
    axes = _object(path / "axes.json", problems, AxisRows)
    folder.axes = {when: objects(axes.get(when)) for when in ("before", "after")}
    folder.scores = _object(path / "scores.json", problems, ScoreSummary)
    folder.metrics = _lines(path / "metrics.jsonl", problems)
    folder.findings = _object(path / "findings.json", problems, Findings)
    if searched:
        folder.origin = mapping(_object(path / "shapes.json", problems).get("origin"))
    return folder


def _plans(path: Path, problems: list[str]) -> list[JsonObject]:
    """Return the plans of a ledger, with ranges of units expanded."""
    ledger = _object(path, problems)
    if ledger.get("format") != LEDGER_FORMAT:
        problems += [f"{path.name}: expected the format {LEDGER_FORMAT!r}; left out"] if ledger else []
        return []
    plans = [plan for plan in objects(ledger.get("plans")) if plan.get("format") == PLAN_FORMAT]
    try:
        return expand_plans(plans, path.stat().st_size)
    except (StoreError, ResourceError) as error:
        problems.append(f"{path.name}: {error}; left out")
        return []


def objects(value: object) -> list[JsonObject]:
    """Return the objects of a JSON list, at most ``MAX_ITEMS``; empty if the value is not a list.

    Args:
        value: The JSON value.

    >>> objects([{"a": 1}, 2, None]), objects("abc")
    ([{'a': 1}], [])
    """
    return [item for item in items(value, MAX_ITEMS) if isinstance(item, dict)]


def items(value: object, most: int = 100) -> list[object]:
    """Return the first values of a JSON list; empty if the value is not a list.

    Args:
        value: The JSON value.
        most: The largest number of values.

    >>> items([1, "a", None], 2), items("abc")
    ([1, 'a'], [])
    """
    return value[:most] if isinstance(value, list) else []


def mapping(value: object) -> JsonObject:
    """Return the value if it is a JSON object, with at most ``MAX_ITEMS`` entries; else an empty one.

    Args:
        value: The JSON value.
    """
    return dict(list(value.items())[:MAX_ITEMS]) if isinstance(value, dict) else {}


def number(value: object, low: float = -1e30, high: float = 1e30) -> float | None:
    """Return the value if it is a finite number within the bounds, else ``None``.

    Args:
        value: The JSON value.
        low: The lower bound.
        high: The upper bound.

    >>> number(1.5), number(True), number("3"), number(float("nan")), number(-1, low=0)
    (1.5, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) and low <= result <= high else None


def size(value: object, high: int = MAX_SIZE) -> int | None:
    """Return the value if it is a whole number from 0 to ``high``, else ``None``.

    Args:
        value: The JSON value.
        high: The upper bound.

    >>> size(3), size(3.0), size(-1), size(10**99)
    (3, 3, None, None)
    """
    result = number(value, 0, high)
    return int(result) if result is not None and result == int(result) else None


def text(value: object, limit: int = 120) -> str:
    """Return the value as one printable line of at most ``limit`` characters; empty for other types.

    Args:
        value: The JSON value.
        limit: The largest number of characters.

    >>> text("a\\n\\x00b"), text(["a"]), text("abcdef", limit=4)
    ('a b', '', 'abc…')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        value = format(value, ".6g")
    if isinstance(value, int) and abs(value) <= MAX_SIZE:
        value = str(value)
    if not isinstance(value, str):
        return ""
    line = _CONTROL.sub(" ", value[: 4 * limit]).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _object(path: Path, problems: list[str], kind: type[object] | None = None) -> JsonObject:
    """Return the JSON object in a file; the first field that does not fit its schema is recorded as a problem."""
    if not path.is_file():
        return {}
    data = _json(path, problems)
    if data is not None and not isinstance(data, dict):
        problems.append(f"{path.name}: not a JSON object; left out")
    if not isinstance(data, dict):
        return {}
    if kind is not None:
        try:
            convert(data, kind, path.name, "what does not fit is left out")
        except StoreError as error:
            problems.append(text(str(error), 300))
    return data


def _json(path: Path, problems: list[str]) -> object:
    raw = _content(path, problems)
    try:
        return None if raw is None else json.loads(raw)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: not JSON ({text(str(error), 80)}); left out")
        return None


def _lines(path: Path, problems: list[str]) -> list[JsonObject]:
    raw = _content(path, problems) if path.is_file() else None
    rows: list[JsonObject] = []
    unread = 0
    for line in (raw or "").split("\n")[: 5 * MAX_ITEMS]:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unread += 1
    if unread:
        problems.append(f"{path.name}: {unread} line{'s' * (unread > 1)} could not be read; left out")
    return rows


def _content(path: Path, problems: list[str]) -> str | None:
    try:
        length = path.stat().st_size
        if length > MAX_BYTES[path.name]:
            problems.append(f"{path.name}: {length:,} bytes, more than a report reads; left out")
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror}); left out")
        return None
