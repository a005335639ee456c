"""What each unit type is worth: neurons, KV groups, query heads, whole attentions, MLPs and blocks, at one budget.

    python benchmarks/unit_types.py --texts FOLDER                     # all rows that are missing
    python benchmarks/unit_types.py --texts FOLDER --folds 0 --keeps 0.8 --arms flap any
    python benchmarks/unit_types.py --show

SmolLM2-135M in bfloat16, 16 windows of 256 tokens of each of three calibration domains; the calibration half of the
fourth judges, in 32 windows (of talk the 31 that its half holds): fold 0: news, code and manual, judged on talk; fold
1: prose, legal and wiki, judged on dialogue. ``--texts`` is that of ``recipes/width_pruning.py``. The reference,
``flap``, cuts MLP neurons in the order of FLAP, the same fraction of every block but the first four and the last two,
with compensation of biases. The arms are in ``ARMS``; those of ``depth`` meet what whole modules leave of the budget
with the same neurons, ``alone`` without.
One row per arm, as soon as it is measured: nats per token of each window, what is left of the weights, and seconds of
the plan. The search of ``depth`` at one keep continues that at the others (its checkpoint), so that ``seconds`` are
those of what was left to measure (``measured``: divergences).
"""

import platform
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from shared import Row, add, arguments, rows, table

from regrow import data, evaluation
from regrow.allocation.cost import Cost
from regrow.allocation.ranked import BudgetError
from regrow.core.budget import Budget
from regrow.data import Half
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import PruningContext, plan_cut
from regrow.store.run_record import versions
from regrow.surgery import apply
from regrow.tracing import trace, with_branches
from regrow.tracing.meta_copy import clone_model

OUT = Path(__file__).parent / "results" / "unit_types.jsonl"
MODEL, SEQ, WINDOWS, JUDGE, JUDGE_SEED = "smollm2-135m", 256, 16, 32, 1000
FOLDS = (("news", "code", "manual", "talk"), ("prose", "legal", "wiki", "dialogue"))
"""Three domains to calibrate on, and the one that judges."""
KEEPS = (0.8, 0.7, 0.5)
SEARCH = {"tokens": SEQ}
"""The search of ``depth`` measures one window of each domain, and judges numbers of modules on two others."""
Arm = tuple[str, Mapping[str, Any], tuple[str, ...]]
ARMS: Mapping[str, Arm] = {
    "flap": ("flap", {"allocation": "uniform"}, ("mlp",)),
    "KV groups": ("flap", {"allocation": "uniform"}, ()),
    "query heads": ("flap", {"allocation": "uniform"}, ("mlp", "q_proj", "o_proj")),
    "any": ("depth", {"unit": "any"}, ()),
    "attention": ("depth", {"unit": "attention"}, ()),
    "mlp": ("depth", {"unit": "mlp"}, ()),
    "block": ("depth", {"unit": "block"}, ()),
    "any, alone": ("depth", {"unit": "any", "fill": "none"}, ()),
    "block, alone": ("depth", {"unit": "block", "fill": "none"}, ()),
}
"""Name → method, its settings, and the patterns of the axes that may be cut."""


