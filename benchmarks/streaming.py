"""Memory over a stream of tasks, and the speed of a step, beside a plain PyTorch loop over the same data.

    python benchmarks/streaming.py                        # permuted images: 20 tasks of 60,000 images
    python benchmarks/streaming.py --folder 200000        # 20 tasks in a generated ImageFolder of 200,000 files; speed
    python benchmarks/streaming.py --speed                # a naive step and a plain one: CPU seconds, in pairs

Images are generated. Memory is the resident set after the test of each task; what counts is the rise from the second
task to the last. Steps are timed by a hook of the optimizer, without a progress callback; rows with a note had one.
Rows go to benchmarks/results/streaming.json.
"""

import argparse
import copy
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import regrow
from regrow.nets.vision import small
from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "streaming.json"


class Permuted(Dataset[tuple[Tensor, int]]):
    """Images of one byte per pixel, in a fixed order of pixels per task; nothing is copied."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.targets = images, labels
        order = torch.randperm(images[0].numel(), generator=torch.Generator().manual_seed(seed))
        self.order = order if seed else order.sort()[0]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (image.flatten()[self.order].view(1, *image.shape).float() / 255), int(self.targets[index])


def permuted(tasks: int, n: int) -> list[tuple[Any, Any]]:
    """Tasks of generated images of 28 × 28 pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (n,), generator=generator)
    return [(Permuted(images, labels, i), Permuted(images[:500], labels[:500], i)) for i in range(tasks)]


def image_folder(place: Path, tasks: int, n: int) -> list[tuple[Any, Any]]:
    """Tasks of the classes of a generated folder of images of 16 × 16 pixels, two classes each."""
    import numpy as np
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    each = n // (2 * tasks)
    for label in range(2 * tasks):
        folder, rng = place / f"{label:03}", np.random.default_rng(label)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / f"{each - 1}.jpg").is_file():
            continue  # made by an earlier call
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.jpg", quality=60)
    data = ImageFolder(str(place), transform=ToTensor())
    found = []
    for task in range(tasks):
        mine = list(range(2 * task * each, 2 * (task + 1) * each))
        found.append((Subset(data, mine[200:]), Subset(data, mine[:200])))
    return found


def resident() -> float:
    """The resident set of this process, in MB."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmRSS"))
    return int(line.split()[1]) / 1000


def memory(tasks: list[tuple[Any, Any]], shape: tuple[int, ...], outputs: int, method: str) -> dict[str, Any]:
    """The resident set after each task."""
    model, _ = small("mlp:100-100", shape, outputs)
    rows: list[float] = []
    last = -1

    def look(done: int, total: int, what: str) -> None:
        nonlocal last
        now = (done - 1) * len(tasks) // total
        if now != last:
            rows.append(resident())
            last = now

    start = time.perf_counter()
    regrow.learn(model, tasks, method=method, epochs=1, batch_size=128, progress=look)
    rows.append(resident())
    after = [round(one) for one in rows[1:]]
    return {
        "tasks": len(tasks),
        "images": sum(len(train) for train, _ in tasks),
        "method": method,
        "seconds": round(time.perf_counter() - start),
        "MB": after,
        "rise from task 2": round(after[-1] / after[1] - 1, 4),
    }


def plain(model: nn.Module, loader: Iterable[Any], optimizer: torch.optim.Optimizer) -> None:
    """One epoch of plain PyTorch."""
    model.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def speed(nets: str, repeats: int) -> list[dict[str, Any]]:
    """CPU seconds of a step of the naive learner and of a plain loop, from memory and through a loader."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for net, shape, batch, n in (("mlp:100-100", (1, 28, 28), 128, 25_600), ("resnet:16-3", (3, 32, 32), 64, 1_280)):
        inputs, labels = torch.rand(n, *shape, generator=generator), torch.randint(10, (n,), generator=generator)
        if nets not in net:
            continue
        for how in ("loader", "memory"):
            model, data = small(net, shape, 10)[0], TensorDataset(inputs, labels)
            given = DataLoader(data, batch_size=batch, shuffle=True) if how == "loader" else (inputs, labels)
            rows.append({"net": net, "data": how, **compare(model, given, batch, repeats)})
    return rows


def folder_speed(tasks: list[tuple[Any, Any]], repeats: int) -> dict[str, Any]:
    """CPU seconds of a step over the images of one task, read from their files."""
    model, _ = small("mlp:100-100", (3, 16, 16), 2 * len(tasks))
    loader = DataLoader(Subset(tasks[0][0], range(min(2_560, len(tasks[0][0])))), batch_size=128, shuffle=True)
    return {"net": "mlp:100-100", "data": "image folder", **compare(model, loader, 128, repeats)}


def compare(model: nn.Module, data: Any, batch: int, repeats: int) -> dict[str, Any]:
    """CPU seconds per step of one epoch of each kind, in pairs, each pair in the other order than the last."""
    steps = {"naive": _naive_step, "plain": _plain_step}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name in sorted(steps, reverse=bool(i % 2)):
            taken[name].append(steps[name](copy.deepcopy(model), data, batch))
    pairs = [plain / naive for naive, plain in zip(taken["naive"], taken["plain"], strict=True)][1:]
    low, middle, high = quantiles(pairs, n=4)
    return {
        **{f"{name} ms": round(1e3 * median(each[1:]), 3) for name, each in taken.items()},
        "speed, plain = 1": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "pairs": len(pairs),
    }


def _naive_step(model: nn.Module, data: Any, batch: int) -> float:
    """CPU seconds per step of an epoch of the naive learner, without its first step."""
    moments: list[float] = []
    inputs, labels = next(iter(data)) if isinstance(data, DataLoader) else data
    test = TensorDataset(inputs[:2], labels[:2])
    build = partial(_noting, moments)
    regrow.learn(model, [(data, test)], method="naive", epochs=1, batch_size=batch, optimizer=build)
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def _plain_step(model: nn.Module, data: Any, batch: int) -> float:
    """CPU seconds per step of an epoch of plain PyTorch, without its first step."""
    moments: list[float] = []
    loader = data if isinstance(data, DataLoader) else _batches(*data, batch)
    plain(model, loader, _noting(moments, model.parameters()))
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def _noting(moments: list[float], parameters: Any) -> torch.optim.Optimizer:
    """SGD that notes when it has taken a step."""
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True)
    optimizer.register_step_post_hook(lambda *_: moments.append(time.process_time()))
    return optimizer


def _batches(inputs: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for part in torch.randperm(len(inputs)).split(size):
        yield inputs[part], labels[part]


def main() -> None:
    """Measure, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--folder", type=int, default=0, help="files of a generated ImageFolder; 0: images in memory")
    parser.add_argument("--place", type=Path, help="a folder in which the files of an earlier call are, and stay")
    parser.add_argument("--method", default="naive")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--nets", default="", help="with --speed: networks with this in their names, mlp or resnet")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.speed:
        what, found = "speed", speed(args.nets, args.repeats)
    elif args.folder:
        what, place = "image folder", args.place or Path(tempfile.mkdtemp())
        try:
            tasks = image_folder(place, args.tasks, args.folder)
            found = [memory(tasks, (3, 16, 16), 2 * args.tasks, args.method), folder_speed(tasks, args.repeats)]
        finally:
            if args.place is None:
                shutil.rmtree(place)
    else:
        tasks = permuted(args.tasks, args.images)
        what, found = "permuted images", [memory(tasks, (1, 28, 28), 10, args.method)]
    rows = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else []
    rows += [{"what": what, "date": f"{date.today()}", "threads": args.threads, **versions(), **row} for row in found]
    args.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    for row in found:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
