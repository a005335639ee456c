"""What GPrune costs beside FLAP on SmolLM2-135M: seconds and peak memory, each in a process of its own, one run.

    python benchmarks/gprune_cost.py --out benchmarks/results/gprune_cost.json

Both measure on the same windows of four kinds of text and make a plan for keep 0.8; nothing is cut or evaluated.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from regrow import trace
from regrow.budget import Budget
from regrow.commands.pruning import build_pruner, collect_evidence
from regrow.data import Half, text, windows
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.store.versions import versions

KINDS = ("news", "code", "manual", "talk")


def one(method: str, n: int) -> dict[str, Any]:
    """Measure and plan; the peak is that of the whole process, the model and torch included."""
    loaded = load("smollm2-135m")
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    sources = [windows(text(kind), loaded.tokenizer, n=n, seq_len=256, half=Half.CALIBRATION) for kind in KINDS]
    chosen, resting = build_pruner(method, {}), _peak()
    start = time.perf_counter()
    evidence = collect_evidence(loaded.model, axes, chosen, sources)
    middle = time.perf_counter()
    plan_cut(chosen, loaded.model, axes, Budget(0.8), evidence)
    return {
        "method": method,
        "measuring_s": round(middle - start, 1),
        "planning_s": round(time.perf_counter() - middle, 1),
        "peak_mib": round(_peak()),
        "peak_after_loading_mib": round(resting),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Both methods, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gprune_cost.json"))
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 256 tokens per kind")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.windows)))
        return
    command = [sys.executable, __file__, "--windows", str(args.windows), "--one"]
    rows = [
        json.loads(subprocess.run([*command, method], check=True, capture_output=True, text=True).stdout)
        for method in ("flap", "gprune")
    ]
    flap, ours = rows
    total = [row["measuring_s"] + row["planning_s"] for row in rows]
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "windows": args.windows,
        "rows": rows,
        "times_as_long": round(total[1] / total[0], 2),
        "times_the_memory": round(ours["peak_mib"] / flap["peak_mib"], 2),
        **versions(),
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
