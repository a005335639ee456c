"""What tracing, planning and surgery cost, in seconds and memory, and what Torch-Pruning takes for the same.

    python benchmarks/speed.py

Each measurement runs in a process of its own, one thread, the tools in turns, and is repeated; the fastest counts.
Seconds are of the wall clock; those of the processor stand beside them, for machines that do something else too.
ResNet-50 (224 × 224) and Llama-3.2-1B's sizes (1.24 billion parameters, random weights, float32) are cut by half as in
peers.py. The 70-billion Llama, 80 layers, lives on meta and is only traced. Memory is the most a process ever held; for
the 70-billion one also what that is above an interpreter that has imported torch and transformers and built the model.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import apart
import peer
import peers
import torch

from regrow.store.versions import versions
from regrow.tracing import trace

NETS = ("resnet50", "llama-1b")
SEVENTY = {"vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
SEVENTY |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
"""The sizes of Llama-3-70B."""


def seventy(layers: int) -> apart.Row:
    """Trace a Llama of 70 billion parameters on meta."""
    import transformers

    torch.set_num_threads(1)
    imported = apart.peak()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SEVENTY | {"num_hidden_layers": layers}))
        inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
    built, start, worked = apart.peak(), time.perf_counter(), time.process_time()
    axes = trace(model.eval(), **inputs)
    seconds = time.perf_counter() - start
    return {
        "parameters": peer.count(model),
        "seconds": round(seconds, 2),
        "cpu_s": round(time.process_time() - worked, 2),
        "axes": len(axes),
        "free": len(axes.free()),
        "peak_mib": apart.peak(),
        "above_imports_mib": round(apart.peak() - imported, 1),
        "above_model_mib": round(apart.peak() - built, 1),
    }


def fastest(turns: list[apart.Row]) -> apart.Row:
    """The run that took least, with the seconds of all."""
    done = [row for row in turns if "seconds" in row and "error" not in row]
    return min(done, key=lambda row: row["seconds"]) | {"all_s": [row["seconds"] for row in done]} if done else turns[0]


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--nets", nargs="*", default=NETS)
    parser.add_argument("--layers", type=int, default=80, help="of the 70-billion Llama; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="limit of one process")
    parser.add_argument("--seventy", type=int, help=argparse.SUPPRESS)
    peer.options(parser)
    args = parser.parse_args()
    if args.seventy:
        apart.tell(seventy(args.seventy))
        return
    pythons = peer.pythons(args)
    script = str(Path(peers.__file__))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]},
        "versions": versions(),
    }
    for net in args.nets:
        turns: dict[str, list[apart.Row]] = {tool: [] for tool in ("regrow", *pythons)}
        for _ in range(args.repeats):
            turns["regrow"].append(apart.run([sys.executable, script, "--one", "speed", net], args.seconds))
            for version, python in pythons.items():
                turns[version].append(peer.run(python, "speed", net, args.seconds))
        result[net] = {tool: fastest(rows) for tool, rows in turns.items()}
        print(net, json.dumps(result[net], indent=1), flush=True)
    if args.layers:
        command = [sys.executable, __file__, "--seventy", str(args.layers)]
        result["llama-70b on meta"] = fastest([apart.run(command, args.seconds) for _ in range(args.repeats)])
        print("llama-70b", json.dumps(result["llama-70b on meta"], indent=1), flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
