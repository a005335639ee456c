"""What masks cost: a training step of a super-network with all three levels searched, over the same without masks.

    python benchmarks/search_step.py --out benchmarks/results/search_step.json

Both are the step of the search's own loop (forward, backward, clipped gradients, optimiser) of the same super-network
on the same batch; with masks α, κ and thresholds learn too, and what stands is priced in the loss. Taken in turns,
median of several; seconds of the processor beside those of the clock, since other processes may run on the machine.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow import trace
from regrow.commands import spaces
from regrow.commands.search import Settings, built
from regrow.learner import Learner, Stand
from regrow.store.versions import versions
from regrow.surgery.parametrize import parametrize
from regrow.tasks import Examples, Task


class Plain(Learner):
    """Plain training, gradients clipped as in a search."""

    def gate(self, at: Stand) -> None:
        """They are clipped."""
        nn.utils.clip_grad_norm_(at.parameters().values(), 5.0)


def step_of(learner: Learner, at: Stand, batch: Examples) -> Callable[[], None]:
    """A step of learning, as the loop takes it."""
    learner.begin(at)
    at.model.train()
    movers: list[torch.optim.Optimizer] = [torch.optim.SGD(at.parameters().values(), 0.01, momentum=0.9, nesterov=True)]
    if learned := [one for one in learner.tensors.values() if one.lr is not None]:
        groups = [{"params": [one.values.requires_grad_()], "lr": one.lr} for one in learned]
        movers.append(torch.optim.Adam(groups, betas=(0.5, 0.999)))

    def step() -> None:
        for mover in movers:
            mover.zero_grad(set_to_none=True)
        with parametrize(at.model, learner.standing(at)):
            learner.loss(at, batch).backward()
        learner.gate(at)
        for mover in movers:
            mover.step()
        learner.stepped(at)

    return step


def in_turns(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of the clock and of the processor, by name."""
    for step in steps.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(repeats):
        for name in [*steps] if turn % 2 else reversed([*steps]):
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(w for w, _ in own), statistics.median(c for _, c in own))
        for name, own in times.items()
    }


def measured(space: str, batch_size: int, size: int, stride: int, repeats: int) -> dict[str, Any]:
    """One row: a space of pictures of three colours and ten classes."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(batch_size, 3, size, size, generator=generator)
    batch = Examples(pictures, torch.arange(batch_size) % 10)
    task = Task("noise", batch, batch, tuple(range(10)))
    net, _, _ = spaces.network(space, task, stages=1, memory="", batch_size=batch_size, stride=stride, seed=0)
    axes = trace(net, pictures[:2])
    own = built(Settings(space, "", "nonzero=30%", method_settings={"warm": 0, "augment": False}), net, axes)
    steps = {
        name: step_of(learner, Stand(copy.deepcopy(net), axes, task, epochs=10, steps=100), batch)
        for name, learner in (("plain", Plain()), ("masked", own))
    }
    found = in_turns(steps, repeats)
    plain, masked = found["plain"], found["masked"]
    return {
        "space": space,
        "parameters": sum(p.numel() for p in net.parameters()),
        "batch": batch_size,
        "pictures": [3, size, size],
        "stride": stride,
        "repeats": repeats,
        "plain_s": round(plain[0], 3),
        "masked_s": round(masked[0], 3),
        "ratio": round(masked[0] / plain[0], 3),
        "plain_cpu_s": round(plain[1], 3),
        "masked_cpu_s": round(masked[1], 3),
        "ratio_of_cpu_time": round(masked[1] / plain[1], 3),
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search_step.json"))
    parser.add_argument("--spaces", nargs="+", default=["cells:8-6-3", "mobile:8-1"])
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "versions": versions(),
        "note": args.note,
        "rows": [measured(space, args.batch, args.size, args.stride, args.repeats) for space in args.spaces],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
