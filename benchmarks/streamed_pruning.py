"""Prune a Llama that need not fit into memory: peak memory and time with one block in memory, from the command line.

    python benchmarks/streamed_pruning.py --size 0.5B                    # make the model, then prune it
    python benchmarks/streamed_pruning.py --size 3.2B --limit 4GB        # 6.4 GB, in a control group of 4 GB
    python benchmarks/streamed_pruning.py --size 0.25B --layers 8 16 32  # the peak over depth, at one width
    python benchmarks/streamed_pruning.py --size 8B --memory 16GiB --dtype float32 --tokens 1024

Weights are random, in bfloat16, in shards of 1 GB. What counts is the peak resident memory of the process (VmHWM, reset
once everything is imported), beside the prediction and what the model's size allows: embeddings + 2.5 blocks + 1.7
blocks in float64 + 1 GiB; and the wall time of calibration, plan, cut, check and writing (``work``) beside that of
reading, of the forward passes of the same windows and of writing, each alone. Imports, tracing and evaluation are in
``seconds`` and count for neither. Rows go to benchmarks/results/streamed_pruning.jsonl. The 3.2B model takes about ten
minutes on two idle cores, the others one to two.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from shared import Row, add, arguments

from regrow.core.amounts import parse_bytes
from regrow.nets.packaged import packaged_folder
from regrow.store.run_record import versions
from regrow.store.tensors import TensorFile

OUT = Path(__file__).parent / "results" / "streamed_pruning.jsonl"
SIZES = {
    "0.25B": (1024, 2816, 16, 16, 8, 49152, True),
    "0.5B": (1280, 3456, 24, 20, 4, 49152, True),
    "1B": (2048, 8192, 16, 32, 8, 49152, True),
    "3.2B": (3072, 8192, 28, 24, 8, 128256, True),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
}
"""Name → hidden size, MLP width, layers, heads, key-value heads, vocabulary, whether embeddings and head are tied."""
SHARD = 10**9


def configuration(size: str, layers: int) -> Row:
    """The configuration of a Llama of a size."""
    hidden, inner, usual, heads, groups, vocabulary, tied = SIZES[size]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu"}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers or usual}
    config |= {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": hidden // heads}
    config |= {"vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 8192}
    return config | {"rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0}


def make_model(folder: Path, config: Row) -> None:
    """Write a random model of a configuration in shards, one tensor in memory at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, parameter in model.named_parameters():
        if filled + parameter.nbytes > SHARD and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = parameter.dtype, tuple(parameter.shape)
        filled += parameter.nbytes
    folder.mkdir(parents=True)
    generator, placed = torch.Generator().manual_seed(0), {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        with TensorFile(folder / file, shard, {"format": "pt"}) as written:
            for name, (dtype, shape) in shard.items():
                noise = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
                written.write(name, noise.to(dtype))
                placed[name] = file
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    source = packaged_folder("smollm2-135m", lambda done, total, what: None)
    for path in source.glob("*token*"):
        shutil.copy(path, folder / path.name)
    for path in (source / "vocab.json", source / "merges.txt"):
        if path.exists():
            shutil.copy(path, folder / path.name)


RUN = """
import json, sys, time, torch
from pathlib import Path
import transformers, regrow.cli
from regrow.jobs.prune import prune_named
from regrow.jobs.recording import Invocation
from regrow.jobs import memory_needs as streamed
from regrow.settings.prune import Settings
def peak():
    return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
folder, out, tokens, seq, keep, memory, dtype = sys.argv[1:8]
def opened(*given, true=streamed.open_network):
    made = true(*given)
    open("/proc/self/clear_refs", "w").write("5")
    print(json.dumps({"base": peak()}), flush=True)
    return made
streamed.open_network = opened
settings = Settings(folder, "flap", {}, float(keep), sources=("news",), tokens=int(tokens), eval_tokens=int(seq),
                    seq_len=int(seq), dtype=dtype, undo=False)
start = time.time(), time.process_time()
announce = lambda line: print(json.dumps({"plan": line}), flush=True)
done = prune_named(settings, Invocation(out, memory=memory, announce=announce))
row = {"wall": time.time() - start[0], "cpu": time.process_time() - start[1], "peak": peak()}
record = done.read_record()
row |= {"seconds": record["seconds"], "verify": done.last("verify"), "predicted": record["memory"]["predicted"]}
print(json.dumps(row), flush=True)
"""

PLAIN = """
import json, sys, time
from contextlib import contextmanager
from regrow import data
from regrow.jobs.models import DTYPES
from regrow.streaming.opening import open_network
folder, tokens, seq, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
opened = open_network(folder, DTYPES.get(dtype))
network = opened.network()
batches = data.windows(data.text("news"), opened.loaded.tokenizer, n=tokens // seq, seq_len=seq).batches
start = time.time()
for name in network.weights.stored: network.weights.checkpoint.read(name)
read = time.time() - start
forward = 0.0
@contextmanager
def timed(index, watched):
    global forward
    start = time.time()
    yield
    forward += time.time() - start
network.visit(batches, [network.blocks[-1].names[0]], timed)
print(json.dumps({"read": read, "forward": forward}))
"""


@contextmanager
def limited(limit: int) -> Iterator[Path | None]:
    """Make a control group with a limit of memory, which a process enters; without a limit there is none."""
    if not limit:
        yield None
        return
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    first = next((path for _, names, path in lines if names == "memory"), None)  # of the first version, if not None
    unified = next((path for number, _, path in lines if number == "0"), "/")
    base = Path("/sys/fs/cgroup", "memory" if first is not None else "", (first or unified).lstrip("/"))
    group = base / f"streamed-pruning-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if first is None else "memory.limit_in_bytes")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def measured(script: str, *words: object, limit: int = 0) -> Row:
    """Run a script in a process of its own and return what it printed, as one record."""
    row: Row = {}
    with limited(limit) as group:

        def enter() -> None:
            if group:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, "-c", script, *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter)
        for line in done.stdout.splitlines():
            row |= json.loads(line)
        if group:
            counter = next(group / name for name in ("memory.events", "memory.failcnt") if (group / name).exists())
            row |= {"limit": limit, "reclaims": counter.read_text().split()}
    return row


