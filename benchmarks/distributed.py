"""Several processes on one machine: calibration with one and two, one thread each.

    python benchmarks/distributed.py                      # about four minutes on two idle cores

SmolLM2-135M is pruned from the command line by one process and by two (torchrun), in turns. What counts is the wall
time of calibration, as the run folder records it: windows, sums and the stored statistics, without start-up; efficiency
is t₁ / (2 · t₂), which takes two idle cores (``load`` is the load average before the first run). The plan, the weights
and the measurements are compared byte for byte. A row goes to benchmarks/results/distributed.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "distributed.jsonl"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
FILES = ("ledger.json", "model.safetensors", "scores.json", "metrics.jsonl")


def run(processes: int, *words: str) -> None:
    """Run a command of regrow in some processes, one thread each."""
    launch = ("-m", "regrow") if processes == 1 else (*TORCHRUN, str(processes), "-m", "regrow")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *launch, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def calibration(repeats: int, tokens: int) -> dict[str, object]:
    """Prune with one and two processes in turns, and return the times of calibration."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        amounts = ("--tokens", str(tokens), "--eval-tokens", "512", "--seq-len", "512")
        for _ in range(repeats):
            for processes in times:
                out = place / f"run-{processes}-{len(times[processes])}"
                chosen = ("--keep", "0.7", "--source", "news", "--no-verify", "--no-undo")
                run(processes, "prune", "smollm2-135m", *chosen, *amounts, "--out", str(out))
                times[processes].append(json.loads((out / "run.json").read_text())["seconds"]["calibrate"])
                print(processes, "processes:", times[processes][-1], "s", flush=True)
        same = all(len({(one / file).read_bytes() for one in place.iterdir()}) == 1 for file in FILES)
    one, two = (statistics.median(values) for values in times.values())
    return {"what": "calibration", "tokens": tokens, "times": times, "efficiency": one / 2 / two, "same_files": same}


def main() -> None:
    """Measure and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    row = calibration(given.repeats, given.tokens)
    row |= {"load": load, "cores": os.cpu_count(), "date": str(date.today()), "versions": versions()}
    with OUT.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
