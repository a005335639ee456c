"""SparseGrow (reconstructed) beside other learners, one task after the other: same stream, network, steps and seeds.

    python recipes/sparsegrow_tables.py tune --mnist FOLDER
    python recipes/sparsegrow_tables.py main --fashion FOLDER --seeds 5
    python recipes/sparsegrow_tables.py conv --cifar PICTURES --seeds 3
    python recipes/sparsegrow_tables.py shift --mnist FOLDER --cifar PICTURES --seeds 5
    python recipes/sparsegrow_tables.py main --show

FOLDER has MNIST's four files (``train-images-idx3-ubyte`` …, or ``.gz``), PICTURES has CIFAR-10 as
``train/CLASS/…`` and ``test/CLASS/…``. A row is written when it is whole; rows that are there are not run again, so the
same command goes on where it was stopped.
The baselines' strengths were chosen by ``tune`` (SI's 3.0 diverges on Fashion-MNIST, so 1.0), SparseGrow's defaults
by looks at permuted and rotated MNIST (seeds 0 and 1), what it does with a memory by looks at split MNIST, of which
``relief`` holds the most telling; every other table of the MLP is Fashion-MNIST, which no number of its settings was
chosen on (that its gate needs damping was seen there). 5,000 images per task, 5 epochs, batches of 64, SGD with
momentum 0.9 and rate 0.01, two hidden layers of 100; no task is named when it is evaluated, but in ``told``.
``classes``, ``told`` and ``relief`` split 5,000 images into five tasks; ``conv`` has 5,000 in each of its five, of two
classes that every task calls 0 and 1, and a residual network with GroupNorm; its strengths were chosen by
``tune-conv --test 1000``: pairs of CIFAR-10's classes drawn anew, and training images alone, to test on too. ``shift``
is a natural change of domain, ten digits each: MNIST, the UCI digits of other writers at lower resolution
(scikit-learn's, 1,347 to learn from), and MNIST over photographs, |photograph − digit| in grey, as MNIST-M (Ganin et
al., JMLR 2016) is made.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rows import add, difference, head, line, rows, spread
from torch import nn

from regrow.core.tasks import Examples, Task
from regrow.data.streams import alike, digits_task, fewer, idx, permuted_tasks, pictures, rotated_tasks, split
from regrow.methods import LEARNERS
from regrow.nets.vision import small
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, accuracy_matrix, learn

OUT = Path(__file__).parent / "results" / "sparsegrow.jsonl"
HEAD = ("", "final average accuracy, %", "difference, paired", "forgetting", "learning accuracy", "parameters", "s")
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
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    like: str = ""
    lr: float = 0.01

    @property
    def told(self) -> dict[str, Any]:
        """What a row says of how it was made: one that was made otherwise is none of this arm's."""
        return {"arm": self.name, "method": self.method, "settings": self.settings, "lr": self.lr}


