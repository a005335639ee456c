"""The law masked = shrunk on a real language model and on networks of full size.

    python benchmarks/law.py

SmolLM2-135M is cut by FLAP at keep 0.8 and 0.5 (four kinds of text) and by a random plan over every free axis, the
residual width included; the torchvision networks (random weights, BatchNorm statistics drawn so that they matter) by a
random plan over every free axis.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from shared import Row, arguments, tell, today, write
from torch import nn

from nets import lively
from regrow import Plan, trace, verify
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.data import text, windows
from regrow.jobs.pruning_inputs import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.store.run_record import versions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import laws

OUT = Path(__file__).parent / "results" / "law.json"

NETS = ("resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0", "convnext_tiny", "shufflenet_v2_x1_0")
NETS += ("googlenet", "vit_b_16")


def row(name: str, plan_name: str, model: nn.Module, axes: AxisGraph, plan: Plan, seconds: float) -> Row:
    """Verify one plan."""
    start = time.perf_counter()
    result = verify(model, axes, plan)
    made = {"model": name, "plan": plan_name, "axes": len(axes), "free": len(axes.free())}
    made |= {"changed": sum(len(c.keep) < c.size for c in plan.changes.values()), "trace_s": round(seconds, 1)}
    made |= {"verify_s": round(time.perf_counter() - start, 1), **asdict(result)}
    made |= {"float32_within_3x_rounding": result.float32_diff <= 3 * result.rounding}
    tell(made)
    return made


def rows_of(name: str) -> Iterator[Row]:
    """The rows of a network, cut by a random plan; of the language model, by FLAP too."""
    loaded = load(name)
    model = loaded.model if loaded.tokenizer else lively(loaded.model)
    start = time.perf_counter()
    axes = trace(model, *loaded.example.args, **loaded.example.kwargs)
    seconds = time.perf_counter() - start
    if loaded.tokenizer:
        method = build_pruner("flap", {})
        domains = ("news", "code", "manual", "talk")
        sources = [windows(text(domain), loaded.tokenizer, n=8, seq_len=256) for domain in domains]
        evidence = collect_evidence(model, axes, method, sources)
        for keep in (0.8, 0.5):
            plan = plan_cut(method, model, axes, Budget(keep), evidence).plan
            yield row("SmolLM2-135M", f"flap, keep {keep}", model, axes, plan, seconds)
    plan = laws.random_plan(axes, torch.Generator().manual_seed(0))
    yield row("SmolLM2-135M" if loaded.tokenizer else name, "random, every free axis", model, axes, plan, seconds)


def main() -> None:
    """Run and write."""
    args = arguments(__doc__, nets=[*NETS, "smollm2-135m"], out=OUT)
    rows = [row for name in args.nets for row in rows_of(name)]
    write(args.out, {"date": today(), "versions": versions(), "rows": rows})
    assert all(row["ok"] for row in rows), "the law does not hold somewhere; see the rows"


if __name__ == "__main__":
    main()
