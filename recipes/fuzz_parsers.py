"""Coverage-guided fuzzing of everything that parses what users give (atheris, the extra ``fuzz``).

    python recipes/fuzz_parsers.py                        150 s for each of the targets, half an hour in all
    python recipes/fuzz_parsers.py --target plan --seconds 60
    python recipes/fuzz_parsers.py --show                 what is committed

A target fails where it raises anything but an error that regrow raises on purpose, which the command line tells in one
line; where it takes more than 10 s; or more than 1 GiB above what importing takes. Failing inputs are kept in
``crash-*`` files in the working directory.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "results" / "fuzz_parsers.json"
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(HERE))

from malformed.mutations import JSON_VALUES  # noqa: E402

PLAN = {
    "format": "regrow-plan/1",
    "origin": {"method": "flap"},
    "changes": {
        "a": {
            "size": 4, "keep": [0, 2], "ids": [], "grow": 0, "restore": [], "fresh": False,
            "fill": {"rule": "zero_out", "seed": 0},
            "slots": [
                {"name": "a.weight", "role": "produces", "dim": 0, "outer": 1, "stride": 1, "inner": 1, "offset": 0}
            ],
        }
    },
    "means": {"b.weight": {"1": 0.5}},
    "drop": {},
    "back": [],
}  # fmt: skip
FIXTURES = HERE.parent / "tests" / "fixtures" / "runs"
SHAPES = (FIXTURES / "learn" / "shapes.json").read_bytes()
RUN = json.loads((FIXTURES / "prune" / "run.json").read_text())
LEARN = json.loads((FIXTURES / "learn" / "run.json").read_text())
ROWS = [
    {"what": "perplexity", "model": "dense", "source": "news", "ppl": 9.5, "nll": 2.2, "tokens": 64},
    {"what": "size", "model": "dense", "params_all": 10, "params_counted": 9, "macs": 8, "bytes": 40},
    {"what": "task", "name": "a", "task": 0, "accuracy": [0.5], "parameters": 9},
]  # fmt: skip
GGUF = (
    b"GGUF\x03\0\0\0" + (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    + (1).to_bytes(8, "little") + b"a" + (8).to_bytes(4, "little") + (2).to_bytes(8, "little") + b"hi"
    + (1).to_bytes(8, "little") + b"b" + (9).to_bytes(4, "little") + (4).to_bytes(4, "little")
    + (2).to_bytes(8, "little") + bytes(8)
    + (1).to_bytes(8, "little") + b"w" + (1).to_bytes(4, "little") + (2).to_bytes(8, "little") + bytes(4) + bytes(8)
    + bytes(64)
)  # fmt: skip
IDX = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2]) + bytes(8)
SEEDS: dict[str, list[bytes]] = {
    "plan": [json.dumps(PLAN).encode()],
    "shapes": [SHAPES],
    "ledger": [
        json.dumps({"format": "regrow-ledger/2", "plans": [PLAN, PLAN]}).replace("[0, 2]", "[[0, 2], 3]").encode(),
    ],
    "run": [json.dumps(RUN).encode(), json.dumps(LEARN).encode()],
    "report": [json.dumps(RUN).encode() + b"\n" + "\n".join(map(json.dumps, ROWS)).encode()],
    "metrics": ["\n".join(map(json.dumps, ROWS)).encode()],
    "gguf": [GGUF],
    "idx": [IDX, bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 2])],
    "text": [b"One line.\n\nAnother line.\n" * 4, b'{"text": "a"}\n{"text": "b"}\n', b"\x1f\x8b\x08\0"],
    "amounts": [b"params=100M", b"kv_cache=50MiB@4096", b"ms=7.5@512", b"0.2", b"2GiB", b"permuted:digits:5"],
    "config": [b'{"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10, "text_config": {"head_dim": 4}}'],
    "settings": [b'keep = 0.5\nsource = ["digits"]\n[set]\na = 1\n', b"tasks: [digits]\nlr: 1.0e-3\nset: {a: [1]}\n"],
    "items": [b'{"query": "a", "choices": ["b", "c"], "gold": 0}\n'],
}  # fmt: skip


def _targets(place: Path) -> dict[str, Callable[[bytes], object]]:
    """What parses: each takes any bytes."""
    from regrow.core.amounts import Target, parse_bytes
    from regrow.core.limits import parse_json
    from regrow.core.plan import Plan
    from regrow.data import streams
    from regrow.data.text import read
    from regrow.evaluation import items_in
    from regrow.jobs import learn as learning_run
    from regrow.jobs import pruning as pruning_run
    from regrow.jobs.starting import parse_sequence
    from regrow.nets.files import check_config, check_gguf
    from regrow.reports import summarise, to_markdown
    from regrow.settings.words import read_settings
    from regrow.store.ledger import Ledger
    from regrow.store.metrics import Metrics
    from regrow.store.run_folder import RunFolder
    from regrow.store.run_record import convert_settings
    from regrow.store.shapes import Shapes

    def kept(name: str, data: bytes) -> Path:
        path = place / name
        path.write_bytes(data)
        return path

    def run(data: bytes) -> None:
        kept("run.json", data)
        told = RunFolder.open(place).run()
        if told.get("verb") == "learn":
            convert_settings(told["settings"], learning_run.Settings)
        else:
            pruning_run.read_pruning_settings(told["settings"])

    def report(data: bytes) -> None:
        first, _, rest = data.partition(b"\n")
        kept("run.json", first)
        kept("metrics.jsonl", rest)
        to_markdown(summarise([place]))

    def amounts(data: bytes) -> None:
        text = data.decode("utf-8", errors="replace")
        failed = []
        for parse in (Target.parse, parse_bytes, parse_sequence):
            try:
                parse(text)
            except ValueError as error:
                failed.append(error)
        for error in failed:
            _on_purpose(error)

    def text(data: bytes) -> None:
        for name in ("x.txt", "x.jsonl", "x.txt.gz"):
            try:
                read("x", kept(name, data))
            except ValueError as error:
                _on_purpose(error)

    def idx(data: bytes) -> None:
        kept("x", data)
        for dims in (1, 3):
            try:
                streams._idx(place, "x", dims)
            except ValueError as error:
                _on_purpose(error)

    def settings(data: bytes) -> None:
        for kind in (learning_run.Settings, pruning_run.Settings):
            try:
                read_settings(kept("x.toml", data), kind)
            except ValueError as error:
                _on_purpose(error)

    return {
        "plan": lambda data: Plan.from_json(data.decode("utf-8", errors="replace")),
        "shapes": lambda data: Shapes.from_json(data.decode("utf-8", errors="replace"), check=False),
        "ledger": lambda data: Ledger(kept("ledger.json", data)).plans(),
        "run": run,
        "report": report,
        "metrics": lambda data: Metrics(kept("metrics.jsonl", data)).rows(),
        "gguf": lambda data: check_gguf(kept("x.gguf", data), "x"),
        "idx": idx,
        "text": text,
        "amounts": amounts,
        "config": lambda data: (check_config(kept("config.json", data), "x"), parse_json(data)),
        "settings": settings,
        "items": lambda data: items_in(kept("items.jsonl", data)),
    }


def _on_purpose(error: Exception) -> None:
    """Raise an error again unless regrow tells it in one line."""
    from regrow.cli.boundary import BUG, failure_of

    found = failure_of(error)
    if found.code == BUG or found.report:
        raise error


def _mutated(data: bytes, most: int, seed: int) -> bytes:
    """Half of the time one value of the JSON in it becomes another, else bytes change as libFuzzer changes them."""
    import atheris

    draw = random.Random(seed)
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    try:
        if draw.random() < 0.5:
            raise ValueError
        value = json.loads(lines[at])
        places: list[tuple[Any, Any]] = []
        level = [value]
        while level:
            one = level.pop()
            for key, inner in one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ():
                places.append((one, key))
                level.append(inner)
        holder, key = draw.choice(places)
        match draw.randrange(4):
            case 0 if isinstance(holder, dict):
                holder[draw.choice(list(_keys(value)))] = holder.pop(key)
            case 1:
                del holder[key]
            case 2:
                holder[key] = draw.choice([inner for outer, inner in _pairs(places)])
            case _:
                holder[key] = draw.choice(JSON_VALUES)
        lines[at] = json.dumps(value).encode("utf-8", errors="replace")
        return b"\n".join(lines)[:most]
    except (ValueError, IndexError, RecursionError):
        mutated: bytes = atheris.Mutate(data, most)
        return mutated


def _pairs(places: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    return [(holder, holder[key]) for holder, key in places]


def _keys(value: Any) -> set[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = set(value) if isinstance(value, dict) else {"a"}
    return own.union(*(_keys(one) for one in inner))


def fuzz(name: str, seconds: int, seeds: Path) -> None:
    """Fuzz one target in this process, which ends with it; everything is imported, and regrow instrumented."""
    import atheris

    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    target = _targets(place)[name]

    def one(data: bytes) -> None:
        try:
            target(data)
        except ValueError as error:
            _on_purpose(error)

    options = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=3072", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one, custom_mutator=_mutated)
    atheris.Fuzz()


def fuzzed(name: str, seconds: int) -> dict[str, Any]:
    """Fuzz one target in a child, and say what came of it."""
    seeds = Path(tempfile.mkdtemp(prefix=f"seeds-{name}-"))
    for i, data in enumerate(SEEDS[name]):
        (seeds / str(i)).write_bytes(data)
    said = Path(tempfile.mkstemp(suffix=".log")[1])
    child = os.fork()
    if not child:
        with said.open("wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        fuzz(name, seconds, seeds)
        os._exit(1)
    _, status, usage = os.wait4(child, 0)
    text = said.read_text("utf-8", errors="replace")
    runs, cover = re.search(r"Done (\d+) runs", text), re.findall(r"cov: (\d+) ft: (\d+)", text)
    code = os.waitstatus_to_exitcode(status)
    row = {
        "target": name,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": seconds,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "executions": int(runs[1]) if runs else 0,
        "edges": [int(cover[0][0]), int(cover[-1][0])] if cover else [],
        "features": int(cover[-1][1]) if cover else 0,
        "inputs_kept": sum(1 for _ in seeds.iterdir()),
        "crashes": int(code != 0),
    }
    print(row, flush=True)
    if code:
        print(text[-4000:], flush=True)
    shutil.rmtree(seeds)
    said.unlink()
    return row


def main() -> None:
    """Fuzz every target, one after the other, and write what came of it."""
    parser = argparse.ArgumentParser(description="Coverage-guided fuzzing of what parses users' input.")
    parser.add_argument("--target", action="append", choices=SEEDS)
    parser.add_argument("--seconds", type=int, default=150)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    told = parser.parse_args()
    if told.show:
        print(OUT.read_text())
        return
    import atheris
    import torch  # noqa: F401 (not instrumented)

    with atheris.instrument_imports(include=["regrow"]):
        pass
    rows = [fuzzed(name, told.seconds) for name in told.target or SEEDS]
    known = json.loads(told.out.read_text("utf-8")) if told.out.is_file() else []
    known = [row for row in known if row["target"] not in {one["target"] for one in rows}] + rows
    told.out.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    sys.exit(any(row["crashes"] for row in rows))


if __name__ == "__main__":
    main()
