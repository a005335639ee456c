"""Does growing make a network forget? Twins from one checkpoint, one left as it is, the others grown, each in its way.

    python recipes/sparsegrow_twins.py --fashion FOLDER --seeds 5
    python recipes/sparsegrow_twins.py --show

SparseGrow (reconstructed) learns tasks up to the epoch before which it would grow in task ``--at``. From there every
twin sees the same batches through the rest of that task and all of the next one. Forgetting through growth is the
accuracy on the tasks before that the twin that did not grow has more: what an instant test cannot show, since most of
these ways of growing change no output at first.

Branches and layers that are added have no Kronecker factors, so under the gate they train without it and rewrite what
old tasks need. Their rows under the gate measure that, not growth; ``--show`` leaves them out.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rows import add, difference, head, line, rows, spread
from torch import Tensor, nn

from regrow.axes import AxisGraph
from regrow.change import Fill
from regrow.data.streams import fewer, idx, permuted, rotated
from regrow.learner import Stand, along, flags
from regrow.methods.continual.sparsegrow import Settings, SparseGrow
from regrow.nets.small import small
from regrow.plan import Plan
from regrow.scoring import memory
from regrow.sources import Batch
from regrow.surgery.align import aligned
from regrow.surgery.fill import newborn, sides
from regrow.tasks import Task
from regrow.tracing import trace
from regrow.training.learning import Course, Schedule, learn

OUT = Path(__file__).parent / "results" / "sparsegrow_twins.jsonl"
WIDTH = 100
BRANCH = 15
"""Units of a lateral branch: as many parameters as two layers that are 16 units wider."""

ONCE = 1.2
"""A cap under which a net is widened once."""


class Loud(SparseGrow):
    """Newborn units are read at once, by drawn weights: widening as it is done without care."""

    def grown(self, at: Stand, plan: Plan) -> None:
        """As without the drawn weights, which come last."""
        unread = sides(at.model, at.axes, newborn(at.model, at.axes, plan))[1]
        super().grown(at, plan)
        for entries in unread:
            whole = at.parameters()[entries.name].detach()
            part = entries.of(whole)
            entries.set(at.model, torch.randn(part.shape, generator=at.drawn(9)) * whole.std())
        self._settle(at)


class Born(SparseGrow):
    """Born as under the gate, also where there is none."""

    def grown(self, at: Stand, plan: Plan) -> None:
        """The gate's memory says what to be silent on."""
        own, self.settings = self.settings, replace(self.settings, gate="kronecker")
        super().grown(at, plan)
        self.settings = own
        self._settle(at)


class Wider(SparseGrow):
    """Newborn units are copies of old ones, which share what reads them: Net2Wider (Chen et al., arXiv 1511.05641)."""

    def plan(self, at: Stand) -> Plan | None:
        """As it would, with another birth."""
        plan = super().plan(at)
        many = {key: change.grow for key, change in plan.changes.items()} if plan else {}
        return Plan.growing(at.axes, many, Fill("split", seed=self.settings.seed)) if many else None

    def grown(self, at: Stand, plan: Plan) -> None:
        """They are as they are."""
        memory.born(at, self.tensors)
        self._settle(at)


class Max(SparseGrow):
    """Newborn units are turned to where the loss would learn most: GradMax (Evci et al., arXiv 2201.05125)."""

    def grown(self, at: Stand, plan: Plan) -> None:
        """Nothing reads them yet."""
        batches = [Batch((one.inputs,), labels=one.labels) for one in at.task.train.batches(256)]
        aligned(at.model, at.axes, plan, batches[:4])
        memory.born(at, self.tensors)
        self._settle(at)


class Lateral(nn.Module):
    """A layer and a drawn branch beside it, added up."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.old = old
        self.branch = nn.Sequential(nn.Linear(old.in_features, BRANCH), nn.ReLU(), nn.Linear(BRANCH, old.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in]`` → ``[N, out]``."""
        return self.old(x) + self.branch(x)


