"""``regrow grid``: a pruning run for every combination of settings, resumed where it was stopped."""

import contextlib
import json
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrow.commands.cell_processes import CellJob, CellOutcome, Engine, count_starts
from regrow.commands.run_state import is_finished
from regrow.progress import Progress, silent
from regrow.settings.grid import ROWS, GridCell
from regrow.settings.words import command_line
from regrow.store.atomic import write_text
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.journal import read
from regrow.store.locks import lock
from regrow.store.metrics import Metrics
from regrow.store.run_record import RUN

LOGS = "logs"
SIZES = {"weights": "params_counted", "parameters": "params_all", "macs": "macs", "bytes": "bytes"}
"""Name in a row of a grid → name in a run's measurements."""


@dataclass
class _Course:
    """What became of the cells so far, written to the grid's file with each change."""

    out: Path
    cells: Sequence[GridCell]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self) -> list[GridCell]:
        """Add the rows of finished cells, and return the others."""
        before = {row.get("cell"): row for row in (read(self.out / ROWS) if (self.out / ROWS).is_file() else ())}
        left = []
        for cell in self.cells:
            if is_finished(cell.settings, self.out / cell.name):
                self.add(row_of(cell, self.out) | _effort(before.get(cell.name, {})))
            else:
                left.append(cell)
        return left

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["cell"]] = row

    def write(self) -> list[dict[str, Any]]:
        rows = [self.rows[cell.name] for cell in self.cells if cell.name in self.rows]
        write_text(self.out / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def run(
    cells: Sequence[GridCell],
    out: Path,
    make_engine: Callable[[], Engine],
    *,
    jobs: int | None = None,
    threads: int = 1,
    retries: int = 0,
    words: Iterable[str] = (),
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run the cells of a grid that are not finished, each as ``regrow prune`` in a folder of its own.

    A cell that fails becomes a row with its error, and the others go on.

    Args:
        cells: The cells.
        out: The folder of the grid; made if needed. It gets a run folder per cell, ``grid.jsonl`` with a row per
            cell, and ``logs``.
        make_engine: Returns what runs the processes; called if there is anything to run, before anything is written.
        jobs: The largest number of cells at the same time; ``None``: whatever the engine runs.
        threads: CPU threads of a cell.
        retries: How often a cell is started again whose process was killed.
        words: Further words of each command line.
        progress: Called with (cells done, cells to do, description).
        announce: Called with a line for each cell that fails.

    Returns:
        A row for each cell, in order: ``cell``, ``settings`` (those that differ), ``state`` (``finished`` or
        ``failed``), ``exit_code``, ``error``, ``seconds``, ``starts``, ``host``, and for finished cells the sizes,
        perplexities and accuracies, each before and after.

    Raises:
        StoreError: If the folder is that of a run, another process writes there, or the folder of a cell holds
            something else.
    """
    if (out / RUN).exists():
        raise StoreError(f"{out} is the folder of a run; choose a new folder for the grid")
    course = _Course(out, cells)
    if not [cell for cell in cells if not is_finished(cell.settings, out / cell.name)]:
        with lock(out):
            course.read()
            return course.write()
    with contextlib.closing(make_engine()) as engine:
        with explain_os_errors(out):
            (out / LOGS).mkdir(parents=True, exist_ok=True)
            owner = lock(out)
        with owner:
            left = course.read()
            course.write()
            jobs_left = [_job(cell, out, threads, tuple(words)) for cell in left]
            _run_all(dict(zip(jobs_left, left, strict=True)), course, engine, (jobs, retries), progress, announce)
            return course.write()


def row_of(cell: GridCell, out: Path) -> dict[str, Any]:
    """Return the row of a finished cell, from the measurements in its folder.

    Args:
        cell: The cell.
        out: The folder of the grid.
    """
    rows = Metrics(out / cell.name / "metrics.jsonl").rows()
    row = _head(cell, "finished", 0, "")
    sizes = [one for one in rows if one["what"] == "size"]
    row |= {name: [sizes[0][key], sizes[-1][key]] for name, key in SIZES.items() if sizes}
    for kind, name, key, value in (("perplexity",) * 2 + ("source", "ppl"), ("choice", "accuracy", "task", "acc")):
        values: dict[str, list[Any]] = {}
        for one in rows:
            if one["what"] == kind:
                values.setdefault(one[key], []).append(one[value])
        if values:
            row[name] = {source: [several[0], several[-1]] for source, several in values.items()}
    return row


def _effort(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a row says about how a cell was run, for a cell that is not run again."""
    return {name: row.get(name) for name in ("seconds", "starts", "host")}


def _job(cell: GridCell, out: Path, threads: int, words: tuple[str, ...]) -> CellJob:
    own = shlex.split(command_line(cell.settings, "--out", str(out / cell.name), *words))[1:]
    log = (out / LOGS / f"{cell.name}.log").absolute()
    gpus = int(cell.settings.device.startswith("cuda"))
    return CellJob(cell.name, tuple(own), str(log), str(Path.cwd()), threads, gpus)


def _run_all(
    cells: dict[CellJob, GridCell],
    course: _Course,
    engine: Engine,
    limits: tuple[int | None, int],
    progress: Progress,
    announce: Callable[[str], None],
) -> None:
    waiting, (most, retries) = deque(cells), limits
    started: set[CellJob] = set()
    failed = done = 0
    for job in cells:
        with explain_os_errors(Path(job.log)):
            Path(job.log).write_bytes(b"")
    while waiting or started:
        while waiting and (most is None or len(started) < most):
            job = waiting.popleft()
            started.add(job)
            engine.submit(job)
        progress(done, len(cells), f"cells of the grid, {len(started)} submitted, {failed} failed")
        for job, outcome in engine.finished():
            cell, starts = cells[job], count_starts(job)
            if outcome.code is not None and outcome.code < 0 and starts <= retries:
                engine.submit(job)
                continue
            row = _result(cell, course.out, outcome)
            started.remove(job)
            course.add(row | {"seconds": outcome.seconds, "starts": starts, "host": outcome.host})
            course.write()
            done += 1
            if row["state"] == "failed":
                failed += 1
                announce(f"{cell.name} failed: {row['error']}")
    progress(done, len(cells), f"cells of the grid, {failed} failed")


def _result(cell: GridCell, out: Path, outcome: CellOutcome) -> dict[str, Any]:
    error = outcome.error
    if outcome.code == 0:
        try:
            if is_finished(cell.settings, out / cell.name):
                return row_of(cell, out)
            error = f"it ended without a result; see {out / LOGS / cell.name}.log"
        except StoreError as problem:
            error = str(problem)
    return _head(cell, "failed", outcome.code, error)


def _head(cell: GridCell, state: str, code: int | None, error: str) -> dict[str, Any]:
    end = {"state": state, "exit_code": code, "error": error}
    return {"what": "cell", "cell": cell.name, "settings": dict(cell.values), **end}
