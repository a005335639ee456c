"""A sequence of tasks stopped half-way and taken up in a fresh process: Avalanche's checkpoints and ours.

    python benchmarks/continual_checkpoint.py --fashion FOLDER

Same stream, network, steps and learners as ``continual_peer.py``, whose environment it uses. Four tasks: once in one
go, and once with the process ended after the second. Told: whether a checkpoint was written and how large it is,
whether a fresh process went on from it, and whether its final weights are those of the run in one go, bit for bit.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from continual_peer import OURS, SCHEDULE, VERSION, environment, network, strategy_of
from torch import nn

from regrow.core.tasks import Task
from regrow.data.streams import fewer, idx, permuted_tasks
from regrow.methods import LEARNERS
from regrow.tracing import trace
from regrow.training.continual import learn
from regrow.training.state import read_checkpoint, write_checkpoint

OUT = Path("benchmarks/results/continual_checkpoint.json")
ARMS = ("naive", "EWC 10", "replay 500")


def ours(arm: str, tasks: list[Task], until: int, file: Path | None) -> nn.Module:
    """Learn tasks up to one; from a file if there is one, else into it."""
    model, (method, settings) = network(tasks, 0), OURS[arm]
    learner, axes, state = LEARNERS[method].made(method, settings), trace(model, tasks[0].train.inputs[:2]), None
    if file and file.exists():
        model, axes, state = read_checkpoint(file, model, axes, learner.state)
        state = replace(state, before=())
    fitted = learn(model, axes, tasks[:until], learner, SCHEDULE, state=state)
    if file and not file.exists():
        write_checkpoint(file, model, fitted.state)
    return model


def theirs(arm: str, tasks: list[Task], until: int, file: Path | None) -> nn.Module:
    """The same with Avalanche's learners and its ``save_checkpoint`` and ``maybe_load_checkpoint``."""
    from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
    from avalanche.training.determinism.rng_manager import RNGManager

    RNGManager.set_random_seeds(0)
    strategy, benchmark = strategy_of(arm, tasks, 0)
    first, there = 0, bool(file and file.exists())
    if there:
        strategy, first = maybe_load_checkpoint(strategy, str(file))
    for experience in list(benchmark.train_stream)[first:until]:
        strategy.train(experience)
    if file and not there:
        save_checkpoint(strategy, str(file))
    return strategy.model  # type: ignore[no-any-return]


def one(args: argparse.Namespace) -> dict[str, Any]:
    """One process: what it came to."""
    torch.set_num_threads(1)
    tasks = permuted_tasks(fewer(idx(args.fashion, "fashion"), 5000, 2000, 0), 4, 0)
    run: Callable[..., nn.Module] = {"regrow": ours, "avalanche": theirs}[args.side]
    start = time.perf_counter()
    try:
        model = run(args.arm, tasks, args.until, args.file)
    except Exception as error:  # a peer may fail in any way
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    values = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return {"weights": hashlib.sha256(values).hexdigest(), "seconds": round(time.perf_counter() - start, 1)}


def compared(side: str, arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """In one go, and stopped after two tasks: three processes."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint"
        told = [_process(side, arm, args, until, where) for until, where in ((4, None), (2, file), (4, file))]
        size = file.stat().st_size if file.exists() else None
    whole, first, again = told
    return {
        "in one go": whole.get("failed", "done"),
        "stopped after two tasks": first.get("failed", "saved"),
        "bytes": size,
        "in a fresh process": again.get("failed", "went on") if size else "there is nothing to go on from",
        "same weights": size is not None and "weights" in whole and whole.get("weights") == again.get("weights"),
    }


def _process(side: str, arm: str, args: argparse.Namespace, until: int, file: Path | None) -> dict[str, Any]:
    words = [environment(), __file__, "--fashion", str(args.fashion), "--side", side, "--arm", arm]
    words += ["--until", str(until), *(["--file", str(file)] if file else [])]
    source = str(Path(__file__).parents[1] / "src")
    ran = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source})
    try:
        return json.loads(ran.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    except (IndexError, ValueError):
        return {"failed": f"exit {ran.returncode}: {' '.join(ran.stderr.split())[-160:]}"}


def main() -> None:
    """Compare, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, required=True, help="a folder with MNIST's four files")
    parser.add_argument("--out", type=Path, default=OUT)
    for name, kind in (("side", str), ("arm", str), ("until", int), ("file", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one(args)))
        return
    found = {f"{side}, {arm}": compared(side, arm, args) for side in ("regrow", "avalanche") for arm in ARMS}
    about = {"date": str(date.today()), "avalanche-lib": VERSION, "torch": torch.__version__}
    args.out.write_text(json.dumps({**about, "stopped after two of four tasks": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    sys.exit(not all(row["same weights"] for name, row in found.items() if name.startswith("regrow")))


if __name__ == "__main__":
    main()
