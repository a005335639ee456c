"""What GPrune costs beside FLAP on SmolLM2-135M: CPU seconds and peak memory, each in a process of its own.

    python benchmarks/gprune_cost.py

All measure on the same windows of four kinds of text and make a plan for keep 0.8, of all units or (``--only mlp``) of
MLP neurons; nothing is cut or evaluated. One row for each call is appended to benchmarks/results/gprune_cost.jsonl;
``benchmarks/results/gprune_cost.json`` is an earlier result. About 10 minutes on an idle core.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from regrow import trace
from regrow.core.budget import Budget
from regrow.data import Half, text, windows
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.store.versions import versions

KINDS = ("news", "code", "manual", "talk")
METHODS = {"flap": "flap", "learned": "gprune"}
"""Name in the rows → method, with its defaults."""


def one(name: str, n: int, only: str) -> dict[str, Any]:
    """Measure and plan; the peak is that of the whole process, the model and torch included."""
    loaded = load("smollm2-135m")
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    sources = [windows(text(kind), loaded.tokenizer, n=n, seq_len=256, half=Half.CALIBRATION) for kind in KINDS]
    chosen, resting = build_pruner(METHODS[name], {}), _peak()
    start = time.process_time()
    evidence = collect_evidence(loaded.model, axes, chosen, sources)
    middle = time.process_time()
    plan_cut(chosen, loaded.model, axes, Budget(0.8, only=tuple(filter(None, [only]))), evidence)
    return {
        "method": name,
        "measuring_s": round(middle - start, 1),
        "planning_s": round(time.process_time() - middle, 1),
        "peak_mib": round(_peak()),
        "peak_after_loading_mib": round(resting),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """The methods one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gprune_cost.jsonl"))
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 256 tokens per kind")
    parser.add_argument("--only", default="", help="units that may be cut, such as mlp; all if not given")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        print(json.dumps(one(args.one, args.windows, args.only)))
        return
    command = [sys.executable, __file__, "--windows", str(args.windows), "--only", args.only, "--one"]
    rows = []
    for name in args.methods:
        done = subprocess.run([*command, name], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
        total = rows[-1]["measuring_s"] + rows[-1]["planning_s"]
        first = rows[0]["measuring_s"] + rows[0]["planning_s"]
        rows[-1] |= {"times_as_long": round(total / first, 2)}
        rows[-1] |= {"times_the_memory": round(rows[-1]["peak_mib"] / rows[0]["peak_mib"], 2)}
        print(json.dumps(rows[-1]), flush=True)
    found = {"date": time.strftime("%Y-%m-%d"), "processor": platform.machine(), "windows": args.windows}
    with args.out.open("a") as out:
        out.write(json.dumps({**found, "only": args.only, "rows": rows, **versions()}) + "\n")


if __name__ == "__main__":
    main()
