"""Read a run folder that may be hostile or incomplete, and the widths of its axes.

A file or a line that does not fit its schema is left out, and named.
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
from msgspec.structs import replace

from regrow.core.errors import ResourceError
from regrow.core.limits import parse_json
from regrow.reports.cells import FoundParts
from regrow.reports.rows import ROWS, RunFile, RunFindings
from regrow.reports.runs import AxisKind, AxisWidth
from regrow.store.convert import convert, expand_plans, read_json
from regrow.store.errors import StoreError, check_readable
from regrow.store.metrics import MetricsRow
from regrow.store.replacing import WORK, settle
from regrow.store.run_record import read_run as read_settings
from regrow.store.schemas import AxisRow, AxisRows, LedgerJson, PlanRecord, ScoreSummary

ABSENT = {
    "ledger.json": "the plan: how many units stayed",
    "axes.json": "the widths before and after",
    "scores.json": "the scores on both sides of each cut",
    "metrics.jsonl": "every measurement: perplexity, size, proof",
}
"""Files of a pruning run → what a page lacks without them."""
_NEEDED = {
    "grow": {name: meaning for name, meaning in ABSENT.items() if name != "scores.json"},
    "learn": {"metrics.jsonl": "every measurement: the accuracy matrix, sizes, growth"},
    "search": {
        "metrics.jsonl": "every measurement: size and accuracy over epochs, levels, memory, the test",
        "shapes.json": "the final network",
    },
}
_LONGEST, _LONGEST_COMMAND = 300, 8000
"""Characters of a name, and of a command or a note."""

_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]+"
)
Kind = TypeVar("Kind")


class ReportError(ValueError):
    """Raised for a folder that is not a run folder, or a page that cannot be written."""


class FoundShapes(msgspec.Struct, frozen=True):
    """``shapes.json`` of a search, as far as a page shows it: how to build the network."""

    origin: dict[str, dict[str, Any] | str] = {}


@dataclass
class FolderContent:
    """The validated content of a run folder; what is missing or damaged is empty."""

    path: Path
    run: RunFile
    plans: list[PlanRecord] = field(default_factory=list)  # of this run, in order; of a recovery, the plan of the cut
    axes: AxisRows | None = None
    scores: ScoreSummary | None = None
    rows: dict[str, list[Any]] = field(default_factory=dict)  # kind → its rows in metrics.jsonl, as records
    findings: RunFindings | None = None
    found: FoundParts = field(default_factory=FoundParts)  # the parts of the network that a search found
    problems: list[str] = field(default_factory=list)  # what is left out, and why

    @property
    def name(self) -> str:
        """The name of the run folder, also for an unfinished run in its working area."""
        path = self.path.resolve()
        return clean(path.parent.name if path.name == WORK else path.name) or "run"

    @property
    def missing(self) -> dict[str, str]:
        """The files that the folder lacks, and what a page lacks without each."""
        needed = _NEEDED.get(self.run.verb, ABSENT)
        return {name: words for name, words in needed.items() if not (self.path / name).is_file()}

    def of(self, what: str) -> list[Any]:
        """Return the rows of a kind of measurement, as the records of ``ROWS``."""
        return self.rows.get(what, [])

    def last(self, what: str) -> Any:
        """Return the last row of a kind of measurement; ``None`` if there is none."""
        return next(reversed(self.of(what)), None)

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


def read_run(path: Path) -> FolderContent:
    """Read all files of a run folder that a report needs."""
    settle(path)
    if not (path / "run.json").is_file() and (path / WORK / "run.json").is_file():
        path = path / WORK  # it is not finished
    try:
        run = convert(clean(read_settings(path), _LONGEST_COMMAND), RunFile, path / "run.json")
    except StoreError as error:
        raise ReportError(str(error)) from error
    folder = FolderContent(path, run)
    if not run.finished:
        folder.problems.append("run.json has no finishing time: the run was interrupted or is still in progress")
    with folder.leave_out():
        folder.plans = _read_plans(folder)
    folder.axes = folder.table("axes.json", AxisRows)
    folder.scores = folder.table("scores.json", ScoreSummary)
    folder.findings = folder.table("findings.json", RunFindings)
    if run.verb == "search" and (shapes := folder.table("shapes.json", FoundShapes)):
        config = shapes.origin.get("config")
        described = config if isinstance(config, dict) else {}
        parts = {
            name: described[name] for name in ("cells", "edges", "blocks") if isinstance(described.get(name), list)
        }
        if parts:
            with folder.leave_out():
                folder.found = convert(parts | {"width": described.get("width")}, FoundParts, "shapes.json", "left out")
    with folder.leave_out():
        _read_rows(folder)
    return folder


def _read_plans(folder: FolderContent) -> list[PlanRecord]:
    """Return the plans of a ledger, with ranges of units expanded."""
    path = folder.path / "ledger.json"
    if (data := read_json(path)) is None:
        return []
    written = expand_plans(convert(data, LedgerJson, path.name).plans, path.stat().st_size)
    plans = convert({"plans": clean(written)}, dict[str, list[PlanRecord]], path.name)["plans"]
    earlier = folder.run.parent.plans if folder.run.parent else 0
    return plans[-1:] if folder.run.verb == "recover" else plans[earlier:]


def _read_rows(folder: FolderContent) -> None:
    """Read the measurements; a line that does not fit is left out and named, unless a crash cut the last one short."""
    path = folder.path / "metrics.jsonl"
    if not path.is_file():
        return
    check_readable(path)
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path.name}: line {number}"
        try:
            row = clean(parse_json(line))
            what = convert(row, MetricsRow).what
        except ValueError:
            if line.strip() and number < len(lines):
                folder.problems.append(f"{where} is not a measurement; left out")
            continue
        if what in ROWS:
            with folder.leave_out():
                folder.rows.setdefault(what, []).append(convert(row, ROWS[what], where, "left out"))


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


def widths(folder: FolderContent) -> tuple[list[AxisKind], dict[str, int]]:
    """Return the widths of the axes that can change, per kind of axis, and reason → number of the frozen ones."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for plan in folder.plans:
        for key, change in plan.changes.items():
            first.setdefault(key, change.size)
            last[key] = len(change.keep) + len(change.restore) + change.grow
    after = {axis.key: axis.size for axis in folder.axes.after} if folder.axes else {}
    before = (folder.axes.before if folder.axes else []) or [AxisRow(key, size) for key, size in first.items()]
    rows: dict[str, list[AxisWidth]] = {}
    frozen: Counter[str] = Counter()
    for axis in before:
        if axis.mark == "frozen" and axis.key not in last:
            frozen[axis.reason or "no reason given"] += 1
        elif axis.size:
            left = last.get(axis.key, after.get(axis.key, axis.size))
            width = AxisWidth(axis.key, axis.block or block_of(axis.key), axis.size, left)
            rows.setdefault(kind_of(axis.key, axis.label), []).append(width)
    groups = []
    for kind, members in rows.items():
        depths, numbered = depths_of([row.block for row in members])
        ordered = [replace(row, depth=depth) for row, depth in zip(members, depths, strict=True)]
        groups.append(AxisKind(kind, numbered, sorted(ordered, key=lambda row: row.depth)))
    return groups, dict(frozen.most_common())


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
