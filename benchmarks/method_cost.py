"""What ``regrow prune`` costs on SmolLM2-135M by method and fit: CPU seconds and peak memory of the command, in turn.

    python benchmarks/method_cost.py                                       # all arms, one window at a time, once each
    python benchmarks/method_cost.py --batch-size 8 --arms flap fisher --repeats 2
    python benchmarks/method_cost.py --show                                # in multiples of flap

The command loads the model in bfloat16, calibrates on 16 windows of 256 tokens of each of three sources, cuts MLP
neurons to keep 0.8, writes the run folder and evaluates 1,024 tokens of each source, on one thread. Arms with
``generated`` generate 96 windows, calibrate on them too, and fit layers to the dense network. One row per run is
appended to benchmarks/results/method_cost.jsonl; rows that are there are not measured again. 1 to 6 minutes a run.
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
GENERATED = " --source generated --reconstruct"
ARMS = {
    "flap": "flap",
    "fisher": "fisher",
    "flap, reconstructed": "flap --reconstruct",
    "flap, generated text, reconstructed": "flap" + GENERATED,
    "fisher, generated text, reconstructed": "fisher" + GENERATED,
}
"""What is compared: name → the method, and further words of the command."""


def measure(arm: str, batch_size: int) -> dict[str, Any]:
    """Run the command; the peak is that of its process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "regrow", "prune", *WORDS.split(), *AMOUNTS]
        command += ["--method", *ARMS[arm].split(), "--batch-size", str(batch_size), "--out", f"{folder}/run"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, code, used = os.wait4(process.pid, 0)
        if code:
            raise SystemExit(f"{arm} failed: {' '.join(command)}")
    seconds = {"cpu_s": round(used.ru_utime + used.ru_stime, 1), "wall_s": round(time.perf_counter() - start, 1)}
    return {**seconds, "peak_mib": round(used.ru_maxrss / 1024)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the means of each method, and their ratios to the first."""
    for batch_size in sorted({row["batch_size"] for row in rows}):
        own = [row for row in rows if row["batch_size"] == batch_size]
        first: list[float] = []
        for arm in dict.fromkeys(row["arm"] for row in own):
            means = [fmean(row[name] for row in own if row["arm"] == arm) for name in ("cpu_s", "peak_mib")]
            first = first or means
            ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(means, first, strict=True))
            print(f"batch size {batch_size}, {arm}: {means[0]:.1f} CPU s, {means[1]:.0f} MiB; {ratios} times the first")


def main() -> None:
    """The arms in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--arms", nargs="+", default=[*ARMS])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="only print what is there")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.show:
        show(rows)
        return
    there = {(row["arm"], row["batch_size"], row["repeat"]) for row in rows}
    for repeat in range(args.repeats):
        for arm in args.arms:
            if (arm, args.batch_size, repeat) not in there:
                row = {"arm": arm, "batch_size": args.batch_size, "repeat": repeat}
                row |= {**measure(arm, args.batch_size), "date": time.strftime("%Y-%m-%d")}
                print(json.dumps(row), flush=True)
                with args.out.open("a") as out:
                    out.write(json.dumps({**row, "processor": platform.machine(), **versions()}) + "\n")


if __name__ == "__main__":
    main()
