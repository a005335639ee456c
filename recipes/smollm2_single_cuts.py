"""Which single cuts wreck SmolLM2-135M: one massive unit at a time, and magnitude's choice one layer at a time.

    python recipes/smollm2_single_cuts.py --out recipes/results/smollm2_single_cuts.json

Units are masked at the weights that read them (the law says that this is the cut), in bfloat16; two windows of 256
tokens of each of four kinds of text, from their evaluation halves. Massive units are those that make up a tenth or more
of what their layer adds, measured on the calibration halves.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from regrow import trace
from regrow.core.axes import Axis
from regrow.core.budget import Budget
from regrow.core.scores import Evidence, Need
from regrow.core.sources import Source
from regrow.data import Half, text, windows
from regrow.evaluation import perplexity
from regrow.jobs.pruning import build_pruner
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.scoring.collect import collect
from regrow.scoring.metrics import energy, massive
from regrow.scoring.weights import weights_of

KINDS = ("news", "code", "manual", "talk")


@contextmanager
def masked(model: nn.Module, axis: Axis, units: Sequence[int]) -> Iterator[None]:
    """Have the units of an axis count as nothing for a while."""
    slots = axis.consumers()
    before = {slot.name: model.get_parameter(slot.name).detach().clone() for slot in slots}
    with torch.no_grad():
        for slot in slots:
            where = slot.positions(axis.size)[list(units)].flatten()
            model.get_parameter(slot.name).index_fill_(slot.dim, where, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)


def mean_perplexity(model: nn.Module, sources: Sequence[Source]) -> float:
    """The geometric mean over kinds."""
    return math.exp(statistics.fmean(perplexity(model, source).mean for source in sources))


def narrowed(model: nn.Module, axis: Axis, units: Sequence[int], tests: Sequence[Source]) -> list[dict[str, object]]:
    """Halve a set of cut units again and again and stay with the worse half: one unit does the damage, or many."""
    path: list[dict[str, object]] = []
    while len(units) > 1:
        halves = [units[: len(units) // 2], units[len(units) // 2 :]]
        damage = []
        for half in halves:
            with masked(model, axis, half):
                damage.append(mean_perplexity(model, tests))
        units = halves[damage.index(max(damage))]
        path.append({"units": len(units), "ppl": max(damage), "ppl_of_the_other_half": min(damage)})
    return [*path, {"unit": axis.ids[units[0]]}]


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/results/smollm2_single_cuts.json"))
    parser.add_argument("--keep", type=float, default=0.9)
    args = parser.parse_args()
    loaded = load("smollm2-135m", dtype=torch.bfloat16)
    model = loaded.model
    axes = trace(model, *loaded.example.args, **loaded.example.kwargs)
    kinds = [text(name) for name in KINDS]
    calibration = [windows(t, loaded.tokenizer, n=4, seq_len=256, half=Half.CALIBRATION) for t in kinds]
    tests = [windows(t, loaded.tokenizer, n=2, seq_len=256, half=Half.EVALUATION, batch_size=2) for t in kinds]
    evidence = Evidence(collect(model, axes, calibration, {Need.ACTIVATIONS}))
    found = massive(axes, energy(weights_of(model), axes, evidence.pooled()))
    magnitude = build_pruner("magnitude", {"compensate": False})
    plan = plan_cut(magnitude, model, axes, Budget(args.keep, only=("mlp",))).plan
    dense = mean_perplexity(model, tests)
    units, layers = [], []
    for one in found:
        with masked(model, axes[one.axis], [axes[one.axis].ids.index(one.unit)]):
            row = {"axis": one.axis, "unit": one.unit, "share": one.share, "ppl": mean_perplexity(model, tests)}
        units.append(row)
        print(row, flush=True)
    for key, change in plan.changes.items():
        with masked(model, axes[key], change.dropped):
            row = {"axis": key, "cut": len(change.dropped), "ppl": mean_perplexity(model, tests)}
        layers.append(row)
        print(row, flush=True)
    worst = sorted(layers, key=lambda row: -float(row["ppl"]))[:2]
    paths = {row["axis"]: narrowed(model, axes[row["axis"]], plan.changes[row["axis"]].dropped, tests) for row in worst}
    print(paths)
    result = {
        "dense": dense,
        "keep": args.keep,
        "one_massive_unit": units,
        "magnitude_one_layer": layers,
        "magnitude_narrowed": paths,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
