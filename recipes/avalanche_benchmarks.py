"""Benchmarks made by Avalanche itself, learned through ``regrow.learn`` and by Avalanche's own strategies.

    python recipes/avalanche_benchmarks.py --env ENV --mnist FOLDER --cifar FOLDER
    python recipes/avalanche_benchmarks.py --show                    # the table of the committed rows

Makes a virtual environment in ENV, if there is none, with regrow from this checkout and avalanche-lib 0.6.0 with the
torch that pip resolves, and runs there. FOLDER of MNIST has ``MNIST/raw`` with its four files, as torchvision lays them
out; that of CIFAR-10 has ``train`` and ``test`` with class folders. Rows are added to the result file one by one, and
those that are there are not run again.

For each benchmark and method of regrow the same network learns the benchmark object and the same tasks as plain
tensors; scores and weights must be equal bit for bit. Avalanche's strategies take the same number of steps of the same
optimizer over the same examples, in an order of their own. All measure accuracy on every test experience before the
first and after each task, among all ten classes; seconds are of training and of these tests, on one thread.
"""

import argparse
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rows as table
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

import regrow
from regrow.evaluation.continual import Matrix
from regrow.nets.vision import small

VERSION = "0.6.0"
ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "avalanche_benchmarks.jsonl"
NETWORKS = {
    "SplitMNIST": "mlp:100-100",
    "PermutedMNIST": "mlp:100-100",
    "SplitCIFAR10": "resnet-gn:8-3",
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("naive", {}),
    "EWC": ("ewc", {"strength": 10.0}),
    "DER++": ("replay", {"memory": 500, "logit_weight": 0.5, "label_weight": 0.5}),
    "SparseGrow": ("sparsegrow", {}),
}
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {"naive": ("Naive", {}), "EWC": ("EWC", {"ewc_lambda": 10.0})}
EPOCHS = {"SplitMNIST": 1, "PermutedMNIST": 1, "SplitCIFAR10": 3}
BATCH, LR = 64, 0.01


def prepare(folder: Path) -> str:
    """The interpreter of an environment with regrow and Avalanche; made where there is none."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"avalanche-lib=={VERSION}", ROOT], check=True)
        (folder / "ready").touch()
    return str(python)


def benchmark(name: str, args: argparse.Namespace) -> Any:
    """A benchmark of Avalanche on data that are there."""
    from avalanche.benchmarks import PermutedMNIST, SplitMNIST, benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    match name:
        case "SplitMNIST":
            return SplitMNIST(5, dataset_root=args.mnist, seed=0)
        case "PermutedMNIST":
            return PermutedMNIST(3, dataset_root=args.mnist, seed=0)
    streams: dict[str, list[Any]] = {}
    for part, each in (("train", 500), ("test", 100)):
        folder = ImageFolder(args.cifar / part, transform=ToTensor())
        places = [[i for i, label in enumerate(folder.targets) if label == one][:each] for one in range(10)]
        whole = as_classification_dataset(folder)
        streams[part] = [whole.subset(places[i] + places[i + 1]) for i in range(0, 10, 2)]
    return benchmark_from_datasets(**streams)


def tensors(stream: Any, group: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The examples of every experience, with the transforms of a group, in memory."""
    pairs = []
    for experience in stream:
        parts = [(x, y) for x, y, *_ in DataLoader(getattr(experience.dataset, group)(), batch_size=500)]
        pairs.append((torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])))
    return pairs


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    """Count the steps of all optimizers."""
    steps = [0]

    def count(*_: Any) -> None:
        steps[0] += 1

    handle = register_optimizer_step_post_hook(count)
    try:
        yield steps
    finally:
        handle.remove()


def network(name: str, inputs: torch.Tensor) -> nn.Module:
    """The network that every arm begins with."""
    return small(NETWORKS[name], inputs.shape[1:], 10, seed=0)[0]


