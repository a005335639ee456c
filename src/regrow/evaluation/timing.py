"""Measure how the time of a forward pass depends on axis widths, and which operations and layers it goes to.

Parts of the network are called at several widths in alternation. On a single CPU thread the clock is that of the
thread, which does not run while other processes have the CPU.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from regrow.core.axes import Axis, AxisGraph
from regrow.core.budget import Timing
from regrow.core.candidates import candidate_paths
from regrow.core.errors import first_line
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch
from regrow.evaluation.measure import count_positions, evaluating, pause_collection, wait_for
from regrow.tracing.trial import Resizing, resize_copy

SHARES = (0.25, 0.5, 0.75)  # of an axis's width that are measured, besides its full and its least width


def time_widths(
    model: nn.Module,
    axes: AxisGraph,
    units: Sequence[Axis],
    batch: Batch,
    *,
    round_to: int = 1,
    repeats: int = 9,
    progress: Progress = silent,
) -> Timing:
    """Measure how long a forward pass takes as a function of axis widths.

    One axis of each kind is measured: the smallest module that contains all of it is called at several widths, with the
    input that it gets in the network. All of these, and the whole network, are called in alternation; the fastest call
    counts. Time that no axis accounts for is constant. A wider axis never counts as faster, and all axes together never
    save more than the whole time.

    Args:
        model: The network, on the device to measure.
        axes: Its axes.
        units: The axes that may be cut.
        batch: The inputs of the pass.
        round_to: Measured widths are multiples of this where possible; without rounding they are odd, like those of
            most plans.
        repeats: The number of timed calls of each, after a warm-up call.
        progress: Called with (rounds done, rounds in all, description).

    Raises:
        ValueError: If a module cannot be run at another width; names the axis.
    """
    groups: dict[object, list[Axis]] = {}
    for axis in units:
        groups.setdefault(axis.kind, []).append(axis)
    members = {group[len(group) // 2].key: group for group in groups.values()}
    with evaluating(model) as device:
        batch = batch.to(device)
        whole = _Call(model, batch.args, dict(batch.kwargs))
        calls: dict[tuple[str, int], _Call] = {}
        holders = {key: _holders(axes, axes[key]) for key in members}
        seen = _record_calls(whole, chain.from_iterable(holders.values()))
        for key, paths in holders.items():
            call = next(seen[path] for path in paths if path in seen)
            for width in _widths(axes[key], round_to):
                calls[key, width] = _resize_call(model, axes, axes[key], width, call)
        fastest = _rounds([whole, *calls.values()], device, repeats, progress)
    curves: dict[str, dict[int, float]] = {key: {} for key in members}
    for (key, width), taken in zip(calls, fastest[1:], strict=True):
        curves[key][width] = taken * calls[key, width].times / len(_together(axes, axes[key]))
    total = fastest[0]
    smooth = {key: _never_falling(curve) for key, curve in curves.items()}
    most = sum((curve[-1][1] - curve[0][1]) * len(members[key]) for key, curve in smooth.items())
    scale = min(1.0, total / most) if most else 1.0
    return Timing(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        positions=count_positions(batch),
        total=total,
        curves={
            key: tuple((width, round(curve[-1][1] - (curve[-1][1] - taken) * scale)) for width, taken in curve)
            for key, curve in smooth.items()
        },
        names={axis.key: key for key, group in members.items() for axis in group},
    )


def fastest_pass(model: nn.Module, batch: Batch, *, repeats: int = 9) -> int:
    """Return the nanoseconds of the fastest of some passes after a warm-up, with the clock of :func:`time_widths`."""
    with evaluating(model) as device:
        batch = batch.to(device)
        return _rounds([_Call(model, batch.args, dict(batch.kwargs))], device, repeats, silent)[0]


def lengthen(batch: Batch, tokens: int) -> Batch:
    """Return a batch of token ids with ``tokens`` tokens in each row, its own repeated.

    >>> lengthen(Batch((torch.tensor([[1, 2, 3]]),)), 5).args[0].tolist()
    [[1, 2, 3, 1, 2]]
    """

    def is_rows(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()

    def longer(value: Any) -> Any:
        return value.repeat(1, -(-tokens // value.shape[1]))[:, :tokens] if is_rows(value) else value

    inputs = (batch.args, dict(batch.kwargs))
    if not any(map(is_rows, tree_leaves(inputs))):
        raise ValueError(f"the example has no rows of tokens, so none of {tokens} can be made: leave @{tokens} away")
    args, kwargs = tree_map(longer, inputs)
    return replace(batch, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class _Call:
    """A module with its inputs, and how many times it is called in one pass."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str = ""
    times: int = 1

    def __call__(self) -> None:
        self.module(*self.args, **self.kwargs)


def _together(axes: AxisGraph, axis: Axis) -> list[Axis]:
    return [other for other in axes.free() if other.count == axis.count] if axis.count else [axis]


def _holders(axes: AxisGraph, axis: Axis) -> list[str]:
    """Return the paths of the modules that contain all tensors of an axis, the innermost first."""
    paths = [slot.name.split(".")[:-1] for other in _together(axes, axis) for slot in other.slots]
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return [".".join(paths[0][:n]) for n in range(shared, -1, -1)]


