"""ResNet-18 on CIFAR-10 to half its multiply–accumulates or milliseconds, at equal CPU minutes, by search and pruning.

    PYTHONPATH=UNPACKED_WHEEL python benchmarks/halve_resnet.py --cifar PICTURES --work FOLDER [--arm trials]
    python benchmarks/halve_resnet.py --show

torchvision's ResNet-18, with its stem, is trained for 15 epochs on 10,000 images of 32 × 32 pixels from
``PICTURES/train/CLASS/…``. Every arm starts from it and has 10 CPU minutes on one thread, those of its cut included.
What is left of them is fine-tuning, with a rate that falls to 0 along a cosine. 10,000 images test, once. ``trials``
and ``mgas`` are ``regrow.search`` with a loader and a loss, ``magnitude`` and ``default`` are ``regrow.prune`` on 1,024
images. Torch-Pruning 1.6.1 cuts in steps of a fortieth of every width, as in ``defaults.py``. Milliseconds are those
of 64 images, the fastest of 25 passes in alternation with the dense network. A row is written per run; seeds are those
of the search and of fine-tuning.
"""

import copy
import math
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from defaults import Examples, accuracy, count_macs, prune_by_peer, read_data, train
from safetensors.torch import load_file, save_file
from shared import Row, add, arguments, rows, table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import regrow
from regrow.core.sources import Batch
from regrow.evaluation.timing import fastest_passes
from regrow.training.tune import recalibrate

OUT = Path(__file__).parent / "results" / "halve_resnet.jsonl"
ARMS = ("trials", "mgas", "magnitude", "default", "torch-pruning magnitude", "torch-pruning taylor")
EPOCHS = {"trials": 10, "mgas": 5}  # of the search: about half of the minutes
RATE = 0.02


def time_pass(dense: nn.Module, net: nn.Module, data: Examples) -> tuple[float, float]:
    """Return the milliseconds of 64 images in the dense network and in another."""
    whole, own = fastest_passes([dense, net], Batch((data[0][:64],)), repeats=25)
    return whole / 1e6, own / 1e6


def cut(arm: str, target: str, net: nn.Module, data: Examples, seed: int) -> tuple[nn.Module, Row]:
    """Return the network at half its size, and what the search says of itself."""
    few = data[0][:1024], data[1][:1024]
    if arm in EPOCHS:
        loader = DataLoader(TensorDataset(*data), 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
        how: dict[str, Any] = {"method": arm, "epochs": EPOCHS[arm], "batch_size": 64, "seed": seed}
        how |= {"lr": RATE, "weight_decay": 5e-4, "settings": {"augment": True}}
        found = regrow.search(net, loader, target=target, loss=nn.CrossEntropyLoss(), **how)
        return found.model, {"size": found.size, "asked": found.target, "saved": dict(found.saved)}
    if arm.startswith("torch-pruning"):
        dense = copy.deepcopy(net)

        def share(net: nn.Module) -> float:
            if target.startswith("macs"):
                return count_macs(net, data[0][:1]) / count_macs(dense, data[0][:1])
            whole, own = time_pass(dense, copy.deepcopy(net).eval(), data)
            return own / whole

        return prune_by_peer(net, few, arm.split()[1], share), {}
    how = {} if arm == "default" else {"method": arm}
    return regrow.prune(net, few, target=target, batch_size=64, reconstruct=False, **how)[0], {}


def fine_tune(net: nn.Module, data: Examples, until: float, seed: int) -> int:
    """Train until a CPU time, shifted and mirrored images at a falling rate; return the number of steps."""
    (x, y), start, steps = data, time.process_time(), 0
    optimizer = torch.optim.SGD(net.train().parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    draw = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(x), generator=draw).split(128):
            done = (time.process_time() - start) / max(1e-9, until - start)
            if done >= 1:
                recalibrate(net, [[Batch((x,)) for x in data[0][:2048].split(128)]])
                return steps
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
            batch = x[part].flip(-1) if torch.rand((), generator=draw) < 0.5 else x[part]
            shift = torch.randint(-4, 5, (2,), generator=draw).tolist()
            batch = torch.roll(nn.functional.pad(batch, (4, 4, 4, 4)), shift, (2, 3))[..., 4:-4, 4:-4]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch), y[part]).backward()
            optimizer.step()
            steps += 1


