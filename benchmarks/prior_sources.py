"""What a prior source adds for text of a domain that calibration has not seen, at equal numbers of tokens.

    python benchmarks/prior_sources.py --texts TEXTS              # all rows that are missing; several CPU minutes each
    python benchmarks/prior_sources.py --texts TEXTS --left-out talk --priors none generated --seconds 300
    python benchmarks/prior_sources.py --texts TEXTS --priors generated --prior-windows 96 --select own
    python benchmarks/prior_sources.py --show

SmolLM2-135M, MLP neurons, uniform, the outer blocks unpruned, with compensation of biases and then with
``--reconstruct``, for all priors to the same ``--target``. Of the four domains of a fold one is left out, the other
three calibrate, and windows of the calibration half of the left-out one judge; the other fold is not looked at.
Priors: ``none``; ``generated``: text that the model itself generates (``--source generated``); ``shuffled``: further
windows of the calibration domains, the order of tokens shuffled within each; ``random``: tokens drawn uniformly from
the vocabulary; ``more``, the control: the further windows as they are, each added to its own domain.

Layers are fitted to all text. ``--select`` says on what units are scored and means are taken: on ``all`` text, on that
of the calibration domains (``own``), or on as much of the prior as of each of these (``equal``). One row per arm,
written as soon as it is measured: negative log-likelihood per token of each window, of the cut network and of the
reconstructed one. Rows go to benchmarks/results/prior_sources.jsonl. ``TEXTS`` holds the texts of
recipes/width_pruning.py. The generated windows are kept in ``--work``. ``--seconds`` ends the run at the first arm
after so long.
"""

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from itertools import combinations, product
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from width_pruning_bench import BATCH, LEFT_OUT_SEED, SEQ_LEN, WidthPruningBench
from width_pruning_points import FOLDS

from regrow import apply
from regrow.core.budget import Budget
from regrow.core.sources import Source
from regrow.data import Half
from regrow.data.text import token_windows
from regrow.evaluation import perplexity
from regrow.jobs.inputs import SourceSpecs, fill_generated, read_sources
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.jobs.recovering import reconstruct
from regrow.methods.pruning.pruner import plan_cut
from regrow.methods.recovery import RecoveryTask
from regrow.scoring.spaces import OUTER_BLOCKS
from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "prior_sources.jsonl"
PRIORS = ("none", "generated", "shuffled", "random", "more")
ALONE = {"none": "own", "more": "all"}
"""The priors that are no source of their own, and what units are then scored on."""
MOST = 96
"""The most windows of a prior: those of a domain are chosen as if there were so many, however many are used."""
SAME = ("model", "dtype", "method", "target", "keep", "left_out", "windows", "judged", "sample")
"""What rows that are compared have in common."""
KEYS = (*SAME, "prior", "prior_windows", "select")


def read() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return [json.loads(line) for line in OUT.read_text("utf-8").splitlines()] if OUT.is_file() else []


def measure(args: argparse.Namespace) -> None:
    """Measure the rows that are missing."""
    torch.set_num_threads(1)
    began, known = time.monotonic(), {tuple(row[key] for key in KEYS) for row in read()}
    common = {
        "model": args.model,
        "dtype": args.dtype,
        "target": args.target,
        "windows": args.windows,
        "judged": args.judged,
    }
    cells = [
        {**common, "method": method, "keep": keep, "left_out": name, "sample": args.sample, "prior": prior}
        | {"prior_windows": 0 if prior == "none" else many, "select": ALONE.get(prior, select)}
        for name, method, keep, prior, select, many in product(
            args.left_out, args.method, args.keep, args.priors, args.select, args.prior_windows
        )
    ]
    cells = list({tuple(cell.values()): cell for cell in cells}.values())
    missing = [cell for cell in cells if tuple(cell[key] for key in KEYS) not in known]
    bench = WidthPruningBench(args) if missing else None
    for cell in missing:
        if bench is None or time.monotonic() - began > args.seconds:
            return
        row = cell | run(bench, cell, Path(args.work))
        row |= {
            "date": f"{date.today()}",
            "cpu": platform.processor() or platform.machine(),
            "threads": 1,
            **versions(),
        }
        with OUT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        values = (f"{fmean(row[name]):.4f}" for name in ("dense", "cut", "reconstructed"))
        print(*(cell[key] for key in KEYS), *values, row["cpu_seconds"], flush=True)


