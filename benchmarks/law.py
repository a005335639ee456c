"""The law masked = shrunk on a real language model and on networks of full size.

    python benchmarks/law.py --out benchmarks/results/law.json

SmolLM2-135M is cut by FLAP at keep 0.8 and 0.5 (four kinds of text) and by a random plan over every free axis, the
residual width included; the torchvision networks (random weights, BatchNorm statistics drawn so that they matter) by a
random plan over every free axis that keeps 30 to 100 % of each.
"""

import argparse
import json
import random
import time
from dataclasses import asdict
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow import Plan, trace, verify
from regrow.core.axes import Axis, AxisGraph
from regrow.core.budget import Budget
from regrow.data import Half, text, windows
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.store.versions import versions

NETS = (
    "resnet18",
    "mobilenet_v2",
    "densenet121",
    "efficientnet_b0",
    "convnext_tiny",
    "shufflenet_v2_x1_0",
    "googlenet",
    "vit_b_16",
)


def random_plan(axes: AxisGraph, seed: int) -> Plan:
    """Keep 30 to 100 % of every free axis; axes whose sizes hang together keep matching numbers of units."""
    draw = random.Random(seed)
    groups: dict[str, list[Axis]] = {}
    for axis in axes.free():
        groups.setdefault(axis.count or axis.key, []).append(axis)
    keep = {}
    for members in groups.values():
        step = lcm(*(axis.times * axis.multiple for axis in members))
        most = min(axis.size * axis.times for axis in members) // step
        least = max(-(-axis.least * axis.times // step) for axis in members)
        total = step * max(least, round(most * draw.uniform(0.3, 1)))
        for axis in members:
            keep[axis.key] = sorted(draw.sample(range(axis.size), total // axis.times))
    return Plan.keeping(axes, keep)


def lively(model: nn.Module) -> nn.Module:
    """Draw what initialisation leaves at 0 or 1, so that a fault there would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                low, high = (0.5, 1.5) if "var" in name or name.endswith("weight") else (-0.3, 0.3)
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
            elif tensor.dim() == 2 and not bool(tensor.any()):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
    return model


def row(name: str, plan_name: str, model: nn.Module, axes: AxisGraph, plan: Plan, seconds: float) -> dict[str, Any]:
    """Verify one plan."""
    start = time.perf_counter()
    result = verify(model, axes, plan)
    made = {
        "model": name,
        "plan": plan_name,
        "axes": len(axes),
        "free": len(axes.free()),
        "changed": sum(len(c.keep) < c.size for c in plan.changes.values()),
        "trace_s": round(seconds, 1),
        "verify_s": round(time.perf_counter() - start, 1),
        **asdict(result),
        "float32_within_3x_rounding": result.float32_diff <= 3 * result.rounding,
    }
    print(json.dumps(made), flush=True)
    return made


def language_model() -> list[dict[str, Any]]:
    """SmolLM2-135M, cut for real."""
    loaded = load("smollm2-135m")
    start = time.perf_counter()
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    seconds = time.perf_counter() - start
    sources = [
        windows(text(name), loaded.tokenizer, n=8, seq_len=256, half=Half.CALIBRATION)
        for name in ("news", "code", "manual", "talk")
    ]
    method = build_pruner("flap", {})
    evidence = collect_evidence(loaded.model, axes, method, sources)
    rows = []
    for keep in (0.8, 0.5):
        plan = plan_cut(method, loaded.model, axes, Budget(keep), evidence).plan
        rows.append(row("SmolLM2-135M", f"flap, keep {keep}", loaded.model, axes, plan, seconds))
    rows.append(row("SmolLM2-135M", "random, every free axis", loaded.model, axes, random_plan(axes, 0), seconds))
    return rows


def image_models() -> list[dict[str, Any]]:
    """Networks of torchvision at full size."""
    rows = []
    for name in NETS:
        loaded = load(name)
        model = lively(loaded.model)
        start = time.perf_counter()
        axes = trace(model, *loaded.example.args, **loaded.example.kwargs)
        seconds = time.perf_counter() - start
        rows.append(row(name, "random, every free axis", model, axes, random_plan(axes, 0), seconds))
    return rows


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/law.json"))
    args = parser.parse_args()
    rows = [*image_models(), *language_model()]
    result = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    assert all(one["ok"] for one in rows), "the law does not hold somewhere; see the rows"


if __name__ == "__main__":
    main()
