"""How fast a pruned SmolLM2-135M is where people run it: prefill and decode in transformers, onnxruntime, llama.cpp.

    python benchmarks/serving.py --work FOLDER
    python benchmarks/serving.py --work FOLDER --llama-cpp PYTHON      # an interpreter that has llama-cpp-python

Dense beside 80, 70 and 50 % kept, each cut three ways: irregular, irregular with widths in multiples of 16, and regular
(one width per kind in all layers) in multiples of 16. What stays is chosen by magnitude, which takes no text: speed
depends on widths alone. Networks take turns, so that what disturbs the machine disturbs all; the least and the median
of the repeats are told. Ideal is the ratio of the multiply–accumulates of a whole prefill (the layer of logits for the
last token; in onnxruntime, whose graph gives them all, for all); the share is the measured speed-up times that ratio.
Run it on a machine that does nothing else.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import regrow
from regrow import evaluation, export, store
from regrow.evaluation.generation import empty_cache
from regrow.nets import load
from regrow.store.versions import versions
from regrow.tracing import trace

FORMS: Mapping[str, dict[str, Any]] = {
    "irregular": {},
    "irregular, multiples of 16": {"round_to": 16},
    "regular, multiples of 16": {"round_to": 16, "regular": True},
}
GGUF = ("f32", "q8_0")
Turn = Callable[[], float]
"""Does one thing once; gives back its seconds."""


def made(work: Path, keeps: list[float], tokens: int) -> dict[str, dict[str, Any]]:
    """Name → folder, multiply–accumulates of a prefill, bytes of the cache per token; cut what is not there yet."""
    found: dict[str, dict[str, Any]] = {}
    cases = [("dense", 1.0, {}), *((f"{keep:g}, {form}", keep, more) for keep in keeps for form, more in FORMS.items())]
    for name, keep, more in cases:
        folder = work / name.replace(", ", "-").replace(" ", "-")
        if not (folder / store.SHAPES).is_file():
            loaded = load("smollm2-135m", dtype=torch.float32)
            if keep < 1:
                regrow.prune(loaded.model, method="magnitude", keep=keep, example=loaded.example, **more)
            store.save(loaded, folder)
        net = store.load(folder)
        macs = evaluation.macs(trace(net, torch.zeros(1, tokens, dtype=torch.long), use_cache=False))
        found[name] = {
            "folder": folder,
            "macs": macs,
            "macs_last": macs - (tokens - 1) * net.lm_head.weight.numel(),
            "cache_bytes_per_token": _cached(net),
            "parameters": sum(p.numel() for p in net.parameters()),
        }
    return found


@torch.no_grad()
def _cached(net: Any) -> int:
    cache = empty_cache(net)
    net(torch.zeros(1, 4, dtype=torch.long), **cache)
    layers = next(value for value in cache.values() if hasattr(value, "layers")).layers
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)) // 4


@torch.no_grad()
def transformers_turns(folder: Path, tokens: int, steps: int) -> dict[str, Turn]:
    """Prefill and decode with the network that transformers loads."""
    net: Any = store.load(folder)
    window = torch.arange(tokens)[None] % 40_000 + 100

    @torch.no_grad()
    def prefill() -> float:
        start = time.perf_counter()
        net(window, use_cache=False, logits_to_keep=1)
        return time.perf_counter() - start

    @torch.no_grad()
    def decode() -> float:
        cache = empty_cache(net)
        net(window[:, :32], **cache)
        start = time.perf_counter()
        for i in range(steps):
            net(window[:, i : i + 1], **cache)
        return (time.perf_counter() - start) / steps

    return {"prefill": prefill, "decode": decode}


def _onnx(folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.is_file():
        export(folder, path, format="onnx", cache=True)
    return path


def _gguf(folder: Path, dtype: str) -> Path:
    path = folder / f"model-{dtype}.gguf"
    if not path.is_file():
        export(folder, path, format="gguf", dtype=dtype)
    return path


def onnx_turns(folder: Path, tokens: int, steps: int) -> dict[str, Turn]:
    """Prefill and decode in onnxruntime, with the graph that has a cache."""
    import numpy
    import onnxruntime

    path = _onnx(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    window = (torch.arange(tokens)[None] % 40_000 + 100).numpy()
    past = {one.name: one.shape for one in session.get_inputs() if one.name.startswith("past_key_values")}
    empty = {name: numpy.zeros((1, shape[1], 0, shape[3]), numpy.float32) for name, shape in past.items()}

    def given(ids: Any, cache: dict[str, Any]) -> dict[str, Any]:
        held = next(iter(cache.values())).shape[2]
        mask = numpy.ones((1, held + ids.shape[1]), numpy.int64)
        return {"input_ids": ids, "attention_mask": mask, **cache}

    def ask(ids: Any, cache: dict[str, Any]) -> dict[str, Any]:
        said = session.run(None, given(ids, cache))
        return dict(zip(cache, said[1:], strict=True))

    def prefill() -> float:
        start = time.perf_counter()
        ask(window, empty)
        return time.perf_counter() - start

    def decode() -> float:
        cache = ask(window[:, :32], empty)
        start = time.perf_counter()
        for i in range(steps):
            cache = ask(window[:, i : i + 1], cache)
        return (time.perf_counter() - start) / steps

    return {"prefill": prefill, "decode": decode}


def in_turns(turns: Mapping[str, Mapping[str, Turn]], repeats: int) -> dict[str, dict[str, Any]]:
    """Every network's every act, one after the other, over and over; the first round is not counted."""
    seconds: dict[str, dict[str, list[float]]] = {name: {act: [] for act in acts} for name, acts in turns.items()}
    for repeat in range(repeats + 1):
        for name, acts in turns.items():
            for act, turn in acts.items():
                took = turn()
                if repeat:
                    seconds[name][act].append(took)
        print(f"round {repeat} of {repeats}", file=sys.stderr, flush=True)
    return {
        name: {
            act: {"min_s": min(took), "median_s": statistics.median(took), "all_s": [round(s, 4) for s in took]}
            for act, took in acts.items()
        }
        for name, acts in seconds.items()
    }


