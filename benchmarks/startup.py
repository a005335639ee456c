"""Start-up: seconds and memory of ``--help``, of typos and of all that is refused, beside ``python -c pass``.

    python benchmarks/startup.py                                   # this checkout, a row per command and mistake
    python benchmarks/startup.py --checkout ../before              # another checkout, with the same interpreter
    python benchmarks/startup.py --table                           # the rows of the result file, before and after

Every command line is run in a folder of its own with a finished run, a folder that holds something else, and nothing
more. The fastest of at most three runs counts; slow ones are run once. Memory is the peak resident set of the process.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "startup.jsonl"

GOOD = {
    "show": "resnet18",
    "prune": "resnet18 --method magnitude --keep 0.8",
    "grow": "resnet18 --channels +32",
    "recover": "run --by bias",
    "learn": "digits --method naive",
    "search": "cells:4-2-1 --data digits --target 0.2",
    "apply": "plan.json resnet18",
    "evaluate": "resnet18",
    "chat": "smollm2-135m",
    "export": "run --to onnx",
    "compare": "run run",
    "report": "run",
    "settings": "run",
    "history": "run",
    "undo": "run",
    "methods": "",
}
"""Command → words that it accepts, but for ``--out``."""
MODELS = (
    *("show", "prune", "grow", "apply", "evaluate", "chat", "export", "recover"),
    *("compare", "report", "settings", "history", "undo"),
)
METHODS = {"prune": "--method", "learn": "--method", "search": "--method", "recover": "--by", "methods": ""}
FOLDERS = ("prune", "grow", "recover", "learn", "search", "apply", "export")
FILES = {"show": "--json", "evaluate": "--json", "settings": "--out", "report": "--out", "compare": "--out"}
SOURCES = ("prune", "grow", "evaluate")
DEVICES = ("prune", "learn", "search", "evaluate", "chat")


def cases() -> list[tuple[str, str, str]]:
    """Every command line: command, what is wrong with it, words."""
    lines = [("", "help", "--help"), ("", "mistyped command", "prun"), ("", "mistyped option", "--halp")]
    for command, good in GOOD.items():
        lines.append((command, "help", f"{command} --help"))
        lines.append((command, "mistyped option", f"{command} {good} --oot new"))
        out = " --out new" if command in FOLDERS else ""
        name = good.partition(" ")[0]
        if command in MODELS:
            former, missing = ("resnet18" if "resnet18" in good else name), "no-such-model"
            lines.append((command, "missing model", f"{command} {good.replace(former, missing)}{out}"))
        if command in METHODS:
            lines.append((command, "unknown method", f"{command} {good} {METHODS[command]} no_such{out}"))
        if command in METHODS and command != "methods":
            lines.append((command, "unknown setting", f"{command} {good} --set no_such=1{out}"))
        if command in SOURCES:
            lines.append((command, "missing source", f"{command} {good} --source mine=nowhere.txt{out}"))
            lines.append((command, "unknown text domain", f"{command} {good} --source nws{out}"))
        if command in DEVICES:
            lines.append((command, "mistyped device", f"{command} {good} --device cudda{out}"))
            lines.append((command, "unavailable device", f"{command} {good} --device cuda:99{out}"))
        if command in FOLDERS:
            lines.append((command, "--out holds something else", f"{command} {good} --out full"))
            lines.append((command, "unwritable --out", f"{command} {good} --out /proc/new"))
        if command in FILES:
            option = FILES[command]
            lines.append((command, f"{option} holds something else", f"{command} {good} {option} full/file"))
            lines.append((command, f"unwritable {option}", f"{command} {good} {option} /proc/new/file.json"))
    lines.append(("prune", "bad target", "prune resnet18 --target watts=3 --out new"))
    lines.append(("search", "bad target", "search cells:4-2-1 --data digits --target half --out new"))
    lines.append(("search", "missing data", "search cells:4-2-1 --data nowhere/ --target 0.2 --out new"))
    lines.append(("search", "unknown space", "search cels:4-2-1 --data digits --target 0.2 --out new"))
    lines.append(("learn", "missing data", "learn split:nowhere/:5 --out new"))
    return lines


def timed(words: list[str], folder: Path, env: dict[str, str]) -> tuple[float, float, float, int, str]:
    """Wall and CPU seconds, peak memory in MB, exit code and the last line of one process."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    peak = usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    return seconds, usage.ru_utime + usage.ru_stime, peak, process.returncode, lines[-1] if lines else ""


def fastest(words: list[str], folder: Path, env: dict[str, str]) -> tuple[float, float, float, int, str]:
    """The fastest of three runs; of one run if it takes two seconds."""
    runs = [timed(words, folder, env)]
    while len(runs) < 3 and runs[0][0] < 2:
        runs.append(timed(words, folder, env))
    return min(runs)


def imports_torch(words: list[str], folder: Path, env: dict[str, str]) -> bool:
    """Whether a command line imports torch."""
    told = subprocess.run(
        [words[0], "-X", "importtime", *words[1:]],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return any(line.endswith("| torch") or line.split("|")[-1].strip() == "torch" for line in told.stderr.splitlines())


def measure(checkout: Path, only: str) -> None:
    """Run every command line of a checkout, and append a row for each to the result file."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()
    env = os.environ | {"PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(HERE / "tests" / "fixtures" / "runs" / "prune", folder / "run")
        (folder / "full").mkdir()
        (folder / "full" / "file").write_text("something else\n")
        (folder / "plan.json").write_text((folder / "run" / "ledger.json").read_text())
        for command, case, line in cases():
            if only and only not in line:
                continue
            bare = fastest([sys.executable, "-c", "pass"], folder, env)
            words = [sys.executable, "-m", "regrow", *line.split()]
            seconds, cpu, peak, code, message = fastest(words, folder, env)
            row = {
                "commit": commit,
                "command": command,
                "case": case,
                "line": f"regrow {line}",
                "code": code,
                "message": "" if case == "help" else message,
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu, 3),
                "peak_mb": round(peak, 1),
                "python_seconds": round(bare[0], 3),
                "python_mb": round(bare[2], 1),
                "torch": imports_torch(words, folder, env) if seconds < 2 else True,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            }
            with RESULTS.open("a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{seconds - bare[0]:6.2f} s  {peak:6.0f} MB  torch {row['torch']!s:5}  {code}  {line}", flush=True)


def table() -> None:
    """Print the rows of the first and the last commit in the result file side by side."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    by = {(row["commit"], row["line"]): row for row in rows}
    print(f"seconds above python -c pass, and peak MB: {commits[0]} → {commits[-1]}")
    for command, case, line in cases():
        cells = []
        for commit in (commits[0], commits[-1]):
            row = by.get((commit, f"regrow {line}"))
            absent = row is None or ("No such command" in row["message"] and case != "mistyped command")
            cells.append("–" if absent else f"{row['seconds'] - row['python_seconds']:.2f} s {row['peak_mb']:.0f} MB")
        print(f"{command or 'regrow':10} {case:28} {cells[0]:>16} → {cells[1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=HERE, help="the root of the checkout that is measured")
    parser.add_argument("--only", default="", help="only command lines that contain this")
    parser.add_argument("--table", action="store_true", help="only print the committed rows")
    given = parser.parse_args()
    if given.table:
        table()
    else:
        measure(given.checkout.resolve(), given.only)
