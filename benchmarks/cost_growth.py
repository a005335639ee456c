"""How time and memory grow with layers, tokens, sources, units, keeps and parameters: rows, exponents and a plot.

    python benchmarks/cost_growth.py                 about 6 minutes on an idle core; resumes where it stopped
    python benchmarks/cost_growth.py --again         from the start; if it is stopped, the line above resumes it
    python benchmarks/cost_growth.py --show          the exponents of the rows, and the plot again

Llamas with random float32 weights, one thread:

* layers: tracing a Llama of SmolLM2-135M's widths on meta;
* tokens, sources: measuring for flap (of 4 layers), in windows of 256 tokens, at first with one source; with sources,
  each adds 2,048 tokens;
* units: tracing, planning and cutting one MLP of so many units in each of 4 layers;
* keeps: so many plans from one measurement, allocation alone;
* parameters: tracing, measuring 2,048 tokens, planning and cutting Llamas of growing width.

Time is CPU seconds. All sizes of what grows are measured in turns in one process, after a turn that does not count, so
that other work on the machine slows all of them alike. Memory is the peak of a process that measures one size, above
what it held when its imports were done. The exponent is the slope of log cost over log size by least squares: of time,
the median over the turns, with the standard error of their mean; of memory, that of the only curve, with the standard
error of the fit. Costs that do not begin at 0 have a slope below 1 at the lower end.
"""

import argparse
import copy
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

import apart
import torch
import transformers
from torch import nn

from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.sources import Batch, Source
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.store.versions import versions
from regrow.surgery import apply
from regrow.tracing import trace

OUT = Path(__file__).parent / "results" / "cost_growth.jsonl"
PLOT = Path(__file__).parents[1] / "docs" / "cost-growth.svg"
SIZES = {
    "layers": (8, 16, 32, 64, 128),
    "tokens": (2048, 4096, 8192, 16384),
    "sources": (1, 2, 4, 8),
    "units": (256, 512, 1024, 2048, 4096),
    "keeps": (1, 2, 4, 8),
    "parameters": (128, 256, 512, 768, 1024),
}
"""What grows → its values; of parameters, the hidden size."""
WINDOW = 256
TURNS = 5


def llama(hidden: int = 256, inner: int = 704, layers: int = 4, vocabulary: int = 1024) -> nn.Module:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=vocabulary,
    )
    return transformers.LlamaForCausalLM(config).eval()


