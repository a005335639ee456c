"""The default of ``regrow.prune`` and Torch-Pruning at half the multiply–accumulates of small image networks.

    PYTHONPATH=UNPACKED_WHEEL python benchmarks/defaults.py                     # digits; a few minutes an arm
    python benchmarks/defaults.py --cifar FOLDER --nets resnet18 --images 6000
    python benchmarks/defaults.py --show

ResNet-18 with a stem for 32 × 32 pixels, MobileNetV3-Small and a ViT of transformers (4 layers of width 128)
are trained on scikit-learn's digits, or on the first images of the folders ``train`` and ``test`` of ``--cifar``, and
then cut. Every arm gets the same 1,024 training images. Torch-Pruning 1.6.1 (if imported) cuts in up to 16 steps
by ``GroupTaylorImportance`` and ``GroupMagnitudeImportance``, as its examples do, until half is reached; its BatchNorms
are measured again, too, which its examples leave to training. Then each cut network is trained for one epoch on all
images. A row has the test accuracy as returned, after the epoch, and seconds to cut. The default and its settings were
chosen before these rows were made.
"""

import copy
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peer
import torch
from shared import Row, add, arguments, rows, spread, table
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet18

import regrow
from regrow.core.sources import Batch, logits_in
from regrow.data.streams import load_digits
from regrow.evaluation import macs
from regrow.training.tune import recalibrate

OUT = Path(__file__).parent / "results" / "defaults.jsonl"
ARMS = ("default", "torch-pruning taylor", "torch-pruning magnitude")
Examples = tuple[Tensor, Tensor]


def build(name: str, channels: int) -> nn.Module:
    """Return an untrained network for 32 × 32 pixels."""
    if name == "vit":
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
        return ViTForImageClassification(
            ViTConfig(image_size=32, patch_size=4, num_channels=channels, num_labels=10, **sizes)
        )
    net = resnet18(num_classes=10) if name == "resnet18" else mobilenet_v3_small(num_classes=10)
    if name == "resnet18":
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
    else:
        net.features[0][0] = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
    return net


def read_data(cifar: Path | None, images: int, tests: int = 2000) -> tuple[Examples, Examples]:
    """Return training and test images with labels."""
    if cifar is None:
        task = load_digits()
        parts = [(part.inputs, part.labels) for part in (task.train, task.test)]
        return tuple((nn.functional.interpolate(x, size=32, mode="bilinear"), y) for x, y in parts)  # type: ignore
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    scale = transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    change, found = transforms.Compose([transforms.ToTensor(), scale]), []
    for part, n in (("train", images), ("test", tests)):
        data = ImageFolder(cifar / part, change)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n].tolist()
        found.append((torch.stack([data[i][0] for i in order]), torch.tensor([data[i][1] for i in order])))
    return found[0], found[1]


def train(net: nn.Module, data: Examples, epochs: int, lr: float, seed: int, adam: bool) -> nn.Module:
    """Train by SGD, or AdamW, on a rate that rises and falls; images in color are mirrored at random."""
    x, y = data
    sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True)
    optimizer = (torch.optim.AdamW if adam else sgd)(net.train().parameters(), lr=lr)
    draw, steps = torch.Generator().manual_seed(seed), epochs * -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=draw).split(128):
            batch = x[part].flip(-1) if x.shape[1] == 3 and torch.rand((), generator=draw) < 0.5 else x[part]
            with torch.autocast("cpu", torch.bfloat16, enabled=adam):  # which convolutions are slower in
                logits = logits_in(net(batch))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits.float(), y[part]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def accuracy(net: nn.Module, data: Examples) -> float:
    """Return the test accuracy."""
    with torch.no_grad():
        logits = torch.cat([logits_in(net.eval()(x)) for x in data[0].split(500)])
    return float((logits.argmax(1) == data[1]).float().mean())


def count_macs(net: nn.Module, image: Tensor) -> int:
    """Return the multiply–accumulates of one image."""
    return macs(regrow.trace(copy.deepcopy(net).eval(), image))


