"""What the proof on every change costs: seconds of ``apply``, its share, and memory of ``verify``.

    python benchmarks/proof.py

Each measurement runs in a process of its own with one thread; the fastest of several counts. ResNet-50 (random weights,
224 × 224) and Llama-3.2-1B's sizes (1.24 billion parameters, random weights, float32) lose half of each axis whose cut
is exact, and for the Llama also half of its MLP neurons alone; SmolLM2-135M keeps an irregular plan, a
random share of each MLP and of some groups of heads. The share is that of comparing numbers in float64. It holds no
recording of the network at its planned size, which was made before too, and no forward pass: ``trace``, ``apply``
compare the network's own (``forward_cpu_s`` before the cut) with its recording.

Memory is the most that a process held (``ru_maxrss``) while it verified a Llama of half a billion parameters in
bfloat16, above what it held once the model was built, and in all.
"""

import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from shared import Row, again, arguments, peak, run, tell, today, write

OUT = Path(__file__).parent / "results" / "proof.json"

JOBS = ("resnet50", "smollm2-135m", "llama-1b", "llama-1b mlp")
HALF = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 14, "vocab_size": 32_000}
HALF |= {"num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True}
"""The sizes of a Llama of half a billion parameters."""


BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256}
BILLION |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
"""The sizes of Llama-3.2-1B."""


def opened(job: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A network and its inputs."""
    from regrow.nets import load

    if job.startswith("llama"):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**BILLION)).eval(), (), {"input_ids": torch.randint(3, 211, (1, 16))}
    loaded = load(job)
    return loaded.model, loaded.example.args, dict(loaded.example.kwargs)


def plan_of(job: str, model: torch.nn.Module, axes: Any) -> Any:
    """Half of everything, half of the MLPs, or an irregular plan."""
    import peers

    from regrow import Plan

    if job in ("resnet50", "llama-1b"):
        return peers.halved(model, axes)
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for i, axis in enumerate(axes.units()):
        if not any(part in axis.key for part in (("mlp",) if job.endswith("mlp") else ("mlp", "self_attn"))):
            continue
        share = 0.5 if job.endswith("mlp") else 0.4 + 0.6 * float(torch.rand((), generator=generator))
        if axis.size > 8 or i % 3 == 0:
            keep[axis.key] = torch.randperm(axis.size, generator=generator)[: max(1, round(share * axis.size))].tolist()
    return Plan.keeping(axes, keep)


def applying(job: str) -> Row:
    """Seconds of ``trace``, of a forward pass, of ``apply``, and of the proof in it."""
    from regrow import apply, trace

    torch.set_num_threads(1)
    model, args, kwargs = opened(job)
    begun = time.process_time()
    axes = trace(model, *args, **kwargs)
    row: Row = {"trace_cpu_s": round(time.process_time() - begun, 2), "traced_mib": peak()}
    begun = time.process_time()
    with torch.no_grad():
        model(*args, **kwargs)
    row["forward_cpu_s"] = round(time.process_time() - begun, 2)
    plan, module, proof = plan_of(job, model, axes), sys.modules[apply.__module__], [0.0, 0.0]
    check_blocks = module.check_blocks

    def timed(change: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        check_blocks(change)
        proof[:] = [time.perf_counter() - wall, time.process_time() - cpu]

    module.check_blocks = timed
    gc.collect()
    gc.freeze()  # a full collection takes 0.2 s and would fall into this or that part by chance
    wall, cpu = time.perf_counter(), time.process_time()
    apply(model, axes, plan)
    spent = {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    spent |= {"proof_s": proof[0], "proof_cpu_s": proof[1]}
    row |= {name: round(seconds, 2) for name, seconds in spent.items()}
    return row | {"peak_mib": peak(), "share": round(proof[1] / spent["cpu_s"], 3)}


def verifying() -> Row:
    """The memory that ``verify`` takes of a Llama of half a billion parameters in bfloat16, half of its MLPs cut."""
    torch.set_num_threads(1)
    from transformers import LlamaConfig, LlamaForCausalLM

    from regrow import Plan, trace, verify

    torch.set_default_dtype(torch.bfloat16)
    imported = peak()
    model = LlamaForCausalLM(LlamaConfig(**HALF)).eval()
    torch.set_default_dtype(torch.float32)
    axes = trace(model, input_ids=torch.arange(16)[None])
    keep = {axis.key: range(0, axis.size, 2) for axis in axes.units(only=("mlp",))}
    plan, held = Plan.keeping(axes, keep), peak()
    size = sum(one.numel() * one.element_size() for one in model.parameters()) / 2**20
    wall, cpu = time.perf_counter(), time.process_time()
    found = verify(model, axes, plan)
    return {
        "parameters": sum(one.numel() for one in model.parameters()),
        "model_mib": round(size, 1),
        "imported_mib": imported,
        "before_mib": held,
        "peak_mib": peak(),
        "above_imports_mib": round(peak() - imported, 1),
        "above_model_mib": round(peak() - held, 1),
        "allowed_mib": round(1.5 * size + 500e6 / 2**20, 1),
        "ok": found.ok,
        "max_abs_diff": found.max_abs_diff,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
    }


def main() -> None:
    """Run and write."""
    args = arguments(__doc__, jobs=(*JOBS, "verify"), repeats=3, seconds=600.0, out=OUT)
    if args.job:
        tell(verifying() if args.job == "verify" else applying(args.job))
        return
    from regrow.store.run_record import versions

    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]}
    result |= {"date": today(), "machine": machine, "versions": versions()}
    for job in args.jobs:
        turns = [run(again(job), args.seconds) for _ in range(args.repeats)]
        best = min(turns, key=lambda row: row.get("cpu_s", float("inf")))
        result[job] = {"this": best | {"all_cpu_s": [row.get("cpu_s") for row in turns]}}
        print(job, json.dumps(result[job]), flush=True)
        write(args.out, result)


if __name__ == "__main__":
    main()
