"""Every command on folders whose files name code: nothing that a file names may be imported or called.

    python recipes/hostile_folders.py                                every command on every folder, one row each
    python recipes/hostile_folders.py --sample 40 --seed 1 --out F   so many of all, drawn
    python recipes/hostile_folders.py --show                         what is committed

The folders: ``hostile/folders.py``. The working directory holds modules with the names that the files give; they are
found by Python like any other. A process watches its own imports, code, programs and named functions
(``hostile/watch.py``): audit events, ``sys.setprofile``, and what is loaded afterwards. What the same command does on
the honest folder as well is told apart (``honest``).
"""

import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import Row, add, arguments, last_line, rows
from hostile import watch
from hostile.folders import HOSTILE, make_honest, tamper

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "hostile_folders.jsonl"

SMALL = "--source digits --tokens 64 --eval-tokens 64"
COMMANDS: dict[str, str] = {
    "show": "show {model}",
    "prune": "prune {model} --method magnitude --keep 0.9 --out out",
    "recover": "recover {folder} --by refit --tokens 192 --out out",
    "learn --resume": "learn --resume {folder} --task permuted:digits:1",
    "search": "search cells:4-2-1 --data digits --target params=3k --train 120 --test 60 --out {folder}",
    "apply": "apply {folder}/ledger.json {model} --out out",
    "evaluate": "evaluate {model}",
    "chat": "chat {model} --prompt hello --longest 2",
    "export transformers": "export {model} --to transformers --out out",
    "export onnx": "export {model} --to onnx --out out.onnx",
    "export gguf": "export {model} --to gguf --out out.gguf",
    "export torchvision": "export {model} --to torchvision --out out",
    "undo": "undo {folder} --out out",
    "report": "report {folder}",
    "compare": "report {folder} {folder}",
    "regrow.load": "",
    "regrow.load, save": "",
    "regrow.nets.load": "",
}
"""Every command, and what Python does with a folder."""
PACKAGES = ("jinja2", "matplotlib.pyplot", "onnx", "onnxruntime", "onnxscript", "scipy.sparse", "regrow.cli")
_QUIET = (OSError, ValueError, AttributeError, TypeError, RuntimeError)


def work(command: str, folder: Path) -> int:
    """Run a command; its exit code (Python: 0 or 2)."""
    if not COMMANDS[command]:
        return _in_python(command, folder)
    from regrow.cli import main

    model = folder / "model.gguf" if (folder / "model.gguf").exists() else folder
    sys.argv = ["regrow", *COMMANDS[command].format(folder=folder.name, model=model.relative_to(folder.parent)).split()]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else 99
    return 0


def _in_python(command: str, folder: Path) -> int:
    from torch import nn

    import regrow
    from regrow.nets import load
    from regrow.store import save

    def mine() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2))

    try:
        match command:
            case "regrow.nets.load":
                load(str(folder))
            case "regrow.load":
                regrow.load(folder)
            case _:
                save(regrow.load(folder, model=_classifier if folder.name.startswith("prune") else mine), "copy")
    except _QUIET as error:
        print(error)
        return 2
    return 0


def _classifier() -> Any:
    """The architecture of the fixtures, given in Python; it is not the module of the same name beside the user."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("given", HERE.parent / "tests" / "cli" / "toys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.classifier()[0]


def tried(name: str, commands: list[str], honest: Path, seed: int) -> list[Row]:
    """Run commands on copies of one folder in a process of its own; a row for each."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as lines:
            results = [json.loads(line) for line in lines]
        os.waitpid(child, 0)
        for command in commands[len(results) :][:1]:  # what ended the process is a finding, too
            results.append({"folder": name, "command": command, "code": -1, "foreign": ["the process ended"]})
        return results
    os.close(reading)
    with os.fdopen(writing, "w") as out, tempfile.TemporaryDirectory() as place:
        here = Path(place).resolve()
        watch.start(here)
        for i, command in enumerate(commands):
            begin = time.perf_counter()
            code, events, said = _once(here / f"{i}", name, command, honest, seed)
            fair = _once(here / f"{i}-honest", name, command, honest, None)[1] if events else []
            row = {"folder": name, "command": command, "code": code, "foreign": [e for e in events if e not in fair]}
            row |= {"said": said, "seconds": round(time.perf_counter() - begin, 2)} | ({"honest": fair} if fair else {})
            out.write(json.dumps(row) + "\n")
            out.flush()
    os._exit(0)


def _once(cell: Path, name: str, command: str, honest: Path, seed: int | None) -> tuple[int, list[str], str]:
    """Run a command on a copy of a folder in a directory of its own: exit code, what happened, the last it said."""
    cell.mkdir()
    os.chdir(cell)
    watch.lay_canaries(cell)
    sys.path.append(str(cell))
    folder, noise, codes = cell / HOSTILE[name][0], io.StringIO(), [99]
    if seed is None:
        shutil.copytree(honest / folder.name, folder)
    else:
        tamper(name, honest, folder, seed)
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        events = watch.watched(lambda: codes.append(work(command, folder)))
    sys.path.remove(str(cell))
    events = [re.sub(r"\.[0-9a-f]{8}\.partial", ".partial", event.replace(str(cell), "HERE")) for event in events]
    return codes[-1], events, last_line(noise.getvalue().replace(str(cell), "HERE"))


def main() -> None:
    """Run what was asked for, or show what is there."""
    args = arguments(__doc__, OUT, sample=0, seed=0, folder=(*HOSTILE,), command=(*COMMANDS,))
    if not args.show:
        pairs = [(name, command) for name in args.folder for command in args.command]
        if args.sample:
            pairs = random.Random(args.seed).sample(pairs, args.sample)
        there = {(row["folder"], row["command"]) for row in rows(args.out)}
        with tempfile.TemporaryDirectory() as honest, contextlib.redirect_stderr(io.StringIO()):
            make_honest(Path(honest))
            for package in PACKAGES:  # once, not in every process
                importlib.import_module(package)
            for name in HOSTILE:
                wanted = [command for other, command in pairs if other == name and (name, command) not in there]
                for row in tried(name, wanted, Path(honest), args.seed) if wanted else ():
                    add(args.out, row)
    results = rows(args.out)
    tell(results)
    sys.exit(any(row["foreign"] for row in results))


def tell(results: list[Row]) -> None:
    """How many pairs there are, and what happened in them."""
    folders, commands = ({row[key] for row in results} for key in ("folder", "command"))
    print(f"{len(results)} runs: {len(commands)} commands on {len(folders)} hostile folders")
    print(f"exit codes: {dict(sorted(Counter(row['code'] for row in results).items()))}")
    print(f"foreign imports or calls: {sum(len(row['foreign']) for row in results)}")
    for row in results:
        if row["foreign"] or row["code"] not in (0, 2):
            print(f"  {row['folder']} · {row['command']}: exit {row['code']}, {row['foreign']}")


if __name__ == "__main__":
    main()