def prune_by_peer(
    net: nn.Module, data: Examples, how: str, share: Callable[[nn.Module], float] | None = None
) -> nn.Module:
    """Return the network cut by Torch-Pruning until its ``share``, by default of multiply–accumulates, is half."""
    import torch_pruning as tp

    image, whole, steps = data[0][:1], count_macs(net, data[0][:1]), 16 if share is None else 32
    with torch.no_grad():
        outputs = [logits_in(net.eval()(image))]
    heads = peer.attention(net)
    sizes = {module: peer.rows_of(module) // n for module, n in heads.items()}
    importance = (
        tp.importance.GroupTaylorImportance() if how == "taylor" else tp.importance.GroupMagnitudeImportance(p=2)
    )
    pruner = tp.pruner.BasePruner(
        net,
        image,
        importance=importance,
        pruning_ratio=0.4 if share is None else 0.8,
        iterative_steps=steps,
        ignored_layers=peer.ignored(net, outputs),
        num_heads=dict(heads),
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        head_pruning_ratio=0.4,
        output_transform=lambda output: logits_in(output).sum(),
    )
    for _ in range(steps):
        if how == "taylor":
            net.zero_grad()
            for x, y in zip(data[0].split(128), data[1].split(128), strict=True):
                nn.functional.cross_entropy(logits_in(net(x)), y).backward()
        pruner.step()
        peer.restate(net, sizes)
        if (count_macs(net, image) / whole if share is None else share(net)) <= 0.5:
            break
    net.zero_grad(set_to_none=True)
    recalibrate(net, [[Batch((x,)) for x in data[0].split(128)]])
    return net


def measure(name: str, arm: str, data: Examples, test: Examples, dense: nn.Module, seed: int) -> Row:
    """Cut a copy of the network, and measure it as it is and after one epoch."""
    net, few, start = copy.deepcopy(dense), (data[0][:1024], data[1][:1024]), time.perf_counter()
    if arm == "default":
        net, _ = regrow.prune(net, few, target="macs=50%", batch_size=128)
    else:
        net = prune_by_peer(net, few, arm.split()[1])
    seconds = time.perf_counter() - start
    share = count_macs(net, few[0][:1]) / count_macs(dense, few[0][:1])
    row = {"macs": round(share, 3), "parameters": peer.count(net), "seconds": round(seconds, 1)}
    row["returned"] = accuracy(net, test)
    train(net, data, 1, 1e-4 if name == "vit" else 0.01, seed, name == "vit")
    recalibrate(net, [[Batch((x,)) for x in data[0].split(128)]])  # an epoch of a dozen steps leaves them behind
    return row | {"after_an_epoch": accuracy(net, test)}


def show(every: list[Row]) -> None:
    """Print the mean accuracies, in percent, over seeds."""
    lines = []
    for key in dict.fromkeys((row["net"], row["data"], row["arm"]) for row in every):
        own = [row for row in every if (row["net"], row["data"], row["arm"]) == key]
        cells = [spread([row[name] for row in own]) for name in ("dense", "returned", "after_an_epoch", "macs")]
        lines.append([*key, len(own), *cells, spread([row["seconds"] for row in own], 1)])
    columns = ["network", "data", "arm", "seeds", "dense", "as returned", "after one epoch", "MACs left", "seconds"]
    print(*table(columns, lines), sep="\n")


def main() -> None:
    """Train each network, cut it by each arm, and write a row per arm."""
    args = arguments(
        __doc__, OUT, nets=("resnet18", "mobilenet", "vit"), seeds=3, epochs=10, images=6000, cifar=Path, arms=ARMS
    )
    known = rows(args.out)
    if not args.show:
        data, test = read_data(args.cifar, args.images)
        source = f"CIFAR-10, {args.images} images" if args.cifar else "digits"
        peers = importlib.util.find_spec("torch_pruning") is not None
        for name in args.nets or ("resnet18", "mobilenet", "vit"):
            for seed in range(args.seeds):
                done = {row["arm"] for row in known if (row["net"], row["data"], row["seed"]) == (name, source, seed)}
                left = [arm for arm in args.arms or ARMS if arm not in done and (peers or arm == "default")]
                if not left:
                    continue
                torch.manual_seed(seed)
                dense = build(name, data[0].shape[1])
                train(
                    dense,
                    data,
                    args.epochs * (1 if name == "resnet18" else 4),
                    1e-3 if name == "vit" else 0.05,
                    seed,
                    name == "vit",
                )
                recalibrate(dense, [[Batch((x,)) for x in data[0].split(128)]])  # short training leaves them behind
                for arm in left:
                    row = {"net": name, "data": source, "arm": arm, "seed": seed, "dense": accuracy(dense, test)}
                    try:
                        row |= measure(name, arm, data, test, dense, seed)
                    except Exception as error:  # the peer refuses some networks
                        print(f"{name}, {arm}: {type(error).__name__}: {error}")
                        continue
                    known.append(add(args.out, row))
                    print(row)
    show(known)


if __name__ == "__main__":
    main()
