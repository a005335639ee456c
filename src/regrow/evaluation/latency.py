"""A latency table: how long each operation of a network takes in a pass, and each layer that lies in none."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from regrow.candidates import candidates_in
from regrow.evaluation.forward import evaluating
from regrow.evaluation.speed import waiting_for
from regrow.evaluation.timing import uncollected
from regrow.sources import Batch, moved


def latency(model: nn.Module, batch: Batch, *, repeats: int = 9) -> dict[str, float]:
    """Milliseconds of each candidate operation, of each sum of candidates without its operations, and of each layer.

    Every one is timed where it stands, in the same passes; its fastest call counts. What no module accounts for is
    under ``""``, so that all of them together are a whole pass.

    Args:
        model: The network, on the device that counts.
        batch: What it is called with.
        repeats: Timed passes, after one that is not.

    >>> table = latency(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), Batch((torch.ones(8, 4),)))
    >>> list(table)
    ['0', '2', '']
    """
    sums = candidates_in(model)
    ops = [path for paths in sums.values() for path in paths]
    inside = tuple(f"{path}." for path in ops)
    layers = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and name not in sums
        and name not in ops
        and not name.startswith(inside)
    ]
    with evaluating(model) as device, uncollected():
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        clock = _Clock(model, [*ops, *sums, *layers], device, time.thread_time_ns if alone else time.perf_counter_ns)
        args, kwargs = moved(batch.args, device), moved(dict(batch.kwargs), device)
        try:
            for turn in range(1 + repeats):
                waiting_for(device)
                begin = clock.now()
                model(*args, **kwargs)
                waiting_for(device)
                clock.fastest[""] = min(clock.fastest.get("", torch.inf), clock.now() - begin)
                if not turn:
                    clock.fastest.clear()
        finally:
            clock.remove()
    found = {name: value / 1e6 for name, value in clock.fastest.items()}
    for path, paths in sums.items():
        found[path] = max(0.0, found[path] - sum(found[one] for one in paths if one in found))
    total = found.pop("")
    return found | {"": max(0.0, total - sum(found.values()))}


class _Clock:
    """The fastest call of each of some modules, in nanoseconds."""

    def __init__(self, model: nn.Module, paths: Iterable[str], device: torch.device, now: Callable[[], int]) -> None:
        self.now, self.fastest, self.begun = now, dict[str, float](), dict[str, int]()
        self.hooks = []
        for path in paths:
            module = model.get_submodule(path)
            self.hooks.append(module.register_forward_pre_hook(self._begins(path, device)))
            self.hooks.append(module.register_forward_hook(self._ends(path, device)))

    def remove(self) -> None:
        """No call is timed any more."""
        for hook in self.hooks:
            hook.remove()

    def _begins(self, path: str, device: torch.device) -> Callable[..., None]:
        def begins(*_: Any) -> None:
            waiting_for(device)
            self.begun[path] = self.now()

        return begins

    def _ends(self, path: str, device: torch.device) -> Callable[..., None]:
        def ends(*_: Any) -> None:
            waiting_for(device)
            self.fastest[path] = min(self.fastest.get(path, torch.inf), self.now() - self.begun[path])

        return ends
