"""What measuring and cutting cost on SmolLM2-135M, as ratios in one run.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

Calibration is compared with plain forward passes over the same batches, both without the head of the language model,
in turns, median of several; surgery and saving are timed once per repeat on fresh copies.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from regrow import apply, trace
from regrow.core.budget import Budget
from regrow.core.scores import Need
from regrow.data import Half, text, windows
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.scoring.collect import collect
from regrow.store import save
from regrow.store.versions import versions


def calibration(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Seconds of one pass with and without the running sums."""
    loaded = load("smollm2-135m", dtype=dtype)
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    source = windows(text("code"), loaded.tokenizer, n=16, seq_len=256, half=Half.CALIBRATION, batch_size=4)

    def plain() -> None:
        with torch.no_grad():
            for batch in source:
                loaded.model.base_model(*batch.args, **batch.kwargs)

    def measuring() -> None:
        collect(loaded.model, axes, [source], {Need.ACTIVATIONS})

    return {"dtype": str(dtype).removeprefix("torch."), **_in_turns(plain, measuring, repeats)}


def _in_turns(plain: Any, other: Any, repeats: int) -> dict[str, Any]:
    plain(), other()
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "measuring": []}
    for turn in range(repeats):
        pair = [("plain", plain), ("measuring", other)]
        for name, run in pair if turn % 2 else reversed(pair):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    middle = {name: [statistics.median(t[i] for t in values) for i in (0, 1)] for name, values in times.items()}
    return {
        "repeats": repeats,
        "plain_s": round(middle["plain"][0], 3),
        "measuring_s": round(middle["measuring"][0], 3),
        "ratio": round(middle["measuring"][0] / middle["plain"][0], 3),
        "ratio_of_cpu_time": round(middle["measuring"][1] / middle["plain"][1], 3),
        "ratio_of_fastest": round(min(times["measuring"])[0] / min(times["plain"])[0], 3),
    }


def cutting(repeats: int) -> dict[str, Any]:
    """Seconds of surgery and of saving at keep 0.8, in float32."""
    loaded = load("smollm2-135m")
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    source = windows(text("code"), loaded.tokenizer, n=4, seq_len=256, half=Half.CALIBRATION)
    method = build_pruner("flap", {})
    evidence = collect_evidence(loaded.model, axes, method, [source])
    plan = plan_cut(method, loaded.model, axes, Budget(0.8), evidence).plan
    surgery, saving = [], []
    for _ in range(repeats):
        model = copy.deepcopy(loaded.model)
        start = time.perf_counter()
        apply(model, axes, plan)
        middle = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "model", origin=loaded.origin, tokenizer=loaded.tokenizer)
            saving.append(time.perf_counter() - middle)
        surgery.append(middle - start)
    both = [a + b for a, b in zip(surgery, saving, strict=True)]
    medians = {"surgery_s": surgery, "save_s": saving, "both_s": both}
    return {"repeats": repeats, **{name: round(statistics.median(values), 2) for name, values in medians.items()}}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "versions": versions(),
        "calibration": [calibration(dtype, args.repeats) for dtype in (torch.float32, torch.bfloat16)],
        "cutting": cutting(3),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