def measure(args: Namespace) -> None:
    """Measure the rows that are missing."""
    import corpora

    torch.set_num_threads(1)
    known = {(row["fold"], row["keep"], row["arm"]) for row in rows(args.out)}
    loaded = load_model(ModelSpec(MODEL, "bfloat16"))
    axes = with_branches(loaded.model, trace(loaded.model, *loaded.example.args, **loaded.example.kwargs))
    texts = corpora.texts(args.texts)

    def windows(name: str, n: int, seed: int, batch_size: int) -> Any:
        return data.windows(
            texts[name](), loaded.tokenizer, n=n, seq_len=SEQ, seed=seed, half=Half.CALIBRATION, batch_size=batch_size
        )

    def write(row: Row, model: Any) -> None:
        found = evaluation.perplexity(model, judge, tokenizer=loaded.tokenizer)
        nll = [total / many for total, many in zip(found.nll, found.tokens, strict=True)]
        row |= {"nll": round(fmean(nll), 5), "nll_per_window": [round(value, 4) for value in nll]}
        add(args.out, {"model": MODEL, **row, "cpu": platform.processor() or platform.machine(), **versions()})
        print(*(row[key] for key in ("fold", "keep", "arm", "nll")), flush=True)

    for fold in args.folds:
        missing = [(keep, arm) for arm in args.arms for keep in sorted(args.keeps) if (fold, keep, arm) not in known]
        if not missing:
            continue
        *names, left_out = FOLDS[fold]
        sources = [windows(name, WINDOWS, 0, 1) for name in names]
        judge = windows(left_out, JUDGE, JUDGE_SEED, 8)
        if (fold, 1.0, "dense") not in known:
            write({"fold": fold, "keep": 1.0, "arm": "dense"}, loaded.model)
        evidence = collect_evidence(loaded.model, axes, build_pruner("depth", {}), sources, batch_size=8)
        for keep, arm in missing:
            method, settings, only = ARMS[arm]
            unpruned = ("*layers.[0-3].*", "*layers.2[89].*") if method == "flap" else ()
            searched = {key: value for key, value in settings.items() if key in ("unit", "search")}
            path = args.checkpoints / f"{fold} {searched}.safetensors" if method == "depth" else None
            pruner = build_pruner(method, {**settings, **(SEARCH if method == "depth" else {})})
            start = time.process_time()
            try:
                budget = Budget(keep, only=only, exclude=unpruned)
                cut = plan_cut(pruner, loaded.model, axes, budget, evidence, context=PruningContext(checkpoint=path))
            except BudgetError as error:
                print(fold, keep, arm, error, flush=True)
                continue
            row = {"fold": fold, "keep": keep, "arm": arm, "seconds": round(time.process_time() - start, 1)}
            model, after = apply(clone_model(loaded.model), axes, cut.plan)
            row |= {"left": round(Cost(after).total / Cost(axes).total, 5), "dropped": [*cut.plan.drop]}
            write(row | tables(cut.findings.get("depth")), model)


def tables(findings: Any) -> dict[str, Any]:
    """Return what the search measured, for a row."""
    if not findings:
        return {}
    path = [[one["module"], round(one["divergence"], 4)] for one in findings["path"]]
    counts = {one["modules"]: round(one["divergence"], 4) for one in findings["counts"]}
    return {"path": path, "counts": counts, "measured": findings["measured"]}


def shown(every: list[Row]) -> Iterator[list[object]]:
    """The nats per token that each arm loses, and its paired difference to ``flap``."""
    by = {(row["fold"], row["keep"], row["arm"]): row for row in every}
    for keep, fold, arm in product(KEEPS, (0, 1), ARMS):
        row, dense = by.get((fold, keep, arm)), by.get((fold, 1.0, "dense"))
        if row is None or dense is None:
            continue
        kinds = [sum(module.endswith(end) for module in row["dropped"]) for end in ("self_attn", "mlp")]
        dropped = ", ".join(map(str, [*kinds, len(row["dropped"]) - sum(kinds)]))
        to = difference(row, by.get((fold, keep, "flap"))) if arm != "flap" else ""
        yield [keep, fold, arm, f"{row['left']:.3f}", dropped, difference(row, dense), to]


def difference(row: Row, other: Row | None) -> str:
    """Return the paired difference of two rows, ± its standard error over windows."""
    if other is None:
        return ""
    gaps = [a - b for a, b in zip(row["nll_per_window"], other["nll_per_window"], strict=True)]
    return f"{fmean(gaps):+.3f} ± {stdev(gaps) / sqrt(len(gaps)):.3f}"


if __name__ == "__main__":
    folders = {"texts": Path("texts"), "checkpoints": Path(tempfile.gettempdir())}
    given = arguments(__doc__, OUT, folds=[0, 1], keeps=[*KEEPS], arms=(*ARMS,), **folders)
    columns = ("keep", "fold", "arm", "left", "dropped: attentions, MLPs, blocks", "lost nats/token", "to flap")
    if given.show:
        print("\n".join(table(columns, shown(rows(given.out)))))
    else:
        measure(given)
