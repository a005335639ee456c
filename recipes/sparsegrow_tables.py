"""SparseGrow (reconstructed) beside other learners, one task after the other: same stream, network, steps and seeds.

    python recipes/sparsegrow_tables.py grid --fashion FOLDER --first 100 --seeds 101
    python recipes/sparsegrow_tables.py main --fashion FOLDER --seeds 5
    python recipes/sparsegrow_tables.py shift --mnist FOLDER --cifar PICTURES --seeds 5
    python recipes/sparsegrow_tables.py main --show

FOLDER has MNIST's four files (``train-images-idx3-ubyte`` …, or ``.gz``), PICTURES has CIFAR-10 as
``train/CLASS/…`` and ``test/CLASS/…``. A row is written when it is whole; rows that are there are not run again, so the
same command goes on where it was stopped.
Strengths and rates are chosen by ``grid``: four rates and three strengths of each arm, one seed, tested on training
images that no table tests on; one choice serves both streams. 5,000 images per task, 5 epochs, batches of 64, SGD with
momentum 0.9, two hidden layers of 100 units; no task is named when it is evaluated, but in ``told``. ``classes`` and
``told`` split 5,000 images into five tasks. ``growth`` and ``fifty`` (tasks) have Laplace in networks that are too
small at first. ``epochs`` trains longer. ``gpm`` is the protocol of Saha et al. (ICLR 2021), with ``--train 54000
--test 10000``: normalised digits, no biases, no momentum. ``mammoth`` is that of Buzzega et al. (NeurIPS 2020), with
``--train 60000 --test 10000``; its DER++ has no momentum. Both have the settings of their code. ``conv`` has 5,000
images in each of its five tasks, of two classes that every task calls 0 and 1, and a residual network with GroupNorm.
``shift`` is a natural change of domain, ten digits each: MNIST, the UCI digits of other writers at lower resolution
(scikit-learn's, 1,347 to learn from), and MNIST over photographs, |photograph − digit| in grey, as MNIST-M (Ganin et
al., JMLR 2016) is made. ``--train`` and ``--test`` are images per task, ``--first`` is the first seed, ``--match`` a
part of an arm's name, and ``--against`` the arm that differences of ``--show`` are to.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from harness import Row, add, arguments, difference, rows, spread, table
from torch import nn

from regrow.core.tasks import Examples, Task
from regrow.data.streams import (
    load_digits,
    load_idx,
    load_image_folder,
    permuted_tasks,
    resize_tasks,
    rotated_tasks,
    sample_task,
    split_by_classes,
)
from regrow.methods import LEARNERS
from regrow.nets.vision import small
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, accuracy_matrix, learn

OUT = Path(__file__).parent / "results" / "sparsegrow.jsonl"
HEAD = ("", "final average accuracy, %", "difference, paired", "forgetting", "learning accuracy", "parameters")
HEAD += ("on average", "MB kept", "training TMACs", "s")
WIDTH = 100
CHANNELS = 8


@dataclass(frozen=True)
class Arm:
    """One line of a table.

    Args:
        name: How the table calls it.
        method: A learner's name.
        settings: Its settings.
        like: Another arm, whose final number of parameters the network has from the start.
        lr: Learning rate.
        epochs: Passes over each task; ``batch``: examples a step; ``momentum``: of SGD.
        width: Units of both hidden layers at first; 0: as usual.
        size: With ``like``: ``parameters``, its final number; ``average``: the mean over all tasks.
        bias: Whether linear layers have biases.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    like: str = ""
    lr: float = 0.01
    epochs: int = 5
    batch: int = 64
    momentum: float = 0.9
    width: int = 0
    size: str = "parameters"
    bias: bool = True

    @property
    def told(self) -> dict[str, Any]:
        """What a row says of how it was made: one that was made otherwise is none of this arm's."""
        told = {"arm": self.name, "method": self.method, "settings": self.settings, "lr": self.lr}
        usual = Arm("", "")
        others = {key: getattr(self, key) for key in ("epochs", "batch", "momentum", "bias")}
        return told | {key: value for key, value in others.items() if value != getattr(usual, key)}


def arms(method: str, name: str, **lists: Any) -> tuple[Arm, ...]:
    """Arms of one method, of which settings are lists of equal length: names and settings have their values in turn."""
    turns = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    return tuple(Arm(name.format(**turn), method, turn) for turn in turns)


