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
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from width_pruning_bench import BATCH, LEFT_OUT_SEED, SEQ_LEN, WidthPruningBench
from width_pruning_points import FOLDS, OUTER

from regrow import apply
from regrow.budget import Budget
from regrow.commands.generated import fill_generated
from regrow.commands.inputs import SourceSpecs, read_sources
from regrow.commands.pruning import build_pruner, collect_evidence
from regrow.commands.reconstruction import reconstruct
from regrow.data import Half
from regrow.data.windows import token_windows
from regrow.evaluation import perplexity
from regrow.methods.pruning.pruner import plan_cut
from regrow.sources import Source
from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "prior_sources.jsonl"
PRIORS = ("none", "generated", "shuffled", "random", "more")
SAME = ("dtype", "method", "target", "keep", "left_out", "windows", "judged", "sample")
"""What rows that are compared have in common."""
KEYS = (*SAME, "prior", "prior_windows", "select")


def read() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return [json.loads(line) for line in OUT.read_text("utf-8").splitlines()] if OUT.is_file() else []


def measure(args: argparse.Namespace) -> None:
    """Measure the rows that are missing."""
    torch.set_num_threads(1)
    began, known = time.monotonic(), {tuple(row[key] for key in KEYS) for row in read()}
    common = {"dtype": args.dtype, "target": args.target, "windows": args.windows, "judged": args.judged}
    cells = [
        {**common, "method": method, "keep": keep, "left_out": name, "sample": args.sample, "prior": prior}
        | {"prior_windows": 0 if prior == "none" else many, "select": "own" if prior == "none" else select}
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
    pruner = replace(build_pruner(cell["method"], {"allocation": "uniform"}), spare=OUTER)
    scored = [cell[name] for name in ("method", "left_out", "select")]
    scored += [cell[name] for name in ("prior", "prior_windows") if cell["select"] != "own"]
    if (evidence := bench.evidence.get(tuple(scored), (None, 0))[0]) is None:
        evidence = collect_evidence(bench.model, bench.axes, pruner, selection(cell, sources), batch_size=BATCH)
        bench.evidence = {tuple(scored): (evidence, 0)}
    plan = plan_cut(pruner, bench.model, bench.axes, Budget(cell["keep"], only=("mlp",)), evidence).plan
    network = apply(copy.deepcopy(bench.model), bench.axes, plan)[0]
    took["prune"] = time.process_time() - start - sum(took.values())
    judge = bench.windows(cell["left_out"], cell["judged"], LEFT_OUT_SEED, Half.CALIBRATION, BATCH)
    same = ("dtype", "left_out", "judged")
    known = next((row["dense"] for row in read() if all(row[name] == cell[name] for name in same)), None)
    nll = {"dense": known or losses(bench.model, judge), "cut": losses(network, judge)}
    took["evaluate"] = time.process_time() - start - sum(took.values())
    reconstruct(network, bench.model, bench.axes, plan, sources, {"target": cell["target"]})
    took["reconstruct"] = time.process_time() - start - sum(took.values())
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
    every = [
        bench.windows(name, n + more, sample, Half.CALIBRATION, 1) for name, more in zip(names, extra, strict=True)
    ]
    if cell["prior"] == "more":
        return every
    plain = [replace(one, batches=one.batches[:n]) for one in every]
    generator = torch.Generator().manual_seed(sample)
    match cell["prior"]:
        case "none":
            return plain
        case "generated":
            specs = SourceSpecs(0, SEQ_LEN, ("generated",), tokens=many * SEQ_LEN, seed=sample)
            kinds = read_sources(specs, bench.loaded)
            return [
                *plain,
                *fill_generated(kinds, specs, bench.loaded, max(bench.args.prior_windows), work).calibration,
            ]
        case "shuffled":
            rows = [batch.args[0][0] for one in every for batch in one.batches[n:]]
            tokens = torch.stack([row[torch.randperm(SEQ_LEN, generator=generator)] for row in rows])
        case _:
            tokens = torch.randint(bench.model.config.vocab_size, (many, SEQ_LEN), generator=generator)
    return [*plain, token_windows(cell["prior"], tokens, (), cell["prior"])]


def amounts(cell: dict[str, Any]) -> tuple[int, int, int]:
    """Return the windows of each calibration source, those of the prior, and the seed."""
    return cell["windows"], cell["prior_windows"], cell["sample"]


def show() -> None:
    """Print what is lost with each prior and what it recovers of the loss without one, paired over windows."""
    print(
        "| dtype | method | target | keep | left out | prior | windows | selection | lost, cut | lost, reconstructed "
        "| recovered | more than none |"
    )
    print("|" + "---|" * 12)
    every = read()
    bases = {tuple(row[key] for key in SAME): row for row in every if row["prior"] == "none"}
    for row in sorted(every, key=lambda row: [row[key] if key != "prior" else PRIORS.index(row[key]) for key in KEYS]):
        lost = [f"{fmean(row[name]) - fmean(row['dense']):.3f}" for name in ("cut", "reconstructed")]
        base, gains = bases.get(tuple(row[key] for key in SAME)), ["", ""]
        if base is not None:
            gains = [difference(base[name], row["reconstructed"]) for name in ("cut", "reconstructed")]
            gains[1:] = [""] if row is base else gains[1:]
        named = (row[key] for key in (*SAME[:5], *KEYS[-3:]))
        print(f"| {' | '.join(map(str, (*named, *lost, *gains)))} |")


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
