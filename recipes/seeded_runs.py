"""Small seeded runs of every command and every way to run it: a refactoring must not change what they make.

    python recipes/seeded_runs.py                   run all, compare with what is committed
    python recipes/seeded_runs.py --only mgas       those with this in their names, and those they need
    python recipes/seeded_runs.py --source CHECKOUT run another checkout, through its command line and Python functions
    python recipes/seeded_runs.py --keep FOLDER     keep what the runs write, to see what differs
    python recipes/seeded_runs.py --record          write what is found; only where an old result was wrong

Of each run there are digests of all tensors of its results (``digests``), of the plans in its ledger (``plans``), and
of the measurements of each kind without times (``rows``); of ``evaluate`` and ``export``, of what they write
(``files``). They hold for one thread, one version of torch and one kind of processor, which the file names; elsewhere
run the old and the new version in turns. Each run is a process of its own, which begins with torch imported.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import arguments, today, write

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}

HERE = Path(__file__).parent
OUT = HERE / "results" / "seeded_runs.json"
TEXT = "--source digits --tokens 896 --eval-tokens 64"
CODE = "--code toys:classifier"
LEARN = "learn split:digits:2 --model mlp:12-12 --epochs 2 --train 400 --test 200 --batch-size 32 --lr 0.1 --method"
SEARCH = (
    "search cells:4-2-1 --data digits --target params=3k --train 120 --test 60 --batch-size 48 --epochs 8 --retrain 2 "
    "--stride 1 --method"
)
SHORT = f"{SEARCH.replace('--epochs 8 --retrain 2', '--epochs 4 --retrain 1')} mgas --set warm=1 --set every=1"
GPRUNE = f"prune toys:classifier --method gprune --set steps=6 --set every=2 --keep 0.6 {TEXT} --finetune 2"
WORDS = "--source news --source code --tokens 256 --eval-tokens 128 --seq-len 64"
LLAMA = f"prune llama --method flap --keep 0.7 {WORDS}"
REFIT = "--tokens 512 --by"
RUNS = {
    "prune flap": f"prune toys:classifier --method flap --keep 0.6 {TEXT}",
    "prune gprune": GPRUNE,
    "recover refit": f"recover 'prune flap' --by refit {CODE} --tokens 896",
    "recover lora": f"recover 'prune flap' --by lora {CODE} --tokens 896 --set passes=3 --set checks=3 --set windows=1",
    "recover distil": f"recover 'prune flap' --by distil {CODE} --tokens 896",
    "learn sparsegrow": f"{LEARN} sparsegrow",
    "learn ewc": f"{LEARN} ewc",
    "learn der++": f"{LEARN} replay",
    "search mgas": f"{SEARCH} mgas --set warm=1 --set every=1 --set share=0.3",
    "search darts": f"{SEARCH} darts",
    "prune fisher, BatchNorm": f"prune toys:residual --method fisher --target macs=60% {TEXT}",
    "prune reconstruct, images": f"prune toys:residual --method magnitude --keep 0.6 {TEXT} --reconstruct",
    "grow channels": f"grow 'prune flap' --channels +25% --code toys:classifier {TEXT.replace('--tokens 896 ', '')}",
    "grow blocks": "grow toys:residual --blocks +1 --mlp +4 --on digits --tokens 256 --steps 4 --train all",
    "prune, by default": f"prune toys:residual --target macs=60% {TEXT}",
    "undo": "undo 'grow channels'",
    "evaluate images": f"evaluate 'prune flap' --source digits --eval-tokens 64 {CODE}",
    "prune flap, text": LLAMA,
    "prune flap, streamed": f"{LLAMA} --memory LEAST",
    "prune flap, two ranks": LLAMA,
    "prune flap, streamed by two ranks": f"{LLAMA} --memory LEAST",
    "prune text, by default": f"prune llama --keep 0.7 {WORDS} --precision float32",
    "prune obs": f"{LLAMA} --method obs",
    "prune obs, streamed": f"{LLAMA} --method obs --memory LEAST",
    "prune reconstruct": f"{LLAMA} --method wanda_sp --reconstruct",
    "prune generated": f"{LLAMA} --source generated --generated-tokens 128",
    "grow text": "grow llama --mlp +25% --heads +2 --blocks +1 --source news --eval-tokens 128 --seq-len 64",
    "recover refit, text": f"recover 'prune flap, text' {REFIT} refit",
    "recover distil, text": f"recover 'prune flap, text' {REFIT} distil",
    "recover distil, two ranks": f"recover 'prune flap, text' {REFIT} distil",
    "evaluate text": f"evaluate 'prune flap, text' {WORDS.replace('--tokens 256 ', '')}",
    "export transformers": "export 'prune flap, text' --to transformers",
    "export net.onnx": f"export 'prune flap' --to onnx {CODE}",
    "prune gprune, resumed": GPRUNE,
    "recover distil, resumed": f"recover 'prune flap' --by distil {CODE} --tokens 896",
    "learn sparsegrow, resumed": f"{LEARN} sparsegrow",
    "learn sparsegrow, two ranks": f"{LEARN} sparsegrow",
    "search mgas, fewer epochs": SHORT,
    "search mgas, resumed": SHORT,
    "search mgas, two ranks": SHORT,
}
"""Name and folder of a run → its command. ``LEAST`` stands for the least memory with which the command runs."""
KINDS = ("digests", "plans", "rows", "files")
"""Kinds of digests in the file of results."""
IMPORTED = ("matplotlib.pyplot", "sklearn.datasets", "torch._dynamo", "torch.distributed.fsdp", "transformers")
"""What runs import, imported once before them."""
KILLED = 3
"""The write to its measurements at which a run that is resumed is killed."""
TIMES = frozenset(("seconds", "ms", "memory", "peak", "page"))
"""Fields of measurements and results that tell the time, or the memory of the process."""


def write_llama(folder: Path) -> None:
    """Write a small language model with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2)).save_pretrained(folder)