def grow(name: str, like: str = "", lr: float = 0.01, size: str = "parameters", **settings: Any) -> Arm:
    """An arm of SparseGrow."""
    return Arm(name, "sparsegrow", settings, like, lr, size=size)


RATES = (0.01, 0.02, 0.05, 0.1)


def grid(method: str, name: str, *choices: dict[str, Any]) -> tuple[Arm, ...]:
    """Arms of one method with every rate and every choice of settings; names have both."""
    return tuple(Arm(f"{name.format(**one)}, {lr:g}", method, one, lr=lr) for lr in RATES for one in choices)


ENERGIES = ((0.97, 0.9), (0.99, 0.95), (0.999, 0.99))
GATES = ((15.0, 0.0), (15.0, 0.5), (2.0, 0.5), (2.0, 2.0))
GRID = (
    *grid("naive", "naive", {}),
    *grid("naive", "joint", {"keep": "data"}),
    *grid("laplace", "Laplace {strength:g}", *({"strength": s, "gate": 0.0} for s in (0.5, 2.0, 8.0))),
    *grid("laplace", "Laplace, gate 2, {strength:g}", *({"strength": s, "gate": 2.0} for s in (0.5, 2.0, 8.0))),
    *grid("ncl", "NCL {strength:g}, {pull:g}", *({"strength": s, "pull": 0.1} for s in (1.0, 5.0, 25.0))),
    *grid("gpm", "GPM {energy:g}", *({"energy": e, "first_energy": f} for e, f in ENERGIES)),
    *grid("ewc", "EWC {strength:g}", *({"strength": s} for s in (10.0, 100.0, 1000.0))),
    *grid("si", "SI {strength:g}", *({"strength": s} for s in (0.1, 0.3, 1.0))),
    *grid("replay", "DER++ {logit_weight:g}", *({"memory": 500, "logit_weight": w} for w in (0.2, 0.5, 1.0, 2.0))),
    *grid("sparsegrow", "SparseGrow {strength:g}, {pull:g}", *({"strength": s, "pull": q} for s, q in GATES)),
)
FEW_CLASSES = (
    *grid("naive", "naive", {}),
    *grid("naive", "joint", {"keep": "data"}),
    *grid("laplace", "Laplace {strength:g}", *({"strength": s, "gate": 0.0} for s in (0.5, 2.0, 8.0))),
    *grid("laplace", "Laplace, gate 2, {strength:g}", *({"strength": s, "gate": 2.0} for s in (0.5, 2.0, 8.0))),
    *grid("ncl", "NCL {strength:g}, {pull:g}", *({"strength": s, "pull": 0.1} for s in (1.0, 5.0, 25.0))),
    *grid("gpm", "GPM {energy:g}", *({"energy": e, "first_energy": f} for e, f in ENERGIES)),
    *grid("replay", "ER", {"memory": 500}),
    *grid("replay", "DER++ {logit_weight:g}", *({"memory": 500, "logit_weight": w} for w in (0.2, 0.5, 1.0))),
    *grid("replay", "ER-ACE", {"memory": 500, "asymmetric_loss": True}),
    *grid("sparsegrow", "SparseGrow {strength:g}, {pull:g}", *({"strength": 2.0, "pull": q} for q in (0.5, 2.0, 8.0))),
    *grid(
        "sparsegrow",
        "SparseGrow + ER-ACE 500 {strength_factor:g}",
        *({"memory": 500, "strength_factor": f} for f in (0.01, 0.1, 1.0)),
    ),
)


