"""What ``regrow prune`` costs on SmolLM2-135M by method and fit: CPU seconds and peak memory of the command, in turn.

    python benchmarks/method_cost.py                                       # all arms, one window at a time, once each
    python benchmarks/method_cost.py --dtype bfloat16 --arms flap fisher --repeats 2
    python benchmarks/method_cost.py --show                                # in multiples of flap

The command loads the model, calibrates on 16 windows of 256 tokens of each of three sources, cuts MLP neurons to keep
0.8, writes the run folder and evaluates 2,048 tokens of each source, as it does by default, on one thread. Arms named
*N generated windows* generate N windows of 256 tokens, calibrate on them too, and fit layers to the dense network. One
row per run is appended to benchmarks/results/method_cost.jsonl; rows of this processor are not measured again. 2 to 15
minutes a run. Ratios depend on the processor and the dtype: products of bfloat16 are fast where there is AMX, and slow
where there is none.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "method_cost.jsonl"
WORDS = "smollm2-135m --keep 0.8 --only mlp --source news --source code --source manual --tokens 4096"
ARMS = {
    "flap": "flap",
    "fisher": "fisher",
    "flap, reconstructed": "flap --reconstruct",
    **{
        f"{method}, {n} generated windows, reconstructed": (
            f"{method} --source generated --generated-tokens {n * 256} --reconstruct"
        )
        for method, n in (*product(("flap", "fisher"), (96, 64, 48)), ("fisher_obs", 48), ("obs", 48))
    },
}
"""What is compared: name → the method, and further words of the command."""
GIVEN = ("processor", "dtype", "batch_size", "eval_tokens")
"""What rows that are compared have in common."""


def measure(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the command; the peak is that of its process."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"{WORDS} --method {ARMS[arm]} --dtype {args.dtype} --batch-size {args.batch_size}".split()
        words += ["--eval-tokens", str(args.eval_tokens), "--out", f"{folder}/run"]
        command = [sys.executable, "-m", "regrow", "prune", *words]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, code, used = os.wait4(process.pid, 0)
        if code:
            raise SystemExit(f"{arm} failed: {' '.join(command)}")
    seconds = {"cpu_s": round(used.ru_utime + used.ru_stime, 1), "wall_s": round(time.perf_counter() - start, 1)}
    return {**seconds, "peak_mib": round(used.ru_maxrss / 1024)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the means of each method, and their ratios to the first."""
    for group in sorted({tuple(row[name] for name in GIVEN) for row in rows}):
        own = [row for row in rows if tuple(row[name] for name in GIVEN) == group]
        given = ", ".join(f"{name} {value}" for name, value in zip(GIVEN, group, strict=True))
        arms = {
            arm: [fmean(row[name] for row in own if row["arm"] == arm) for name in ("cpu_s", "peak_mib")]
            for arm in ARMS
            if any(row["arm"] == arm for row in own)
        }
        for arm, means in arms.items():
            ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(means, arms.get("flap", []), strict=False))
            print(f"{given}, {arm}: {means[0]:.1f} CPU s, {means[1]:.0f} MiB; {ratios} x flap")


def main() -> None:
    """The arms in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--arms", nargs="+", default=[*ARMS])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--eval-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="only print what is there")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.show:
        show(rows)
        return
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    there = {tuple(row[name] for name in (*GIVEN, "arm", "repeat")) for row in rows}
    given = {"processor": processor, **{name: getattr(args, name) for name in GIVEN[1:]}}
    for repeat in range(args.repeats):
        for arm in args.arms:
            if (*given.values(), arm, repeat) not in there:
                row = {"arm": arm, **given, "repeat": repeat, **measure(arm, args), "date": time.strftime("%Y-%m-%d")}
                print(json.dumps(row), flush=True)
                with args.out.open("a") as out:
                    out.write(json.dumps({**row, **versions()}) + "\n")


if __name__ == "__main__":
    main()
