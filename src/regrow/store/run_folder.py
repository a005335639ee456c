"""Run folders: settings, measurements and plans of one run, so that it can be read, resumed and repeated.

While a run is unfinished, its files are in a working area inside its folder (``.work``), so that they are not mistaken
for a result. At the end, the complete new folder replaces the old one, which may have an earlier result.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from regrow.core.axes import AxisGraph
from regrow.nets.loaded import WeightFile, check_unchanged
from regrow.store import run_record
from regrow.store.atomic import FolderLock, lock, write_text
from regrow.store.convert import replace_nonfinite
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.ledger import Ledger
from regrow.store.metrics import Metrics
from regrow.store.replacing import WORK, check_replaceable, clear_leftovers, link_tree, replace_folder, settle

WritePage = Callable[[Path], object]  # writes the report page of a run into the folder that it is given


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, for reading, or locked for writing until :meth:`finish` or the end of a ``with`` block.

    Args:
        path: The folder that has the files: that of a finished run, or the working area of an unfinished one.
        resumed: Whether an earlier process had started this run.
        out: The folder that the finished run will have; ``None`` for a folder that is only read.
        owner: The lock on that folder. :meth:`finish` releases it, and so does the end of a ``with`` block.
        inputs: The files of weights that the run reads, which the caller adds: :meth:`finish` raises if one changed.
    """

    path: Path
    resumed: bool = False
    out: Path | None = None
    owner: FolderLock | None = None
    inputs: list[WeightFile] = field(default_factory=list)
    is_kept: ClassVar[bool] = True  # whether the run is on disk; one without a folder says False
    wants_measurements: ClassVar[bool] = True  # whether quality is measured

    @classmethod
    def create(
        cls,
        out: str | Path,
        *,
        verb: str,
        settings: Mapping[str, object],
        defaults: Mapping[str, object] | None = None,
        asked: Mapping[str, object] | None = None,
        command: str = "",
    ) -> "RunFolder":
        """Start a run in a new or empty folder and lock it, or resume the same run if it was interrupted.

        The run is the same if ``verb`` (the command, such as ``"prune"``), ``settings`` and ``defaults`` (of the
        method; compared if given) are; with ``asked``, the settings as they were given, these are compared instead of
        ``settings``. ``command``: what users repeat to resume. Raises StoreError if the folder holds
        anything else, and LockedError if another process writes to it.
        """
        out = Path(out)
        identity: dict[str, Any] = {"verb": verb, "settings": settings}
        identity |= {} if defaults is None else {"defaults": defaults}
        identity |= {} if asked is None else {"asked": asked}
        cls.check(out, identity)
        with explain_os_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            owner = lock(out)
        with ExitStack() as stack:
            stack.enter_context(owner)
            resumed = run_record.is_resumable(out, identity)
            folder = cls(out / WORK if resumed else run_record.recreate_area(out), resumed, out, owner)
            if not resumed:
                record = {"format": run_record.FORMAT, "command": command, "defaults": {}, **identity}
                folder.write(run_record.RUN, record | {"versions": run_record.versions(), "started": _now()})
            stack.pop_all()
        return folder

    @classmethod
    def check(cls, out: str | Path, identity: Mapping[str, Any]) -> "RunFolder | None":
        """Return the interrupted run that :meth:`create` would resume, for reading; ``None``: it would start a new one.

        Raises StoreError where :meth:`create` would. ``identity``: ``verb``, ``settings`` and perhaps ``defaults`` of
        :meth:`create` by name. What killed processes left beside the folder is deleted; nothing else is changed.
        """
        out = Path(out)
        check_replaceable(out)
        clear_leftovers(out)
        if out.is_dir():
            lock(out).release()
        unfinished = cls.open_unfinished(out) if run_record.is_resumable(out, identity) else None
        if unfinished:
            unfinished.metrics()  # raises if they are damaged, before the run goes on with them
        return unfinished

    @classmethod
    def reopen(cls, out: str | Path) -> "RunFolder":
        """Lock the run in a folder and open it for writing; a finished one is copied and stays until :meth:`finish`."""
        out = Path(out)
        check_replaceable(out)
        with explain_os_errors(out):
            owner = lock(out)
        with ExitStack() as stack:
            stack.enter_context(owner)
            if not run_record.find_unfinished(out):
                cls.open(out)
                run_record.copy_into_area(out)
            stack.pop_all()
        return cls(out / WORK, True, out, owner)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open a finished run for reading; raise StoreError if it is unfinished, damaged or no run."""
        path = Path(path)
        settle(path)
        folder = cls(path)
        if not (path / run_record.RUN).is_file() or not folder.read_record().get("finished"):
            if unfinished := cls.open_unfinished(path):
                command = unfinished.read_record().get("command")
                raise StoreError(f"{path}: the run is not finished; resume it first: {command}")
            folder.read_record()  # raises unless it is a run folder
        return folder

    @classmethod
    def open_unfinished(cls, path: str | Path) -> "RunFolder | None":
        """Open the unfinished run in a folder for reading; ``None`` if there is none (finished ones do not count)."""
        area = run_record.find_unfinished(Path(path))
        return cls(area) if area else None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        if self.owner:
            self.owner.release()

    def read_record(self) -> dict[str, Any]:
        """Return the content of ``run.json``, whose fields are those of :class:`regrow.store.schemas.RunJson`."""
        return run_record.read_run(self.path)

    def update(self, **fields: object) -> None:
        """Set fields of ``run.json`` to JSON data, such as ``notes``, on disk; a field set to ``None`` is removed."""
        run = {**self.read_record(), **fields}
        self.write(run_record.RUN, {name: value for name, value in run.items() if value is not None})

    def finish(self, write_page: WritePage | None = None, **fields: object) -> "RunFolder":
        """Complete the run: move its files into its final folder at once, release the lock, return that folder to read.

        ``write_page``: called before with the folder of the files, to write the report page; ``fields``: further ones
        to set in ``run.json``. Raises InputError if a file that the run has read was changed meanwhile, and ValueError
        if this object was opened for reading.
        """
        if self.out is None:
            raise ValueError(f"{self.path} was opened for reading; a run is finished where it was begun")
        self.update(**fields, finished=_now())
        if write_page:
            write_page(self.path)
        check_unchanged(self.inputs)
        with replace_folder(self.out, self.owner) as new:
            link_tree(self.path, new, skip={"statistics"})  # needed to resume alone
        if self.owner:
            self.owner.release()
        return RunFolder(self.out)

    def discard_unmeasured(self) -> None:
        """Delete the files of a run that this process began, unless it has measured, learned or generated something."""
        begun = {run_record.RUN, run_record.BEFORE, "ledger.json"}  # what a run is begun with
        files = (path.relative_to(self.path).parts[0] for path in self.path.rglob("*") if path.is_file())
        if not self.resumed and {*files} <= begun:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # of an earlier result, or another process
                (self.out or self.path).rmdir()

    @property
    def ledger(self) -> Ledger:
        """``ledger.json``: every plan applied to the network, in order: those of earlier runs on it, then its own."""
        return Ledger(self.path / "ledger.json")

    @property
    def own_ledger(self) -> Ledger:
        """``ledger.json`` with the plans of this run alone; those of earlier runs on the network are skipped."""
        return Ledger(self.path / "ledger.json", int((self.read_record().get("parent") or {}).get("plans", 0)))

    def log(
        self, what: str, row: Mapping[str, object] | None = None, /, *, number: int | None = None, **values: object
    ) -> None:
        """Append a measurement of kind ``what`` to ``metrics.jsonl`` and sync it, unless one with its key is there.

        Its columns are those of ``row`` and ``values``, which wins; ``number``: its number among the rows of its kind,
        for kinds that no columns identify (:meth:`regrow.store.metrics.Metrics.add`).
        """
        self._metrics.add({"what": what, **(row or {}), **values}, number)

    def metrics(self) -> list[dict[str, Any]]:
        """Return every row of ``metrics.jsonl``, in order; raise StoreError if the file is damaged."""
        return self._metrics.rows()

    def last(self, what: str) -> dict[str, Any]:
        """Return the last row of the kind ``what`` in ``metrics.jsonl``, or raise StoreError if there is none."""
        if not (rows := [row for row in self.metrics() if row["what"] == what]):
            raise StoreError(f"{self.path / 'metrics.jsonl'}: it has no measurement {what!r}; run the command again")
        return rows[-1]

    @cached_property
    def _metrics(self) -> Metrics:
        """The file with the measurements of the run."""
        return Metrics(self.path / "metrics.jsonl")

    def write_axes(self, before: AxisGraph, after: AxisGraph) -> None:
        """Write ``axes.json``: one row per axis of the model ``before`` and ``after`` the run."""
        rows = {"before": before, "after": after}
        self.write("axes.json", {name: [asdict(row) for row in axes.inventory()] for name, axes in rows.items()})

    def write(self, name: str, data: Mapping[str, object]) -> None:
        """Write a JSON file of the run atomically, such as ``findings.json``; NaN and infinity become null."""
        write_text(self.path / name, json.dumps(replace_nonfinite(data), indent=1, allow_nan=False) + "\n")


def _now() -> str:
    """Return the present time in UTC, in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