RATE = 0.05  # of most arms, by the grid
OWN = grow("SparseGrow", lr=RATE)
HARD = {"grow": "never", "gate": "hard", "threshold": "adaptcl"}
NAIVE, JOINT = Arm("naive", "naive", lr=0.01), Arm("joint: all examples kept", "naive", {"keep": "data"}, lr=RATE)
FROZEN, LWF = Arm("frozen after task 1", "naive", {"keep": "network"}), Arm("LwF", "lwf")
LAPLACE = Arm("Laplace", "laplace", {"strength": 0.5, "gate": 0.0}, lr=RATE)
EWC, SI = Arm("EWC", "ewc", {"strength": 100.0}, lr=0.02), Arm("SI", "si", {"strength": 1.0})
DER = Arm("DER++, 500 examples kept", "replay", {"memory": 500, "logit_weight": 2.0})
GATED = replace(LAPLACE, name="Laplace, gate 2", settings={**LAPLACE.settings, "gate": 2.0})
NCL, GPM = Arm("NCL", "ncl", lr=RATE), Arm("GPM", "gpm", lr=RATE)
PEERS = (
    LAPLACE,
    GATED,
    NCL,
    GPM,
    EWC,
    SI,
    DER,
    JOINT,
    NAIVE,
)
CONTROLS = (
    grow("SparseGrow, never grown", lr=RATE, grow="never"),
    grow("SparseGrow, never grown, average size", OWN.name, lr=RATE, size="average", grow="never"),
    grow("SparseGrow, never grown, final size", OWN.name, lr=RATE, grow="never"),
    replace(LAPLACE, name="Laplace, average size", like=OWN.name, size="average"),
    replace(LAPLACE, name="Laplace, final size", like=OWN.name),
    replace(GATED, name="Laplace, gate 2, boundaries detected", settings={**GATED.settings, "boundaries": "detected"}),
    replace(GATED, name="Laplace, gate 2, every 8 steps", settings={**GATED.settings, "every": 8}),
    replace(GATED, name="Laplace, gate 2, factors × 1", settings={**GATED.settings, "limit": 1.0}),
    replace(GATED, name="Laplace, gate 2, factors × ¼", settings={**GATED.settings, "limit": 0.25}),
    replace(LAPLACE, name="Laplace, grown", settings={**LAPLACE.settings, "grow": "start"}),
    replace(DER, name="DER++, as many bytes", settings={**DER.settings, "memory": 1100}),
)
UNTUNED = (
    FROZEN,
    LWF,
    Arm("PackNet, task not named", "packnet", {"prune": 0.8}),
    Arm("WSN, task not named", "wsn", {"share": 0.8}),
    Arm("PackNet, task named", "packnet", {"prune": 0.8, "use_task_id": True}),
    Arm("WSN, task named", "wsn", {"share": 0.8, "use_task_id": True}),
    grow("AdaptCL", **HARD, alpha=1e-3),
)
ABLATIONS = (
    grow("no pull to the anchor", lr=RATE, pull=0.0),
    grow("pull alone, no gate", lr=RATE, strength=0.0, grow="short", min_free=1.0),
    grow("gate alone, 15", lr=RATE, pull=0.0, strength=15.0),
    grow("new units projected, at random", lr=RATE, directions="projected"),
    grow("new units at random", lr=RATE, directions="random"),
    grow("new units not fitted to data", lr=RATE, fit=False),
    grow("new units dense", lr=RATE, density=1.0),
    grow("grown at the start of a task", lr=RATE, late_phase=1.0),
    grow("no thresholds", lr=RATE, threshold="none"),
    grow("gate hard", lr=RATE, gate="hard"),
    grow("no gate", lr=RATE, gate="none"),
    grow("no damping", lr=RATE, damping=0.0),
    grow("gate every 16 steps", lr=RATE, every=16),
    grow("rate 0.01"),
    grow("rate 0.02", lr=0.02),
)
# Class-incremental learning: strengths and rates by a grid of its own.
BOTH, MANY = "SparseGrow + ER-ACE 500", (200, 500)
ACE = arms("replay", "ER-ACE {memory}", memory=MANY, asymmetric_loss=(True, True))
SOLO = grow("SparseGrow", lr=0.02, pull=8.0)
REPLAYING = (
    *arms("replay", "ER {memory}", memory=MANY),
    *arms("replay", "DER++ {memory}", memory=(*MANY, 1100, 1550), logit_weight=(0.2,) * 4),
    *ACE,
)
BUFFERS = (
    SOLO,
    replace(LAPLACE, settings={"strength": 8.0, "gate": 0.0}),
    replace(GATED, settings={"strength": 8.0, "gate": 2.0}),
    replace(NCL, settings={"strength": 25.0}),
    replace(GPM, lr=0.01),
    replace(NAIVE, lr=0.02),
    replace(JOINT, lr=0.1),
    grow("SparseGrow, never grown", lr=0.02, pull=8.0, grow="never"),
    grow("SparseGrow, never grown, average size", SOLO.name, lr=0.02, size="average", pull=8.0, grow="never"),
    grow("SparseGrow, never grown, final size", SOLO.name, lr=0.02, pull=8.0, grow="never"),
    *(replace(arm, lr=0.02) for arm in REPLAYING),
    *(grow(f"SparseGrow + ER-ACE {memory}", lr=RATE, memory=memory) for memory in MANY),
    grow(f"{BOTH}, no gate", lr=RATE, memory=500, gate="none"),
    grow(f"{BOTH}, never grown", lr=RATE, memory=500, grow="never"),
    grow(f"{BOTH}, never grown, average size", BOTH, lr=RATE, size="average", memory=500, grow="never"),
    grow(f"{BOTH}, never grown, final size", BOTH, lr=RATE, memory=500, grow="never"),
)
CONV_GATES = ((0.5, 0.1), (2.0, 0.1), (2.0, 0.5), (15.0, 0.5))
CONV_GRID = (
    *grid("naive", "naive", {}),
    *grid("naive", "joint", {"keep": "data"}),
    *grid("laplace", "Laplace {strength:g}", *({"strength": s, "gate": 0.0} for s in (0.1, 0.5, 2.0))),
    *grid("laplace", "Laplace, gate 2, {strength:g}", *({"strength": s, "gate": 2.0} for s in (0.1, 0.5, 2.0))),
    *grid("ncl", "NCL {strength:g}, {pull:g}", *({"strength": s, "pull": 0.1} for s in (1.0, 5.0, 25.0))),
    *grid("gpm", "GPM {energy:g}", *({"energy": e, "first_energy": f} for e, f in ENERGIES)),
    *grid("ewc", "EWC {strength:g}", *({"strength": s} for s in (10.0, 100.0, 1000.0))),
    *grid("lwf", "LwF {strength:g}", *({"strength": s} for s in (0.3, 1.0, 3.0))),
    *grid("replay", "ER", {"memory": 500}),
    *grid("replay", "DER++ {logit_weight:g}", *({"memory": 500, "logit_weight": w} for w in (0.2, 0.5, 1.0))),
    *grid(
        "sparsegrow",
        "SparseGrow {strength:g}, {pull:g}",
        *({"multiple": 1, "strength": s, "pull": q} for s, q in CONV_GATES),
    ),
)
# Split CIFAR-10: strengths and rates by a grid of its own.
CONV: dict[str, Any] = {"lr": 0.02, "multiple": 1, "pull": 0.5}
CONVS = (
    grow("SparseGrow", **CONV),
    replace(LAPLACE, settings={"strength": 2.0, "gate": 0.0}, lr=0.02),
    GATED,
    replace(NCL, settings={"strength": 1.0}, lr=0.02),
    replace(GPM, lr=0.01),
    replace(EWC, settings={"strength": 1000.0}, lr=RATE),
    replace(LWF, lr=RATE),
    Arm("ER, 500 examples kept", "replay", {"memory": 500}),
    replace(DER, settings={"memory": 500, "logit_weight": 1.0}),
    Arm("DER++, as many bytes", "replay", {"memory": 95, "logit_weight": 1.0}),
    JOINT,
    replace(NAIVE, lr=0.1),
    replace(FROZEN, lr=RATE),
    grow("SparseGrow, never grown", **CONV, grow="never"),
    grow("SparseGrow, never grown, average size", "SparseGrow", **CONV, size="average", grow="never"),
    grow("SparseGrow, never grown, final size", "SparseGrow", **CONV, grow="never"),
    replace(LAPLACE, name="Laplace, final size", like="SparseGrow", settings={"strength": 2.0, "gate": 0.0}, lr=0.02),
)


