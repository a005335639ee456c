"""Llama's shapes of heads: each traced, its heads halved, and cut; and Torch-Pruning at the same task.

    python benchmarks/shapes.py                       # peers in environments of their own, made on first use
    python benchmarks/shapes.py --peers none

Ours: half of the key-value heads go with their query heads (where there is but one, half of the query heads), and half
of the neurons. A shape passes if it ends in under 5 seconds of the processor (one thread: an idle machine's wall clock
says the same), heads are really cut, and masked = shrunk in float64. Torch-Pruning is asked for half of the heads and
of all else as its own example for language models does it; it is stopped after ``--seconds``.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import apart
import peer
import torch

from regrow.core.axes import Axis, AxisGraph
from regrow.core.plan import Plan
from regrow.store.versions import versions
from regrow.surgery import apply
from regrow.surgery.verify import RELATIVE_BOUND, distances
from regrow.tracing import trace

SHAPES = ("8/8", "8/4", "8/2", "8/1", "9/3", "24/8", "32/8", "32/4", "14/2", "16/16", "40/8", "12/6", "28/4", "71/1")
LIMIT = 5.0


def ours(shape: str) -> apart.Row:
    """Trace, plan and cut one shape; seconds, shapes of what was cut, and the distance from the masked network."""
    torch.set_num_threads(1)
    model, inputs = peer.llama(shape)
    start, worked = time.perf_counter(), time.process_time()
    axes = trace(model, **inputs)
    traced = time.perf_counter()
    plan = halving(axes)
    before = heads(model)
    small, _ = apply(model, axes, plan)
    end, cpu = time.perf_counter(), time.process_time() - worked
    after = heads(small)
    fresh, _ = peer.llama(shape)
    ((_, distance),) = distances(fresh, axes, [plan])
    return {
        "trace_s": round(traced - start, 2),
        "seconds": round(end - start, 2),
        "cpu_s": round(cpu, 2),
        "before": before,
        "after": after,
        "heads_cut": all(after[part] < before[part] for part in "qo"),
        "distance": distance,
        "passes": cpu < LIMIT and after["q"] < before["q"] and distance <= RELATIVE_BOUND,
    }


def halving(axes: AxisGraph) -> Plan:
    """Keep the first half of every key-value head, of the neurons, and of the repetitions where there is one head."""

    def wanted(axis: Axis) -> bool:
        names = {slot.name.rsplit(".", 2)[-2] for slot in axis.slots}
        return names in ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"})

    chosen = [axis for axis in axes.free() if wanted(axis)]
    layers = {axis.slots[0].name.split(".")[2] for axis in chosen if any("q_proj" in slot.name for slot in axis.slots)}
    chosen += [
        axis
        for axis in axes.free()
        if {slot.name.rsplit(".", 2)[-2] for slot in axis.slots} == {"q_proj", "o_proj"}
        and axis.slots[0].name.split(".")[2] not in layers
    ]
    return Plan.keeping(axes, {axis.key: range(max(axis.size // 2, axis.least)) for axis in chosen})


def heads(model: torch.nn.Module) -> dict[str, int]:
    """Rows of q, k and v and columns of o, in units of a head, in the first layer."""
    attention = model.model.layers[0].self_attn
    parts = {part: getattr(attention, f"{part}_proj").weight for part in "qkvo"}
    return {part: weight.shape[int(part == "o")] // peer.HEAD for part, weight in parts.items()}


def main() -> None:
    """Run all shapes and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shapes.json"))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="heads/key-value heads")
    parser.add_argument("--seconds", type=float, default=60, help="limit of one shape")
    peer.options(parser)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        apart.tell(ours(args.one))
        return
    pythons = peer.pythons(args)
    rows = []
    for shape in args.shapes:
        row: apart.Row = {"shape": shape, "regrow": apart.run([sys.executable, __file__, "--one", shape], args.seconds)}
        for version, python in pythons.items():
            row[version] = peer.run(python, "shape", shape, args.seconds)
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv]), "versions": versions()}
    args.out.write_text(json.dumps(result | {"seconds_at_most": args.seconds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
