"""Search on planted tasks, where it is known which granularity is redundant, against single granularities.

    python benchmarks/planted_search.py [--world O F W] [--arm trials mgas] [--seeds 5]
    python benchmarks/planted_search.py --show

A network of six branches, 24 → 24 → 4 each on its own part of the input, learns what a random network of that form
says. In that teacher two of six branches count (``O``), a third of every branch's units (``F``) or of all weights
(``W``); half of each where two or three are combined. In ``P`` every live branch costs 11 % of the network beyond its
units, two branches count, and half of their units; in ``P0`` all count. The target is 34 % of the parameters, counting
those that are not 0, and in ``P`` and ``P0`` 28 % of all. 3,200 examples train, 800 validate, 3,000 test.

Arms that cost trials have 24 epochs of search, 12 before the first cut; the others 36, as many steps. ``portfolio`` is
the best on validation data of searches of one granularity, with a third of the epochs each. After the search all train
for ten epochs on all 4,000 examples from the weights that they have; zeros stay 0. Difference: points of test accuracy,
paired by seed, to the best single granularity of that world, which is chosen in hindsight.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from shared import Row, add, arguments, rows, table
from torch import Tensor, nn

import regrow

OUT = Path(__file__).parent / "results" / "planted_search.jsonl"
BRANCHES, INPUTS, UNITS, CLASSES = 6, 24, 24, 4
WORLDS = ("O", "F", "W", "OF", "OW", "FW", "OFW", "P", "P0")
ALL, TWO = ("operations", "filters", "weights"), ("operations", "filters")
# Arm → method, its settings, epochs of search.
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "trials": ("trials", {"levels": TWO}, 24),
    "trials, weights too": ("trials", {"levels": ALL}, 24),
    "operations": ("trials", {"levels": ALL[:1]}, 36),
    "filters": ("trials", {"levels": ALL[1:2]}, 36),
    "weights": ("trials", {"levels": ALL[2:]}, 36),
    "mgas": ("mgas", {"levels": ALL}, 36),
    "mgas, no weights": ("mgas", {"levels": TWO}, 36),
    "mgas, no filters": ("mgas", {"levels": ("operations", "weights")}, 36),
    "mgas, no operations": ("mgas", {"levels": ALL[1:]}, 36),
    "mgas, size not in the loss": ("mgas", {"levels": ALL, "gain": 0.0}, 36),
    "random granularity": ("trials", {"levels": ALL, "decide": "random"}, 36),
    "lowest loss": ("trials", {"levels": TWO, "decide": "lowest"}, 24),
    "no trial steps": ("trials", {"levels": TWO, "trial_steps": 0}, 32),
    "weights alone for a quarter": ("trials", {"levels": TWO, "warm": 0.25}, 24),
    "weights alone for three quarters": ("trials", {"levels": TWO, "warm": 0.75}, 24),
    "three times the steps": ("trials", {"levels": TWO, "trial_steps": 33}, 24),
}
REMOVED = ("mgas, thresholds of 0.3",)  # arms whose code is gone; their rows are printed
SHORT = {f"{name}, a third": (method, settings, 12) for name, (method, settings, _) in [*ARMS.items()][2:5]}


class Branches(nn.Module):
    """Branches on parts of the input, which are added up; ``costly``: each has two layers that are there or not."""

    def __init__(self, costly: bool) -> None:
        super().__init__()
        branches = [Branch(costly) for _ in range(BRANCHES)]
        self.sum = regrow.Candidates({f"b{i}": one for i, one in enumerate(branches)}, range(BRANCHES))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        total: Tensor = self.sum(*x.split(INPUTS, 1))
        return total


class Branch(nn.Module):
    """A network of one hidden layer; ``costly``: behind two linear layers whose outputs are added to the input."""

    def __init__(self, costly: bool) -> None:
        super().__init__()
        self.before = nn.ModuleList([nn.Linear(INPUTS, INPUTS) for _ in range(2 if costly else 0)])
        self.hidden, self.out = nn.Linear(INPUTS, UNITS), nn.Linear(UNITS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's part of the logits."""
        for layer in self.before:
            x = x + layer(x)
        result: Tensor = self.out(self.hidden(x).relu())
        return result