def write_alone(folder: Path) -> float:
    """Return the seconds that copying the bytes of a run's weights to the disk takes."""
    start = time.time()
    for path in folder.glob("model*.safetensors"):
        with tempfile.NamedTemporaryFile(dir=folder.parent) as file, path.open("rb") as source:
            shutil.copyfileobj(source, file, 2**24)
            file.flush()
            os.fsync(file.fileno())
    return time.time() - start


def made(size: str, layers: int, place: Path) -> tuple[Path, int]:
    """The folder of a model, made unless it is there, and its number of layers."""
    config = configuration(size, layers)
    folder = place / f"llama-{size}-{config['num_hidden_layers']}"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder, config)
    return folder, config["num_hidden_layers"]


def prune(args: Namespace, layers: int) -> Row:
    """Make a model, prune it from the command line, and return the row of the result."""
    folder, layers = made(args.size, layers, args.folder)
    out = args.folder / f"run-{args.size}-{layers}"
    shutil.rmtree(out, ignore_errors=True)
    hidden, inner, _, heads, groups, vocabulary, tied = SIZES[args.size]
    block = hidden * (3 * inner + 2 * hidden + 2 * hidden // heads * groups) + 2 * hidden
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    item = getattr(torch, args.dtype or "bfloat16").itemsize
    bound = item * vocabulary * hidden * (2 - tied) + int(2.5 * item * block + 1.7 * 8 * block) + 2**30
    memory = args.memory or f"{bound >> 20}MiB"
    limit = parse_bytes(args.limit) if args.limit else 0
    row = {"size": args.size, "layers": layers, "tokens": args.tokens, "seq_len": args.seq_len, "memory": memory}
    row |= {"dtype": args.dtype}
    row |= measured(RUN, folder, out, args.tokens, args.seq_len, 0.7, memory, args.dtype, limit=limit)
    row |= measured(PLAIN, folder, args.tokens, args.seq_len, args.dtype) | {"write": write_alone(out)}
    work = sum(row["seconds"].get(name, 0) for name in ("calibrate", "plan", "apply"))
    plain = sum(row[name] for name in ("read", "forward", "write"))
    row |= {"model_bytes": stored, "block_bytes": item * block, "bound": bound, "work": work, "ratio": work / plain}
    return row | {"versions": versions(), "threads": torch.get_num_threads()}


FOLDER = Path(tempfile.gettempdir()) / "streamed-pruning"


def main() -> None:
    """Measure and append the rows."""
    words = {"limit": "", "memory": "", "dtype": "", "folder": FOLDER}
    args = arguments(__doc__, size="0.5B", layers=[0], tokens=8192, seq_len=512, **words)
    for layers in args.layers:
        print(json.dumps(add(OUT, prune(args, layers)), indent=1))


if __name__ == "__main__":
    main()