def growing(start: int, final: int, tasks: int = 10) -> tuple[Arm, ...]:
    """Laplace that grows from a small network, beside fixed ones of its first, average and final size, at one rate."""
    share = (final - start) / (tasks - 1) / start
    small = {**GATED.settings, "grow": "start", "width": share, "cap": 99.0}
    grown = Arm(f"grown from {start}", "laplace", small, lr=RATE, width=start)
    fixed = replace(grown, settings=GATED.settings, like=grown.name)
    return (
        grown,
        replace(grown, name=f"grown from {start}, at random", settings={**small, "directions": "random"}),
        replace(grown, name=f"grown from {start}, late", settings={**small, "grow": "late"}),
        replace(fixed, name=f"{start} units", like=""),
        replace(fixed, name=f"average size, from {start}", size="average"),
        replace(fixed, name=f"final size, from {start}"),
        replace(fixed, name=f"joint, final size, from {start}", method="naive", settings={"keep": "data"}),
    )


EPOCHS = tuple(
    replace(arm, name=f"{arm.name}, {epochs} epochs", epochs=epochs)
    for epochs in (5, 20, 80)
    for arm in (OWN, CONTROLS[0], LAPLACE, GATED)
)
LIKE_GPM: dict[str, Any] = {"lr": 0.01, "batch": 10, "momentum": 0.0, "bias": False}
ONE_PASS: dict[str, Any] = {"epochs": 1, "batch": 128}
LIKE_MAMMOTH = tuple(
    Arm(f"DER++ {n}", "replay", {"memory": n, "logit_weight": a, "label_weight": b}, lr=lr, momentum=0.0, **ONE_PASS)
    for n, a, b, lr in ((200, 1.0, 1.0, 0.1), (500, 1.0, 0.5, 0.2), (5120, 0.5, 1.0, 0.2))
)
GROWTH = (*growing(20, 74), *growing(40, 76))
FIFTY = tuple(arm for arm in growing(40, 138, tasks=50) if not arm.name.endswith(("at random", "late")))


