"""The networks of coverage.py through Torch-Pruning and through regrow, in one run.

    python benchmarks/peers.py --python 1.6.1=PATH 1.5.2=PATH --jobs 2
    python benchmarks/peers.py --only transformers --match llama --again         regrow alone again
    python benchmarks/peers.py --show

Both cut half of everything they can cut: Torch-Pruning as ``peer.py`` says, regrow half of the units of every axis
whose cut is exact (neutral, competed, folded), by the norms of the weights that read them. Per network and tool:
seconds from the network to the cut one, parameters before and after, whether it runs, and whether it computes what
masking computes. ``--seconds`` is the limit of one network in one tool; ``--python VERSION=PATH`` names an interpreter
that has Torch-Pruning of that version beside torch, torchvision and transformers. Rows of tools that are not run stay.
Torch-Pruning 1.6.1 is run on all; 1.5.2 on transformers too, since 1.6.1 does not end on many of them.
"""

import copy
import time
from collections import Counter
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import peer
import torch
from shared import Row, again, arguments, by_key, collect, peak, run, table, tell, today

from nets import KINDS, nets
from regrow.core.axes import AxisGraph, Mark
from regrow.core.plan import Plan
from regrow.nets import replace_attention
from regrow.scoring.metrics import magnitude
from regrow.scoring.weights import weights_of
from regrow.surgery import apply
from regrow.surgery.verify import RELATIVE_BOUND, measure_distances
from regrow.tracing import trace

OUT = Path(__file__).parent / "results" / "peers.jsonl"
EXACT = frozenset({Mark.NEUTRAL, Mark.COMPETED, Mark.FOLDED})


def ours(name: str) -> None:
    """Cut half of everything whose cut is exact; tell each step's outcome as soon as it is known."""
    torch.set_num_threads(1)
    model, args, kwargs = peer.opened(name)
    if not name.startswith("transformers/"):
        model = replace_attention(model)
    row: Row = {"before": peer.count(model)}
    heads, shapes = peer.attention(model), {layer: layer.weight.shape for layer in peer.layers(model).values()}
    whole, start, worked = copy.deepcopy(model), time.perf_counter(), time.process_time()
    axes = trace(model, *args, **kwargs)
    row["build_s"] = round(time.perf_counter() - start, 2)
    tell(row)
    plan = halved(model, axes)
    apply(model, axes, plan)
    row |= {"seconds": round(time.perf_counter() - start, 2), "after": peer.count(model), "groups": len(plan.changes)}
    row |= {"peak_mib": peak(), "cpu_s": round(time.process_time() - worked, 2)}
    tell(row)
    peer.answers(model, args, kwargs)
    row |= {"runs": True, "heads_asked": len(heads), "layers": len(shapes)}
    row["heads_left_whole"] = sum(peer.rows_of(layer) == shapes[layer][0] for layer in heads)
    row["layers_left_whole"] = sum(layer.weight.shape == shape for layer, shape in shapes.items())
    tell(row)
    ((_, distance),) = measure_distances(whole, axes, [plan])
    tell(row | {"beyond_masking": distance, "verdict": "exact" if distance <= RELATIVE_BOUND else "other"})


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


COLUMNS = (
    *("networks", "tool", "of", "cut and run", "exact", "beyond masking: norms", "beyond masking: other"),
    *("cut nothing", "heads left whole", "failed or did not run", "did not end", "parameters left", "s", "MiB"),
)


def page(rows: dict[str, Row]) -> str:
    """Per kind and tool, how it went; then every network that a tool did not cut exactly."""
    lines, notes = [], []
    for kind, tool in product(KINDS, ("regrow", *peer.VERSIONS)):
        own = {key: row[tool] for key, row in rows.items() if key.startswith(f"{kind}/") and tool in row}
        if own:
            lines.append([kind, tool, *summary(list(own.values()))])
            notes += [f"* {key}, {tool}: {why}" for key, row in own.items() if (why := problem(row))]
    return "\n".join([*table(COLUMNS, lines), "", *notes])


def summary(done: list[Row]) -> list[Any]:
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


def problem(row: Row) -> str:
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
    limits = {"seconds": 120.0, "jobs": 1, "again": False}
    args = arguments(__doc__, OUT, only="", match="", python=[str], **limits)
    if args.show:
        print(page(by_key(args.out)))
        return
    if args.job:
        ours(args.job)
        return
    before, pythons = by_key(args.out), dict(text.split("=", 1) for text in args.python)

    def job(key: str) -> Row:
        row: Row = before.get(key, {}) | {"regrow": run(again(key), args.seconds) | {"date": today()}}
        for version, python in pythons.items():
            if version != "1.5.2" or key.startswith("transformers/"):
                row[version] = run([python, peer.__file__, key], args.seconds, environment={"PYTHONPATH": ""})
        return row | {"wall_s": round(sum(row[tool]["wall_s"] for tool in ("regrow", *pythons) if tool in row), 1)}

    keys = [f"{net.kind}/{net.name}" for net in nets(args.only, args.match)]
    collect(keys, job, args.out, args.jobs, args.again)


if __name__ == "__main__":
    main()
