"""What pruning models of 8, 70 and 405 billion parameters takes: shapes are traced, memory and time are computed.

    python benchmarks/scale.py                  about 1 minute; writes results/scale.json and prints the tables
    python benchmarks/scale.py --models 405B    only the largest: seconds and peak memory of tracing it on meta

Each published configuration is built on meta and traced in a process of its own (measured: CPU seconds, peak resident
memory). What a run needs is what `regrow prune --memory` would print, from the same function, with the interpreter's
own memory as it is. Times are computed: 2 · parameters · tokens operations at a machine's sustained rate, bytes at its
disk's bandwidth, and cutting and checking at the measured seconds per GB (results/streamed_pruning.jsonl, two cores).
"""

import json
import platform
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from shared import Row, again, arguments, peak, rows, run, table, tell, today, write

from regrow.core.amounts import format_bytes
from regrow.store.run_record import versions
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.requirements import plan_memory
from regrow.tracing import trace

OUT = Path(__file__).parent / "results" / "scale.json"
STREAMED = Path(__file__).parent / "results" / "streamed_pruning.jsonl"
MODELS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
"""Llama-3.1's published configurations; all have 8 key-value heads and a vocabulary of 128,256."""
MACHINES = {
    "laptop (32 GiB)": (0.5e12, 3e9, 2e9, 32 * 2**30),
    "CPU server (512 GiB)": (8e12, 5e9, 2e9, 512 * 2**30),
    "one GPU (80 GB)": (400e12, 5e9, 2e9, 80 * 10**9),
    "eight GPUs (80 GB)": (8 * 400e12, 5e9, 2e9, 80 * 10**9),
}
"""Name → sustained operations per second in bfloat16, bytes read and written per second, memory for the model."""
WINDOWS, TOKENS, KEEP = 128, 2048, 0.7


def one(name: str) -> Row:
    """Trace a configuration on meta, and predict what pruning it needs."""
    import transformers

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(**MODELS[name], num_key_value_heads=8, vocab_size=128_256)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
    start, wall = time.process_time(), time.perf_counter()
    axes = trace(model, **inputs)
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    held = peak()
    like = dict(model.state_dict(keep_vars=True))
    bytes_of = {key: tensor.numel() * tensor.element_size() for key, tensor in like.items()}
    blocks = [
        SimpleNamespace(names=[key for key in like if key.startswith(f"{block.path}.")])
        for block in axes.recording.blocks
        if block.path
    ]
    inside = {key for block in blocks for key in block.names}
    weights = SimpleNamespace(
        name=name, stored={key: key for key in like}, like=like, bytes_of=bytes_of.__getitem__, places=lambda: ()
    )
    network = SimpleNamespace(
        model=model,
        weights=weights,
        blocks=blocks,
        outer=[key for key in like if key not in inside],
        largest_block=max(sum(bytes_of[key] for key in block.names) for block in blocks),
    )
    plan = plan_memory(cast(StreamedNetwork, network), 2**60, WINDOWS, TOKENS)
    return {
        "layers": config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(bytes_of.values()),
        "axes": len(axes),
        "trace_cpu_s": round(seconds, 2),
        "trace_s": round(wall, 2),
        "trace_ms_per_layer": round(1000 * seconds / config.num_hidden_layers, 1),
        "trace_peak_mib": held,
        "block_bytes": network.largest_block,
        "least": plan.least,
        "results": plan.results,
        "whole": plan.whole,
    }


def cutting() -> float:
    """Measured seconds (wall time) of cutting, checking and writing per GB of a model: the row of the largest model."""
    largest = max(
        (row for row in rows(STREAMED) if "apply" in row.get("seconds", {})), key=lambda row: row["model_bytes"]
    )
    return float(largest["seconds"]["apply"] / largest["model_bytes"] * 1e9)


def times(row: Row, machine: str, per_gb: float) -> dict[str, Any]:
    """Seconds of measuring, reading and writing, and cutting, and whether the model is streamed."""
    rate, read, write, memory = MACHINES[machine]
    streams = row["whole"] > memory
    if streams and "GPU" in machine:
        return {"refused": "does not fit a GPU: on the CPUs of its host"}
    if row["least"] > memory:
        return {"refused": f"refused: needs {format_bytes(row['least'])}"}
    return {
        "streams": streams,
        "measure": 2 * row["parameters"] * WINDOWS * TOKENS / rate,
        "disk": (2 if streams else 1) * row["bytes"] / read + KEEP * row["bytes"] / write,
        "cut": per_gb * row["bytes"] / 1e9,
    }


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


SIZES = {"in bfloat16": "bytes", "one block": "block_bytes", "needs, one block at a time": "least"}
SIZES |= {"hidden states": "results", "needs, whole": "whole"}


def memory(models: dict[str, Row]) -> Iterator[list[str]]:
    """The table of memory, line by line."""
    for name, row in models.items():
        traced = f"{row['trace_cpu_s']:.1f} s, {row['trace_peak_mib']:.0f} MiB"
        sizes = [format_bytes(row[key]) for key in SIZES.values()]
        yield [name, f"{row['parameters'] / 1e9:.1f} billion", *sizes, traced]


def time_taken(models: dict[str, Row], per_gb: float) -> Iterator[list[str]]:
    """The table of times, line by line."""
    for name, machine in product(models, MACHINES):
        cost = times(models[name], machine, per_gb)
        if "refused" in cost:
            yield [name, machine, f"{cost['refused']} | | | |"]
            continue
        parts = [cost["measure"], cost["disk"], cost["cut"]]
        blocks = "one at a time" if cost["streams"] else "all in memory"
        yield [name, machine, blocks, *map(duration, [*parts, sum(parts)])]


def main() -> None:
    """Trace and compute, then print."""
    args = arguments(__doc__, OUT, models=(*MODELS,))
    if args.job:
        tell(one(args.job))
        return
    if not args.show:
        result = {"date": today(), "machine": platform.machine(), "versions": versions(), "windows": WINDOWS}
        result |= {"tokens": TOKENS, "keep": KEEP, "cut_seconds_per_gb": round(cutting(), 2)}
        write(args.out, result | {"models": {name: run(again(name), 300) for name in args.models}})
    result = json.loads(args.out.read_text("utf-8"))
    models, per_gb = result["models"], result["cut_seconds_per_gb"]
    print("\n".join(table(["", "parameters", *SIZES, "traced in"], memory(models))), end="\n\n")
    columns = ("", "machine", "blocks", "measuring", "disk", "cut and check", "in all")
    print("\n".join(table(columns, time_taken(models, per_gb))))


if __name__ == "__main__":
    main()