TABLES: dict[str, tuple[tuple[str, ...], tuple[Arm, ...]]] = {
    "grid": (("permuted:fashion-train:10", "rotated:fashion-train:10"), GRID),
    "grid-classes": (("split:fashion-train:5",), FEW_CLASSES),
    "main": (("permuted:fashion:10", "rotated:fashion:10"), (OWN, *PEERS, *CONTROLS, *UNTUNED)),
    "long": (("permuted:fashion:20", "rotated:fashion:20"), (OWN, *PEERS, *CONTROLS[:3], CONTROLS[-1])),
    "epochs": (("rotated:fashion:5",), EPOCHS),
    "ablation": (("permuted:fashion:10", "rotated:fashion:10"), (OWN, *ABLATIONS)),
    "growth": (("permuted:fashion:10", "rotated:fashion:10"), GROWTH),
    "fifty": (("permuted:fashion:50", "rotated:fashion:50"), FIFTY),
    "classes": (("split:fashion:5",), BUFFERS),
    "told": (("told:fashion:5",), (OWN, *PEERS, *UNTUNED)),
    "grid-conv": (("domains:cifar-train:5",), CONV_GRID),
    "conv": (("domains:cifar:5",), CONVS),
    "shift": (("digits:mnist:3",), (OWN, *PEERS, *CONTROLS, *UNTUNED)),
    "gpm": (("permuted:mnist-normalised:10",), tuple(replace(arm, **LIKE_GPM) for arm in (GPM, GATED))),
    "mammoth": (("permuted:mnist:20",), (*LIKE_MAMMOTH, *(replace(arm, **ONE_PASS) for arm in (GATED, NAIVE)))),
}


def stream(spec: str, folders: Namespace, seed: int) -> list[Task]:
    """The tasks of ``kind:data:n``; images, and what is done to them, are drawn anew for each seed."""
    kind, data, n = spec.split(":")
    data, _, how = data.partition("-")
    training_alone = how == "train"
    if (folder := getattr(folders, data)) is None:
        raise SystemExit(f"--{data} FOLDER is needed: where the files of {data} are")
    if data == "cifar":
        load: Callable[..., Task] = partial(load_image_folder, folder, data)
    else:
        load = partial(
            sample_task, normalise(load_idx(folder, data)) if how == "normalised" else load_idx(folder, data)
        )
    tasks = int(n) if kind == "domains" else 1  # images are counted per task
    train, test = tasks * folders.train, tasks * folders.test
    if training_alone:  # validation images, which no reported table tests on
        every = load(train + test, 1, seed)
        first, rest = torch.arange(len(every.train)).split([train, test])
        base = replace(every, train=every.train.take(first), test=every.train.take(rest))
    else:
        base = load(train, test, seed)
    if kind == "domains":
        return split_by_classes(base, int(n), relabel=True)
    if kind == "digits":
        return resize_tasks([base, load_digits(), over_photographs(load_idx(folder, data), folders, seed)])
    if kind == "permuted":
        return permuted_tasks(base, int(n), seed)
    return rotated_tasks(base, int(n)) if kind == "rotated" else split_by_classes(base, int(n))


def normalise(digits: Task) -> Task:
    """Digits of mean 0 and standard deviation 1, by the figures of MNIST that are usual."""
    halves = [Examples((part.inputs - 0.1307) / 0.3081, part.labels) for part in (digits.train, digits.test)]
    return replace(digits, train=halves[0], test=halves[1])


