"""How much of a network Kronecker factors protect, what they weigh, and what a protected training step costs.

    python benchmarks/protection.py coverage     # seconds, SmolLM2 a minute
    python benchmarks/protection.py steps        # minutes
    python benchmarks/protection.py coverage --show

``coverage``: the share of the parameters that have Kronecker factors, or Fisher diagonals alone; the rest is left
without protection. ``steps``: CPU seconds of a second task's steps, in multiples of those of ``naive`` in the same
process: batches of 256 inputs, of 2,048 tokens for SmolLM2; of the MLP, the least of five rounds in which each method
has its turn. Inputs are random; times and shares depend on shapes only. A row is appended per network and method.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shared import Row, add, arguments, rows, table
from torch import Tensor, nn

from regrow.core.objectives import CLASSIFICATION, NEXT_TOKEN
from regrow.core.tasks import Examples, Task
from regrow.methods import LEARNERS
from regrow.nets import load, replace_attention
from regrow.nets.vision import small
from regrow.protection.factors import layer_parameters, measure_factors
from regrow.store.run_record import versions
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.learner import Event

OUT = Path(__file__).parent / "results" / "protection.jsonl"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("naive", {}),
    "laplace": ("laplace", {}),
    "laplace, every 8": ("laplace", {"every": 8}),
    "ncl": ("ncl", {}),
    "gpm": ("gpm", {}),
    "sparsegrow, ungrown": ("sparsegrow", {"grow": "never"}),
}


class Recurrent(nn.Module):
    """An embedding, two LSTM layers and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = (
            nn.Embedding(50, 16),
            nn.LSTM(16, 64, 2, batch_first=True),
            nn.Linear(64, 10),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, ``[n, 10]``."""
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Encoder(nn.Module):
    """An embedding, two layers of a transformer encoder and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embedding, self.encoder, self.head = (
            nn.Embedding(50, 32),
            nn.TransformerEncoder(layer, 2),
            nn.Linear(32, 10),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, ``[n, 10]``."""
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def make_conv1d() -> nn.Module:
    """Return two convolutions of a signal, a BatchNorm and a classifier."""
    layers = [nn.Conv1d(1, 16, 5), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 5), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 32, 10))


def draw_images(n: int) -> Tensor:
    """Return random images of Fashion-MNIST's shape."""
    return torch.randn(n, 1, 28, 28)


def draw_tokens(n: int) -> Tensor:
    """Return random windows of 12 tokens."""
    return torch.randint(50, (n, 12))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp:100-100": (lambda: small("mlp:100-100", (1, 28, 28), 10, 0)[0], draw_images),
    "resnet-gn:8-3": (lambda: small("resnet-gn:8-3", (1, 28, 28), 10, 0)[0], draw_images),
    "Conv1d": (make_conv1d, lambda n: torch.randn(n, 1, 40)),
    "LSTM": (Recurrent, draw_tokens),
    "transformer encoder": (Encoder, draw_tokens),
    "transformer encoder, as loaded": (lambda: replace_attention(Encoder()), draw_tokens),
    "smollm2-135m": (lambda: load("smollm2-135m").model, lambda n: torch.randint(1000, (n, 128))),
}
TIMED = {"mlp:100-100": 256, "resnet-gn:8-3": 256, "smollm2-135m": 16}  # network → examples of a step


def measure_coverage(name: str) -> Row:
    """Measure the factors of a network, and count what they protect."""
    make, draw = NETS[name]
    torch.manual_seed(0)
    net, inputs, start = make(), draw(16), time.process_time()
    factors = measure_factors(net, [Examples(inputs, torch.zeros(len(inputs)))], torch.Generator().manual_seed(0))
    sizes = {parameter: tensor.numel() for parameter, tensor in net.named_parameters()}
    weights = [key.removesuffix(" outputs") for key in factors if key.endswith(" outputs")]
    in_layers = {parameter for weight in weights for parameter in layer_parameters(net, weight)}
    alone = {key.removesuffix(" diagonal") for key in factors if key.endswith(" diagonal")}
    total = sum(sizes.values())
    return {
        "parameters": total,
        "kronecker": round(sum(sizes[one] for one in in_layers) / total, 4),
        "diagonal": round(sum(sizes[one] for one in alone) / total, 4),
        "bytes": round(sum(factor.nbytes for factor in factors.values()) / sum(p.nbytes for p in net.parameters()), 3),
        "cpu_s": round(time.process_time() - start, 2),
    }


def time_steps(name: str, arm: str, batches: int) -> float:
    """Return the CPU seconds of the steps of a second task."""
    make, draw = NETS[name]
    torch.manual_seed(0)
    net, size = make(), TIMED[name]
    inputs, is_text = draw(size * batches), name == "smollm2-135m"
    labels = inputs if is_text else torch.randint(10, (len(inputs),))
    examples = Examples(inputs, labels)
    tasks = [
        Task(f"{i}", examples, Examples(inputs[:2], labels[:2]), () if is_text else tuple(range(10))) for i in (0, 1)
    ]
    method, settings = ARMS[arm]
    samples = {"samples": 16} if is_text and method in ("laplace", "ncl", "sparsegrow") else {}
    learner, marks = LEARNERS[method].create(method, {**settings, **samples}), list[float]()

    def boundary(state: Any, context: Any, at: Any) -> Any:
        if context.number and at.event == Event.EPOCH_END:
            marks.append(time.process_time())
        state = learner.boundary(state, context, at)
        if context.number and at.event == Event.EPOCH_START:
            marks.append(time.process_time())
        return state

    schedule = TaskSchedule(batch_size=size, epochs=1, objective=NEXT_TOKEN if is_text else CLASSIFICATION, lr=1e-4)
    learn(net, trace(net, inputs[:2]), tasks, replace(learner, boundary=boundary), schedule)
    return marks[1] - marks[0]


def run(args: Namespace) -> None:
    """Measure what is asked for."""
    for name in args.net:
        if args.table == "coverage":
            print(add(args.out, {"table": "coverage", "net": name, **measure_coverage(name)}), flush=True)
            continue
        if name not in TIMED:
            continue
        batches = {"smollm2-135m": 4, "mlp:100-100": 400}.get(name, 48)
        arms = dict.fromkeys(("naive", *args.arm))
        rounds = [{arm: time_steps(name, arm, batches) for arm in arms} for _ in range(5 if "mlp" in name else 1)]
        best = {arm: min(one[arm] for one in rounds) for arm in arms}
        for arm, seconds in best.items():
            row = {"table": "steps", "net": name, "arm": arm, "ratio": round(seconds / best["naive"], 2)}
            print(add(args.out, {**row, "cpu_s": round(seconds, 2), **versions()}), flush=True)


def main() -> None:
    """Measure, or print the rows as tables."""
    which: dict[str, Any] = {"net": tuple(NETS), "arm": tuple(ARMS)}
    args = arguments(__doc__, OUT, {"table": ("coverage", "steps")}, **which)
    if not args.show:
        run(args)
        return
    names = {
        "coverage": ("net", "parameters", "kronecker", "diagonal", "bytes", "cpu_s"),
        "steps": ("net", "arm", "ratio"),
    }
    own = [row for row in rows(args.out) if row["table"] == args.table]
    print(*table(names[args.table], [[str(row[name]) for name in names[args.table]] for row in own]), sep="\n")


if __name__ == "__main__":
    main()