OWN = Arm("SparseGrow", "sparsegrow")
BASELINES = (
    Arm("naive", "naive"),
    Arm("frozen after task 1", "naive", {"keep": "network"}),
    Arm("EWC", "ewc", {"strength": 10.0}),
    Arm("SI", "si", {"strength": 1.0}),
    Arm("LwF", "lwf"),
    Arm("PackNet, task not named", "packnet", {"prune": 0.8}),
    Arm("WSN, task not named", "wsn", {"share": 0.8}),
    Arm("PackNet, task named", "packnet", {"prune": 0.8, "use_task_id": True}),
    Arm("WSN, task named", "wsn", {"share": 0.8, "use_task_id": True}),
    Arm("AdaptCL", "sparsegrow", {"grow": "never", "gate": "hard", "threshold": "adaptcl", "alpha": 1e-3}),
    Arm("AdaptCL, penalty 1e-4", "sparsegrow", {"grow": "never", "gate": "hard", "threshold": "adaptcl"}),
)
CONTROLS = (
    Arm("SparseGrow, never grown", "sparsegrow", {"grow": "never"}),
    Arm("SparseGrow, never grown, final size", "sparsegrow", {"grow": "never"}, like="SparseGrow"),
    Arm("EWC, final size", "ewc", {"strength": 10.0}, like="SparseGrow"),
    Arm("naive, final size", "naive", like="SparseGrow"),
)
BOUNDS = (
    Arm("ER, 500 examples kept", "replay", {"memory": 500}),
    Arm("DER++, 500 examples kept", "replay", {"memory": 500, "logit_weight": 0.5}),
    Arm("joint: all examples kept", "naive", {"keep": "data"}),
)
ABLATIONS = (
    Arm("new units not silent", "sparsegrow", {"project_new_units": False}),
    Arm("new units not fitted to data", "sparsegrow", {"fit": False}),
    Arm("new units dense", "sparsegrow", {"density": 1.0}),
    Arm("grown at the start of a task", "sparsegrow", {"late_phase": 1.0}),
    Arm("no thresholds", "sparsegrow", {"threshold": "none"}),
    Arm("thresholds as in AdaptCL", "sparsegrow", {"threshold": "adaptcl"}),
    Arm("alpha 5e-4", "sparsegrow", {"alpha": 5e-4}),
    Arm("gate hard", "sparsegrow", {"gate": "hard"}),
    Arm("no gate", "sparsegrow", {"gate": "none"}),
    Arm("no damping", "sparsegrow", {"damping": 0.0}),
    Arm("strength 20, no damping", "sparsegrow", {"strength": 20.0, "damping": 0.0}),
    Arm("strength 5", "sparsegrow", {"strength": 5.0}),
    *(Arm(f"strength {s:g}", "sparsegrow", {"strength": s}) for s in (20.0, 30.0, 80.0)),
    Arm("gate at every step", "sparsegrow", {"every": 1}),
    Arm("gate every 16 steps", "sparsegrow", {"every": 16}),
    Arm("grown where short (0.7)", "sparsegrow", {"grow": "short", "min_free": 0.7}),
    Arm("half the rate", "sparsegrow", lr=0.005),
    Arm("twice the rate", "sparsegrow", lr=0.02),
)
TUNED = (
    *(
        Arm(f"SparseGrow {s:g}, damping {d:g}", "sparsegrow", {"strength": s, "damping": d})
        for s, d in ((20.0, 0.0), (20.0, 0.03), (20.0, 0.1), (15.0, 0.1), (10.0, 0.1))
    ),
    *(Arm(f"EWC {s:g}", "ewc", {"strength": s}) for s in (5.0, 10.0, 20.0, 30.0)),
    *(Arm(f"SI {s:g}", "si", {"strength": s}) for s in (0.1, 0.3, 1.0, 3.0)),
    *(Arm(f"LwF {s:g}", "lwf", {"strength": s}) for s in (0.3, 1.0, 3.0)),
    *(
        Arm(f"AdaptCL {a:g}", "sparsegrow", {"grow": "never", "gate": "hard", "threshold": "adaptcl", "alpha": a})
        for a in (1e-5, 1e-4, 1e-3, 5e-3, 2e-2)
    ),
    *(Arm(f"PackNet {s:g}", "packnet", {"prune": s}) for s in (0.5, 0.8, 0.9)),
    *(Arm(f"WSN {s:g}", "wsn", {"share": s}) for s in (0.1, 0.5, 0.8)),
)
_BOTH = "SparseGrow + ER-ACE 500, relieved"
_WITHOUT: dict[str, dict[str, Any]] = {"no gate": {"gate": "none"}, "never grown": {"grow": "never"}}
BUFFERS = (
    Arm("naive", "naive"),
    Arm("SparseGrow", "sparsegrow"),
    *(Arm(f"ER {n}", "replay", {"memory": n}) for n in (200, 500)),
    *(Arm(f"DER++ {n}", "replay", {"memory": n, "logit_weight": 0.5}) for n in (200, 500)),
    *(Arm(f"ER-ACE {n}", "replay", {"memory": n, "asymmetric_loss": True}) for n in (200, 500)),
    *(
        Arm(f"SparseGrow + ER {n}", "sparsegrow", {"memory": n, "strength_factor": 1.0, "asymmetric_loss": False})
        for n in (200, 500)
    ),
    *(Arm(f"SparseGrow + ER {n}, relieved", "sparsegrow", {"memory": n, "asymmetric_loss": False}) for n in (200, 500)),
    *(Arm(f"SparseGrow + ER-ACE {n}, relieved", "sparsegrow", {"memory": n}) for n in (200, 500)),
    *(Arm(f"ER {n}, final size", "replay", {"memory": n}, like="SparseGrow") for n in (200, 500)),
    *(
        Arm(f"ER-ACE {n}, final size", "replay", {"memory": n, "asymmetric_loss": True}, like="SparseGrow")
        for n in (200, 500)
    ),
    Arm("joint: all examples kept", "naive", {"keep": "data"}),
    *(Arm(f"{_BOTH}, {what}", "sparsegrow", {"memory": 500} | given) for what, given in _WITHOUT.items()),
    Arm(f"{_BOTH}, never grown, final size", "sparsegrow", {"memory": 500, "grow": "never"}, like="SparseGrow"),
)
RELIEVED = (
    *(Arm(f"ER {n}", "replay", {"memory": n}) for n in (200, 500)),
    *(Arm(f"ER-ACE {n}", "replay", {"memory": n, "asymmetric_loss": True}) for n in (200, 500)),
    *(
        Arm(f"SparseGrow + ER-ACE {n}, relief {r:g}", "sparsegrow", {"memory": n, "strength_factor": r})
        for n in (200, 500)
        for r in (1.0, 0.25, 0.05, 0.01, 0.0025)
    ),
    *(
        Arm(f"SparseGrow + ER {n}, relief 0.01", "sparsegrow", {"memory": n, "asymmetric_loss": False})
        for n in (200, 500)
    ),
)
CONV: dict[str, Any] = {"multiple": 1, "strength": 60.0}
CONVS = (
    Arm("SparseGrow", "sparsegrow", CONV),
    Arm("naive", "naive"),
    Arm("EWC", "ewc", {"strength": 30.0}),
    Arm("SI", "si", {"strength": 0.1}),
    Arm("LwF", "lwf"),
    Arm("SparseGrow, never grown", "sparsegrow", CONV | {"grow": "never"}),
    Arm("SparseGrow, never grown, final size", "sparsegrow", CONV | {"grow": "never"}, like="SparseGrow"),
    Arm("ER, 500 examples kept", "replay", {"memory": 500}),
    Arm("frozen after task 1", "naive", {"keep": "network"}),
    Arm("joint: all examples kept", "naive", {"keep": "data"}),
)
OTHERS = (
    Arm("SparseGrow, strength 80, no damping", "sparsegrow", CONV | {"strength": 80.0, "damping": 0.0}),
    Arm("SparseGrow, strength as for the MLP", "sparsegrow", {"multiple": 1}),
    *(Arm(f"EWC, strength {s:g}", "ewc", {"strength": s}) for s in (1.0, 3.0, 10.0)),
    *(Arm(f"SI, strength {s:g}", "si", {"strength": s}) for s in (1.0, 3.0, 10.0)),
    Arm("LwF, strength 3", "lwf", {"strength": 3.0}),
)
CHOSEN = (
    *(
        Arm(f"SparseGrow {s:g}, damping {d:g}", "sparsegrow", {"multiple": 1, "strength": s, "damping": d})
        for s, d in ((15.0, 0.1), (60.0, 0.1), (20.0, 0.0), (80.0, 0.0), (320.0, 0.0))
    ),
    *(
        Arm(
            f"SparseGrow 80, damping 0, loud {x:g}",
            "sparsegrow",
            CONV | {"strength": 80.0, "damping": 0.0, "group_norm_damping": x},
        )
        for x in (0.0, 1.0)
    ),
    *(Arm(f"EWC {s:g}", "ewc", {"strength": s}) for s in (1.0, 3.0, 10.0, 30.0, 100.0)),
    *(Arm(f"SI {s:g}", "si", {"strength": s}) for s in (0.03, 0.1, 0.3, 1.0)),
    *(Arm(f"LwF {s:g}", "lwf", {"strength": s}) for s in (0.1, 0.3, 1.0, 3.0)),
    Arm("naive", "naive"),
)
TOLD = tuple(arm for arm in BASELINES if "not named" not in arm.name)
SIX = tuple(arm for arm in (*BASELINES, *CONTROLS) if arm.name in ("naive", "EWC", "SI", "LwF") or arm == CONTROLS[1])

