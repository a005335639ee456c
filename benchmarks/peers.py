"""The networks of coverage.py through Torch-Pruning and through regrow, in one run.

    python benchmarks/peers.py --jobs 2
    python benchmarks/peers.py --only transformers --match llama --again
    python benchmarks/peers.py --ours            regrow alone again
    python benchmarks/peers.py --show

Both cut half of everything they can cut: Torch-Pruning as ``peer.py`` says, regrow half of the units of every axis
whose cut is exact (neutral, competed, folded), by the norms of the weights that read them. Per network and tool:
seconds from the network to the cut one, parameters before and after, whether it runs, and whether it computes what
masking computes.
Torch-Pruning 1.6.1 is run on all; 1.5.2 on transformers too, since 1.6.1 does not end on many of them.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import apart
import peer
import torch
from torch.utils._pytree import tree_map

from nets import KINDS, nets
from regrow.core.axes import AxisGraph, Mark
from regrow.core.plan import Plan
from regrow.nets import replace_attention
from regrow.scoring.metrics import magnitude
from regrow.scoring.weights import weights_of
from regrow.surgery import apply
from regrow.surgery.verify import RELATIVE_BOUND, distances
from regrow.tracing import trace

OUT = Path("benchmarks/results/peers.jsonl")
EXACT = frozenset({Mark.NEUTRAL, Mark.COMPETED, Mark.FOLDED})


def ours(what: str, name: str, judge: bool = True) -> None:
    """Cut half of everything whose cut is exact; tell each step's outcome as soon as it is known."""
    torch.set_num_threads(1)
    model, args, kwargs = peer.network(what, name)
    if not name.startswith("transformers/"):
        model = replace_attention(model)
    if judge:
        model = model.double()
        double = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
        args, kwargs = tree_map(double, args), tree_map(double, kwargs)
    row: apart.Row = {"before": peer.count(model)}
    heads, shapes = peer.attention(model), {layer: layer.weight.shape for layer in peer.layers(model).values()}
    start, worked = time.perf_counter(), time.process_time()
    axes = trace(model, *args, **kwargs)
    row["build_s"] = round(time.perf_counter() - start, 2)
    apart.tell(row)
    plan = halved(model, axes)
    planned = time.perf_counter()
    whole = peer.copy.deepcopy(model) if judge else model
    copied = time.perf_counter() - planned
    apply(model, axes, plan)
    row |= {"seconds": round(time.perf_counter() - start - copied, 2), "after": peer.count(model)}
    row |= {
        "groups": len(plan.changes),
        "peak_mib": apart.peak(),
        "cpu_s": round(time.process_time() - worked - copied, 2),
    }
    apart.tell(row)
    peer.answers(model, args, kwargs)
    row |= {"runs": True, "heads_asked": len(heads), "layers": len(shapes)}
    row["heads_left_whole"] = sum(peer.rows_of(layer) == shapes[layer][0] for layer in heads)
    row["layers_left_whole"] = sum(layer.weight.shape == shape for layer, shape in shapes.items())
    apart.tell(row)
    if judge:
        ((_, distance),) = distances(whole, axes, [plan])
        row |= {"beyond_masking": distance, "verdict": "exact" if distance <= RELATIVE_BOUND else "other"}
        apart.tell(row)


