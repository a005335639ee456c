"""Processes in which the cells of a grid run: on this machine, or as tasks of a Ray cluster.

A cell is the command line of a pruning run in a process of its own, which ends with the process that started it (on
Linux), so that a cell that is started again never finds its predecessor still writing.
"""

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.errors import ResourceError
from regrow.limits import reason

_START = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
sys.argv[:] = ["regrow", *sys.argv[2:]]
from regrow.cli import main
main()
"""
_TAIL = 2**14
_log = logging.getLogger("regrow")
_POLL = 0.2
_STORE = 2**27


@dataclass(frozen=True)
class CellJob:
    """A cell as a process: its command line, and where it runs.

    Args:
        name: The cell's name.
        words: The command line, without the program's name.
        log: The file that gets what it prints.
        folder: The working directory.
        threads: CPU threads.
        gpus: GPUs that it needs; a Ray cluster gives it one.
    """

    name: str
    words: tuple[str, ...]
    log: str
    folder: str
    threads: int
    gpus: int = 0


@dataclass(frozen=True)
class CellOutcome:
    """How a process ended.

    Args:
        code: Its exit code; negative: the number of the signal that killed it; ``None``: it was lost with its worker.
        error: Why it failed; empty if it did not.
        host: The name of the machine.
        seconds: How long it ran; ``None`` if that is not known.
    """

    code: int | None
    error: str
    host: str
    seconds: float | None


def start(job: CellJob) -> subprocess.Popen[bytes]:
    """Start the process of a cell; what it prints is appended to its log.

    Args:
        job: The cell.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job.threads))
    words = [sys.executable, "-P", "-W", "ignore", "-c", _START, str(os.getpid()), *job.words]
    with Path(job.log).open("ab") as log:
        log.write(f"{_mark(job)}\n".encode())
        log.flush()
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=job.folder,
            env=os.environ | threads,
        )


def count_starts(job: CellJob) -> int:
    """Return how often the process of a cell was started, which its log notes.

    Args:
        job: The cell.
    """
    log = Path(job.log)
    return log.read_text("utf-8", "replace").splitlines().count(_mark(job)) if log.is_file() else 0


def outcome_of(job: CellJob, code: int, began: float) -> CellOutcome:
    """Return how a process ended, with the last line of its log that tells why.

    Args:
        job: The cell.
        code: The exit code; negative for a signal.
        began: When it was started, by the monotonic clock.
    """
    error = ""
    if code < 0:
        error = f"its process was killed by {_signal_name(-code)}; if memory ran out, lower --jobs"
    elif code:
        with Path(job.log).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        own = [line.removeprefix("regrow: ") for line in lines if line.startswith("regrow: ")]
        error = (own or lines or [f"its process ended with exit code {code}"])[-1]
    return CellOutcome(code, error, socket.gethostname(), round(time.monotonic() - began, 1))


def run_job(job: CellJob) -> CellOutcome:
    """Run the process of a cell to its end: the task of a Ray cluster.

    Args:
        job: The cell.
    """
    began = time.monotonic()
    return outcome_of(job, start(job).wait(), began)


class Engine(ABC):
    """Starts the processes of cells, and tells which have ended."""

    @abstractmethod
    def submit(self, job: CellJob) -> None:
        """Start a cell, or hand it over to be started.

        Args:
            job: The cell.
        """

    @abstractmethod
    def finished(self) -> list[tuple[CellJob, CellOutcome]]:
        """Wait for a fraction of a second, and return the cells that have ended, with how they did."""

    @abstractmethod
    def close(self) -> None:
        """Stop what is still running, and release what was started."""


