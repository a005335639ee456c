"""The same stream, network, steps and seeds through Avalanche's learners and ours, in one process.

    python benchmarks/continual_peer.py --fashion FOLDER --seeds 3

Makes an environment with avalanche-lib 0.6.0 in the user's cache, which sees this interpreter's packages; runs there.
Permuted images, five tasks; accuracy by the same function, seconds of training. Avalanche's EWC squares gradients of
batches, so its λ is another number than ours; both are run at several. Ours also answers all tests after each task.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from regrow.core.tasks import Task
from regrow.data.streams import fewer, idx, permuted_tasks
from regrow.evaluation.continual import share_right
from regrow.methods import LEARNERS
from regrow.nets.vision import small
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, accuracy_matrix, learn

VERSION = "0.6.0"
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "regrow-peers"
OUT = Path("benchmarks/results/continual_peer.json")
SCHEDULE = TaskSchedule(epochs=5, batch_size=64, lr=0.01)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("naive", {}),
    "EWC 5": ("ewc", {"strength": 5.0}),
    "EWC 10": ("ewc", {"strength": 10.0}),
    "replay 500": ("replay", {"memory": 500}),
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("Naive", {}),
    "EWC 1": ("EWC", {"ewc_lambda": 1.0}),
    "EWC 10": ("EWC", {"ewc_lambda": 10.0}),
    "EWC 100": ("EWC", {"ewc_lambda": 100.0}),
    "replay 500": ("Replay", {"mem_size": 500}),
}


def environment() -> str:
    """The interpreter that has Avalanche; made where there is none."""
    folder = HOME / f"avalanche-{VERSION}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "host.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"avalanche-lib=={VERSION}"], check=True)
        (folder / "ready").touch()
    return str(python)


def network(tasks: list[Task], seed: int) -> nn.Module:
    """The network that both begin with."""
    return small("mlp:100-100", tasks[0].train.inputs.shape[1:], 10, seed)[0]


def ours(arm: str, tasks: list[Task], seed: int) -> tuple[float, float]:
    """Final average accuracy, and seconds of training."""
    model, (method, settings) = network(tasks, seed), OURS[arm]
    schedule = TaskSchedule(**{**vars(SCHEDULE), "seed": seed})
    learner = LEARNERS[method].made(method, settings)
    axes = trace(model, tasks[0].train.inputs[:2])
    start = time.perf_counter()
    state = learn(model, axes, tasks, learner, schedule).state
    spent = time.perf_counter() - start
    return accuracy_matrix(state).average, spent


def strategy_of(arm: str, tasks: list[Task], seed: int) -> tuple[Any, Any]:
    """Avalanche's learner, and its stream."""
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    torch.manual_seed(seed)
    model, (name, settings) = network(tasks, seed), THEIRS[arm]
    benchmark = tensors_benchmark(
        train_tensors=[(task.train.inputs, task.train.labels) for task in tasks],
        test_tensors=[(task.test.inputs, task.test.labels) for task in tasks],
        task_labels=[0] * len(tasks),
    )
    strategy = getattr(supervised, name)(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=SCHEDULE.lr, momentum=0.9, nesterov=True),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=SCHEDULE.batch_size,
        train_epochs=SCHEDULE.epochs,
        evaluator=EvaluationPlugin(loggers=[]),
        **settings,
    )
    return strategy, benchmark


def theirs(arm: str, tasks: list[Task], seed: int) -> tuple[float, float]:
    """The same of Avalanche's."""
    strategy, benchmark = strategy_of(arm, tasks, seed)
    start = time.perf_counter()
    for experience in benchmark.train_stream:
        strategy.train(experience)
    spent = time.perf_counter() - start
    return fmean(share_right(strategy.model, task.test, None) for task in tasks), spent


def compare(args: argparse.Namespace) -> None:
    """Both, arm by arm, in turns."""
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(args.seeds):
        tasks = permuted_tasks(fewer(idx(args.fashion, "fashion"), 5000, 2000, seed), 5, seed)
        for side, arms, run in (("regrow", OURS, ours), ("avalanche", THEIRS, theirs)):
            for arm in arms:
                found.setdefault(f"{side}, {arm}", []).append(run(arm, tasks, seed))
                print(side, arm, seed, found[f"{side}, {arm}"][-1], flush=True)
    table = {
        arm: {
            "accuracy": round(fmean(a for a, _ in each), 4),
            "sd": round(stdev(a for a, _ in each), 4) if len(each) > 1 else None,
            "seconds": round(sorted(s for _, s in each)[len(each) // 2], 2),
        }
        for arm, each in found.items()
    }
    about = {"date": str(date.today()), "avalanche-lib": VERSION, "torch": torch.__version__, "seeds": args.seeds}
    args.out.write_text(json.dumps({**about, "permuted Fashion-MNIST, 5 tasks": table}, indent=1) + "\n")


def main() -> None:
    """Compare, in the environment that has both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, required=True, help="a folder with MNIST's four files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        compare(args)
    else:
        source = str(Path(__file__).parents[1] / "src")
        subprocess.run(
            [environment(), __file__, *sys.argv[1:], "--inside"], check=True, env={**os.environ, "PYTHONPATH": source}
        )


if __name__ == "__main__":
    main()
