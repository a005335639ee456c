"""What a step of SparseGrow takes beside a plain one, at equal width, in a task after the first.

    python benchmarks/learning.py

Plain training and SparseGrow (not grown) learn two short tasks of drawn numbers in turns; per step of the second task,
median of the repeats, as a ratio to plain training in the same run.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from regrow.core.tasks import Examples, Task
from regrow.methods import LEARNERS
from regrow.nets.small import small
from regrow.store.versions import versions
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions

NETS = {"mlp:100-100": ((1, 28, 28), 256), "resnet:16-3": ((3, 32, 32), 64)}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("naive", {}),
    "sparsegrow": ("sparsegrow", {"grow": "never"}),
    "sparsegrow, no thresholds": ("sparsegrow", {"grow": "never", "threshold": "none"}),
    "sparsegrow, gate hard": ("sparsegrow", {"grow": "never", "gate": "hard"}),
    "sparsegrow, gate at every step": ("sparsegrow", {"grow": "never", "every": 1}),
    "ewc": ("ewc", {}),
}


def step(net: str, arm: str, steps: int) -> float:
    """Seconds per step of the second task."""
    shape, batch = NETS[net]
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for i in range(2):
        inputs = torch.rand(steps * batch, *shape, generator=generator)
        labels = torch.randint(10, (len(inputs),), generator=generator)
        tasks.append(Task(f"{i}", Examples(inputs, labels), Examples(inputs[:10], labels[:10]), tuple(range(10))))
    model, _ = small(net, shape, 10)
    method, settings = ARMS[arm]
    moments: list[float] = []
    learn(
        model,
        trace(model, tasks[0].train.inputs[:2]),
        tasks,
        LEARNERS[method].made(method, settings),
        TaskSchedule(epochs=1, batch_size=batch),
        options=FitOptions(progress=lambda done, total, what: moments.append(time.perf_counter())),
    )
    own = moments[steps:]
    return (own[-1] - own[0]) / (len(own) - 1)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning.json"))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    for net in args.nets:
        taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(args.repeats):
            for arm in ARMS:
                taken[arm].append(step(net, arm, args.steps))
        plain = median(taken["naive"])
        found[net] = {
            arm: {"ms": round(1e3 * median(each), 3), "ratio": round(median(each) / plain, 2)}
            for arm, each in taken.items()
        }
        print(net, json.dumps(found[net], indent=1), flush=True)
    about = {"date": str(date.today()), "repeats": args.repeats, "steps": args.steps, "threads": args.threads}
    args.out.write_text(
        json.dumps({**about, **versions(), "batch": {n: b for n, (_, b) in NETS.items()}, **found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