class LocalEngine(Engine):
    """Runs cells as processes on this machine."""

    def __init__(self) -> None:
        self._running: list[tuple[CellJob, subprocess.Popen[bytes], float]] = []

    def submit(self, job: CellJob) -> None:
        """Start a cell."""
        self._running.append((job, start(job), time.monotonic()))

    def finished(self) -> list[tuple[CellJob, CellOutcome]]:
        """Wait for a fraction of a second, and return the cells that have ended."""
        time.sleep(_POLL)
        ended = [one for one in self._running if one[1].poll() is not None]
        self._running = [one for one in self._running if one not in ended]
        return [(job, outcome_of(job, process.returncode, began)) for job, process, began in ended]

    def close(self) -> None:
        """Kill what is still running; its run folders are resumed by the next run of the grid."""
        for _, process, _ in self._running:
            process.kill()
            process.wait()


class RayEngine(Engine):
    """Runs cells as tasks of a Ray cluster, where regrow is installed and the same folders are seen.

    Args:
        address: The address of a running cluster; empty: that of ``RAY_ADDRESS``, else one is started here.
        cpus: The CPUs of a cluster that is started here; ``None``: those of this machine.
        retries: How often Ray runs a task again after its worker died.

    Raises:
        ResourceError: If there is no such cluster.
        ImportError: If ray is not installed.
    """

    def __init__(self, address: str, cpus: int | None, retries: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray: Any = ray
        running = address or os.environ.get("RAY_ADDRESS", "")
        own = {} if running else {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE}
        try:
            ray.init(address=running or "local", log_to_driver=False, logging_level="ERROR", **own)
        except Exception as error:
            raise ResourceError(_describe_failure(address, reason(error))) from None
        self._task, self._retries = ray.remote(run_job), retries
        self._running: dict[Any, CellJob] = {}
        self._known: set[tuple[int, int]] = set()

    def submit(self, job: CellJob) -> None:
        """Hand a cell over to the cluster, which runs it when it has the CPUs; a log message if no machine has them."""
        if (job.threads, job.gpus) not in self._known:
            self._known.add((job.threads, job.gpus))
            machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            if not any(one.get("CPU", 0) >= job.threads and one.get("GPU", 0) >= job.gpus for one in machines):
                _log.warning(
                    "no machine of the Ray cluster has %d CPUs and %d GPUs, which a cell needs: cells wait until one "
                    "joins; lower --threads, or stop with Ctrl-C",
                    job.threads,
                    job.gpus,
                )
        needs = {"num_cpus": job.threads, "num_gpus": job.gpus, "max_retries": self._retries}
        self._running[self._task.options(name=job.name, **needs).remote(job)] = job

    def finished(self) -> list[tuple[CellJob, CellOutcome]]:
        """Wait for a fraction of a second, and return the cells that have ended."""
        ended, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=_POLL)
        return [(self._running.pop(one), self._outcome(one)) for one in ended]

    def close(self) -> None:
        """Cancel what is still running, and leave the cluster."""
        for one in self._running:
            self._ray.cancel(one, force=True)
        self._ray.shutdown()

    def _outcome(self, task: Any) -> CellOutcome:
        try:
            outcome: CellOutcome = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            return CellOutcome(None, f"Ray lost it: {reason(error)}", "", None)
        return outcome


def make_engine(on: str, *, address: str = "", cpus: int | None = None, retries: int = 0) -> Engine:
    """Return the engine that a grid runs on.

    Args:
        on: ``local`` or ``ray``.
        address: As for :class:`RayEngine`.
        cpus: As for :class:`RayEngine`.
        retries: As for :class:`RayEngine`.
    """
    return LocalEngine() if on == "local" else RayEngine(address, cpus, retries)


def _describe_failure(address: str, why: str) -> str:
    """Return why a Ray cluster cannot be used and what to do, by where its address is from."""
    if address:
        return f"no Ray cluster at --address {address} ({why}); start one there, or leave out --address"
    if variable := os.environ.get("RAY_ADDRESS"):
        return f"no Ray cluster at RAY_ADDRESS={variable} ({why}); start one there, or unset RAY_ADDRESS"
    return f"Ray does not start here ({why}); use --on local"


def _mark(job: CellJob) -> str:
    return f"$ {shlex.join(['regrow', *job.words])}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
