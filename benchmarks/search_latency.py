"""What a target in milliseconds comes to by the clock: a latency table foretells, and the found network is timed.

    python benchmarks/search_latency.py --cifar PICTURES --work FOLDER --out benchmarks/results/search_latency.json

MGAS searches operations, and operations and filters, under targets that are shares of the time that a pass of the whole
space takes; the table that it goes by is measured before. Times are those of the fastest of several passes of one
batch, by the thread's clock.
"""

import argparse
import json
import os
import platform
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

import regrow
from regrow.core.sources import Batch
from regrow.evaluation import fastest_pass, latency
from regrow.jobs.recording import Invocation
from regrow.jobs.search import Settings, build_space, run
from regrow.jobs.search_inputs import read_parts
from regrow.store.versions import versions


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 as folders of pictures")
    parser.add_argument("--work", type=Path, default=Path("latency-runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search_latency.json"))
    parser.add_argument("--space", default="cells:8-4-2")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--train", type=int, default=960)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given: dict[str, Any] = {"stages": 1, "retrain": 0, "train": args.train, "test": 100, "epochs": args.epochs}
    settings = Settings(args.space, str(args.cifar), "0.5", **given)
    task = read_parts(settings).search
    batch = Batch((task.train.inputs[: settings.batch_size],))
    whole = latency(build_space(settings, task)[0], batch).total
    rows = []
    for chosen, share in product((("operations",), ("operations", "filters")), args.shares):
        given["method_settings"] = {"levels": chosen}
        asked = Settings(args.space, str(args.cifar), f"ms={share * whole:.3f}", **given)
        folder = run(asked, Invocation(args.work / f"{len(chosen)}-{share:g}"))
        by = {row["what"]: row for row in folder.metrics()}
        clock = min(fastest_pass(regrow.load(folder.path), batch) / 1e6 for _ in range(3))
        told, levels = by["latency"], by["levels"]
        row = {
            "levels": " and ".join(chosen),
            "share": share,
            "whole_ms": told["whole"],
            "asked_ms": levels["asked"],
            "foretold_ms": levels["size"],
        }
        row |= {"clock_ms": clock, "clock / foretold": clock / levels["size"]}
        row |= {"parameters": by["found"]["parameters"], "saved_ms": levels["saved"]}
        rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": str(date.today()),
        "machine": {"cores": os.cpu_count(), "threads": 1, "machine": platform.machine()},
        "versions": versions(),
        "note": args.note,
        "space": args.space,
        "batch": settings.batch_size,
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