def lateral(model: nn.Sequential) -> tuple[nn.Sequential, Callable[[str], str]]:
    """A branch beside both hidden layers."""
    found = nn.Sequential(
        *(Lateral(layer) if i in (1, 3) and isinstance(layer, nn.Linear) else layer for i, layer in enumerate(model))
    )
    return found, lambda name: name.replace("1.", "1.old.").replace("3.", "3.old.")


def deeper(identity: bool) -> Callable[[nn.Sequential], tuple[nn.Sequential, Callable[[str], str]]]:
    """One more hidden layer before the last: one that changes nothing, or a drawn one."""

    def grow(model: nn.Sequential) -> tuple[nn.Sequential, Callable[[str], str]]:
        new = nn.Linear(WIDTH, WIDTH)
        if identity:
            with torch.no_grad():
                new.weight.copy_(torch.eye(WIDTH))
                new.bias.zero_()
        *before, head = model
        return nn.Sequential(*before, new, nn.ReLU(), head), lambda name: name.replace("5.", "7.")

    return grow


def still(axes: AxisGraph, learner: SparseGrow, settings: Settings, kind: type[SparseGrow] = SparseGrow) -> SparseGrow:
    """The learner's copy with other settings."""
    return kind(copy.deepcopy(learner.tensors), copy.deepcopy(learner.values), settings=settings)


WIDE: dict[str, tuple[Settings, type[SparseGrow]]] = {
    "not grown": (Settings(grow="never"), SparseGrow),
    "layer expansion, SparseGrow": (Settings(cap=ONCE), Born),
    "layer expansion, not silent": (Settings(silent=False, cap=ONCE), SparseGrow),
    "layer expansion, Net2Wider": (Settings(cap=ONCE), Wider),
    "layer expansion, GradMax": (Settings(cap=ONCE), Max),
    "layer expansion, drawn and read at once": (Settings(silent=False, density=1.0, cap=ONCE), Loud),
}
OTHER: dict[str, Callable[[nn.Sequential], tuple[nn.Sequential, Callable[[str], str]]]] = {
    "lateral branches": lateral,
    "in depth, identity at birth": deeper(identity=True),
    "in depth, drawn": deeper(identity=False),
}


def reshaped(
    twin: str, model: nn.Module, learner: SparseGrow, course: Course, tasks: list[Task]
) -> tuple[nn.Module, AxisGraph, SparseGrow, Course]:
    """A twin that has grown otherwise than in width; what learner and optimiser remember goes by the new names."""
    assert isinstance(model, nn.Sequential)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(learner.settings.seed)
        model, renamed = OTHER[twin](model)
    axes = trace(model, tasks[0].train.inputs[:2])
    at, other = Stand(model, axes, tasks[course.number]), still(axes, learner, Settings(grow="never"))
    other.tensors = {" ".join((kind, renamed(name))): one for kind, _, name, one in _split(other.tensors)}
    for name in at.parameters():
        other.tensors.setdefault(f"owned {name}", flags(at, name))
    for name in at.weights:
        fresh = along(at, name, torch.zeros(len(at.parameters()[name])))
        other.tensors.setdefault(f"threshold {name}", type(fresh)(fresh.values, fresh.dims[:1], learner.settings.lr))
    course.moments = {
        (f"learner {' '.join((kind.split()[-1], renamed(name)))}" if kind else renamed(name)): one
        for kind, _, name, one in ((*key.rpartition(" "), one) for key, one in course.moments.items())
    }
    return model, axes, other, course


def _split(tensors: dict[str, Any]) -> list[tuple[str, str, str, Any]]:
    return [(*key.partition(" "), one) for key, one in tensors.items()]