def run(bench: WidthPruningBench, cell: dict[str, Any], work: Path) -> dict[str, Any]:
    """Prune and reconstruct with a prior source, and return the values of its row."""
    start = time.process_time()
    sources = sources_of(bench, cell, work)
    took = {"sources": time.process_time() - start}
    pruner = replace(build_pruner(cell["method"], {"allocation": "uniform"}), spare=OUTER_BLOCKS)
    scored = tuple(cell[name] for name in ("method", "left_out", "select"))
    if cell["select"] != "own":
        scored += (cell["prior"], cell["prior_windows"])
    if scored not in bench.evidence:
        found = collect_evidence(bench.model, bench.axes, pruner, selection(cell, sources), batch_size=BATCH)
        bench.evidence = {scored: (found, time.process_time() - start - took["sources"])}
    evidence, took["calibrate"] = bench.evidence[scored]
    began = time.process_time()
    plan = plan_cut(pruner, bench.model, bench.axes, Budget(cell["keep"], only=("mlp",)), evidence).plan
    network = apply(copy.deepcopy(bench.model), bench.axes, plan)[0]
    took["prune"] = time.process_time() - began
    judge = bench.windows(cell["left_out"], cell["judged"], LEFT_OUT_SEED, Half.CALIBRATION, BATCH)
    same = ("model", "dtype", "left_out", "judged")
    known = next((row["dense"] for row in read() if all(row[name] == cell[name] for name in same)), None)
    nll = {"dense": known or losses(bench.model, judge), "cut": losses(network, judge)}
    took["evaluate"] = time.process_time() - began - took["prune"]
    began = time.process_time()
    reconstruct(RecoveryTask(network, bench.model, bench.axes, plan, sources), {"target": cell["target"]})
    took["reconstruct"] = time.process_time() - began
    nll["reconstructed"] = losses(network, judge)
    tokens = sum(source.tokens for source in sources)
    return {**nll, "tokens": tokens, "cpu_seconds": {name: round(value, 1) for name, value in took.items()}}


def selection(cell: dict[str, Any], sources: Sequence[Source]) -> Sequence[Source]:
    """Return the sources that units are scored on."""
    match cell["select"]:
        case "own":
            return sources[:3]
        case "equal":
            return [replace(one, batches=one.batches[: cell["windows"]]) for one in sources]
        case _:
            return sources


def losses(network: Any, judge: Source) -> list[float]:
    """Return the negative log-likelihood per token of each window."""
    found = perplexity(network, judge)
    return [round(total / count, 5) for total, count in zip(found.nll, found.tokens, strict=True)]