TABLES: dict[str, tuple[tuple[str, ...], tuple[Arm, ...]]] = {
    "tune": (("permuted:mnist:10", "rotated:mnist:10"), TUNED),
    "main": (("permuted:fashion:10", "rotated:fashion:10"), (OWN, *BASELINES, *CONTROLS, *BOUNDS)),
    "long": (("permuted:fashion:20", "rotated:fashion:20"), (OWN, *SIX)),
    "ablation": (("permuted:fashion:10", "rotated:fashion:10"), (OWN, *ABLATIONS)),
    "classes": (("split:fashion:5",), BUFFERS),
    "told": (("told:fashion:5",), (OWN, *TOLD, *CONTROLS[:2], *BOUNDS)),
    "relief": (("split:mnist:5",), RELIEVED),
    "conv": (("domains:cifar:5",), CONVS),
    "conv-others": (("domains:cifar:5",), OTHERS),
    "tune-conv": (("held:cifar:5",), CHOSEN),
    "shift": (("digits:mnist:3",), (OWN, *BASELINES, *CONTROLS, *BOUNDS)),
}


def stream(spec: str, folders: argparse.Namespace, seed: int) -> list[Task]:
    """The tasks of ``kind:data:n``; images, and what is done to them, are drawn anew for each seed."""
    kind, data, n = spec.split(":")
    if (folder := getattr(folders, data)) is None:
        raise SystemExit(f"--{data} FOLDER is needed: where the files of {data} are")
    if kind == "held":
        return held(folder, data, int(n), folders, seed)
    if kind == "domains":
        many = (int(n) * folders.train, int(n) * folders.test, seed)
        base = fewer(idx(folder, data), *many) if data == "fashion" else pictures(folder, data, *many)
        return split(base, int(n), relabel=True)
    base = fewer(idx(folder, data), folders.train, folders.test, seed)
    if kind == "digits":
        return alike([base, digits_task(), over_photographs(idx(folder, data), folders, seed)])
    if kind == "permuted":
        return permuted_tasks(base, int(n), seed)
    return rotated_tasks(base, int(n)) if kind == "rotated" else split(base, int(n))


