"""Cells of a grid as processes: failures are rows, killed processes start again, finished cells are skipped."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from regrow.commands.cell_processes import CellJob, CellOutcome, Engine, LocalEngine, RayEngine, count_starts, start
from regrow.commands.grid import run
from regrow.errors import ResourceError
from regrow.run_folder import RunFolder
from regrow.settings.declaration import record_settings
from regrow.settings.grid import GridCell
from regrow.settings.prune import Settings
from regrow.store.errors import StoreError

CELLS = [GridCell(f"keep={keep}", {"keep": keep}, Settings("resnet18", keep=keep)) for keep in (0.8, 0.7, 0.6)]
SIZES = ({"model": "dense", "params": 10}, {"model": "pruned", "params": 7})


class Pretended(Engine):
    """Ends each cell with a given code, one after the other; a cell that succeeds leaves a finished run."""

    def __init__(self, out: Path, ends: dict[str, list[int | None]]) -> None:
        self.out, self.ends, self.started, self.most = out, ends, [], 0
        self.running: list[CellJob] = []
        self.closed = False

    def submit(self, job: CellJob) -> None:
        with Path(job.log).open("a") as log:
            log.write(f"$ regrow {' '.join(job.words)}\n")
        self.started.append(job.name)
        self.running.append(job)
        self.most = max(self.most, len(self.running))

    def finished(self) -> list[tuple[CellJob, CellOutcome]]:
        job = self.running.pop(0)
        code = self.ends[job.name].pop(0)
        if code == 0:
            cell = next(cell for cell in CELLS if cell.name == job.name)
            with RunFolder.create(self.out / job.name, verb="prune", settings=record_settings(cell.settings)) as folder:
                for size in SIZES:
                    count = size["params"]
                    row = {"params_all": count, "params_counted": count, "macs": count, "bytes": count}
                    folder.log("size", model=size["model"], **row, dtype="float32")
                folder.finish()
        return [(job, CellOutcome(code, "" if code == 0 else f"it ended with {code}", "here", 1.5))]

    def close(self) -> None:
        self.closed = True


def ran(out: Path, ends: dict[str, list[int | None]], **more: object) -> tuple[list[dict], Pretended]:
    engine = Pretended(out, ends)
    return run(CELLS, out, lambda: engine, **more), engine


def test_a_failed_cell_is_a_row_and_is_run_again(tmp_path: Path) -> None:
    out, lines = tmp_path / "grid", []
    rows, engine = ran(
        out, {"keep=0.8": [0], "keep=0.7": [-9, -9, 0], "keep=0.6": [2]}, retries=2, jobs=2, announce=lines.append
    )
    assert [row["state"] for row in rows] == ["finished", "finished", "failed"]
    assert (
        rows[1]["starts"] == 3
        and rows[1]["seconds"] == 1.5
        and rows[1]["weights"] == [10, 7]
        and engine.most == 2
        and engine.closed
    )
    assert rows[2]["error"] == "it ended with 2" and lines == ["keep=0.6 failed: it ended with 2"]
    assert rows == [json.loads(line) for line in (out / "grid.jsonl").read_text().splitlines()]
    again, engine = ran(out, {"keep=0.6": [0]})
    assert engine.started == ["keep=0.6"] and [row["state"] for row in again] == ["finished"] * 3
    assert again[:2] == rows[:2]
    assert ran(out, {})[1].started == []


def test_a_cell_is_given_up_after_its_retries(tmp_path: Path) -> None:
    rows, engine = ran(tmp_path / "g", {"keep=0.8": [-9, -9], "keep=0.7": [None], "keep=0.6": [0]}, retries=1)
    assert [row["state"] for row in rows] == ["failed", "failed", "finished"]
    assert [row["exit_code"] for row in rows] == [-9, None, 0] and engine.started.count("keep=0.8") == 2


def test_folders_of_something_else_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "grid"
    other = record_settings(Settings("resnet18", keep=0.1))
    RunFolder.create(out / "keep=0.8", verb="prune", settings=other).finish()
    with pytest.raises(StoreError, match="holds another run"):
        ran(out, {})
    with pytest.raises(StoreError, match="the folder of a run"):
        ran(out / "keep=0.8", {})


def job_of(folder: Path, name: str, *words: str) -> CellJob:
    return CellJob(name, words, str(folder / f"{name}.log"), str(folder), 1)


def all_of(engine: Engine, jobs: list[CellJob]) -> dict[str, CellOutcome]:
    for job in jobs:
        engine.submit(job)
    outcomes: dict[str, CellOutcome] = {}
    while len(outcomes) < len(jobs):
        outcomes |= {job.name: outcome for job, outcome in engine.finished()}
    engine.close()
    return outcomes


def ray_engine() -> Engine:
    pytest.importorskip("ray")
    return RayEngine("", 2, 0)


@pytest.mark.parametrize("make", [LocalEngine, ray_engine], ids=["local", "ray"])
def test_processes_end_with_their_code_and_the_line_that_tells_why(tmp_path: Path, make: Callable[[], Engine]) -> None:
    jobs = [job_of(tmp_path, "good", "--version"), job_of(tmp_path, "bad", "show", "none")]
    outcomes = all_of(make(), jobs)
    assert outcomes["good"].code == 0 and not outcomes["good"].error and outcomes["good"].host
    assert outcomes["bad"].code == 2 and outcomes["bad"].error.startswith("no model 'none'")
    assert count_starts(jobs[0]) == 1


def test_what_still_runs_is_killed(tmp_path: Path) -> None:
    engine = LocalEngine()
    engine.submit(job_of(tmp_path, "long", "show", "smollm2-135m"))
    engine.close()
    assert [process.returncode for _, process, _ in engine._running] == [-9]
    job = job_of(tmp_path, "killed", "show", "smollm2-135m")
    process = start(job)
    engine = LocalEngine()
    engine._running.append((job, process, 0.0))
    process.kill()
    process.wait()
    ((_, outcome),) = engine.finished()
    assert outcome.code == -9 and "SIGKILL" in outcome.error


@pytest.mark.parametrize(
    ("address", "environment", "message"),
    [
        ("here:1", "there:2", "at --address here:1 (gone); start one there, or leave out --address"),
        ("", "there:2", "at RAY_ADDRESS=there:2 (gone); start one there, or unset RAY_ADDRESS"),
        ("", "", "Ray does not start here (gone); use --on local"),
    ],
)
def test_a_cluster_that_is_not_there_is_named_by_where_its_address_is_from(
    monkeypatch: pytest.MonkeyPatch, address: str, environment: str, message: str
) -> None:
    def fail(**_: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=fail))
    monkeypatch.setenv("RAY_ADDRESS", environment)
    with pytest.raises(ResourceError) as failure:
        RayEngine(address, 2, 0)
    assert message in str(failure.value)
