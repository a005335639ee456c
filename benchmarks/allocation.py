"""How the pruning ratios of SmolLM2-135M are chosen: measured, beside the starts, judged on a source left out.

    python benchmarks/allocation.py                                  # keep 0.8, MLP neurons, talk left out
    python benchmarks/allocation.py --keep 0.7 --units all --left code
    python benchmarks/allocation.py --set exchanges=0                # the sum of the divergences of axes alone

Three of the four built-in texts (news, code, manual, talk) are the calibration sources, 16 windows of 256 tokens each.
The fourth is the judge: the mean negative log-likelihood (NLL) per token of the network cut as ``gprune`` says, means
of dropped inputs in place, minus that of ``inner`` (the same fraction of every MLP outside the outer blocks), on the
same windows; the standard error is that of the paired differences over windows. All allocations cut units in the order
of FLAP's scores (``partition=layer switch=never``). CPU seconds are those of the whole method after calibration. A row
is appended to benchmarks/results/allocation.jsonl for each allocation; those that are there already are not run again.
An allocation that was interrupted starts anew, so that its seconds are those of the whole method. About 4 minutes of
CPU per call with all units, 2 with MLP neurons.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from regrow import trace
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.commands.pruning import build_pruner, collect_evidence
from regrow.data import Half, text, windows
from regrow.evidence import Evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.objectives import class_loss
from regrow.plan import Plan
from regrow.sources import Source, logits_in
from regrow.store.versions import versions
from regrow.surgery.gate import gate_inputs

OUT = Path(__file__).parent / "results" / "allocation.jsonl"
KINDS = ("news", "code", "manual", "talk")
ORDER: Mapping[str, object] = {"partition": "layer", "switch": "never"}
STARTS: Mapping[str, Mapping[str, object]] = {
    name: {"start": name, "steps": 0, **ORDER} for name in ("inner", "base", "uniform")
}


def nll(model: torch.nn.Module, axes: AxisGraph, plan: Plan, evidence: Evidence, judge: Source) -> torch.Tensor:
    """Return the NLL per token on each window of the network that a plan leaves, with compensation."""
    gates = {
        key: torch.zeros(axes[key].size).index_fill(0, torch.tensor(change.keep), 1.0)
        for key, change in plan.changes.items()
    }
    fills = {name: moments.mean for name, moments in evidence.pooled().moments.items()}
    losses = []
    with torch.no_grad(), gate_inputs(model, axes, gates, fills):
        for batch in judge:
            assert batch.labels is not None
            losses.append(class_loss(logits_in(model(*batch.args, **batch.kwargs)).float(), batch.labels))
    return torch.stack(losses).double()


def main() -> None:
    """Run what is missing and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--units", choices=("mlp", "all"), default="mlp")
    parser.add_argument("--left", choices=KINDS, default="talk", help="the source that is left out")
    parser.add_argument("--windows", type=int, default=40, help="windows of 256 tokens of the source left out")
    parser.add_argument("--float32", action="store_true", help="float32 instead of bfloat16")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="settings of measured")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = {name: json.loads(value) for name, _, value in (one.partition("=") for one in args.set)}
    label = " ".join(["measured", *(f"{name}={value}" for name, value in given.items())])
    arms = {**STARTS, label: {"allocation": "measured", **ORDER, **given}}
    place = {"keep": args.keep, "units": args.units, "left": args.left, "windows": args.windows}
    place["dtype"] = "float32" if args.float32 else "bfloat16"
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {row["allocation"]: row for row in rows if all(row[name] == value for name, value in place.items())}
    if missing := [name for name in arms if name not in known]:
        known |= run(args, place, {name: arms[name] for name in missing})
    first = torch.tensor(known["inner"]["nll"], dtype=torch.float64)
    for name in arms:
        losses = torch.tensor(known[name]["nll"], dtype=torch.float64)
        gap = losses - first
        error = float(gap.std() / len(gap) ** 0.5)
        print(
            f"{name:30} NLL {losses.mean():.4f}  to inner {gap.mean():+.4f} ± {error:.4f}  {known[name]['seconds']} s"
        )


def run(args: argparse.Namespace, place: Mapping[str, Any], arms: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """Run allocations, append their rows and return them by name."""
    loaded = load("smollm2-135m", dtype=torch.float32 if args.float32 else torch.bfloat16)
    model = loaded.model
    axes = trace(model, *loaded.example.args, **loaded.example.kwargs)
    half, rest = Half.CALIBRATION, [kind for kind in KINDS if kind != args.left]
    sources = [windows(text(kind), loaded.tokenizer, n=16, seq_len=256, half=half) for kind in rest]
    judge = windows(text(args.left), loaded.tokenizer, n=args.windows, seq_len=256, half=half)
    evidence = collect_evidence(model, axes, build_pruner("gprune", dict(ORDER)), sources)
    budget = Budget(args.keep, only=("mlp",) if args.units == "mlp" else ())
    result = {}
    for name, settings in arms.items():
        began = time.process_time()
        cut = plan_cut(build_pruner("gprune", settings), model, axes, budget, evidence)
        seconds = time.process_time() - began
        row = {**place, "allocation": name, "nll": nll(model, axes, cut.plan, evidence, judge).tolist()}
        row |= {"seconds": round(seconds, 1), "date": time.strftime("%Y-%m-%d"), "processor": platform.machine()}
        found = ("starts", "allocation", "levels", "exchanges", "seconds")
        row |= {"findings": {one: cut.findings[one] for one in found if one in cut.findings}, **versions()}
        with args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        result[name] = row
    return result


if __name__ == "__main__":
    main()
