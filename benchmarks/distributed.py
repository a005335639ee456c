"""Several processes on one machine, one thread each: time of calibration, and memory and losses of distillation.

    python benchmarks/distributed.py                      # calibration: about four minutes on two idle cores
    python benchmarks/distributed.py --distil             # distillation, whole and sharded: about six minutes

SmolLM2-135M is pruned from the command line by one process and by two (torchrun), in turns. What counts is the wall
time of calibration, as the run folder records it: windows, sums and the stored statistics, without start-up; efficiency
is t₁ / (2 · t₂), which takes two idle cores (``load`` is the load average before the first run). The plan, the weights
and the measurements are compared byte for byte.

``--distil`` prunes it to 0.7 and recovers it by distillation in one process, in two that hold everything, and in two
that share everything by FSDP2 (``--fsdp``). What counts is the largest difference of the held-out losses from those of
one process, and the peak resident memory per process (VmHWM of the whole process, with imports and loading) as a
fraction of that of one. Rows go to benchmarks/results/distributed.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NoReturn

from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "distributed.jsonl"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
FILES = ("ledger.json", "model.safetensors", "scores.json", "metrics.jsonl")


def run(processes: int, *words: str, peak: Path | None = None) -> None:
    """Run a command of regrow in some processes, one thread each; note the peak memory of each in a file."""
    command = ("-m", "regrow") if peak is None else (__file__, "--work", str(peak))
    launch = command if processes == 1 else (*TORCHRUN, str(processes), *command)
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


DISTIL = ("--by", "distil", "--tokens", "2304", "--set", "lr=1e-4", "--set", "held_out=0.1")


def distillation(place: Path) -> dict[str, object]:
    """Distil in one process, in two, and in two with sharded models; return losses and peaks."""
    cut = place / "cut"
    if not cut.exists():
        amounts = ("--tokens", "1024", "--eval-tokens", "512", "--seq-len", "128", "--only", "mlp")
        run(1, "prune", "smollm2-135m", "--keep", "0.7", "--source", "news", "--no-verify", *amounts, "--out", str(cut))
    cases = {"one": (1,), "two": (2,), "fsdp": (2, "--fsdp")}
    losses, peaks, seconds = {}, {}, {}
    for name, (processes, *words) in cases.items():
        out, peak = place / name, place / f"{name}-peak"
        if not (out / "report.html").exists():
            run(processes, "recover", str(cut), *DISTIL, *words, "--out", str(out), peak=peak)
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        row = next(row for row in rows if row["what"] == "recovery" and row["by"] == "distil")
        losses[name] = [check["held_out"] for check in row["history"]]
        seconds[name] = row["seconds"]
        peaks[name] = [int(one.read_text()) for one in sorted(place.glob(f"{peak.name}.*"))]
        print(name, losses[name], peaks[name], flush=True)
    one = losses["one"]
    differences = {name: max(abs(a - b) for a, b in zip(one, losses[name], strict=True)) for name in ("two", "fsdp")}
    ratios = {name: max(peaks[name]) / peaks["one"][0] for name in ("two", "fsdp")}
    row = {"what": "distillation", "words": DISTIL, "losses": losses, "peaks": peaks, "seconds": seconds}
    return row | {"largest_difference": differences, "peak_ratio": ratios}


def work(peak: Path, words: Sequence[str]) -> NoReturn:
    """Run a command of regrow in this process, and write its peak resident memory to a file of its rank."""
    from regrow.cli import code_of

    code = code_of([*words])
    status = Path("/proc/self/status").read_text().splitlines()
    bytes = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    peak.with_name(f"{peak.name}.{os.environ.get('RANK', '0')}").write_text(str(bytes))
    sys.exit(code)


def main() -> None:
    """Measure and append the row."""
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "distributed-distil")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    row = distillation(given.folder) if given.distil else calibration(given.repeats, given.tokens)
    row |= {"load": load, "cores": os.cpu_count(), "date": str(date.today()), "versions": versions()}
    with OUT.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
