"""Read a run folder that may be hostile or incomplete, and the widths of its axes.

A file that does not fit its schema is left out, and named.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from regrow.core.errors import ResourceError
from regrow.reports.records import AxisKind, AxisWidth, Bounds, MassiveActivation, MissingFile, ScoreRows
from regrow.reports.runs import RunFindings
from regrow.store.convert import convert, expand_plans, read_json
from regrow.store.errors import StoreError
from regrow.store.metrics import Metrics
from regrow.store.replacing import WORK, settle
from regrow.store.run_record import read_run as read_settings
from regrow.store.schemas import AxisRow, AxisRows, LedgerJson, PlanRecord, RunJson, ScoreSummary, StageJson

ABSENT = {
    "ledger.json": "the plan: which units stayed",
    "axes.json": "the widths before and after",
    "scores.json": "the scores and the massive-activation units",
    "metrics.jsonl": "every measurement: perplexity, size, proof",
}
"""Files of a pruning run → what a page lacks without them."""
_ABSENT_GROWING = {name: meaning for name, meaning in ABSENT.items() if name != "scores.json"}
_ABSENT_LEARNING = {"metrics.jsonl": "every measurement: the accuracy matrix, sizes, growth"}
_ABSENT_SEARCHING = {
    "metrics.jsonl": "every measurement: size and accuracy over epochs, levels, memory, the test",
    "shapes.json": "the final network",
}
_NEEDED = {"grow": _ABSENT_GROWING, "learn": _ABSENT_LEARNING, "search": _ABSENT_SEARCHING}
_LONGEST, _LONGEST_COMMAND = 300, 8000
"""Characters of a name, and of a command or a note."""

_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]+"
)
Kind = TypeVar("Kind")


class ReportError(ValueError):
    """Raised for a folder that is not a run folder, or a page that cannot be written."""


class RunFile(RunJson, frozen=True):
    """``run.json`` with the present run as a stage of its network."""

    stage: StageJson | None = None


class FoundOrigin(msgspec.Struct, frozen=True):
    """How to build the network that a search found."""

    config: dict[str, Any] = {}


class FoundShapes(msgspec.Struct, frozen=True):
    """``shapes.json`` of a search, as far as a page shows it."""

    origin: FoundOrigin = FoundOrigin()


@dataclass
class RunRecord:
    """The validated content of a run folder; what is missing or damaged is empty.

    Args:
        path: The folder.
        run: ``run.json``.
        plans: The plans of this run in ``ledger.json``, in order; of a recovery, the plan of the cut.
        axes: ``axes.json``: the axes before and after.
        scores: ``scores.json``.
        metrics: The rows of ``metrics.jsonl`` by kind.
        findings: ``findings.json``, which most methods do not write.
        origin: How to build the network that a search found, from ``shapes.json``.
        missing: Files that do not exist, with what the page lacks without them.
        problems: What is left out, and why.
    """

    path: Path
    run: RunFile
    plans: list[dict[str, Any]] = field(default_factory=list)
    axes: AxisRows | None = None
    scores: ScoreSummary | None = None
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    findings: RunFindings | None = None
    origin: FoundOrigin = field(default_factory=FoundOrigin)
    missing: list[MissingFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run folder, also for an unfinished run in its working area."""
        path = self.path.resolve()
        return clean(path.parent.name if path.name == WORK else path.name) or "run"

    def rows(self, what: str, kind: type[Kind]) -> list[Kind]:
        """Return the measurements of a kind as records; none, and a problem, if one does not fit."""
        return self.each(f"metrics.jsonl: {what}", self.metrics.get(what, []), kind)

    def each(self, where: str, rows: Sequence[object], kind: type[Kind]) -> list[Kind]:
        """Return JSON data as records; none, and a problem, if one does not fit."""
        with self.leave_out():
            return [convert(row, kind, where, "left out") for row in rows]
        return []

    def last(self, what: str, kind: type[Kind]) -> Kind | None:
        """Return the last measurement of a kind; ``None`` if there is none that fits."""
        return next(reversed(self.rows(what, kind)), None)

    def table(self, file: str, kind: type[Kind]) -> Kind | None:
        """Return the content of a JSON file as a record; ``None`` if it is missing, or, with a problem, damaged."""
        with self.leave_out():
            if (data := read_json(self.path / file)) is not None:
                return convert(clean(data), kind, file, "left out")
        return None

    @contextlib.contextmanager
    def leave_out(self) -> Iterator[None]:
        """Record an error of reading in the block as a problem."""
        try:
            yield
        except (StoreError, ResourceError) as error:
            self.problems.append(clean(str(error).replace(f"{self.path}/", "")))


def read_run(path: Path) -> RunRecord:
    """Read all files of a run folder that a report needs."""
    settle(path)
    if not (path / "run.json").is_file() and (path / WORK / "run.json").is_file():
        path = path / WORK  # it is not finished
    try:
        run = convert(clean(read_settings(path), _LONGEST_COMMAND), RunFile, path / "run.json")
    except StoreError as error:
        raise ReportError(str(error)) from error
    folder = RunRecord(path, run)
    needed = _NEEDED.get(run.verb, ABSENT)
    folder.missing = [MissingFile(name, words) for name, words in needed.items() if not (path / name).is_file()]
    if not run.finished:
        folder.problems.append("run.json has no finishing time: the run was interrupted or is still in progress")
    with folder.leave_out():
        folder.plans = _read_plans(folder)
    folder.axes = folder.table("axes.json", AxisRows)
    folder.scores = folder.table("scores.json", ScoreSummary)
    folder.findings = folder.table("findings.json", RunFindings)
    if run.verb == "search" and (shapes := folder.table("shapes.json", FoundShapes)):
        folder.origin = shapes.origin
    with folder.leave_out():
        for row in Metrics(path / "metrics.jsonl").rows():
            folder.metrics.setdefault(row["what"], []).append(clean(row))
    return folder


