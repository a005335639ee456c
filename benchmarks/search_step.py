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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow import trace
from regrow.core.tasks import Examples, Task
from regrow.jobs.search import Settings, build_search, build_space
from regrow.store.versions import versions
from regrow.surgery.gate import parametrize
from regrow.training.learner import Boundary, Context, Event, Learner, NoState, Step
from regrow.training.schedule import Optimizers, Schedule
from regrow.training.state import axis_tensors


def clip(state: NoState, context: Context, step: Step) -> NoState:
    """Clip gradients as in a search."""
    nn.utils.clip_grad_norm_(context.parameters().values(), 5.0)
    return state


PLAIN: Learner[NoState] = Learner(NoState(), project=clip)
"""Plain training."""


def step_of(learner: Learner[Any], context: Context, batch: Examples) -> Callable[[], None]:
    """A training step, as the loop takes it."""
    state = learner.boundary(learner.state, context, Boundary(Event.TASK_START))
    context.model.train()
    optimizers = Optimizers(Schedule(), learner)
    optimizers.collect(context.parameters(), axis_tensors(state))

    def step() -> None:
        nonlocal state
        optimizers.clear_gradients()
        replaced = learner.parametrize(state, context)
        now = Step(0, batch, replaced=replaced)
        with parametrize(context.model, replaced.values):
            loss = learner.loss(state, context, now)
            loss.value.backward()
        now = replace(now, aux=loss.aux)
        state = learner.project(state, context, now)
        optimizers.step()
        state = learner.after_step(state, context, now)

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
    settings = Settings(
        space, "", "nonzero=30%", method_settings={"warm": 0, "augment": False}, stages=1, stride=stride
    )
    net, _, _ = build_space(settings, task)
    axes = trace(net, pictures[:2])
    own = build_search(settings, net, axes)
    steps = {
        name: step_of(learner, Context(copy.deepcopy(net), axes, task, epochs=10, steps=100), batch)
        for name, learner in (("plain", PLAIN), ("masked", own.learner))
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
