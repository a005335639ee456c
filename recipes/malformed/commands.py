"""Commands of a second or less on small inputs, and which of their options and files are damaged."""

import gzip
import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from malformed import mutations as m

TOY = "toys:classifier --method magnitude"
DIGITS = "--source digits --tokens 64 --eval-tokens 32"
LEARN = "learn digits --model mlp:8 --method naive --epochs 1 --train 40 --test 20 --batch-size 20"
SEARCH = (
    "search cells:4-1-1 --data digits --target params=50% --train 60 --test 30 --batch-size 30 --epochs 1 --retrain 1 "
    "--set warm=1 --set every=1"
)


@dataclass(frozen=True)
class Command:
    """A command line that works.

    Args:
        words: It, in the place where it runs.
        files: The files that it reads, each with what is done to them.
        options: The options and arguments that are given other values, beside those that stand in it.
        needs: Which inputs of :func:`prepare` are copied to its place.
    """

    words: str
    files: tuple[tuple[str, tuple[m.Mutation, ...]], ...] = ()
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def _all(*names: str, more: tuple[m.Mutation, ...] = m.BYTES) -> tuple[tuple[str, tuple[m.Mutation, ...]], ...]:
    return tuple((name, (*more, *m.KINDS)) for name in names)


def _json(*names: str) -> tuple[tuple[str, tuple[m.Mutation, ...]], ...]:
    return _all(*names, more=(*m.TEXTS, *m.BYTES))


IDX = tuple(f"{half}-{what}" for half in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))
RUN = _json("run/run.json", "run/metrics.jsonl", "run/ledger.json", "run/axes.json")
MODEL = _json(
    "llama/config.json", "llama/tokenizer.json", "llama/tokenizer_config.json", "llama/generation_config.json"
)
WEIGHTS = (*m.BYTES, m.header)

COMMANDS: tuple[Command, ...] = (
    Command(f"prune {TOY} --method flap --keep 0.7 --out out", options=(
        "--method", "--keep", "--target", "--only", "--exclude", "--mark", "--round", "--set", "--tokens",
        "--seed", "--dtype", "--device", "--finetune", "--source", "--unseen",
        "--out", "--seq-len", "--eval-tokens", "MODEL")),
    Command(f"prune toys:classifier --method wanda_sp --keep 0.7 {DIGITS} --out out", options=(
        "--source", "--tokens", "--eval-tokens", "--dtype", "--finetune", "--set")),
    Command("prune toys:classifier --method wanda_sp --keep 0.7 --source p=images --tokens 8 --eval-tokens 4 --out out",
        _all("images/a/0.png", "images/b/1.png", more=(*m.BYTES, m.large_image, m.large_image)), needs=("images",)),
    Command("prune llama --method magnitude --keep 0.8 --source mail=mail.txt --seq-len 16 --tokens 64 "
        "--eval-tokens 32 --out out", (*_all("mail.txt", more=(*m.BYTES, m.encoded, m.packed)), *MODEL),
        needs=("llama", "mail.txt")),
    Command("prune llama --method magnitude --keep 0.8 --source mail=mail.txt.gz --seq-len 16 --tokens 64 --out out",
        _all("mail.txt.gz", more=(*m.BYTES, m.packed, m.packed)), needs=("llama", "mail.txt.gz")),
    Command("prune llama --method magnitude --keep 0.8 --source mail=mail.jsonl --seq-len 16 --tokens 64 --out out",
        _json("mail.jsonl"), needs=("llama", "mail.jsonl")),
    Command("recover run --by refit --out out --code toys:classifier", _json("run/run.json"), needs=("run",)),
    Command("show llama",
        (*MODEL, *_all("llama/model.safetensors", more=WEIGHTS)), ("--dtype", "MODEL"),
        ("llama",)),
    Command("show m.gguf", _all("m.gguf", more=(*WEIGHTS, m.header, m.header)), ("MODEL",), ("m.gguf",)),
    Command("show toys:stepping", options=("--dtype", "MODEL")),
    Command("show learned", _json("learned/run.json"), needs=("learned",)),
    Command("apply plan.json toys:classifier --out out", _json("plan.json"), ("PLAN", "--out", "--dtype", "MODEL"),
        ("plan.json",)),
    Command("apply run/ledger.json toys:classifier --out out", _json("run/ledger.json"), needs=("run",)),
    Command(f"{LEARN} --out out", options=(
        "TASKS", "--model", "--method", "--epochs", "--batch-size", "--optimizer", "--lr", "--weight-decay", "--train",
        "--test", "--classes", "--precision", "--scenario", "--set", "--seed", "--out", "--resume", "--task")),
    Command(f"{LEARN.replace('digits', 'mnist', 1)} --out out",
        _all(*(f"mnist/{one}" for one in IDX), more=(*WEIGHTS, m.header)), needs=("mnist",)),
    Command(f"{LEARN.replace('digits', 'mnistgz', 1)} --out out",
        _all(*(f"mnistgz/{one}.gz" for one in IDX), more=(*m.BYTES, m.packed)), needs=("mnistgz",)),
    Command(f"{LEARN.replace('digits', 'classes', 1)} --out out",
        _all("classes/train/a/0.png", "classes/test/b/1.png", more=(*m.BYTES, m.large_image, m.large_image)),
        needs=("classes",)),
    Command("learn --resume learned --task digits", (*_json("learned/run.json", "learned/metrics.jsonl"),
        *_all("learned/course.safetensors", more=WEIGHTS)), ("--task", "--resume"), ("learned",)),
    Command(f"{SEARCH} --out out", options=(
        "SPACE", "--data", "--target", "--method", "--stages", "--memory", "--epochs", "--retrain", "--cutout",
        "--batch-size", "--lr", "--weight-decay", "--train", "--test", "--stride", "--set", "--seed",
        "--out")),
    Command(f"{SEARCH.replace('--data digits', '--data mnist')} --out out", _all(*(f"mnist/{one}" for one in IDX)),
        needs=("mnist",)),
    Command("recover run --by refit --tokens 64 --code toys:classifier --out out", (*RUN,
        *_json("run/shapes.json"), *_all("run/model.safetensors", more=WEIGHTS)), ("RUN", "--by", "--tokens", "--set",
        "--seed", "--out"), ("run",)),
    Command("evaluate run --code toys:classifier --source digits --eval-tokens 16", (*_json("run/shapes.json",
        "run/run.json", "run/metrics.jsonl"), *_all("run/model.safetensors", more=WEIGHTS)), ("MODEL", "--source",
        "--items", "--eval-tokens", "--seq-len", "--dtype", "--device", "--code", "--json", "--choices"), ("run",)),
    Command("evaluate learned --source digits --eval-tokens 16", (*_json("learned/shapes.json"),
        *_all("learned/model.safetensors", more=WEIGHTS)), ("MODEL", "--source", "--dtype"), ("learned",)),
    Command("evaluate llama --choices items.jsonl --items 2", _json("items.jsonl"), ("--items", "--choices"),
        ("llama", "items.jsonl")),
    Command("chat llama --prompt hello --longest 2", MODEL, ("--prompt", "--longest", "--temperature",
        "--dtype", "--device", "MODEL"), ("llama",)),
    Command("export llama --to transformers --out out", MODEL, ("--to", "--out", "--dtype", "MODEL"), ("llama",)),
    Command("export learned --to onnx --out out.onnx", (*_json("learned/shapes.json"),
        *_all("learned/model.safetensors", more=WEIGHTS)), ("--to", "--dtype", "--out"), ("learned",)),
    Command("report run --out out.html", RUN, ("RUN", "--out"), ("run",)),
    Command("report learned", _json("learned/run.json", "learned/metrics.jsonl"), needs=("learned",)),
    Command("report run run2 --out out.html", RUN, ("RUNS", "--out"), ("run", "run2")),
    Command("learn --config learned --out out", _json("learned/run.json"), ("--config",), ("learned",)),
    Command("methods flap", options=("NAME",)),
)  # fmt: skip