def _record_calls(whole: _Call, paths: Iterable[str]) -> dict[str, _Call]:
    """Return path → call of each module that is called in a pass, with the input of its first call."""
    seen: dict[str, _Call] = {"": whole}

    def note(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        first = seen.get(path)
        seen[path] = replace(first, times=first.times + 1) if first else _Call(module, args, kwargs, path)

    with ExitStack() as hooks:
        for path in {*paths} - {""}:
            module = whole.module.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(partial(note, path), with_kwargs=True).remove)
        whole()
    return seen


def _widths(axis: Axis, round_to: int) -> list[int]:
    """Return the widths at which an axis is measured, widest first."""
    step = lcm(round_to, axis.multiple) if axis.size >= lcm(round_to, axis.multiple) else axis.multiple
    least = -(-max(axis.least, 1) // step) * step
    odd = int(step == 1 and axis.size >= 64)
    inner = {max(least, round(share * axis.size / step) * step - odd) for share in SHARES}
    return sorted({axis.size, *inner, min(least, axis.size)}, reverse=True)


def _resize_call(model: nn.Module, axes: AxisGraph, axis: Axis, width: int, call: _Call) -> _Call:
    """Return the call of a module with the axis at another width."""
    sizes = axes.sizes() | {other.key: width for other in _together(axes, axis)}
    copy = resize_copy(model, axes, Resizing(sizes))[0].get_submodule(call.path)
    # The copy has no data: it gets the first entries of the tensors of the module that it was cut from.
    state = {**dict(call.module.named_parameters(remove_duplicate=False)), **dict(call.module.named_buffers())}
    for path, part in copy.named_modules(remove_duplicate=False):
        for name, like in [*part._parameters.items(), *part._buffers.items()]:
            if like is not None:
                whole = state[f"{path}.{name}".lstrip(".")].detach()
                data = whole[tuple(slice(n) for n in like.shape)].clone(memory_format=torch.contiguous_format)
                if name in part._parameters:
                    part._parameters[name] = nn.Parameter(data, requires_grad=False)
                else:
                    part._buffers[name] = data
    resized = replace(call, module=copy.eval())
    try:
        resized()
    except Exception as error:
        problem = f"{call.path or 'the network'} does not run at {width} units of {axis.key!r} ({first_line(error)})"
        raise ValueError(f"{problem}, so its time is not known; leave that axis out with --exclude") from error
    return resized


def _rounds(calls: Sequence[_Call], device: torch.device, repeats: int, progress: Progress) -> list[int]:
    """Return the fastest call of each in nanoseconds; calls alternate, and each round begins with another one."""
    fastest = [0] * len(calls)
    with pause_collection():
        for turn in range(1 + repeats):
            for step in range(len(calls)):
                i = (turn + step) % len(calls)
                taken = _time_call(calls[i], device)
                if turn:
                    fastest[i] = min(fastest[i] or taken, taken)
            progress(turn + 1, 1 + repeats, "timing widths")
    return fastest


def _time_call(call: _Call, device: torch.device) -> int:
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time_ns if alone else time.perf_counter_ns
    wait_for(device)
    begin = clock()
    call()
    wait_for(device)
    return clock() - begin


def _never_falling(curve: dict[int, float]) -> list[tuple[int, float]]:
    """Return (width, time) by width; a width that is slower than a wider one gets the time of the wider one.

    >>> _never_falling({4: 9.0, 3: 10.0, 1: 2.0})
    [(1, 2.0), (3, 9.0), (4, 9.0)]
    """
    result: list[tuple[int, float]] = []
    for width in sorted(curve, reverse=True):
        result.append((width, min(curve[width], result[-1][1]) if result else curve[width]))
    return result[::-1]


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
        return max(0.0, self.total - sum(sum(part.values()) for part in (self.ops, self.sums, self.layers)))


def latency(model: nn.Module, batch: Batch, *, repeats: int = 9) -> Latency:
    """Measure the milliseconds of each candidate operation, each sum of them, and each layer outside.

    Each is called with the input that it gets in the network, in alternation with the whole; the fastest of all repeats
    counts. Candidates within an operation are a part of it.

    Args:
        model: The network, on the device to measure.
        batch: The inputs of the pass.
        repeats: The number of timed calls of each, after a warm-up call.

    >>> table = latency(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), Batch((torch.ones(8, 4),)))
    >>> list(table.layers), table.total >= sum(table.layers.values())
    (['0', '2'], True)
    """
    sums = candidate_paths(model)
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
    with evaluating(model) as device:
        batch = batch.to(device)
        calls = _record_calls(_Call(model, batch.args, dict(batch.kwargs)), [*ops, *sums, *layers])
        fastest = dict(zip(calls, _rounds([*calls.values()], device, repeats, silent), strict=True))
    # What is never called takes no time.
    times = {path: fastest[path] * calls[path].times if path in calls else 0 for path in (*ops, *sums, *layers)}
    for path, paths in sums.items():
        times[path] = max(0, times[path] - sum(times[op] for op in paths))
    # Together, parts are no more than the whole.
    part = min(1.0, fastest[""] / (sum(times.values()) or 1.0)) / 1e6
    tables = [{path: times[path] * part for path in paths} for paths in (ops, sums, layers)]
    return Latency(fastest[""] / 1e6, tables[0], tables[1], tables[2])