def over_photographs(digits: Task, folders: Namespace, seed: int) -> Task:
    """Other digits than those of the first task, each over a photograph of its own: |photograph − digit|."""
    if folders.cifar is None:
        raise SystemExit("--cifar FOLDER is needed: photographs to lay digits over")
    # The first task has the first ones of the same order.
    base = sample_task(digits, 2 * folders.train, 2 * folders.test, seed)
    halves = [(base.train, folders.train), (base.test, folders.test)]
    base = Task("", *(Examples(part.inputs[n:], part.labels[n:]) for part, n in halves), base.classes)
    photographs = load_image_folder(folders.cifar, "photographs", len(base.train), len(base.test), seed)
    found = []
    for part, photo in ((base.train, photographs.train), (base.test, photographs.test)):
        found.append(Examples((photo.inputs[:, :, 2:30, 2:30] - part.inputs).abs(), part.labels))
    return Task("over photographs", found[0], found[1], base.classes)


def network(tasks: list[Task], seed: int, parameters: int = 0, start: int = WIDTH, *, conv: bool = False) -> nn.Module:
    """The network of a stream, as wide as usual, or just as wide that it has at least so many parameters."""
    shape, classes = tuple(tasks[0].train.inputs.shape[1:]), 1 + max(c for task in tasks for c in task.classes)
    for width in count(0):
        name = f"resnet-gn:{CHANNELS + 2 * width}-3" if conv else f"mlp:{start + width}-{start + width}"
        model, _ = small(name, shape, classes, seed)
        if sum(p.numel() for p in model.parameters()) >= parameters:
            return model.to(memory_format=torch.channels_last) if conv else model  # a third faster
    raise AssertionError


def measured(arm: Arm, tasks: list[Task], spec: str, seed: int, parameters: int) -> dict[str, Any]:
    """One run: what is read from its matrix, and what it cost."""
    scenario = {"split": "class", "told": "task"}.get(spec.partition(":")[0], "domain")
    first = arm.width or WIDTH
    model = network(tasks, seed, parameters if arm.like else 0, first, conv=spec.startswith("domains"))
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not arm.bias:
            layer.bias = None
    axes = trace(model, tasks[0].train.inputs[:2])
    learner = LEARNERS[arm.method].create(arm.method, arm.settings)
    try:
        lengths: dict[str, Any] = {"epochs": arm.epochs, "batch_size": arm.batch}
        if not arm.momentum:
            lengths["build_optimizer"] = partial(torch.optim.SGD, lr=arm.lr)
        schedule = TaskSchedule(scenario=scenario, seed=seed, lr=arm.lr, **lengths)
        state = learn(model, axes, tasks, learner, schedule).state
    except ValueError as error:
        return {"failed": str(error)[:200]}
    matrix = accuracy_matrix(state)
    found = {
        "accuracy": matrix.average,
        "along": matrix.average_along,
        "backward": matrix.backward_transfer,
        "forward": matrix.forward_transfer,
        "learning": matrix.learning,
        "forgetting": matrix.forgetting,
        "last": state.rows[-1],
        "shock": max((abs(event["shock"]) for event in state.events), default=0.0),
        "parameters": state.sizes[-1]["parameters"],
        "average": fmean(size["parameters"] for size in state.sizes),
        "remembered": state.sizes[-1]["remembered"],
        "training_macs": sum(3 * size["macs"] * arm.epochs * len(tasks[0].train) for size in state.sizes),
        "nonzero": state.sizes[-1]["nonzero"],
        "seconds": sum(size["seconds"] for size in state.sizes),
    }
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}


def run(args: Namespace) -> None:
    """Everything of a table that is not there yet, seed by seed."""
    streams, arms = TABLES[args.table]
    for seed, spec in product(range(args.first, args.seeds), streams):
        tasks = None
        for arm in arms:
            here = [row for row in rows(args.out) if (row["stream"], row["seed"]) == (spec, seed)]
            there = {one.name: row for one in arms for row in here if one.told.items() <= row.items()}
            if arm.name in there or args.match not in arm.name:
                continue
            tasks = tasks or stream(spec, args, seed)
            if arm.like and arm.size not in there.get(arm.like, {}):
                print(f"{spec} seed {seed} {arm.name}: waits for the size of {arm.like}", flush=True)
                continue
            found = measured(arm, tasks, spec, seed, there.get(arm.like, {}).get(arm.size, 0))
            add(args.out, {"stream": spec, "seed": seed, **arm.told, **found})
            print(f"{spec} seed {seed} {arm.name}: {found.get('accuracy', found)}", flush=True)