LLAMA_CPP = """
import json, sys, time
import llama_cpp
paths, tokens, steps, repeats, threads = json.loads(sys.argv[1])
nets = {name: llama_cpp.Llama(path, n_ctx=tokens + 64, n_batch=tokens, n_threads=threads, n_threads_batch=threads,
        verbose=False) for name, path in paths.items()}
window = [i % 40000 + 100 for i in range(tokens)]
took = {name: {"prefill": [], "decode": []} for name in nets}
for repeat in range(repeats + 1):
    for name, net in nets.items():
        net.reset(); start = time.perf_counter(); net.eval(window); prefill = time.perf_counter() - start
        net.reset(); net.eval(window[:32]); start = time.perf_counter()
        for i in range(steps): net.eval([window[i]])
        decode = (time.perf_counter() - start) / steps
        if repeat:
            took[name]["prefill"].append(prefill); took[name]["decode"].append(decode)
print(json.dumps(took))
"""


def llama_cpp(python: str, nets: Mapping[str, dict[str, Any]], dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode in llama.cpp, in an interpreter that has it."""
    paths = {name: str(_gguf(net["folder"], dtype)) for name, net in nets.items()}
    job = json.dumps([paths, args.tokens, args.steps, args.repeats, args.threads])
    done = subprocess.run([python, "-c", LLAMA_CPP, job], check=True, capture_output=True, text=True)
    return {
        name: {
            act: {"min_s": min(took), "median_s": statistics.median(took), "all_s": [round(s, 4) for s in took]}
            for act, took in acts.items()
        }
        | {"bytes": Path(paths[name]).stat().st_size}
        for name, acts in json.loads(done.stdout.splitlines()[-1]).items()
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    parser.add_argument("--work", type=Path, required=True, help="where the networks are kept")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    parser.add_argument("--tokens", type=int, default=256, help="of a prefill")
    parser.add_argument("--steps", type=int, default=24, help="of a decode")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-cpp", default="", metavar="PYTHON")
    parser.add_argument(
        "--onnx", nargs="*", choices=FORMS, default=list(FORMS), help="forms for onnxruntime; each export takes minutes"
    )
    parser.add_argument("--prepare", action="store_true", help="only make the files; measure another time")
    parser.add_argument("--show", action="store_true", help="print the table")
    args = parser.parse_args()
    if args.show:
        print(shown(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(args.threads)
    nets = made(args.work, args.keep, args.tokens)
    graphs = {name: net for name, net in nets.items() if name.partition(", ")[2] in ("", *args.onnx)}
    if args.prepare:
        for net in graphs.values():
            _onnx(net["folder"])
        for net in nets.values() if args.llama_cpp else ():
            for dtype in GGUF:
                _gguf(net["folder"], dtype)
        return
    told = ("macs", "macs_last", "cache_bytes_per_token", "parameters")
    size = lambda path: path.stat().st_size if path.is_file() else None  # noqa: E731
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "versions": versions(),
        "settings": {"tokens": args.tokens, "steps": args.steps, "repeats": args.repeats},
    }
    runtimes: dict[str, Any] = {}
    for runtime, turns, those in (
        ("transformers", transformers_turns, nets),
        ("onnxruntime", onnx_turns, graphs),
    ):
        ready = {name: turns(net["folder"], args.tokens, args.steps) for name, net in those.items()}
        runtimes[runtime] = in_turns(ready, args.repeats)
        del ready
    for dtype in GGUF if args.llama_cpp else ():
        runtimes[f"llama.cpp {dtype}"] = llama_cpp(args.llama_cpp, nets, dtype, args)
    result["nets"] = {
        name: {key: net[key] for key in told} | {"bytes": size(net["folder"] / "model.safetensors")}
        for name, net in nets.items()
    }
    result["runtimes"] = runtimes
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(shown(result))


def shown(result: dict[str, Any]) -> str:
    """The table in Markdown: per runtime and network, tokens a second and the share of the ideal speed-up."""
    lines = [
        "| runtime | network | MACs of dense | prefill tokens/s: best, median | speed-up | share of ideal "
        "| decode tokens/s: best, median | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tokens, sizes = result["settings"]["tokens"], result["nets"]
    for runtime, nets in result["runtimes"].items():
        dense, macs = nets["dense"], "macs" if runtime == "onnxruntime" else "macs_last"
        for name, acts in nets.items():
            ratio = sizes[name][macs] / sizes["dense"][macs]
            prefill, decode = acts["prefill"], acts.get("decode")
            faster = dense["prefill"]["min_s"] / prefill["min_s"]
            row = [
                runtime,
                name,
                f"{ratio:.3f}",
                f"{tokens / prefill['min_s']:.0f}, {tokens / prefill['median_s']:.0f}",
            ]
            row += [f"{faster:.2f}", f"{faster * ratio:.2f}"]
            if decode:
                row += [f"{1 / decode['min_s']:.1f}, {1 / decode['median_s']:.1f}"]
                row += [f"{dense['decode']['min_s'] / decode['min_s']:.2f}"]
            else:
                row += ["", ""]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