def measure(arm: str, target: str, dense: nn.Module, data: Examples, test: Examples, args: Namespace, seed: int) -> Row:
    """Cut a copy of the network, train it for the rest of the minutes, and measure it."""
    torch.manual_seed(seed)
    start = time.process_time()
    net, row = cut(arm, target, copy.deepcopy(dense), data, seed)
    used = time.process_time() - start
    row |= {"steps": fine_tune(net, data, start + 60 * args.minutes, seed), "cut_cpu_s": round(used)}
    (whole, own), (all_macs, macs) = (
        time_pass(dense, net.eval(), data),
        (count_macs(one, data[0][:1]) for one in (dense, net)),
    )
    row |= {"accuracy": 100 * accuracy(net, test), "macs": round(macs / all_macs, 4), "dense_ms": whole, "ms": own}
    return {**row, "parameters": sum(p.numel() for p in net.parameters())}


def make_dense(args: Namespace, data: Examples) -> nn.Module:
    """Return the trained network; it is trained once."""
    torch.manual_seed(0)
    net, file = resnet18(num_classes=10), args.work / f"dense-{args.images}.safetensors"
    if not file.is_file():
        train(net, data, 15, 0.05, 0, adam=False)
        args.work.mkdir(exist_ok=True, parents=True)
        save_file(net.state_dict(), file)
    net.load_state_dict(load_file(file))
    return net.eval()


def show(every: list[Row]) -> Iterator[str]:
    """Yield the table."""
    lines = []
    for target, arm in product(dict.fromkeys(row["target"] for row in every if row["target"]), ARMS):
        own = {row["seed"]: row for row in every if (row["target"], row["arm"]) == (target, arm)}
        rival = {row["seed"]: row for row in every if (row["target"], row["arm"]) == (target, "trials")}
        if not own:
            continue
        levels = [row["accuracy"] for row in own.values()]
        more = [own[seed]["accuracy"] - rival[seed]["accuracy"] for seed in own if seed in rival]
        gap = f"{fmean(more):+.2f} ± {stdev(more) / len(more) ** 0.5:.2f}" if len(more) > 1 and arm != "trials" else ""
        ms = fmean(row["ms"] / row["dense_ms"] for row in own.values())
        exact = [row["size"] / row["ms"] for row in own.values() if target.startswith("ms") and "size" in row]
        cells = [f"{fmean(row[name] for row in own.values()):,.{n}f}" for name, n in (("macs", 3), ("parameters", 0))]
        sd = f" ± {stdev(levels):.2f}" if len(levels) > 1 else ""
        last = ", ".join(f"{value:.2f}" for value in exact)
        lines.append([target, arm, len(own), f"{fmean(levels):.2f}{sd}", gap, *cells, f"{ms:.3f}", last])
    columns = ["target", "arm", "seeds", "test accuracy, %", "to trials", "MACs left", "parameters", "ms left"]
    yield from table([*columns, "predicted ÷ measured ms"], lines)


def main() -> None:
    """Compute, or print the table."""
    which: dict[str, Any] = {
        "target": ["macs=50%", "ms=50%"],
        "arm": ARMS,
        "seeds": 3,
        "minutes": 10.0,
        "images": 10_000,
    }
    args = arguments(__doc__, OUT, cifar=Path, work=Path("halve-resnet"), **which)
    if args.show:
        print(*show(rows(args.out)), sep="\n")
        return
    torch.set_num_threads(1)
    data, test = read_data(args.cifar, args.images, 10_000)
    dense = make_dense(args, data)
    known = rows(args.out)
    if not any(row["arm"] == "dense" for row in known):
        add(args.out, {"target": "", "arm": "dense", "seed": 0, "accuracy": 100 * accuracy(dense, test)})
    done = {(row["target"], row["arm"], row["seed"]) for row in known}
    for seed, target, arm in product(range(args.seeds), args.target, args.arm):
        if (target, arm, seed) not in done:
            row = {"target": target, "arm": arm, "seed": seed, **measure(arm, target, dense, data, test, args, seed)}
            print(add(args.out, {**row, "minutes": args.minutes, "images": args.images}), flush=True)


if __name__ == "__main__":
    main()
