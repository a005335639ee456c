"""What scripts here and in benchmarks/ share: arguments, rows in a file, tables, jobs in processes of their own.

Rows are lines of JSON. A row is written when it is whole, and what is there is not done again, so that the same command
goes on where it was stopped.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock
from typing import Any

Row = dict[str, Any]


def arguments(
    doc: str | None, out: Path | None = None, /, choice: Mapping[str, Any] | None = None, **options: Any
) -> Namespace:
    """Read the command line; the docstring of a script, which explains its options, is its ``--help``.

    Args:
        doc: The docstring.
        out: The default of ``--out``, the file of results; with it there is ``--show``, which prints what is there.
        choice: Name of a positional argument → its values; empty: any. A name that ends in ``*`` takes several or none.
        options: Name → default. A type: no default. A bool: a switch, ``--no-NAME`` if it is on. A list: several values
            of the type of the first; ``[int]``: none unless said. A tuple: some of these; all, if it is not given.

    >>> sys.argv = ["script", "--seeds", "3", "--keep", "0.8", "0.5", "--no-fast"]
    >>> args = arguments("Do.", seeds=5, keep=[0.7], fast=True, work=Path)
    >>> args.seeds, args.keep, args.fast, args.work
    (3, [0.8, 0.5], False, None)
    """
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    for name, values in (choice or {}).items():
        several = name.endswith("*")
        parser.add_argument(name.rstrip("*"), nargs="*" if several else None, choices=[*values] if values else None)
    if out:
        parser.add_argument("--out", type=Path, default=out)
        parser.add_argument("--show", action="store_true")
    parser.add_argument("--job", help=SUPPRESS)
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        match default:
            case bool():
                switch = f"--no-{flag[2:]}" if default else flag
                parser.add_argument(switch, dest=name, action="store_const", const=not default, default=default)
            case list() | tuple():
                first = default[0] if default else ""
                kind = first if isinstance(first, type) else type(first)
                values = default if isinstance(default, tuple) else None
                parser.add_argument(flag, nargs="*", action="extend", type=kind, choices=values)
            case type():
                parser.add_argument(flag, type=default, default="" if default is str else None)
            case _:
                parser.add_argument(flag, type=type(default), default=default)
    args = parser.parse_args()
    for name, default in options.items():
        if isinstance(default, list | tuple) and getattr(args, name) is None:
            setattr(args, name, [] if default in ([int], [str]) else default)
    return args


def rows(path: Path) -> list[Row]:
    """Return the rows of a file; of a file that is not there, none."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def add(path: Path, row: Mapping[str, Any], **stamp: Any) -> Row:
    """Write a row with its date at once, and return it; other processes may write to the same file."""
    dated = {**row, **stamp} | ({} if "day" in stamp or "date" in row else {"date": today()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(dated) + "\n").encode())
    return dated


def today() -> str:
    """Return the date as rows have it."""
    return time.strftime("%Y-%m-%d")


def write(path: Path, result: object) -> None:
    """Write a whole result as indented JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def spread(values: Sequence[float], scale: float = 100) -> str:
    """Mean and standard deviation, in percent unless the scale says otherwise.

    >>> spread([0.5, 0.6]), spread([1200.0], 1)
    ('55.00 ± 7.07', '1,200.00')
    """
    return f"{scale * fmean(values):,.2f}" + (f" ± {scale * stdev(values):,.2f}" if len(values) > 1 else "")


def difference(pairs: Sequence[tuple[float, float]]) -> str:
    """How far one is from another in percent, run by run, and how surely, by a paired t-test.

    >>> difference([(0.5, 0.4)]), difference([(0.5, 0.4), (0.6, 0.45), (0.7, 0.6)])
    ('+10.00', '+11.67 (p = 0.020)')
    """
    from scipy.stats import ttest_rel

    gaps = [a - b for a, b in pairs]
    if len(gaps) < 2:
        return f"{100 * gaps[0]:+.2f}" if gaps else ""
    chance = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return f"{100 * fmean(gaps):+.2f} (p {'<' if chance < 0.001 else '='} {max(chance, 0.001):.3f})"


def line(cells: Iterable[object]) -> str:
    """A line of a table in Markdown.

    >>> line(["a", 1])
    '| a | 1 |'
    """
    return f"| {' | '.join(map(str, cells))} |"


def table(columns: Sequence[str], lines: Iterable[Iterable[object]] = ()) -> Iterator[str]:
    """A table in Markdown, line by line.

    >>> [*table(["a", "b"], [[1, 2]])]
    ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    yield line(columns)
    yield f"|{'---|' * len(columns)}"
    yield from map(line, lines)


def run(
    command: Sequence[object], seconds: float = 1e6, gigabytes: float = 14, environment: Mapping[str, str] | None = None
) -> Row:
    """What a process says last in JSON; if it fails, or is stopped, also how that went (``error``)."""
    start, limit = time.perf_counter(), int(gigabytes * 2**30)
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    try:
        out, errors = process.communicate(timeout=seconds)
        problem = last_line(errors) or f"ended with {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        problem = f"stopped after {seconds:g} s"
    said = [text for text in out.splitlines() if text.startswith("{")]
    row = json.loads(said[-1]) if said else {}
    return row | ({"error": problem} if problem else {}) | {"wall_s": round(time.perf_counter() - start, 1)}


@dataclass(frozen=True)
class Timed:
    """What a process took, in seconds of the clock and of the processor and MiB at its peak, and what it said."""

    seconds: float
    cpu: float
    peak: float
    code: int
    text: str


def timed(command: Sequence[object], folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Timed:
    """Run a process and measure it."""
    with tempfile.TemporaryFile() as output:
        start, words, env = time.perf_counter(), [*map(str, command)], {**os.environ, **(environment or {})}
        process = subprocess.Popen(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Timed(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, process.returncode, text)


def again(job: object, *options: object) -> list[object]:
    """Return the command that runs the present script in another process, for ``--job``."""
    return [sys.executable, sys.argv[0], "--job", job, *options]


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return ([part.strip() for part in text.splitlines() if part.strip()] or [""])[-1][:300]


def finished(folder: Path) -> bool:
    """Whether a folder holds a finished run of regrow."""
    record = folder / "run.json"
    return record.is_file() and bool(json.loads(record.read_text("utf-8")).get("finished"))


def tell(row: Row) -> None:
    """Say what is known so far; the last word counts."""
    print(json.dumps(row), flush=True)


def peak() -> float:
    """The most memory this process ever held, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def by_key(path: Path) -> dict[str, Row]:
    """The rows of a file by their key; later ones stand for earlier ones."""
    return {row["key"]: row for row in rows(path)}


def collect(keys: Iterable[str], job: Callable[[str], Row], path: Path, jobs: int = 1, anew: bool = False) -> None:
    """Run a job for each key that has no row yet, so many at a time, and append its row to the file."""
    known, lock = {} if anew else by_key(path), Lock()

    def complete(key: str) -> None:
        row = job(key)
        with lock:
            add(path, {"key": key, **row})
        print(f"{key}: {row.get('error') or 'done'} ({row['wall_s']} s)", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(complete, [key for key in keys if key not in known]))
    final = by_key(path)
    path.write_text("".join(json.dumps(final[key]) + "\n" for key in sorted(final)), "utf-8")
