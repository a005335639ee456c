"""Start-up: seconds and memory of help, lists, typos and all that is refused, beside ``python -c pass``.

    python benchmarks/startup.py                                   # this checkout, a row per command and mistake
    python benchmarks/startup.py --checkout ../before              # another checkout, with the same interpreter
    python benchmarks/startup.py --table                           # the rows of the result file, before and after

Every command line is run in a folder of its own with a finished run, a folder that holds something else, and nothing
more. The fastest of at most three runs counts; slow ones are run once. Memory is the peak resident set of the process.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared import Timed, add, arguments, last_line, rows, timed

HERE = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "startup.jsonl"

GOOD = {
    "show": "resnet18",
    "prune": "resnet18 --method magnitude --keep 0.8",
    "grow": "resnet18 --channels +32",
    "recover": "run --by refit",
    "learn": "digits --method naive",
    "search": "cells:4-2-1 --data digits --target params=20%",
    "apply": "plan.json resnet18",
    "evaluate": "resnet18",
    "chat": "smollm2-135m",
    "export": "run --to onnx",
    "report": "run",
    "undo": "run",
    "methods": "",
}
"""Command → words that it accepts, but for ``--out``."""
MODELS = (
    *("show", "prune", "grow", "apply", "evaluate", "chat", "export", "recover"),
    *("report", "undo"),
)
METHODS = {"prune": "--method", "learn": "--method", "search": "--method", "recover": "--by", "methods": ""}
FOLDERS = ("prune", "grow", "recover", "learn", "search", "apply", "export")
FILES = {"evaluate": "--json", "report": "--out"}
SOURCES = ("prune", "grow", "evaluate")
DEVICES = ("prune", "learn", "search", "evaluate", "chat")


def cases() -> Iterator[tuple[str, str, str]]:
    """Every command line: command, what is wrong with it, words."""
    yield from (("", "help", "--help"), ("", "mistyped command", "prun"), ("", "mistyped option", "--halp"))
    for command, good in GOOD.items():
        yield command, "help", f"{command} --help"
        out = " --out new" if command in FOLDERS else ""
        yield from ((command, case, f"{command} {words}") for case, words in mistakes(command, good, out))
    yield from (("methods", "list", "methods"), ("methods", "one", "methods flap"))
    yield "prune", "bad target", "prune resnet18 --target watts=3 --out new"
    yield "search", "bad target", "search cells:4-2-1 --data digits --target half --out new"
    yield "search", "missing data", "search cells:4-2-1 --data nowhere/ --target params=20% --out new"
    yield "search", "unknown space", "search cels:4-2-1 --data digits --target params=20% --out new"
    yield "learn", "missing data", "learn split:nowhere/:5 --out new"


def mistakes(command: str, good: str, out: str) -> Iterator[tuple[str, str]]:
    """What is wrong, and the words of a command."""
    yield "mistyped option", f"{good} --oot new"
    if command in MODELS:
        model = "resnet18" if "resnet18" in good else good.partition(" ")[0]
        yield "missing model", f"{good.replace(model, 'no-such-model')}{out}"
    if command in METHODS:
        yield "unknown method", f"{good} {METHODS[command]} no_such{out}"
    if command in METHODS and command != "methods":
        yield "unknown setting", f"{good} --set no_such=1{out}"
    if command in SOURCES:
        yield "missing source", f"{good} --source mine=nowhere.txt{out}"
        yield "unknown text domain", f"{good} --source nws{out}"
    if command in DEVICES:
        yield "mistyped device", f"{good} --device cudda{out}"
        yield "unavailable device", f"{good} --device cuda:99{out}"
    if command in FOLDERS:
        yield "--out holds something else", f"{good} --out full"
        yield "unwritable --out", f"{good} --out /proc/new"
    if command in FILES:
        yield f"{FILES[command]} holds something else", f"{good} {FILES[command]} full/file"
        yield f"unwritable {FILES[command]}", f"{good} {FILES[command]} /proc/new/file.json"


def fastest(words: list[str], folder: Path, env: dict[str, str]) -> Timed:
    """The fastest of three runs; of one run if it takes two seconds."""
    runs = [timed(words, folder, env)]
    while len(runs) < 3 and runs[0].seconds < 2:
        runs.append(timed(words, folder, env))
    return min(runs, key=lambda run: run.seconds)


def imports_torch(words: list[str], folder: Path, env: dict[str, str]) -> bool:
    """Whether a command line imports torch."""
    told = timed([words[0], "-X", "importtime", *words[1:]], folder, env).text
    return any(line.split("|")[-1].strip() == "torch" for line in told.splitlines())


def measure(checkout: Path, only: str) -> None:
    """Run every command line of a checkout, and append a row for each to the result file."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, text=True).strip()
    env = {"PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(HERE / "tests" / "fixtures" / "runs" / "prune", folder / "run")
        (folder / "full").mkdir()
        (folder / "full" / "file").write_text("something else\n")
        (folder / "plan.json").write_text((folder / "run" / "ledger.json").read_text())
        for command, case, line in cases():
            if only not in line:
                continue
            bare = fastest([sys.executable, "-c", "pass"], folder, env)
            words = [sys.executable, "-m", "regrow", *line.split()]
            done = fastest(words, folder, env)
            row = {"commit": commit, "command": command, "case": case, "line": f"regrow {line}", "code": done.code}
            row |= {"message": "" if case == "help" else last_line(done.text)}
            row |= {"seconds": round(done.seconds, 3), "cpu_seconds": round(done.cpu, 3)}
            row |= {"peak_mb": round(done.peak, 1), "python_seconds": round(bare.seconds, 3)}
            row |= {"python_mb": round(bare.peak, 1)}
            row |= {"torch": imports_torch(words, folder, env) if done.seconds < 2 else True}
            add(RESULTS, row)
            print(
                f"{done.seconds - bare.seconds:6.2f} s  {done.peak:6.0f} MB  torch {row['torch']!s:5}  {line}",
                flush=True,
            )


def table() -> None:
    """Print the rows of the first and the last commit in the result file side by side."""
    every = rows(RESULTS)
    commits = list(dict.fromkeys(row["commit"] for row in every))
    by = {(row["commit"], row["line"]): row for row in every}
    print(f"seconds above python -c pass, and peak MB: {commits[0]} → {commits[-1]}")
    for command, case, line in cases():
        cells = []
        for commit in (commits[0], commits[-1]):
            row = by.get((commit, f"regrow {line}"))
            absent = row is None or ("No such command" in row["message"] and case != "mistyped command")
            cells.append("–" if absent else f"{row['seconds'] - row['python_seconds']:.2f} s {row['peak_mb']:.0f} MB")
        print(f"{command or 'regrow':10} {case:28} {cells[0]:>16} → {cells[1]}")


if __name__ == "__main__":
    given = arguments(__doc__, checkout=HERE, only="", table=False)
    if given.table:
        table()
    else:
        measure(given.checkout.resolve(), given.only)
