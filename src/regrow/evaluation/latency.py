"""A latency table: measured milliseconds of each candidate operation and layer of a network."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regrow.core.candidates import candidates_in
from regrow.core.sources import Batch, moved
from regrow.evaluation.forward import evaluating
from regrow.evaluation.speed import waiting_for
from regrow.evaluation.timing import pause_collection


@dataclass(frozen=True)
class Latency:
    """The milliseconds of a forward pass, divided among operations, sums and layers.

    Args:
        total: Milliseconds of the whole pass.
        ops: Path of a candidate operation → its milliseconds.
        sums: Path of candidates → milliseconds beside those of their operations.
        layers: Path of a layer that lies in no operation → its milliseconds.
    """

    total: float
    ops: dict[str, float]
    sums: dict[str, float]
    layers: dict[str, float]

    @property
    def rest(self) -> float:
        """The milliseconds that no module accounts for."""
        return max(0.0, self.total - sum(sum(one.values()) for one in (self.ops, self.sums, self.layers)))


def latency(model: nn.Module, batch: Batch, *, repeats: int = 9) -> Latency:
    """Measure the milliseconds of each candidate operation, each sum of them, and each layer outside.

    All are timed by hooks in the same forward passes; passes without hooks in between give the total. The fastest of
    all repeats counts. Candidates within an operation are a part of it.

    Args:
        model: The network, on the device to measure.
        batch: The inputs of the pass.
        repeats: The number of timed passes of both kinds, after a warm-up pass.

    >>> table = latency(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), Batch((torch.ones(8, 4),)))
    >>> list(table.layers), table.total >= sum(table.layers.values())
    (['0', '2'], True)
    """
    sums = candidates_in(model)
    every = tuple(f"{path}." for paths in sums.values() for path in paths)
    sums = {path: paths for path, paths in sums.items() if not f"{path}.".startswith(every)}
    ops = [path for paths in sums.values() for path in paths]
    inside = tuple(f"{path}." for path in ops)
    layers = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and name not in sums
        and not f"{name}.".startswith(inside)
    ]
    with evaluating(model) as device, pause_collection():
        args, kwargs = moved(batch.args, device), moved(dict(batch.kwargs), device)
        clock, total = _Clock(device), float("inf")
        for turn in range(1 + repeats):
            waiting_for(device)
            begin = clock.now()
            model(*args, **kwargs)
            waiting_for(device)
            total = min(total, clock.now() - begin) if turn else total
            with clock.inside(model, [*ops, *sums, *layers]):
                model(*args, **kwargs)
            if not turn:
                clock.fastest.clear()
    # What is never called takes no time.
    found = {path: clock.fastest.get(path, 0.0) for path in (*ops, *sums, *layers)}
    for path, paths in sums.items():
        found[path] = max(0.0, found[path] - sum(found[one] for one in paths))
    # Clocks inside take time themselves: together, parts are no more than the whole.
    part = min(1.0, total / (sum(found.values()) or 1.0)) / 1e6
    ops_, sums_, layers_ = ({path: found[path] * part for path in paths} for paths in (ops, sums, layers))
    return Latency(total / 1e6, ops_, sums_, layers_)


class _Clock:
    """Records the fastest call of each of some modules, in nanoseconds."""

    def __init__(self, device: torch.device) -> None:
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.now = time.thread_time_ns if alone else time.perf_counter_ns
        self.device, self.fastest, self.begun = device, dict[str, float](), dict[str, int]()

    @contextmanager
    def inside(self, model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
        """Time the calls of these modules in the block."""
        hooks = []
        for path in paths:
            module = model.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(self._begins(path)))
            hooks.append(module.register_forward_hook(self._ends(path)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begins(self, path: str) -> Callable[..., None]:
        def begins(*_: Any) -> None:
            waiting_for(self.device)
            self.begun[path] = self.now()

        return begins

    def _ends(self, path: str) -> Callable[..., None]:
        def ends(*_: Any) -> None:
            waiting_for(self.device)
            self.fastest[path] = min(self.fastest.get(path, float("inf")), self.now() - self.begun[path])

        return ends