def row_of(scores: Matrix, model: nn.Module, seconds: float, steps: int) -> dict[str, Any]:
    """What an arm came to."""
    return {
        "accuracy": round(scores.average, 4),
        "forgetting": round(scores.forgetting, 4),
        "seconds": round(seconds, 1),
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def ours(name: str, arm: str, given: Any, plain: list[Any]) -> dict[str, Any]:
    """Regrow's learner, on the benchmark object and on tensors."""
    method, settings = METHODS[arm]
    results, row = [], {}
    for kind, tasks in (("object", given), ("tensors", plain)):
        model = network(name, plain[0][0][0])
        with counted_steps() as steps:
            start = time.perf_counter()
            learned = regrow.learn(
                model, tasks, method=method, settings=settings, epochs=EPOCHS[name], batch_size=BATCH, lr=LR
            )
            seconds = time.perf_counter() - start
        results.append((learned.scores, learned.model.state_dict()))
        row[kind] = row_of(learned.scores, learned.model, seconds, steps[0])
    (scores, weights), (again, same) = results
    equal = weights.keys() == same.keys() and all(torch.equal(one, same[key]) for key, one in weights.items())
    return {**row["object"], "seconds_tensors": row["tensors"]["seconds"], "bit_equal": equal and scores == again}


def theirs(name: str, arm: str, given: Any, plain: list[Any]) -> dict[str, Any]:
    """Avalanche's strategy, on its own benchmark."""
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    torch.manual_seed(0)
    model, (strategy_name, settings) = network(name, plain[0][0][0]), STRATEGIES[arm]
    strategy = getattr(supervised, strategy_name)(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        eval_mb_size=500,
        train_epochs=EPOCHS[name],
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
        **settings,
    )

    def measured() -> tuple[float, ...]:
        found = strategy.eval(given.test_stream)
        ends = [f"Exp{i:03}" for i in range(len(plain))]
        return tuple(next(value for key, value in found.items() if key.endswith(end)) for end in ends)

    with counted_steps() as steps:
        start = time.perf_counter()
        before, lines = measured(), []
        for experience in given.train_stream:
            strategy.train(experience)
            lines.append(measured())
        seconds = time.perf_counter() - start
    return row_of(Matrix(tuple(lines), before), model, seconds, steps[0])


def run(args: argparse.Namespace) -> None:
    """Every arm that has no row yet."""
    torch.set_num_threads(1)
    there = {(row["benchmark"], row["library"], row["method"]) for row in table.rows(args.out)}
    for name in args.only or NETWORKS:
        arms = [("regrow", arm, ours) for arm in METHODS] + [("avalanche", arm, theirs) for arm in STRATEGIES]
        left = [(library, arm, call) for library, arm, call in arms if (name, library, arm) not in there]
        if not left:
            continue
        given = benchmark(name, args)
        plain = [*zip(tensors(given.train_stream, "train"), tensors(given.test_stream, "eval"), strict=True)]
        for library, arm, call in left:
            add_row(args.out, name, library, arm, given, plain, call)


def add_row(
    out: Path, name: str, library: str, arm: str, given: Any, plain: list[Any], call: Callable[..., dict[str, Any]]
) -> None:
    """Run an arm, and add its row."""
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": f"avalanche-lib {VERSION}, torch {torch.__version__}",
        "benchmark": name,
        "object": type(given).__name__,
        "examples": [len(train[1]) for train, _ in plain],
        "network": NETWORKS[name],
        "library": library,
        "method": arm,
    }
    row = about | call(name, arm, given, plain)
    table.add(out, row)
    print(row, flush=True)


def show(out: Path) -> None:
    """Print the table."""
    print(table.head(["benchmark", "learner", "accuracy %", "forgetting %", "steps", "object = tensors"]))
    for row in table.rows(out):
        cells = [
            row["benchmark"],
            f"{row['library']}, {row['method']}",
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['forgetting']:.2f}",
            f"{row['steps']:,}",
            {True: "bit for bit", False: "no", None: "–"}[row.get("bit_equal")],
        ]
        print(table.line(cells))


def main() -> None:
    """Run in the environment that has both, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, help="the folder of the virtual environment")
    parser.add_argument("--mnist", type=Path, help="a folder with MNIST/raw and its four files")
    parser.add_argument("--cifar", type=Path, help="a folder with train and test, each with class folders")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", action="append", choices=NETWORKS, help="one benchmark; may be given several times")
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.show:
        show(args.out)
    elif args.inside:
        run(args)
    elif None in (args.env, args.mnist, args.cifar):
        parser.error("give --env, --mnist and --cifar; or --show")
    else:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        env.pop("PYTHONPATH", None)
        subprocess.run([prepare(args.env), __file__, *sys.argv[1:], "--inside"], check=True, env=env)


if __name__ == "__main__":
    main()
