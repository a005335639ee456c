"""Jobs apart: each in a process of its own, with limits of time and memory, and its result as a row of JSON."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

Row = dict[str, Any]


def run(
    command: Sequence[str], seconds: float, gigabytes: float = 14, environment: Mapping[str, str] | None = None
) -> Row:
    """What a process says last in JSON; if it fails, or is stopped, also how that went."""
    start = time.perf_counter()
    most = int(gigabytes * 2**30)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),
    )
    try:
        out, errors = process.communicate(timeout=seconds)
        problem = "" if process.returncode == 0 else _last(errors) or f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        problem = f"stopped after {seconds:g} s"
    said = [line for line in out.splitlines() if line.startswith("{")]
    row = json.loads(said[-1]) if said else {}
    if problem:
        row["error"] = problem
    return row | {"wall_s": round(time.perf_counter() - start, 1)}


def _last(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def tell(row: Row) -> None:
    """Say what is known so far; the last word counts."""
    print(json.dumps(row), flush=True)


def peak() -> float:
    """The most memory this process ever held, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def rows(path: Path) -> dict[str, Row]:
    """The rows of a file by their key; later ones stand for earlier ones."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def collect(keys: Iterable[str], job: Callable[[str], Row], path: Path, jobs: int = 1, again: bool = False) -> None:
    """Run a job for each key that has no row yet, so many at a time, and append its row to the file."""
    known = {} if again else rows(path)
    left, lock = [key for key in keys if key not in known], Lock()
    path.parent.mkdir(parents=True, exist_ok=True)

    def one(key: str) -> None:
        row = {"key": key, **job(key), "date": time.strftime("%Y-%m-%d")}
        with lock, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            print(f"{key}: {row.get('error') or 'done'} ({row['wall_s']} s)", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, left))
    final = rows(path)
    path.write_text("".join(json.dumps(final[key]) + "\n" for key in sorted(final)), encoding="utf-8")
