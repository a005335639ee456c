"""Measure how the time of a forward pass depends on axis widths, and which operations and layers it goes to.

Parts of the network are called at several widths in alternation. On a single CPU thread the clock is that of the
thread, which does not run while other processes have the CPU.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import lcm
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from regrow.allocation.cost import enclosing_modules
from regrow.allocation.latency import Latency
from regrow.core.axes import Axis, AxisGraph
from regrow.core.budget import Timing
from regrow.core.candidates import candidate_paths
from regrow.core.errors import first_line
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch
from regrow.evaluation.measure import count_positions, evaluating, pause_collection, wait_for
from regrow.tracing.trial import Resizing, resize_copy

W = TypeVar("W", int, float)

WIDTH_FRACTIONS = (0.25, 0.5, 0.75)  # of an axis's width that are measured, besides its full and its least width
# The shares of all widths at which modules of a search are measured; few give multiples of 16, which are faster
SEARCH_SHARES = (0.9, 0.7, 0.45, 0.2, 0.0)


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
    """Measure how many nanoseconds a forward pass takes, and how many it saves at smaller widths of each axis.

    One axis of each kind is measured: the smallest module that contains all of it is called at several widths, with the
    input that it gets in the network. All of these, and the whole network, are called in alternation; the fastest call
    counts. Time that no axis accounts for is constant. A wider axis never counts as faster, and all axes together never
    save more than the whole time.

    Args:
        model: The network, on the device to measure.
        axes: Its axes.
        units: The axes that may be cut.
        batch: The inputs of the pass.
        round_to: Measured widths are multiples of this where possible; without rounding, odd, as in most plans.
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
        containers = {key: _find_containers(axes, axes[key]) for key in members}
        recorded = _record_calls(whole, chain.from_iterable(containers.values()))
        for key, paths in containers.items():
            call = next(recorded[path] for path in paths if path in recorded)
            for width in _choose_widths(axes[key], round_to):
                tied = {other.key: width for other in _tied_axes(axes, axes[key])}
                where, remedy = f"at {width} units of {key!r}", "leave that axis out with --exclude"
                calls[key, width] = _resize_call(model, axes, tied, call, where, remedy)
        total, *times = _time_fastest([whole, *calls.values()], device, repeats, progress)
    curves: dict[str, dict[int, float]] = {key: {} for key in members}
    for (key, width), nanoseconds in zip(calls, times, strict=True):
        curves[key][width] = nanoseconds * calls[key, width].times / len(_tied_axes(axes, axes[key]))
    monotone = {key: _make_monotone(curve) for key, curve in curves.items()}
    # What all axes together could save is scaled down to the whole time, if it is more.
    most = sum((curve[-1][1] - curve[0][1]) * len(members[key]) for key, curve in monotone.items())
    scale = min(1.0, total / most) if most else 1.0
    return Timing(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        positions=count_positions(batch),
        total=total,
        curves={
            key: tuple((width, round(curve[-1][1] - (curve[-1][1] - t) * scale)) for width, t in curve)
            for key, curve in monotone.items()
        },
        names={axis.key: key for key, group in members.items() for axis in group},
    )


def fastest_pass(model: nn.Module, batch: Batch, *, repeats: int = 9) -> int:
    """Return the nanoseconds of the fastest of ``repeats`` passes after a warm-up (clock: :func:`time_widths`)."""
    return fastest_passes([model], batch, repeats=repeats)[0]


def fastest_passes(models: Sequence[nn.Module], batch: Batch, *, repeats: int = 9) -> list[int]:
    """Return :func:`fastest_pass` of each model, of passes in alternation, so that all meet the same other load."""
    with ExitStack() as modes:
        device, *_ = [modes.enter_context(evaluating(model)) for model in models]
        batch = batch.to(device)
        calls = [_Call(model, batch.args, dict(batch.kwargs)) for model in models]
        return _time_fastest(calls, device, repeats, silent)


