"""Random, magnitude, Wanda-sp, LLM-Pruner and FLAP on SmolLM2-135M: every switch, three budgets, several draws.

    python recipes/smollm2_methods_table.py --texts FOLDER
    python recipes/smollm2_methods_table.py --show

Calibration: 16 windows of 256 tokens of each of four kinds (news, code, manual, talk), pooled; evaluation: 8 windows of
256 tokens of eight kinds, from the other half of each text. ``--texts`` is a folder with the four kinds that no Python
package brings, as for ``width_pruning.py``. The dense model is a 4-bit file de-quantised.

One line is written per point, and points that are there already are not run again. ``--windows``, ``--eval-windows``
and ``--draws`` set the size.
"""

import copy
import itertools
import math
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import corpora
import torch
from harness import Row, add, arguments, rows, table

from regrow import apply, trace
from regrow.core.budget import Budget
from regrow.core.scores import Evidence, Need
from regrow.core.sources import Source
from regrow.data import Half, windows
from regrow.evaluation import perplexity
from regrow.methods import METHODS
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.scoring.collect import collect

OUT = Path(__file__).parent / "results" / "smollm2_methods.jsonl"
SEEN = ("news", "code", "manual", "talk")
UNSEEN = ("prose", "legal", "wiki", "dialogue")
METHOD_NAMES = ("flap", "wanda_sp", "llm_pruner", "random", "magnitude")


def points(draws: int) -> Iterator[dict[str, Any]]:
    """Every combination; the most telling ones first."""
    for keep, draw in itertools.product((0.8, 0.9, 0.7), range(draws)):
        for method, only, compensate in itertools.product(METHOD_NAMES, ("mlp", ""), (True, False)):
            if draw and method == "magnitude" and not compensate:
                continue  # nothing of it depends on the draw
            yield {"method": method, "keep": keep, "only": only, "compensate": compensate, "draw": draw}


def key_of(point: dict[str, Any]) -> tuple:
    """What makes a point the same one."""
    return tuple(point[name] for name in ("method", "keep", "only", "compensate", "draw"))


def run(args: Namespace) -> None:
    """Fill in the points that are missing."""
    there = rows(args.out)
    done = {key_of(row) for row in there if row["method"] != "dense"}
    # Half precision is faster only where the processor computes in it. Calibration is always in float32.
    loaded, wide = load("smollm2-135m", dtype=getattr(torch, args.dtype)), load("smollm2-135m").model
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    texts = corpora.texts(args.texts)

    def read(name: str, n: int, half: Half, seed: int = 0, batch_size: int = 1) -> Source:
        return windows(texts[name](), loaded.tokenizer, n=n, seq_len=256, seed=seed, half=half, batch_size=batch_size)

    tests = [read(name, args.eval_windows, Half.EVALUATION, batch_size=4) for name in texts]
    shape = {"windows": args.windows, "eval_windows": args.eval_windows, "seq_len": 256, "dtype": args.dtype}

    def write(point: Row, model: torch.nn.Module) -> None:
        add(args.out, {**point, "nll": {source.name: perplexity(model, source).mean for source in tests}, **shape})

    if not any(row["method"] == "dense" and row.get("dtype", "bfloat16") == args.dtype for row in there):
        write({"method": "dense", "keep": 1.0, "only": "", "compensate": False, "draw": 0}, loaded.model)
    evidence: dict[int, Evidence] = {}
    todo = [point for point in points(args.draws) if key_of(point) not in done]
    for number, point in enumerate(todo, 1):
        start, draw = time.perf_counter(), point["draw"]
        if draw not in evidence:
            sources = [read(name, args.windows, Half.CALIBRATION, draw) for name in SEEN]
            sums = Evidence(collect(wide, axes, sources, {Need.ACTIVATIONS, Need.GRADIENTS}))
            evidence[draw] = Evidence({"pooled": [sums.pooled()]})  # so that the gradients of a draw are held once
        entry = METHODS[point["method"]]
        more = {"seed": draw} if point["method"] == "random" else {}
        method = entry.build(entry.settings(compensate=point["compensate"], **more))
        budget = Budget(point["keep"], only=(point["only"],) if point["only"] else ())
        plan = plan_cut(method, wide, axes, budget, evidence[draw]).plan
        model, _ = apply(copy.deepcopy(loaded.model), axes, plan)
        write(point, model)
        print(f"{number}/{len(todo)} {point} {time.perf_counter() - start:.0f} s", flush=True)


def shown(every: list[Row]) -> Iterator[list[object]]:
    """Mean ± sd over draws of the geometric mean perplexity, seen and unseen kinds apart."""
    cells: dict[tuple, list[tuple[float, float, float]]] = {}
    for row in sorted(every, key=key_of):
        if row["method"] == "dense" and row.get("dtype") != "float32":
            continue  # the same model, evaluated in half precision
        seen, unseen = ([row["nll"][name] for name in names if name in row["nll"]] for names in (SEEN, UNSEEN))
        means = (fmean(seen + unseen), fmean(seen), fmean(unseen))
        cells.setdefault((row["method"], row["only"], row["compensate"], row["keep"]), []).append(means)
    for (method, only, compensate, keep), values in sorted(cells.items(), key=lambda c: (-c[0][3], c[0][:3])):
        each = map(_cell, zip(*values, strict=True))
        yield [method, only or "all", "yes" if compensate else "no", keep, *each, len(values)]


def _cell(logs: Sequence[float]) -> str:
    """Perplexities of some draws: mean ± sd."""
    values = [math.exp(min(log, 50)) for log in logs]
    return f"{fmean(values):.4g}" + (f" ± {stdev(values):.3g}" if len(values) > 1 else "")


def main() -> None:
    """Run, or print the table."""
    args = arguments(__doc__, OUT, texts=Path("texts"), windows=16, eval_windows=8, draws=3, dtype="float32")
    if args.show:
        columns = ("method", "units", "bias compensation", "keep", "all eight", "seen", "unseen", "draws")
        print("\n".join(table(columns, shown(rows(args.out)))))
    else:
        run(args)


if __name__ == "__main__":
    main()