def sources_of(bench: WidthPruningBench, cell: dict[str, Any], work: Path) -> list[Source]:
    """Return the calibration sources of a cell, the prior source last."""
    fold = next(fold for fold in FOLDS if cell["left_out"] in fold)
    names, n, many, sample = [one for one in fold if one != cell["left_out"]], *amounts(cell)
    extra = [many // 3 + (i < many % 3) for i in range(3)]
    every = [bench.windows(name, n + MOST // 3, sample, Half.CALIBRATION, 1) for name in names]
    plain = [replace(one, batches=one.batches[:n]) for one in every]
    if cell["prior"] == "none":
        return plain
    if cell["prior"] in ("more", "shuffled"):
        for one, more in zip(every, extra, strict=True):
            if len(one) < n + more:
                raise SystemExit(
                    f"{one.name} has {len(one)} windows, not {n + more}; lower --prior-windows or --windows"
                )
    further = [one.batches[n : n + more] for one, more in zip(every, extra, strict=True)]
    if cell["prior"] == "more":
        return [replace(one, batches=[*one.batches, *new]) for one, new in zip(plain, further, strict=True)]
    generator = torch.Generator().manual_seed(sample)
    match cell["prior"]:
        case "generated":
            specs = SourceSpecs(0, SEQ_LEN, ("generated",), tokens=many * SEQ_LEN, seed=sample)
            folder = work / "_".join(str(cell[name]) for name in ("model", "dtype", "sample", "prior_windows"))
            folder.mkdir(parents=True, exist_ok=True)
            kinds = fill_generated(read_sources(specs, bench.loaded), specs, bench.loaded, many, folder)
            return [*plain, *kinds.calibration]
        case "shuffled":
            rows = [batch.args[0][0] for batches in further for batch in batches]
            tokens = torch.stack([row[torch.randperm(SEQ_LEN, generator=generator)] for row in rows])
        case _:
            tokens = torch.randint(bench.model.config.vocab_size, (many, SEQ_LEN), generator=generator)
    return [*plain, token_windows(cell["prior"], tokens, (), cell["prior"])]


def amounts(cell: dict[str, Any]) -> tuple[int, int, int]:
    """Return the windows of each calibration source, those of the prior, and the seed."""
    return cell["windows"], cell["prior_windows"], cell["sample"]


def show() -> None:
    """Print what is lost with each prior, and the differences between any two, paired over windows."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    order = lambda row: [row[key] if key != "prior" else PRIORS.index(row[key]) for key in KEYS]  # noqa: E731
    for row in sorted(read(), key=order):
        groups.setdefault(tuple(row[key] for key in SAME if key != "method"), []).append(row)
    for shared, rows in groups.items():
        print(
            ", ".join(f"{key} {value}" for key, value in zip((k for k in SAME if k != "method"), shared, strict=True))
        )
        print("\n| method, prior, windows, scored on | lost, cut | lost, reconstructed |\n|---|---|---|")
        names = [" ".join(str(row[key]) for key in ("method", "prior", "prior_windows", "select")) for row in rows]
        for name, row in zip(names, rows, strict=True):
            lost = (f"{fmean(row[what]) - fmean(row['dense']):.3f}" for what in ("cut", "reconstructed"))
            print(f"| {name} | {' | '.join(lost)} |")
        print("\n| reconstructed | against | loses less by, nats ± standard error |\n|---|---|---|")
        for (i, one), (j, other) in combinations(enumerate(rows), 2):
            print(f"| {names[j]} | {names[i]} | {difference(one['reconstructed'], other['reconstructed'])} |")
        print()


def difference(before: Sequence[float], after: Sequence[float]) -> str:
    """Return by how much the mean went down, ± the standard error of the paired difference."""
    gaps = [a - b for a, b in zip(before, after, strict=True)]
    return f"{fmean(gaps):+.4f} ± {stdev(gaps) / sqrt(len(gaps)):.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--texts", default="texts", help="the folder with the texts of recipes/width_pruning.py")
    parser.add_argument("--work", default="prior_sources", help="the folder that keeps the generated windows")
    parser.add_argument("--left-out", nargs="+", default=[*FOLDS[0]], choices=[name for fold in FOLDS for name in fold])
    parser.add_argument("--method", nargs="+", default=["flap"])
    parser.add_argument("--target", default="dense", choices=("own", "dense"), help="what layers are fitted to")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8])
    parser.add_argument("--priors", nargs="+", default=[*PRIORS], choices=PRIORS)
    parser.add_argument("--windows", type=int, default=8, help="windows of each calibration source")
    parser.add_argument("--prior-windows", nargs="+", type=int, default=[16])
    parser.add_argument("--select", nargs="+", default=["all"], choices=("all", "own", "equal"), help="scored on")
    parser.add_argument("--judged", type=int, default=64, help="windows of the left-out domain")
    parser.add_argument("--sample", type=int, default=0, help="the seed of the windows")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--show", action="store_true", help="only print the table")
    given = parser.parse_args()
    show() if given.show else measure(given)