def shown(args: Namespace) -> Iterator[str]:
    """The table in Markdown, a block per stream; differences are to the arm of ``--against``."""
    streams, arms = TABLES[args.table]
    for spec in streams:
        own = [row for row in rows(args.out) if row["stream"] == spec]
        own = [row for row in own if any(arm.told.items() <= row.items() for arm in arms)]
        yield f"\n{spec}, seeds {', '.join(map(str, sorted({row['seed'] for row in own})))}\n"
        yield from table(HEAD, lines(own, arms, args.against))


def shown_grid(args: Namespace) -> Iterator[str]:
    """A grid: final average accuracy on each of its streams, a column per rate; the best mean of each kind is bold."""
    streams, arms = TABLES[args.table]
    found = {(row["arm"], row["stream"]): 100 * row.get("accuracy", 0.0) for row in rows(args.out)}
    whole = [arm for arm in arms if all((arm.name, spec) in found for spec in streams)]
    means = {arm.name: fmean(found[arm.name, spec] for spec in streams) for arm in whole}
    best = {max((means[arm.name], arm.name) for arm in whole if family(arm) == kind)[1] for kind in map(family, whole)}
    yield f"\n{' and '.join(streams)}, seed {args.first}\n"
    body = []
    done = {arm.name.rpartition(", ")[0] for arm in whole}
    for name in dict.fromkeys(name for arm in arms if (name := arm.name.rpartition(", ")[0]) in done):
        texts = []
        for lr in RATES:
            pair = [found.get((f"{name}, {lr:g}", spec)) for spec in streams]
            text = " / ".join("–" if value is None else f"{value:.1f}" if value else "diverged" for value in pair)
            texts.append(f"**{text}**" if f"{name}, {lr:g}" in best else text)
        body.append([name, *texts])
    yield from table(("", *(f"rate {lr:g}" for lr in RATES)), body)


def family(arm: Arm) -> str:
    """What one choice of settings and rate is made for."""
    kept = {key: value for key, value in arm.settings.items() if key in ("keep", "gate", "memory", "asymmetric_loss")}
    return f"{arm.method} {kept} {'logit_weight' in arm.settings}"


def lines(own: list[Row], arms: Iterable[Arm], against: str) -> Iterator[list[str]]:
    """A line per arm that has rows."""
    whole = {row["seed"]: row for row in own if row["arm"] == against and "accuracy" in row}
    for arm in arms:
        done = sorted((row for row in own if row["arm"] == arm.name), key=lambda row: row["seed"])
        fine = [row for row in done if "accuracy" in row]
        if done and not fine:
            yield [arm.name, f"all {len(done)} diverged", *[""] * (len(HEAD) - 2)]
        if not fine:
            continue
        both = [(row["accuracy"], whole[row["seed"]]["accuracy"]) for row in fine if row["seed"] in whole]
        some = f" ({len(fine)} of {len(done)} runs; the others diverged)" if len(fine) < len(done) else ""
        yield [
            arm.name + some,
            spread([row["accuracy"] for row in fine]),
            difference(both) if arm.name != against else "",
            *(spread([row[key] for row in fine]) for key in ("forgetting", "learning")),
            f"{fmean(row['parameters'] for row in fine):,.0f}",
            *(
                mean_of(fine, key, scale)
                for key, scale in (("average", 1), ("remembered", 1e6), ("training_macs", 1e12))
            ),
            f"{fmean(row['seconds'] for row in fine):,.0f}",
        ]


def mean_of(fine: list[Row], key: str, scale: float) -> str:
    """The mean of a figure that earlier rows do not have."""
    if any(key not in row for row in fine):
        return "–"
    mean = fmean(row[key] for row in fine) / scale
    return f"{mean:,.0f}" if scale == 1 else f"{mean:.2f}"


def main() -> None:
    """Run what is missing, or show what is there."""
    paths = {"mnist": Path, "fashion": Path, "cifar": Path}
    sizes = {"seeds": 5, "first": 0, "train": 5000, "test": 2000}
    args = arguments(__doc__, OUT, {"table": TABLES}, **paths, **sizes, match="", against=OWN.name)
    torch.set_num_threads(1)
    if args.show:
        print("\n".join(shown_grid(args) if args.table.startswith("grid") else shown(args)))
    else:
        run(args)


if __name__ == "__main__":
    main()