def draw(world: str, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (inputs, labels) of 4,000 examples to learn from, and of 3,000 to test on."""
    g = torch.Generator().manual_seed(100 + seed)
    first = torch.randn(BRANCHES, UNITS, INPUTS, generator=g) / INPUTS**0.5
    last = torch.randn(BRANCHES, CLASSES, UNITS, generator=g) / UNITS**0.5
    mixed = len(world) > 1
    if "O" in world or world == "P":
        count = 3 if mixed and world != "P" else 2
        good = torch.randperm(BRANCHES, generator=g)[:count].tolist()
        last[[i for i in range(BRANCHES) if i not in good]] = 0
    if "F" in world or world == "P":
        for branch in last:
            branch[:, torch.randperm(UNITS, generator=g)[: UNITS // 2 if mixed or world == "P" else UNITS * 2 // 3]] = 0
    if "W" in world:
        share = 0.5 if mixed else 0.33
        first *= torch.rand(first.shape, generator=g) < share
        last *= torch.rand(last.shape, generator=g) < share

    def examples(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, BRANCHES * INPUTS, generator=g)
        parts = zip(x.split(INPUTS, 1), first, last, strict=True)
        return x, sum(F.linear(F.relu(F.linear(part, 3 * a)), b) for part, a, b in parts)  # type: ignore[return-value]

    (x, y), (x_test, y_test) = examples(4000), examples(3000)
    mean, std = y.mean(0), y.std(0)
    return (x, ((y - mean) / std).argmax(1)), (x_test, ((y_test - mean) / std).argmax(1))


def train(net: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int = 10) -> None:
    """Train a network in place by a falling learning rate; zeros stay 0."""
    parameters = [*net.parameters()]
    zeros, steps = [p == 0 for p in parameters], epochs * math.ceil(len(x) / 96)
    optimizer = torch.optim.SGD(parameters, lr=0.025, momentum=0.9, nesterov=True, weight_decay=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=g).split(96):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for p, zero in zip(parameters, zeros, strict=True):
                    p[zero] = 0


def find(world: str, arm: str, seed: int) -> tuple[nn.Module, Row]:
    """Return the network that an arm finds, and figures of the search."""
    (x, y), _ = draw(world, seed)
    costly = world.startswith("P")
    method, settings, epochs = (ARMS | SHORT)[arm]
    target = "params=28%" if costly else "nonzero=34%"
    if costly:
        settings = {**settings, "levels": tuple(name for name in settings["levels"] if name != "weights")}
    torch.manual_seed(1000 + seed)
    net = Branches(costly)
    result = regrow.search(
        net,
        (x[:3200], y[:3200]),
        validation=(x[3200:], y[3200:]),
        target=target,
        method=method,
        settings=settings,
        epochs=epochs,
        batch_size=96,
        lr=0.025,
        weight_decay=3e-4,
        seed=seed,
    )
    return result.model, {"used": result.size / result.target, "saved": dict(result.saved), "validation": result.score}


def run(args: Namespace) -> None:
    """Compute the rows that are missing."""
    done = {(row["world"], row["arm"], row["seed"]) for row in rows(args.out)}
    for seed, world, arm in product(range(args.seeds), args.world, (*args.arm, *(SHORT if args.portfolio else ()))):
        if (world, arm, seed) in done:
            continue
        (x, y), (x_test, y_test) = draw(world, seed)
        try:
            net, row = find(world, arm, seed)
        except ValueError as error:  # a granularity that cannot reach the target
            add(args.out, {"world": world, "arm": arm, "seed": seed, "error": str(error)})
            continue
        train(net, x, y, seed)
        with torch.no_grad():
            right = (net(x_test).argmax(1) == y_test).double().mean()
        add(args.out, {"world": world, "arm": arm, "seed": seed, "accuracy": 100 * float(right), **row})
        print(f"{world}, {arm}, seed {seed}: {float(right):.2%}, {row['used']:.1%} of the target", flush=True)


def show(every: list[Row]) -> Iterator[str]:
    """Yield the table of paired differences to the best single granularity."""
    found = {(row["world"], row["arm"], row["seed"]): row for row in every if "accuracy" in row}
    for world, seed in {(world, seed): None for world, _, seed in found}:
        short = [found[at] for arm in SHORT if (at := (world, arm, seed)) in found]
        if short:
            found[world, "portfolio", seed] = max(short, key=lambda row: row["validation"])
    lines = []
    for arm in (*ARMS, *REMOVED, "portfolio"):
        cells = []
        for world in WORLDS:
            seeds = [s for s in range(100) if (world, arm, s) in found]
            single = [one for one in ALL if any((world, one, s) in found for s in seeds)]
            if not seeds or not single:
                cells.append("")
                continue
            best = max(single, key=lambda one: fmean(found[world, one, s]["accuracy"] for s in seeds))
            more = [found[world, arm, s]["accuracy"] - found[world, best, s]["accuracy"] for s in seeds]
            error = f" ± {stdev(more) / len(more) ** 0.5:.1f}" if len(more) > 1 else ""
            level = fmean(found[world, arm, s]["accuracy"] for s in seeds)
            cells.append(f"{level:.1f}" if arm == best else f"{fmean(more):+.1f}{error}")
        lines.append([arm, *cells])
    yield from table(["arm", *WORLDS], lines)


def main() -> None:
    """Compute, or print the table."""
    args = arguments(__doc__, OUT, world=WORLDS, arm=tuple(ARMS), seeds=5, portfolio=True)
    torch.set_num_threads(1)
    if args.show:
        print(*show(rows(args.out)), sep="\n")
    else:
        run(args)


if __name__ == "__main__":
    main()