def _read_plans(folder: RunRecord) -> list[dict[str, Any]]:
    """Return the plans of a ledger, with ranges of units expanded."""
    path, plans = folder.path / "ledger.json", []
    if (data := read_json(path)) is not None:
        plans = expand_plans(convert(data, LedgerJson, path.name).plans, path.stat().st_size)
        convert({"plans": plans}, dict[str, list[PlanRecord]], path.name)
    earlier = folder.run.parent.plans if folder.run.parent else 0
    return list(clean(plans[-1:] if folder.run.verb == "recover" else plans[earlier:]))


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


def widths(folder: RunRecord) -> tuple[list[AxisKind], dict[str, int]]:
    """Return the widths of the axes that can change, per kind of axis, and reason → number of the frozen ones."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for key, change in _changes(folder.plans):
        first.setdefault(key, change["size"])
        last[key] = len(change["keep"]) + len(change.get("restore", ())) + change.get("grow", 0)
    after = {axis.key: axis.size for axis in folder.axes.after} if folder.axes else {}
    before = (folder.axes.before if folder.axes else []) or [AxisRow(key, size) for key, size in first.items()]
    rows: dict[str, list[tuple[str, str, int, int]]] = {}
    frozen: Counter[str] = Counter()
    for axis in before:
        if axis.mark == "frozen" and axis.key not in last:
            frozen[axis.reason or "no reason given"] += 1
        elif axis.size:
            left = last.get(axis.key, after.get(axis.key, axis.size))
            width = (axis.key, axis.block or block_of(axis.key), axis.size, left)
            rows.setdefault(kind_of(axis.key, axis.label), []).append(width)
    groups = []
    for kind, members in rows.items():
        depths, numbered = depths_of([block for _, block, *_ in members])
        ordered = [AxisWidth(*member, depth) for member, depth in zip(members, depths, strict=True)]
        groups.append(AxisKind(kind, numbered, sorted(ordered, key=lambda row: row.depth)))
    return groups, dict(frozen.most_common())


def scores(folder: RunRecord, groups: Sequence[AxisKind]) -> ScoreRows | None:
    """Return where each axis was cut, and the units with massive activations; ``None`` without ``scores.json``."""
    if folder.scores is None or not folder.scores.axes:
        return None
    survivors, bounds, massive = _survivors(folder.plans), {}, []
    for kind in groups:
        for row in kind.rows:
            if (entry := folder.scores.axes.get(row.key)) is None:
                continue
            bounds[row.key] = Bounds(entry.dropped_max, entry.kept_min)
            for unit in entry.massive:
                whole = True if row.after == row.before else None
                kept = unit.unit in survivors[row.key] if row.key in survivors else whole
                if unit.ratio is not None:
                    massive.append(MassiveActivation(row.key, row.block, kind.kind, unit.unit, unit.ratio, kept))
    massive.sort(key=lambda unit: -abs(unit.ratio))
    return ScoreRows(folder.scores.metric, bounds, massive)


def kind_of(key: str, label: str = "") -> str:
    """Return the name that axes of one kind share in all blocks: the label, or the key with ``*`` for block numbers.

    >>> kind_of("layers.3.mlp.w:0"), kind_of("layers.3.mlp.w:0", "MLP neurons")
    ('layers.*.mlp.w:0', 'MLP neurons')
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", label or key)


def block_of(key: str) -> str:
    """Return the block of an axis whose block is not recorded: its key up to the first number.

    >>> block_of("layers.3.mlp.w:0"), block_of("head.weight:0")
    ('layers.3', 'head')
    """
    match = re.match(r".*?\.\d+(?=\.)", key)
    return match.group() if match else key.rpartition(".")[0] or key


def depths_of(blocks: Sequence[str]) -> tuple[list[int], bool]:
    """Return the depth of each block, and whether that is its number; else it is its place.

    >>> depths_of(["layers.1", "layers.7"]), depths_of(["stem", "layers.1"])
    (([1, 7], True), ([0, 1], False))
    """
    numbers = [re.search(r"\d+", block) for block in blocks]
    depths = [int(match.group()[:9]) for match in numbers if match]
    numbered = len(set(depths)) == len(blocks) and max(depths, default=0) < 10 * len(blocks) + 10
    return (depths if numbered else list(range(len(blocks)))), numbered


def _changes(plans: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(key, change) for plan in plans for key, change in plan["changes"].items()]


def _survivors(plans: Sequence[Mapping[str, Any]]) -> dict[str, set[int]]:
    """Return axis key → the ids of the units that every plan kept, or that were restored with their weights."""
    left: dict[str, set[int]] = {}
    for key, change in _changes(plans):
        ids = change.get("ids") or range(change["size"])
        kept = {ids[unit] for unit in change["keep"] if unit < len(ids)}
        restored = set() if change.get("fresh") else set(change.get("restore", ()))
        left[key] = (left[key] & kept if key in left else kept) | restored
    return left
