"""What each unit type is worth: neurons, KV groups, query heads, whole attentions, MLPs and blocks, at one budget.

    python benchmarks/unit_types.py --texts FOLDER                     # all rows that are missing
    python benchmarks/unit_types.py --texts FOLDER --folds 0 --keeps 0.8 --arms flap any --seconds 400
    python benchmarks/unit_types.py --show

SmolLM2-135M in bfloat16, 16 windows of 256 tokens of each of three calibration domains; the calibration half of the
fourth judges, in 32 windows (of talk the 31 that its half holds): fold 0: news, code and manual, judged on talk; fold
1: prose, legal and wiki, judged on dialogue. ``--texts`` is that of ``recipes/width_pruning.py``. The reference,
``flap``, cuts MLP neurons in the order of FLAP, the same fraction of every block but the first four and the last two,
with compensation of biases. The arms are in ``ARMS``; those of ``depth`` meet what whole modules leave of the budget
with the same neurons, ``alone`` without.
``head size`` cuts a quarter of the channels of every head, in all blocks, and neurons: its plan is made here, since no
allocation takes axes of which one unit (a rotary pair) goes with two of others (values).
One row per arm, as soon as it is measured: nats per token of each window, what is left of the weights, and seconds of
the plan. The search of ``depth`` at one keep continues that at the others (its checkpoint), so that ``seconds`` are
those of what was left to measure (``measured``: divergences).
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import corpora

from regrow import data, evaluation
from regrow.allocation.cost import Cost
from regrow.allocation.ranked import BudgetError, uniform
from regrow.core.amounts import Measure, Target
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.plan import Plan
from regrow.core.scores import Evidence
from regrow.data import Half
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import PruningRun, plan_cut
from regrow.scoring.compensate import means
from regrow.scoring.metrics import wifv
from regrow.scoring.spaces import OUTER_BLOCKS, inner
from regrow.store.versions import versions
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
    "head size": ("", {}, ()),
    "any": ("depth", {"unit": "any"}, ()),
    "attention": ("depth", {"unit": "attention"}, ()),
    "mlp": ("depth", {"unit": "mlp"}, ()),
    "block": ("depth", {"unit": "block"}, ()),
    "any, one shot": ("depth", {"unit": "any", "search": "one_shot"}, ()),
    "any, alone": ("depth", {"unit": "any", "fill": "none"}, ()),
    "block, alone": ("depth", {"unit": "block", "fill": "none"}, ()),
}
"""Name → method, its settings, and the patterns of the axes that may be cut."""


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def measure(args: argparse.Namespace) -> None:
    """Measure the rows that are missing."""
    torch.set_num_threads(1)
    began, known = time.monotonic(), {(row["fold"], row["keep"], row["arm"]) for row in read(args.out)}
    loaded = load_model(ModelSpec(MODEL, "bfloat16"))
    axes = with_branches(loaded.model, trace(loaded.model, *loaded.example.args, **loaded.example.kwargs))
    texts = {
        "prose": lambda: corpora.prose(args.texts / "moby-dick.txt"),
        "legal": lambda: corpora.legal(args.texts / "spdx-full.json"),
        "wiki": lambda: corpora.wiki(args.texts / "new_wiki_v1.0.json"),
        "dialogue": lambda: corpora.dialogue(args.texts / "topical_chat" / "task.json"),
    }

    def windows(name: str, many: int, seed: int, batch_size: int) -> Any:
        text = texts[name]() if name in texts else data.text(name)
        more: Any = {"n": many, "seq_len": SEQ, "seed": seed, "half": Half.CALIBRATION, "batch_size": batch_size}
        return data.windows(text, loaded.tokenizer, **more)

    def write(row: Mapping[str, Any], nll: Any) -> None:
        row = {"model": MODEL, **row, "nll": round(fmean(nll), 5), "nll_per_window": [round(one, 4) for one in nll]}
        row |= {"date": f"{date.today()}", "cpu": platform.processor() or platform.machine(), **versions()}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*(row[key] for key in ("fold", "keep", "arm")), f"{row['nll']:.4f}", flush=True)

    for fold in args.folds:
        missing = [(k, arm) for arm in args.arms for k in sorted(args.keeps) if (fold, k, arm) not in known]
        if not missing:
            continue
        *names, left_out = FOLDS[fold]
        sources = [windows(name, WINDOWS, 0, 1) for name in names]
        judge = windows(left_out, JUDGE, JUDGE_SEED, 8)
        if (fold, 1.0, "dense") not in known:
            write({"fold": fold, "keep": 1.0, "arm": "dense"}, judged(loaded, loaded.model, judge))
        evidence = collect_evidence(loaded.model, axes, build_pruner("depth", {}), sources, batch_size=8)
        for keep, arm in missing:
            if time.monotonic() - began > args.seconds:
                return
            method, settings, only = ARMS[arm]
            unpruned = ("layers.[0-3].*", "layers.2[89].*") if method == "flap" else ()
            start = time.process_time()
            searched = {key: value for key, value in settings.items() if key in ("unit", "search")}
            path = args.checkpoints / f"{fold} {searched}.safetensors" if method == "depth" else None
            budget = Budget(keep, only=only, exclude=tuple(f"*{one}" for one in unpruned))
            row: dict[str, Any] = {"fold": fold, "keep": keep, "arm": arm}
            try:
                if method:
                    pruner = build_pruner(method, {**settings, **(SEARCH if method == "depth" else {})})
                    cut = plan_cut(pruner, loaded.model, axes, budget, evidence, run=PruningRun(checkpoint=path))
                    plan, found = cut.plan, cut.findings
                else:
                    plan, found = cut_head_size(loaded.model, axes, evidence, keep), {}
            except BudgetError as error:
                print(fold, keep, arm, error, flush=True)
                continue
            row["seconds"] = round(time.process_time() - start, 1)
            model, after = apply(clone_model(loaded.model), axes, plan)
            row["left"] = round(Cost(after).total / Cost(axes).total, 5)
            row |= {"dropped": [*plan.drop], **tables(found.get("depth"))}
            write(row, judged(loaded, model, judge))


def cut_head_size(model: Any, axes: AxisGraph, evidence: Evidence, keep: float, share: float = 0.75) -> Plan:
    """Return the plan that keeps a share of the channels of all heads, and cuts neurons of inner blocks to the budget.

    Rotary pairs are ranked by Σ over layers of E[q²] · E[k²], relative to the layer's sum; values by FLAP's score.
    """
    (pairs,) = (axis for axis in axes.free() if axis.times == 2)
    values = [axis for axis in axes.free() if axis.count == pairs.count and axis.times == 1]
    many, energies = round(share * pairs.size), {}

    def add(name: str) -> Any:
        own = [slot for slot in pairs.slots if slot.name == f"{name}.weight"]

        def hook(_: Any, given: Any, output: torch.Tensor) -> None:
            power = output.double().square().flatten(0, -2).mean(0)
            each = sum(power[slot.positions(pairs.size)].sum(1) for slot in own)
            energies[name] = energies.get(name, 0) + each

        return hook

    names = dict.fromkeys(slot.name.removesuffix(".weight") for slot in pairs.slots if "_proj" in slot.name)
    hooks = [model.get_submodule(name).register_forward_hook(add(name)) for name in names]
    with torch.no_grad():
        for source in evidence.data.values():
            for batch in list(source)[:2]:
                model(*batch.args, **batch.kwargs)
    for hook in hooks:
        hook.remove()
    total = torch.zeros(pairs.size, dtype=torch.float64)
    for name in (name for name in energies if name.endswith("q_proj")):
        both = energies[name] * energies[name.replace("q_proj", "k_proj")]
        total += both / both.sum()
    pooled, weights = evidence.pooled(), dict(model.named_parameters())
    kept = {pairs.key: sorted(total.topk(many).indices.tolist())}
    scores = wifv(weights, axes, pooled, units=values).values
    kept |= {axis.key: sorted(scores[axis.key].topk(2 * many).indices.tolist()) for axis in values}
    cost = Cost(axes)
    saved = cost.total - cost({key: len(units) for key, units in kept.items()})
    neurons = list(inner(axes.units(("mlp",)), OUTER_BLOCKS))
    limit = Target(Measure.WEIGHTS, float(Budget(keep).limit(cost.total) + saved))
    kept |= uniform(axes, wifv(weights, axes, pooled, units=neurons), Budget(target=limit))
    return Plan.keeping(axes, kept, means=means(model, axes, kept, pooled))


def tables(findings: Any) -> dict[str, Any]:
    """Return what the search measured, for a row."""
    if not findings:
        return {}
    path = [[one["module"], round(one["divergence"], 4)] for one in findings["path"]]
    counts = {one["modules"]: round(one["divergence"], 4) for one in findings["counts"]}
    return {"path": path, "counts": counts, "measured": findings["measured"]}


def judged(loaded: Any, model: Any, judge: Any) -> list[float]:
    """Return nats per token of each window of the judging domain."""
    found = evaluation.perplexity(model, judge, tokenizer=loaded.tokenizer)
    return [total / many for total, many in zip(found.nll, found.tokens, strict=True)]


def show(path: Path) -> None:
    """Print the nats per token that each arm loses, and its paired difference to ``flap``."""
    rows = {(row["fold"], row["keep"], row["arm"]): row for row in read(path)}
    print("| keep | fold | arm | left | dropped: attentions, MLPs, blocks | lost nats/token | to flap |")
    print("|---|---|---|---|---|---|---|")
    for keep in KEEPS:
        for fold, arm in ((fold, arm) for fold in (0, 1) for arm in ARMS):
            row, dense = rows.get((fold, keep, arm)), rows.get((fold, 1.0, "dense"))
            if row is None or dense is None:
                continue
            kinds = [sum(one.endswith(end) for one in row["dropped"]) for end in ("self_attn", "mlp")]
            kinds.append(len(row["dropped"]) - sum(kinds))
            to = difference(row, rows.get((fold, keep, "flap"))) if arm != "flap" else ""
            words = [keep, fold, arm, f"{row['left']:.3f}", ", ".join(map(str, kinds)), difference(row, dense), to]
            print(f"| {' | '.join(map(str, words))} |")


def difference(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    """Return the paired difference of two rows, ± its standard error over windows."""
    if other is None:
        return ""
    gaps = [a - b for a, b in zip(row["nll_per_window"], other["nll_per_window"], strict=True)]
    return f"{fmean(gaps):+.3f} ± {stdev(gaps) / sqrt(len(gaps)):.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="folder of the texts of fold 1")
    parser.add_argument("--folds", nargs="+", type=int, default=[0, 1], choices=(0, 1))
    parser.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()), help="folder of the searches")
    parser.add_argument("--seconds", type=float, default=1e9, help="end at the first arm after so long")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of rows")
    parser.add_argument("--show", action="store_true", help="print the table")
    given = parser.parse_args()
    show(given.out) if given.show else measure(given)