def least(refusal: str) -> str:
    """Return the amount of memory that a refusal names."""
    found = re.search(r"use --memory (\S+\w)", refusal)
    if not found:
        raise SystemExit(f"it was not refused: {refusal[-600:]}")
    return found[1]


def without_times(value: Any) -> Any:
    """Return JSON data without times and amounts of memory."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def short(value: object) -> str:
    """Return a short digest of JSON data or bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def digest_tensors(folder: Path) -> str:
    """Of all tensors in the results of a run, wherever they lie, but for those of the model that it started from."""
    from safetensors import safe_open

    found = hashlib.sha256()
    results = (path for path in folder.rglob("model.safetensors") if "before" not in path.relative_to(folder).parts)
    for path in sorted(results):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
                found.update(tensor.contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def onnx_graph(path: Path) -> bytes:
    """Return an ONNX file without the lines of code that each node comes from."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        del node.metadata_props[:]
    return model.SerializeToString(deterministic=True)


def digest(path: Path) -> dict[str, str]:
    """Return the digests of a run folder, or of what was exported or printed, by kind."""
    digests = {"digests": digest_tensors(path)} if path.is_dir() else {}
    if not (path / "run.json").is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        parts = [[file.name, short(file.read_bytes())] for file in files if file.name != "model.safetensors"]
        if path.suffix == ".json":
            parts = without_times(json.loads(path.read_text()))
        if path.suffix == ".onnx":
            parts = [["graph", short(onnx_graph(path))]]
        return {**digests, "files": short(parts)}
    if (path / "ledger.json").is_file():
        digests["plans"] = short(without_times(json.loads((path / "ledger.json").read_text())["plans"]))
    kinds: dict[str, list[object]] = {}
    if (path / "metrics.jsonl").is_file():
        for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()):
            if row["what"] != "latency":
                kinds.setdefault(row["what"], []).append(without_times(row))
    digests["rows"] = " ".join(f"{kind}:{short(rows)[:8]}" for kind, rows in sorted(kinds.items()))
    return digests


def act(log: Path, environment: dict[str, str], action: Callable[..., object], *arguments: object) -> None:
    """Run a function in the present process, which writes what it prints to a file."""
    with log.open("wb", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(log.parent)
    try:
        action(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def command(words: list[str], kill: bool = False) -> None:
    """Run a command; one that is to be killed dies when it opens its measurements for writing again."""
    writes = 0

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal writes
        if event == "open" and str(given[0]).endswith("metrics.jsonl") and given[2] & (os.O_WRONLY | os.O_RDWR):
            writes += 1
            if writes == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill:
        sys.addaudithook(watch)
    sys.argv = ["regrow", *words]
    runpy.run_module("regrow", run_name="__main__")


def go(work: Path, action: Callable[..., object], *arguments: object, ranks: int = 1) -> tuple[int, str]:
    """Run a function in one process or several; returns the exit code of the first and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    fork, processes = multiprocessing.get_context("fork"), []
    for rank in range(ranks):
        environment = {**several, "RANK": str(rank)} if ranks > 1 else {}
        log = work / f"log-{rank}"
        processes.append(fork.Process(target=act, args=(log, environment, action, *arguments)))
        processes[-1].start()
    for process in processes:
        process.join()
    return processes[0].exitcode or 0, (work / "log-0").read_text()


def run(name: str, work: Path) -> dict[str, str]:
    """Run a command or a call in a folder; returns its digests."""
    from seeded_calls import CALLS

    if name in CALLS:
        out = f"{name}.txt" if "evaluate" in name else name
        code, said = go(work, CALLS[name], out)
    else:
        words = shlex.split(RUNS[name])
        out = f"{name}.json" if words[0] == "evaluate" else name
        words += ["--json" if words[0] == "evaluate" else "--out", out]
        ranks = 2 if "two ranks" in name else 1
        if "LEAST" in words:
            at = words.index("LEAST")
            _, refusal = go(work, command, [*words[:at], "1MiB", *words[at + 1 :]])
            words[at] = least(refusal)
        if "resumed" in name and go(work, command, words, True)[0] != -signal.SIGKILL:
            raise SystemExit(f"{name}: the run was not killed")
        code, said = go(work, command, words, ranks=ranks)
    if code or ("streamed" in name and "blocks at a time" not in said):
        raise SystemExit(f"{name}: exit code {code}: {said.strip()[-900:]}")
    return digest(work / out)


def chosen(only: str) -> Iterator[str]:
    """Yield the names of runs with a text in their names, and those that they need."""
    from seeded_calls import CALLS

    names = [*RUNS, *CALLS]
    needed = {name for name in names if only in name}
    while more := {one for name in needed for one in RUNS if f"'{one}'" in RUNS.get(name, "")} - needed:
        needed |= more
    yield from (name for name in names if name in needed)


def main() -> None:
    """Run and compare, or write."""
    options = arguments(__doc__, only="", record=False, source=HERE.parent, keep=Path, out=OUT)
    with tempfile.TemporaryDirectory() as folder:
        work = (options.keep or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        paths = [str((options.source / "src").resolve()), str(work)]
        sys.path[:0], os.environ["PYTHONPATH"] = paths, os.pathsep.join(paths)
        shutil.copy(HERE.parent / "tests" / "cli" / "toys.py", work)
        import torch

        import regrow

        if not regrow.__file__.startswith(paths[0]):
            raise SystemExit(f"regrow was imported from {regrow.__file__}; run outside of other checkouts")
        for name in IMPORTED:
            importlib.import_module(name)
        for name in regrow.__all__:
            getattr(regrow, name)
        if (code := go(work, write_llama, work / "llama"))[0]:
            raise SystemExit(code[1])
        compare(options, work, {"torch": torch.__version__, "processor": platform.machine(), "threads": 1})


def compare(options: Namespace, work: Path, machine: dict[str, object]) -> None:
    """Run all, print what is as before, and write it if asked."""
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    found: dict[str, dict[str, str]] = {}
    changed = []
    for name in chosen(options.only):
        began = time.monotonic()
        said = []
        for kind, value in run(name, work).items():
            before = known.get(kind, {}).get(name)
            found.setdefault(kind, {})[name] = value
            if before not in (None, value):
                changed.append(f"{kind} of {name}")
            differ = sorted({*(before or "").split()} ^ {*value.split()}) if kind == "rows" else []
            said.append(f"{kind} {'new' if before is None else 'as before' if before == value else 'DIFFERENT'}")
            said[-1] += f" ({' '.join(differ)})" if before and differ else ""
        print(f"{name:36} {', '.join(said)} ({time.monotonic() - began:.1f} s)", flush=True)
    if options.record:
        result: dict[str, Any] = {"date": today(), **machine}
        result |= {kind: {**known.get(kind, {}), **found.get(kind, {})} for kind in KINDS}
        write(options.out, result)
    elif changed:
        raise SystemExit(f"other results than before: {', '.join(changed)}")


if __name__ == "__main__":
    main()
