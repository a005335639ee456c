"""What least squares after a cut recovers on a text domain that it was not fitted to: ways to choose ridge and target.

    python benchmarks/reconstruction.py                        # all rows that are missing; about 2 minutes per arm
    python benchmarks/reconstruction.py --folds talk --keeps 0.8 --seconds 600
    python benchmarks/reconstruction.py --show

SmolLM2-135M in bfloat16, cut by FLAP with its compensation of biases; ``mlp``: MLP neurons alone, the first and the
last block left as they are; ``all``: all units of all blocks. Of the four included text domains three calibrate and are
fitted to, and the calibration half of the fourth judges (its name is the fold): evaluation halves are for tests
alone. Arms: ``means``: the cut alone; ``held_out``: ``recover --by refit`` with its defaults; ``left_out``: the ridge
chosen on left-out sources; ``shrunk``: shrinkages too; ``dense``: the dense network's values as the target;
``defaults``: those of ``--reconstruct``. One row per arm, as soon as it is measured: the mean negative log-likelihood
per token of each window of the judging domain, and CPU seconds of the fit on one thread. Rows go to
benchmarks/results/reconstruction.jsonl.
``--seconds`` ends the run at the first arm after so long.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from datetime import date
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from regrow import data, evaluation
from regrow.core.budget import Budget
from regrow.data import Half
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.pruning_inputs import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.methods.recovery import RecoveryTask, refit
from regrow.settings.prune import make_reconstruction_settings
from regrow.store.run_record import versions
from regrow.surgery import apply
from regrow.tracing import trace
from regrow.tracing.meta_copy import clone_model

OUT = Path(__file__).parent / "results" / "reconstruction.jsonl"
MODEL, SEQ = "smollm2-135m", 256
DOMAINS = ("news", "code", "manual", "talk")
CUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "mlp": {"only": ("mlp",), "exclude": ("layers.0", "layers.29")},
    "all": {},
}
SHRINKAGES = (0.25, 0.5, 0.75, 1.0)
ARMS: Mapping[str, Mapping[str, Any] | None] = {
    "means": None,
    "held_out": {},
    "left_out": {"choose_on": "left_out_source"},
    "left_out, shrunk": {"choose_on": "left_out_source", "shrinkages": SHRINKAGES},
    "defaults": make_reconstruction_settings(()),
    "held_out, dense": {"target": "dense"},
    "left_out, dense": {"choose_on": "left_out_source", "target": "dense"},
    "left_out, shrunk, dense": {"choose_on": "left_out_source", "shrinkages": SHRINKAGES, "target": "dense"},
}
KEYS = ("fold", "cut", "keep", "arm", "tokens", "windows", "seed", "half")
JUDGE_SEED = 1000
"""The seed of the windows that judge; those that calibrate have seeds from 0."""


def read() -> list[dict[str, Any]]:
    """Return the rows that are there; the first of them were judged on evaluation halves, and do not say so."""
    rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.is_file() else []
    return [{"half": Half.EVALUATION.value, **row} for row in rows]


def measure(args: argparse.Namespace) -> None:
    """Measure the rows that are missing."""
    torch.set_num_threads(1)
    began, known = time.monotonic(), {tuple(row[key] for key in KEYS) for row in read()}
    loaded = load_model(ModelSpec(MODEL, "bfloat16"))
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)

    def windows(name: str, many: int, half: Half, seed: int) -> Any:
        return data.windows(data.text(name), loaded.tokenizer, n=many, seq_len=SEQ, seed=seed, half=half)

    for fold in args.folds:
        names = [name for name in DOMAINS if name != fold]
        amount = args.tokens // SEQ // len(names)
        common = {"tokens": args.tokens, "windows": args.windows, "seed": args.seed, "half": Half.CALIBRATION.value}
        cells = [
            {"fold": fold, "cut": cut, "keep": keep, "arm": arm, **common}
            for cut in args.cuts
            for keep in args.keeps
            for arm in args.arms
        ]
        missing = [cell for cell in cells if tuple(cell[key] for key in KEYS) not in known]
        if not missing:
            continue
        sources = [windows(name, amount, Half.CALIBRATION, args.seed) for name in names]
        judge = windows(fold, args.windows, Half.CALIBRATION, JUDGE_SEED)
        pruner, evidence, at = build_pruner("flap", {}), None, None
        for cell in missing:
            if time.monotonic() - began > args.seconds:
                return
            if at != (cell["cut"], cell["keep"]):
                evidence = evidence or collect_evidence(loaded.model, axes, pruner, sources)
                limits = Budget(cell["keep"], **CUTS[cell["cut"]])
                plan = plan_cut(pruner, loaded.model, axes, limits, evidence).plan
                at, small = (cell["cut"], cell["keep"]), apply(clone_model(loaded.model), axes, plan)[0]
            model, settings, start, found = small, ARMS[cell["arm"]], time.process_time(), {}
            if settings is not None:
                model = clone_model(small)
                task = RecoveryTask(model, loaded.model, axes, plan, sources)
                found = refit.refit(task, refit.Settings(**settings))
            seconds = time.process_time() - start
            measured = evaluation.perplexity(model, judge)
            nll = [total / many for total, many in zip(measured.nll, measured.tokens, strict=True)]
            layers = [{name: round(v, 5) if isinstance(v, float) else v for name, v in one.items()}
                      for one in found.get("layers", [])]  # fmt: skip
            with OUT.open("a") as file:
                row = cell | {"nll": fmean(nll), "cpu_seconds": round(seconds, 1), "nll_per_window": nll}
                row |= {"layers": layers, "date": f"{date.today()}", "cpu": platform.processor(), **versions()}
                file.write(json.dumps(row) + "\n")
            print(*(cell[key] for key in KEYS), f"{row['nll']:.4f} {seconds:.0f} s", flush=True)


def show() -> None:
    """Print per fold, cut and keep the mean negative log-likelihood, and paired differences to ``held_out``."""
    rows = read()
    print("| cut | keep | judged on | half | windows | arm | nats/token | to means alone | to held_out | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        at = tuple(row[key] for key in ("cut", "keep", "fold", "half", "windows", "tokens", "seed"))
        cells.setdefault(at, {})[row["arm"]] = row
    for (cut, keep, fold, half, *_), arms in sorted(cells.items()):
        for arm, row in arms.items():
            pairs = [difference(row, arms.get(other)) for other in ("means", "held_out")]
            words = [cut, keep, fold, half, len(row["nll_per_window"]), arm, f"{row['nll']:.4f}", *pairs]
            words.append(f"{row['cpu_seconds']:.0f}")
            print(f"| {' | '.join(map(str, words))} |")


def difference(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    """Return the paired difference of two arms, ± its standard error over windows."""
    if other is None or other is row:
        return ""
    gaps = [a - b for a, b in zip(row["nll_per_window"], other["nll_per_window"], strict=True)]
    return f"{fmean(gaps):+.4f} ± {stdev(gaps) / sqrt(len(gaps)):.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="+", default=DOMAINS, choices=DOMAINS)
    parser.add_argument("--cuts", nargs="+", default=[*CUTS], choices=[*CUTS])
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.8, 0.7])
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    parser.add_argument("--tokens", type=int, default=12288, help="tokens of all calibration sources together")
    parser.add_argument("--windows", type=int, default=96, help="windows of the judging domain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    show() if given.show else measure(given)
