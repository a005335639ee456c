"""What ``regrow prune`` costs by method on SmolLM2-135M: CPU seconds and peak memory of the command, in turn.

    python benchmarks/method_cost.py                                # flap and fisher, 8 windows at a time, twice each
    python benchmarks/method_cost.py --batch-size 1 --repeats 1     # one window at a time
    python benchmarks/method_cost.py --show                         # fisher ÷ flap

The command loads the model in bfloat16, calibrates on 16 windows of 256 tokens of each of three sources, cuts MLP
neurons to keep 0.8, writes the run folder and evaluates 1,024 tokens of each source, on one thread. One row per run is
appended to benchmarks/results/method_cost.jsonl; rows that are there are not measured again. About 2 minutes a run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "method_cost.jsonl"
WORDS = "smollm2-135m --dtype bfloat16 --keep 0.8 --only mlp --source news --source code --source manual"
AMOUNTS = ("--tokens", "4096", "--eval-tokens", "1024")


def measure(method: str, batch_size: int) -> dict[str, Any]:
    """Run the command; the peak is that of its process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "regrow", "prune", *WORDS.split(), *AMOUNTS]
        command += ["--method", method, "--batch-size", str(batch_size), "--out", f"{folder}/run"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, code, used = os.wait4(process.pid, 0)
        if code:
            raise SystemExit(f"{method} failed: {' '.join(command)}")
    seconds = {"cpu_s": round(used.ru_utime + used.ru_stime, 1), "wall_s": round(time.perf_counter() - start, 1)}
    return {**seconds, "peak_mib": round(used.ru_maxrss / 1024)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the means of each method, and their ratios to the first."""
    for batch_size in sorted({row["batch_size"] for row in rows}):
        own = [row for row in rows if row["batch_size"] == batch_size]
        first: list[float] = []
        for method in dict.fromkeys(row["method"] for row in own):
            means = [fmean(row[name] for row in own if row["method"] == method) for name in ("cpu_s", "peak_mib")]
            first = first or means
            ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(means, first, strict=True))
            print(
                f"batch size {batch_size}, {method}: {means[0]:.1f} CPU s, {means[1]:.0f} MiB; {ratios} times the first"
            )


def main() -> None:
    """The methods in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--methods", nargs="+", default=["flap", "fisher"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="only print what is there")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.show:
        show(rows)
        return
    there = {(row["method"], row["batch_size"], row["repeat"]) for row in rows}
    for repeat in range(args.repeats):
        for method in args.methods:
            if (method, args.batch_size, repeat) not in there:
                row = {"method": method, "batch_size": args.batch_size, "repeat": repeat}
                row |= {**measure(method, args.batch_size), "date": time.strftime("%Y-%m-%d")}
                print(json.dumps(row), flush=True)
                with args.out.open("a") as out:
                    out.write(json.dumps({**row, "processor": platform.machine(), **versions()}) + "\n")


if __name__ == "__main__":
    main()