def prepare(run: Callable[[list[str]], int]) -> int:
    """Make every input in the working directory; ``run`` runs words of the command line, undisturbed."""
    from crashes.cases import llama
    from PIL import Image

    llama("llama")
    text = "\n".join(f"Line {i}: the cat sat on mat number {i * 7 % 13}." for i in range(60)) + "\n"
    Path("mail.txt").write_text(text)
    Path("mail.txt.gz").write_bytes(gzip.compress(text.encode()))
    Path("mail.jsonl").write_text("".join(json.dumps({"text": line * 3}) + "\n" for line in text.splitlines()[:20]))
    item = {"query": "The cat sat on the", "choices": [" mat", " cat"], "gold": 0}
    Path("items.jsonl").write_text((json.dumps(item) + "\n") * 3)
    for where in ("images", "classes/train", "classes/test"):
        for name in ("a", "b"):
            place = Path(where, name)
            place.mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), 40 * i).save(place / f"{i}.png")
    for name in ("mnist", "mnistgz"):
        Path(name).mkdir()
        for half, n in (("train", 24), ("t10k", 12)):
            images = struct.pack(">BBBBIII", 0, 0, 8, 3, n, 6, 6) + bytes(i % 251 for i in range(36 * n))
            labels = struct.pack(">BBBBI", 0, 0, 8, 1, n) + bytes(i % 3 for i in range(n))
            for what, data in ((f"{half}-images-idx3-ubyte", images), (f"{half}-labels-idx1-ubyte", labels)):
                packed = name == "mnistgz"
                path = Path(name, what + ".gz" * packed)
                path.write_bytes(gzip.compress(data) if packed else data)
    for words in (
        f"prune toys:classifier --method wanda_sp --keep 0.7 {DIGITS} --out run",
        f"prune {TOY} --method flap --keep 0.7 {DIGITS} --dry-run plan.json",
        f"{LEARN} --classes 10 --out learned",
        "export llama --to gguf --out m.gguf",
    ):
        if code := run(words.split()):
            sys.exit(f"{words}: exit code {code}")
    shutil.copytree("run", "run2")
    return 0