def held(folder: Path, data: str, n: int, folders: argparse.Namespace, seed: int) -> list[Task]:
    """Pairs of classes as ``domains`` has them, of training pictures alone: other ones to test on, pairs drawn anew."""
    base = pictures(folder, data, n * (folders.train + folders.test), 1, seed).train
    names = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[base.labels]
    halves = [Examples(base.inputs[part], names[part]) for part in torch.arange(len(base)).split(n * folders.train)]
    return split(Task("held", halves[0], halves[1], tuple(range(10))), n, relabel=True)


def over_photographs(digits: Task, folders: argparse.Namespace, seed: int) -> Task:
    """Other digits than those of the first task, each over a photograph of its own: |photograph − digit|."""
    if folders.cifar is None:
        raise SystemExit("--cifar FOLDER is needed: photographs to lay digits over")
    # The first task has the first ones of the same order.
    base = fewer(digits, 2 * folders.train, 2 * folders.test, seed)
    halves = [(base.train, folders.train), (base.test, folders.test)]
    base = Task("", *(Examples(part.inputs[n:], part.labels[n:]) for part, n in halves), base.classes)
    photographs = pictures(folders.cifar, "photographs", len(base.train), len(base.test), seed)
    found = []
    for part, photo in ((base.train, photographs.train), (base.test, photographs.test)):
        found.append(Examples((photo.inputs[:, :, 2:30, 2:30] - part.inputs).abs(), part.labels))
    return Task("over photographs", found[0], found[1], base.classes)


def network(tasks: list[Task], seed: int, parameters: int = 0, *, conv: bool = False) -> nn.Module:
    """The network of a stream, as wide as usual, or just as wide that it has at least so many parameters."""
    shape, classes = tuple(tasks[0].train.inputs.shape[1:]), 1 + max(c for task in tasks for c in task.classes)
    for width in count(0):
        name = f"resnet-gn:{CHANNELS + 2 * width}-3" if conv else f"mlp:{WIDTH + width}-{WIDTH + width}"
        model, _ = small(name, shape, classes, seed)
        if sum(p.numel() for p in model.parameters()) >= parameters:
            return model
    raise AssertionError