def set_row_length(batch: Batch, tokens: int) -> Batch:
    """Return a batch whose rows of token ids have exactly ``tokens`` tokens, repeated or cut; labels are unchanged.

    Raise ValueError if no input is a tensor of integers ``[batch, tokens]``.

    >>> set_row_length(Batch((torch.tensor([[1, 2, 3]]),)), 5).args[0].tolist()
    [[1, 2, 3, 1, 2]]
    """

    def is_rows(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()

    def repeat_or_cut(value: Any) -> Any:
        return value.repeat(1, -(-tokens // value.shape[1]))[:, :tokens] if is_rows(value) else value

    inputs = (batch.args, dict(batch.kwargs))
    if not any(map(is_rows, tree_leaves(inputs))):
        raise ValueError(f"the example has no rows of tokens, so none of {tokens} can be made: leave @{tokens} away")
    args, kwargs = tree_map(repeat_or_cut, inputs)
    return replace(batch, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class _Call:
    """A module with its inputs, its path, and how many ``times`` a pass calls it; calling it runs the module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str = ""
    times: int = 1

    def __call__(self) -> None:
        self.module(*self.args, **self.kwargs)


def _tied_axes(axes: AxisGraph, axis: Axis) -> list[Axis]:
    """Return the free axes that must keep as many units as an axis, itself included (its ``count`` group)."""
    return [other for other in axes.free() if other.count == axis.count] if axis.count else [axis]


def _find_containers(axes: AxisGraph, axis: Axis) -> list[str]:
    """Return the paths of the modules that hold all tensors of an axis and of axes tied to it, innermost first."""
    paths = [slot.name.split(".")[:-1] for other in _tied_axes(axes, axis) for slot in other.slots]
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return [".".join(paths[0][:n]) for n in range(shared, -1, -1)]


def _record_calls(whole: _Call, paths: Iterable[str]) -> dict[str, _Call]:
    """Run the network; return path → call, with its first input, of ``whole`` ("") and each of ``paths`` that ran."""
    recorded: dict[str, _Call] = {"": whole}

    def record(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        first = recorded.get(path)
        recorded[path] = replace(first, times=first.times + 1) if first else _Call(module, args, kwargs, path)

    with ExitStack() as hooks:
        for path in {*paths} - {""}:
            module = whole.module.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(partial(record, path), with_kwargs=True).remove)
        whole()
    return recorded


def _choose_widths(axis: Axis, round_to: int) -> list[int]:
    """Return the widths at which an axis is measured, widest first: its full, its least, and some between."""
    odd = int(max(round_to, axis.multiple) == 1 and axis.size >= 64)  # odd, as the widths of most plans are
    inner = (_round_width(axis, share, round_to, odd) for share in (0, *WIDTH_FRACTIONS))
    return sorted({axis.size, *inner}, reverse=True)


def _round_width(axis: Axis, share: float, round_to: int, less: int = 0) -> int:
    """Return a ``share`` of an axis's width less ``less`` units, as plans leave it: rounded, not below its least."""
    rounded = lcm(round_to, axis.multiple)
    step = rounded if axis.size >= rounded else axis.multiple
    least = -(-max(axis.least, 1) // step) * step
    return min(axis.size, max(least, round(share * axis.size / step) * step - less))


def _resize_call(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], call: _Call, where: str, remedy: str
) -> _Call:
    """Return the call of a copy of its module at ``sizes``, axis key → units; ValueError if that does not run.

    ``where``, ``remedy``: parts of its message.
    """
    resized_network, *_ = resize_copy(model, axes, Resizing({**axes.sizes(), **sizes}))
    copy = resized_network.get_submodule(call.path)
    # The copy has no data: it gets the first entries of the tensors of the module that it was cut from.
    state = {**dict(call.module.named_parameters(remove_duplicate=False)), **dict(call.module.named_buffers())}
    for path, part in copy.named_modules(remove_duplicate=False):
        for name, like in [*part._parameters.items(), *part._buffers.items()]:
            if like is not None:
                original = state[f"{path}.{name}".lstrip(".")].detach()
                data = original[tuple(slice(n) for n in like.shape)].clone(memory_format=torch.contiguous_format)
                if name in part._parameters:
                    part._parameters[name] = nn.Parameter(data, requires_grad=False)
                else:
                    part._buffers[name] = data
    resized = replace(call, module=copy.eval())
    try:
        resized()
    except Exception as error:
        problem = f"{call.path or 'the network'} does not run {where} ({first_line(error)})"
        raise ValueError(f"{problem}, so its time is not known; {remedy}") from error
    return resized


def _time_fastest(calls: Sequence[_Call], device: torch.device, repeats: int, progress: Progress) -> list[int]:
    """Return each call's fastest time in nanoseconds; calls alternate, and each round begins with another."""
    fastest = [0] * len(calls)
    with pause_collection():
        for turn in range(1 + repeats):
            for step in range(len(calls)):
                i = (turn + step) % len(calls)
                nanoseconds = _time_call(calls[i], device)
                if turn:  # the first round is the warm-up
                    fastest[i] = min(fastest[i] or nanoseconds, nanoseconds)
            progress(turn + 1, 1 + repeats, "timing widths")
    return fastest


def _time_call(call: _Call, device: torch.device) -> int:
    """Return the nanoseconds of a call; on a single CPU thread, those for which the thread had the CPU."""
    single_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time_ns if single_thread else time.perf_counter_ns
    wait_for(device)
    begin = clock()
    call()
    wait_for(device)
    return clock() - begin


def _make_monotone(curve: dict[W, float]) -> list[tuple[W, float]]:
    """Return (width, time) by ascending width; a width that is slower than a wider one gets the time of the wider one.

    >>> _make_monotone({4: 9.0, 3: 10.0, 1: 2.0})
    [(1, 2.0), (3, 9.0), (4, 9.0)]
    """
    result: list[tuple[W, float]] = []
    for width in sorted(curve, reverse=True):
        result.append((width, min(curve[width], result[-1][1]) if result else curve[width]))
    return result[::-1]


def measure_latency(
    model: nn.Module, axes: AxisGraph, batch: Batch, *, round_to: int = 1, repeats: int = 9, progress: Progress = silent
) -> Latency:
    """Measure the milliseconds of each candidate operation, each sum of them, and each layer, at several widths.

    All axes that a search cuts are narrowed together: to their least width, some between, and the full one. Each module
    is called with the input that it gets in the network of that width, in alternation with all others; the fastest of
    all repeats counts. A wider module never counts as faster.

    Args:
        model: The network, on the device to measure.
        axes: Its axes.
        batch: The inputs of the pass.
        round_to: Measured widths are multiples of this where possible.
        repeats: The number of timed calls of each, after a warm-up call.
        progress: As of :func:`time_widths`.

    >>> from regrow.tracing import trace
    >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> table = measure_latency(net, trace(net, torch.ones(2, 4)), Batch((torch.ones(8, 4),)))
    >>> [*table.curves], table.curves["0"][-1][0], table.total > 0
    (['0', '2', ''], 320, True)
    """
    sums, held = candidate_paths(model), dict[str, list[str]]()  # held: layer → its own parameters
    for name, _ in model.named_parameters():
        if (path := name.rpartition(".")[0]) not in ("", *sums):
            held.setdefault(path, []).append(name)
    paths = [*dict.fromkeys([*held, *sums, *(op for ops in sums.values() for op in ops), ""])]
    cut = [axis for axis in axes.units() if not axis.count and axis.multiple == 1]
    with evaluating(model) as device:
        batch = batch.to(device)
        whole = _Call(model, batch.args, dict(batch.kwargs))
        networks = [whole]
        for share in SEARCH_SHARES:
            sizes = {axis.key: _round_width(axis, share, round_to) for axis in cut}
            reason = f"with its axes at {share:.0%} of their widths", "give a target in params or macs"
            networks.append(_resize_call(model, axes, sizes, whole, *reason))
        calls = [_record_calls(network, paths) for network in networks]
        fastest = iter(_time_fastest([call for part in calls for call in part.values()], device, repeats, progress))
    totals = fastest_passes([network.module for network in networks], batch, repeats=3 * repeats)
    found = [{path: next(fastest) * call.times / 1e6 for path, call in part.items()} for part in calls]
    times = [_own_times(each, total / 1e6) for each, total in zip(found, totals, strict=True)]
    entries = [
        {path: sum(network.module.get_parameter(name).numel() for name in names) for path, names in held.items()}
        for network in networks
    ]
    weight = {path: times[0].get(path, 0.0) for path in held}
    total, curves = sum(weight.values()), dict[str, Sequence[tuple[float, float]]]()
    means = [sum(weight[path] * (n / entries[0][path]) for path, n in each.items()) / (total or 1) for each in entries]
    for path in paths:
        curve: dict[float, float] = {}
        for each, mean, own in zip(entries, means, times, strict=True):
            curve.setdefault(each.get(path, mean if total else 1.0), own.get(path, 0.0))  # never called: no time
        curves[path] = tuple(_make_monotone(curve))
    return Latency(curves)


def _own_times(times: Mapping[str, float], total: float) -> dict[str, float]:
    """Return the time of each module beside the modules in it, from module path → its time; in all ``total``.

    Small modules take longer alone, so the times of modules are scaled to what the one around them takes.

    >>> _own_times({"": 10, "a": 4, "a.b": 8}, 5)
    {'': 3.0, 'a': 0.0, 'a.b': 2.0}
    """
    outer = {path: next((path for path in enclosing_modules(path) if path in times), "") for path in times if path}
    inside = dict.fromkeys(times, 0.0)
    for path, around in outer.items():
        inside[around] += times[path]
    own = {path: max(0.0, time - inside[path]) for path, time in times.items()}
    scale = {"": total / (own[""] + inside[""])}
    for path in sorted(outer, key=len):  # what lies outside comes first
        scale[path] = scale[outer[path]] * times[path] / ((own[path] + inside[path]) or 1.0)
    return {path: time * scale[path] for path, time in own.items()}