def source(name: str, tokens: int) -> Source:
    """Random tokens in windows."""
    generator = torch.Generator().manual_seed(len(name))
    ids = [torch.randint(1024, (1, WINDOW), generator=generator) for _ in range(tokens // WINDOW)]
    return Source(name, [Batch(kwargs={"input_ids": one}, labels=one) for one in ids])


def traced(model: nn.Module) -> AxisGraph:
    """The axes of a Llama."""
    return trace(model, input_ids=torch.zeros(1, 16, dtype=torch.long, device=next(model.parameters()).device))


def prepared(what: str, size: int) -> tuple[Callable[[], object], int]:
    """What is measured, and the size that counts."""
    flap = build_pruner("flap", {})
    if what == "layers":
        with torch.device("meta"):
            config = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
            sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": size}
            deep = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, **sizes)).eval()
        return lambda: traced(deep), size
    if what == "units":
        wide = llama(inner=size)

        def resize() -> None:
            model = copy.deepcopy(wide)
            axes = traced(model)
            apply(model, axes, plan_cut(build_pruner("magnitude", {}), model, axes, Budget(0.8)).plan)

        return resize, size
    model = llama(hidden=size, inner=size * 11 // 4) if what == "parameters" else llama()
    axes = traced(model)
    count = size if what == "sources" else 1
    tokens = size if what == "tokens" else 2048
    sources = [source(str(i), tokens) for i in range(count)]
    if what == "keeps":
        evidence = collect_evidence(model, axes, flap, sources)
        keeps = [0.9 - 0.05 * i for i in range(size)]
        return lambda: [plan_cut(flap, model, axes, Budget(keep), evidence) for keep in keeps], size
    if what == "parameters":

        def prune() -> None:
            twin = copy.deepcopy(model)
            own = traced(twin)
            apply(twin, own, plan_cut(flap, twin, own, Budget(0.8), collect_evidence(twin, own, flap, sources)).plan)

        return prune, sum(p.numel() for p in model.parameters())
    return lambda: collect_evidence(model, axes, flap, sources), size


def measure_time(what: str) -> apart.Row:
    """Measure all sizes of what grows, in turns."""
    torch.set_num_threads(1)
    every = [prepared(what, size) for size in SIZES[what]]
    turns: list[list[float]] = []
    for _ in range(TURNS + 1):
        turns.append([])
        for measured, _ in every:
            start = time.process_time()
            measured()
            turns[-1].append(round(time.process_time() - start, 4))
    return {"sizes": [counted for _, counted in every], "turns": turns[1:]}


def measure_memory(what: str, size: int) -> apart.Row:
    """Measure the peak of one size."""
    torch.set_num_threads(1)
    traced(llama(layers=1))
    base = _memory("VmRSS")
    measured, counted = prepared(what, size)
    Path("/proc/self/clear_refs").write_text("5")
    measured()
    return {"size": counted, "mib": round(_memory("VmHWM") - base, 1)}


def _memory(field: str) -> float:
    rows = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return round(next(int(row[1]) for row in rows if row[0] == f"{field}:") / 1024, 1)


def fit(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """The slope of log cost over log size, and its standard error."""
    x, y = ([math.log(v) for v in values] for values in (sizes, costs))
    n, mean, middle = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean) ** 2 for a in x)
    slope = sum((a - mean) * (b - middle) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - middle - slope * (a - mean)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(rest / max(n - 2, 1) / spread)


def curves(rows: dict[str, apart.Row]) -> dict[str, tuple[apart.Row, list[float]]]:
    """What grows → its times, and its peaks in MiB, where all is measured."""
    keys = {what: [f"time {what}", *(f"memory {what} {size}" for size in sizes)] for what, sizes in SIZES.items()}
    done = {what: [rows.get(key, {"error": "not measured"}) for key in own] for what, own in keys.items()}
    whole = {what: own for what, own in done.items() if not any("error" in row for row in own)}
    return {what: (times, [row["mib"] for row in peaks]) for what, (times, *peaks) in whole.items()}


def time_exponent(times: apart.Row) -> tuple[float, float]:
    """The median over the turns of the exponent, and the standard error of its mean."""
    slopes = [fit(times["sizes"], turn)[0] for turn in times["turns"]]
    return median(slopes), stdev(slopes) / math.sqrt(len(slopes))


def median_times(times: apart.Row) -> list[float]:
    """The median over the turns, by size."""
    return [median(turn[i] for turn in times["turns"]) for i in range(len(times["sizes"]))]


def page(rows: dict[str, apart.Row]) -> str:
    """The exponents as a table in Markdown."""
    lines = ["| | from, to | CPU seconds | exponent | peak MiB | exponent |", "|---|---|---|---|---|---|"]
    for what, (times, peaks) in curves(rows).items():
        sizes, seconds = times["sizes"], median_times(times)
        cells = [what, f"{sizes[0]:,}, {sizes[-1]:,}", f"{seconds[0]:.2f}, {seconds[-1]:.2f}"]
        cells += [_plus_minus(time_exponent(times)), f"{peaks[0]:.0f}, {peaks[-1]:.0f}"]
        lines.append("| " + " | ".join([*cells, _plus_minus(fit(sizes, peaks))]) + " |")
    return "\n".join(lines)


def _plus_minus(exponent: tuple[float, float]) -> str:
    return "{:.2f} ± {:.2f}".format(*exponent)


def plot(rows: dict[str, apart.Row], path: Path) -> None:
    """Draw all curves, time and memory, in logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "regrow", "svg.fonttype": "none"}
    from matplotlib import pyplot

    own = curves(rows)
    figure, panels = pyplot.subplots(2, len(own), figsize=(2.3 * len(own), 4.4), layout="constrained", squeeze=False)
    for column, (what, (times, peaks)) in enumerate(own.items()):
        sizes, every = times["sizes"], [fit(times["sizes"], peaks), time_exponent(times)]
        for panel, costs, unit in zip(
            panels[:, column], (median_times(times), peaks), ("CPU seconds", "peak MiB"), strict=True
        ):
            panel.loglog(sizes, costs, "o-", color="#2a6f97", markersize=4)
            panel.set_title(f"{what}: {_plus_minus(every.pop())}", fontsize=9)
            panel.set_ylabel(unit if column == 0 else "", fontsize=9)
            panel.set_ylim(min(costs) / 2, max(costs) * 2)
            panel.tick_params(labelsize=7, which="both")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure what has no row yet, then show and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--only", nargs="*", choices=[*SIZES], default=[*SIZES])
    parser.add_argument("--again", action="store_true", help="also what has a row")
    parser.add_argument("--show", action="store_true", help="only print and draw")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, what, *size = args.one
        apart.tell(measure_time(what) if kind == "time" else measure_memory(what, int(size[0])))
        return
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "versions": versions()}

    def job(key: str) -> dict[str, Any]:
        load = {"load": round(os.getloadavg()[0], 1)}
        return apart.run([sys.executable, __file__, "--one", *key.split()], 600) | load | about

    if args.again and len(args.only) == len(SIZES):
        args.out.unlink(missing_ok=True)
    if not args.show:
        keys = [f"time {what}" for what in args.only]
        keys += [f"memory {what} {size}" for what in args.only for size in SIZES[what]]
        apart.collect(keys, job, args.out, again=args.again)
    rows = apart.rows(args.out)
    print(page(rows))
    plot(rows, args.plot)


if __name__ == "__main__":
    main()
