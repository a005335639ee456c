"""Run every combination of options as a `regrow` command of its own, on a Ray cluster or on this machine.

    pip install 'ray>=2.40'
    python recipes/grid_on_ray.py grid.toml --out GRID               on RAY_ADDRESS, or on a cluster that it starts here
    python recipes/grid_on_ray.py grid.toml --out GRID --local 4     four processes at a time, without Ray

The file is TOML or JSON. ``command`` has the words that all runs share, and ``grid`` lists of values for options:

    command = ["prune", "smollm2-135m", "--tokens", "4096"]
    grid = {method = ["flap", "wanda_sp"], keep = [0.8, 0.7], source = [["news", "code"], ["talk"]]}

Commands that are no product of lists are written out: ``rows = [["learn", "digits", "--seed", "1"], …]``. Each runs in
a folder of its own below GRID, with a log beside it. The same command skips finished runs and resumes the others. A run
that fails, or whose worker is lost, leaves the others alone; the exit code is then 1. ``GRID/rows.jsonl`` has a row per
run: its command, exit code, seconds and the last line of its log. Every machine needs regrow and the same folders.
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from harness import Row, add, arguments, finished, last_line


def read_rows(file: Path) -> list[list[str]]:
    """Return the command lines of a grid, without the program's name."""
    data = (json if file.suffix == ".json" else tomllib).loads(file.read_text("utf-8"))
    rows = [[str(word) for word in row] for row in data.get("rows", ())]
    lists = data.get("grid", {})
    for values in itertools.product(*lists.values()) if lists else ():
        words = list(data["command"])
        for name, value in zip(lists, values, strict=True):
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words += [option] * value
            else:
                for part in value if isinstance(value, list) else [value]:
                    words += [option, str(part)]
        rows.append(words)
    return rows


def run_row(words: Sequence[str], out: Path, threads: int, cwd: str) -> Row:
    """Run one command line unless its folder is finished; return its row."""
    text = " ".join(words)
    name = re.sub(r"[^\w.=]+", "-", text)[-60:].strip("-.") + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    folder, log, began, code = out / name, out / f"{name}.log", time.monotonic(), 0
    if not finished(folder):
        command = [sys.executable, "-m", "regrow", *words, "--out", str(folder)]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("wb") as file:
            code = subprocess.run(command, cwd=cwd, env=env, stdout=file, stderr=file, check=False).returncode
    last = last_line(log.read_text("utf-8", "replace")) if code else ""
    return {"folder": str(folder), "exit_code": code, "error": last, "seconds": round(time.monotonic() - began, 1)}


def submit_to_ray(rows: Sequence[Sequence[str]], out: Path, threads: int, cwd: str) -> list[Future[Row]]:
    """Submit the rows as tasks of a Ray cluster; a row with ``--device cuda`` takes a GPU."""
    import ray

    ray.init(log_to_driver=False)
    task = ray.remote(run_row).options
    gpus = [int("--device cuda" in " ".join(words)) for words in rows]
    tasks = [task(num_cpus=threads, num_gpus=gpu, max_retries=0) for gpu in gpus]
    return [task.remote(words, out, threads, cwd).future() for task, words in zip(tasks, rows, strict=True)]


def main() -> int:
    """Run a grid and print a table; return 1 if a run failed."""
    args = arguments(__doc__, choice={"file": ()}, out=Path, local=int, threads=1)
    rows, out, cwd, failed = read_rows(Path(args.file)), args.out.absolute(), str(Path.cwd()), 0
    (out / "rows.jsonl").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(args.local or 1)
    if args.local:
        futures = [pool.submit(run_row, words, out, args.threads, cwd) for words in rows]
    else:
        futures = submit_to_ray(rows, out, args.threads, cwd)
    commands = dict(zip(futures, rows, strict=True))
    try:
        for future in as_completed(futures):
            lost = future.exception()
            row = {"exit_code": None, "error": f"lost: {type(lost).__name__}"} if lost else future.result()
            failed += row["exit_code"] != 0
            add(out / "rows.jsonl", {"words": commands[future], **row})
            print(f"exit code {row['exit_code']}: {' '.join(commands[future])}  {row['error']}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{len(rows)} runs, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