def halved(model: torch.nn.Module, axes: AxisGraph) -> Plan:
    """Half of every axis whose cut is exact: the units whose readers have the largest norms stay."""
    units = axes.units(marks=EXACT)
    scores = magnitude(weights_of(model), axes, units=units).values
    keep = {}
    for axis in units:
        n = max(axis.size - axis.size // 2, min(axis.least, axis.size))
        order = scores[axis.key].argsort(descending=True) if axis.key in scores else torch.arange(axis.size)
        keep[axis.key] = order[:n].tolist()
    return Plan.keeping(axes, keep)


# --- tables ---------------------------------------------------------------------------------------------------------


def page(rows: dict[str, apart.Row]) -> str:
    """Per kind and tool, how it went; then every network that a tool did not cut exactly."""
    head = ["networks", "tool", "of", "cut and run", "exact", "beyond masking: norms", "beyond masking: other"]
    head += ["cut nothing", "heads left whole", "failed or did not run", "did not end", "parameters left", "s", "MiB"]
    lines, notes = [], []
    for kind in KINDS:
        own = {key: row for key, row in rows.items() if key.startswith(f"{kind}/")}
        for tool in ("regrow", *peer.VERSIONS):
            done = {key: row[tool] for key, row in own.items() if tool in row}
            if done:
                lines.append([kind, tool, *summary(list(done.values()))])
                notes += [f"* {key}, {tool}: {why}" for key, row in done.items() if (why := problem(row))]
    text = [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(map(str, line))} |" for line in lines),
    ]
    return "\n".join([*text, "", *notes])


def summary(done: list[apart.Row]) -> list[Any]:
    """The numbers of a line."""
    fine = [row for row in done if row.get("runs") and row.get("after", 0) < row["before"]]
    verdicts = Counter(row.get("verdict") for row in fine)
    endless = sum("stopped after" in row.get("error", "") and not row.get("runs") for row in done)
    middle = lambda key: f"{median(row[key] for row in fine):.1f}" if fine else ""  # noqa: E731
    return [
        len(done),
        len(fine),
        verdicts["exact"],
        verdicts["norms"],
        verdicts["other"],
        sum(row.get("after") == row["before"] for row in done if "after" in row),
        sum(bool(row.get("heads_left_whole")) for row in done),
        sum(not row.get("runs") for row in done) - endless,
        endless,
        f"{median(row['after'] / row['before'] for row in fine):.0%}" if fine else "",
        middle("seconds"),
        middle("peak_mib"),
    ]


def problem(row: apart.Row) -> str:
    """What was not as it should be, in words."""
    if not row.get("runs"):
        return f"does not run: {row.get('why') or row.get('error')}"
    parts = []
    if row["after"] == row["before"]:
        parts.append("nothing cut")
    if row.get("heads_left_whole"):
        parts.append(f"{row['heads_left_whole']} of {row['heads_asked']} layers of heads left whole")
    if row.get("verdict") in ("norms", "other"):
        parts.append(f"beyond masking by {row['beyond_masking']:.1e} ({row['verdict']})")
    return "; ".join(parts)


def main() -> None:
    """Run what has no row yet, or show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=KINDS, default="")
    parser.add_argument("--match", default="", help="part of a name")
    parser.add_argument("--seconds", type=float, default=120, help="limit of one network in one tool")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--ours", action="store_true", help="regrow alone again, beside what the peers have shown")
    parser.add_argument("--show", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    peer.options(parser)
    args = parser.parse_args()
    if args.show:
        print(page(apart.rows(args.out)))
        return
    if args.one:
        ours(*args.one, judge=args.one[0] != "speed")
        return
    before = apart.rows(args.out) if args.ours else {}
    pythons = {} if args.ours else peer.pythons(args)

    def job(key: str) -> apart.Row:
        start = time.perf_counter()
        row: apart.Row = {"regrow": apart.run([sys.executable, __file__, "--one", "net", key], args.seconds)}
        if args.ours:
            row["regrow"]["date"] = time.strftime("%Y-%m-%d")
            return before.get(key, {}) | row | {"wall_s": round(time.perf_counter() - start, 1)}
        for version, python in pythons.items():
            if version != "1.5.2" or key.startswith("transformers/"):
                row[version] = peer.run(python, "net", key, args.seconds)
        return row | {"wall_s": round(time.perf_counter() - start, 1)}

    keys = [f"{net.kind}/{net.name}" for net in nets(args.only, args.match)]
    apart.collect(keys, job, args.out, args.jobs, args.again or args.ours)


if __name__ == "__main__":
    main()