def twins(tasks: list[Task], at: int, seed: int, gate: str) -> list[dict[str, Any]]:
    """A row per twin."""
    model, _ = small(f"mlp:{WIDTH}-{WIDTH}", tasks[0].train.inputs.shape[1:], 10, seed)
    axes, learner = trace(model, tasks[0].train.inputs[:2]), SparseGrow(settings=Settings(grow="never", seed=seed))
    schedule, held = Schedule(seed=seed), []
    late = schedule.epochs - max(1, round(learner.settings.late * schedule.epochs))

    class EnoughError(Exception):
        """It stands where it would grow."""

    def look(course: Course, axes: AxisGraph) -> None:
        if (course.number, course.epoch) == (at, late):
            held.append((copy.deepcopy(model), axes, still(axes, learner, learner.settings), copy.deepcopy(course)))
            raise EnoughError

    tasks = tasks[: at + 2]
    with contextlib.suppress(EnoughError):
        learn(model, axes, tasks, learner, schedule, on_epoch=look)
    (start,) = held
    found = []
    for twin in (*WIDE, *OTHER):
        own, axes, first, course = start[0], start[1], start[2], copy.deepcopy(start[3])
        own = copy.deepcopy(own)
        if twin in WIDE:
            settings, kind = WIDE[twin]
            mine = still(axes, first, replace(settings, gate=gate), kind)
        else:
            own, axes, mine, course = reshaped(twin, own, first, course, tasks)
            mine.settings = replace(mine.settings, gate=gate)
        _, course = learn(own, axes, tasks, mine, schedule, course=course)
        matrix = course.rows
        found.append(
            {
                "twin": twin,
                "old_then": fmean(matrix[at][:at]),
                "old_later": fmean(matrix[at + 1][:at]),
                "task": matrix[at][at],
                "next": matrix[at + 1][at + 1],
                "parameters": sum(p.numel() for p in own.parameters()),
            }
        )
    return found


def main() -> None:
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--at", type=int, default=5, help="the task, from 0, in which twins part")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    there = rows(args.out)
    if args.show:
        print("\n".join(shown(there)))
        return
    if args.fashion is None:
        parser.error("--fashion FOLDER: where MNIST's four files of Fashion-MNIST are")
    for seed in range(args.seeds):
        for kind, gate in product(("permuted", "rotated"), ("kronecker", "none")):
            told = {"stream": kind, "gate": gate, "seed": seed, "at": args.at}
            if any(told.items() <= row.items() for row in there):
                continue
            base = fewer(idx(args.fashion, "fashion"), 5000, 2000, seed)
            tasks = permuted(base, 10, seed) if kind == "permuted" else rotated(base, 10)
            for row in twins(tasks, args.at, seed, gate):
                add(args.out, told | row | {"date": str(date.today())})
                print(row, flush=True)


def shown(there: list[dict[str, Any]]) -> Iterator[str]:
    """The tables in Markdown: points of accuracy on the tasks before that the twin which did not grow has more."""
    for kind, gate in product(("permuted", "rotated"), ("kronecker", "none")):
        own = [row for row in there if (row["stream"], row["gate"]) == (kind, gate)]
        rest = {row["seed"]: row for row in own if row["twin"] == "not grown"}
        yield f"\n{kind}, {'under the gate' if gate != 'none' else 'without a gate'}, {len(rest)} seeds\n"
        names = ("twin", "lost on old tasks, end of the task", "lost, end of the next", "paired")
        yield head([*names, "accuracy, the task", "accuracy, the next", "parameters"])
        for twin in dict.fromkeys(row["twin"] for row in own):
            if gate != "none" and twin in OTHER:
                continue
            mine = [row for row in own if row["twin"] == twin]
            gaps = [[rest[row["seed"]][key] - row[key] for row in mine] for key in ("old_then", "old_later")]
            pairs = [(rest[row["seed"]]["old_later"], row["old_later"]) for row in mine]
            told = difference(pairs).partition(" ")[2] if twin != "not grown" else ""
            learned = [[row[key] for row in mine] for key in ("task", "next")]
            parameters = f"{fmean(row['parameters'] for row in mine):,.0f}"
            yield line([twin, *map(spread, gaps), told.strip("()"), *map(spread, learned), parameters])


if __name__ == "__main__":
    main()