def measured(arm: Arm, tasks: list[Task], spec: str, seed: int, parameters: int) -> dict[str, Any]:
    """One run: what is read from its matrix, and what it cost."""
    scenario = {"split": "class", "told": "task"}.get(spec.partition(":")[0], "domain")
    model = network(tasks, seed, parameters if arm.like else 0, conv=spec.startswith(("domains", "held")))
    axes = trace(model, tasks[0].train.inputs[:2])
    learner = LEARNERS[arm.method].made(arm.method, arm.settings)
    try:
        schedule = TaskSchedule(scenario=scenario, seed=seed, lr=arm.lr)
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
        "nonzero": state.sizes[-1]["nonzero"],
        "seconds": sum(size["seconds"] for size in state.sizes),
    }
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}


def run(table: str, args: argparse.Namespace) -> None:
    """Everything of a table that is not there yet, seed by seed."""
    streams, arms = TABLES[table]
    for seed in range(args.first, args.seeds):
        for spec in streams:
            tasks = None
            for arm in arms:
                here = [row for row in rows(args.out) if (row["stream"], row["seed"]) == (spec, seed)]
                there = {one.name: row for one in arms for row in here if one.told.items() <= row.items()}
                if arm.name in there or args.match not in arm.name:
                    continue
                tasks = tasks or stream(spec, args, seed)
                if arm.like and "parameters" not in there.get(arm.like, {}):
                    print(f"{spec} seed {seed} {arm.name}: waits for the size of {arm.like}", flush=True)
                    continue
                size = there.get(arm.like, {}).get("parameters", 0)
                found = measured(arm, tasks, spec, seed, size)
                row = {"stream": spec, "seed": seed, **arm.told, **found, "date": str(date.today())}
                add(args.out, row)
                print(f"{spec} seed {seed} {arm.name}: {found.get('accuracy', found)}", flush=True)


def shown(table: str, path: Path, against: str = OWN.name) -> Iterator[str]:
    """The table in Markdown, a block per stream; differences are to the arm of that name."""
    streams, arms = TABLES[table]
    for spec in streams:
        own = [
            row for row in rows(path) if row["stream"] == spec and any(arm.told.items() <= row.items() for arm in arms)
        ]
        whole = {row["seed"]: row for row in own if row["arm"] == against and "accuracy" in row}
        yield f"\n{spec}, seeds {', '.join(map(str, sorted({row['seed'] for row in own})))}\n"
        yield head(HEAD)
        for arm in arms:
            done = sorted((row for row in own if row["arm"] == arm.name), key=lambda row: row["seed"])
            fine = [row for row in done if "accuracy" in row]
            if not fine:
                if done:
                    yield line([arm.name, f"all {len(done)} diverged", *[""] * (len(HEAD) - 2)])
                continue
            both = [(row["accuracy"], whole[row["seed"]]["accuracy"]) for row in fine if row["seed"] in whole]
            cells = [
                arm.name
                + (f" ({len(fine)} of {len(done)} runs; the others diverged)" if len(fine) < len(done) else ""),
                spread([row["accuracy"] for row in fine]),
                difference(both) if arm.name != against else "",
                spread([row["forgetting"] for row in fine]),
                spread([row["learning"] for row in fine]),
                f"{fmean(row['parameters'] for row in fine):,.0f}",
                f"{fmean(row['seconds'] for row in fine):.0f}",
            ]
            yield line(cells)


def main() -> None:
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the seed to begin with: for a second process")
    parser.add_argument("--train", type=int, default=5000, help="images per task")
    parser.add_argument("--test", type=int, default=2000, help="images per task that are only evaluated on")
    parser.add_argument("--match", default="", help="part of an arm's name")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the table in Markdown")
    parser.add_argument("--against", default=OWN.name, help="the arm that differences are to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.show:
        print("\n".join(shown(args.table, args.out, args.against)))
    else:
        run(args.table, args)


if __name__ == "__main__":
    main()
