"""Measure how the time of a forward pass depends on axis widths, on this device.

Parts of the network are called at several widths in alternation. On a single CPU thread the clock is that of the
thread, which does not run while other processes have the CPU.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from regrow.core.axes import Axis, AxisGraph
from regrow.core.budget import Timing
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, moved
from regrow.evaluation.forward import evaluating
from regrow.evaluation.speed import positions_of, waiting_for
from regrow.tracing.trial import Resizing, resize_copy

SHARES = (0.25, 0.5, 0.75)
"""The fractions of an axis's width that are measured, besides its full and its least width."""


def timing(
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
    kinds: dict[tuple[Any, ...], list[Axis]] = {}
    for axis in units:
        kinds.setdefault(axis.kind, []).append(axis)
    members = {one[len(one) // 2].key: one for one in kinds.values()}
    with evaluating(model) as device:
        batch = batch.to(device)
        whole = _Call(model, moved(batch.args, device), moved(dict(batch.kwargs), device))
        met = _met(whole, [_holders(axes, axes[key]) for key in members])
        calls: dict[tuple[str, int], _Call] = {}
        for key, found in zip(members, met, strict=True):
            for width in _widths(axes[key], round_to):
                calls[key, width] = _at(model, axes, axes[key], width, found)
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
        positions=positions_of(batch),
        total=total,
        curves={
            key: tuple((width, round(curve[-1][1] - (curve[-1][1] - taken) * scale)) for width, taken in curve)
            for key, curve in smooth.items()
        },
        names={axis.key: key for key, own in members.items() for axis in own},
    )


def fastest_pass(model: nn.Module, batch: Batch, *, repeats: int = 9) -> int:
    """Return the nanoseconds of the fastest of several forward passes, with the clock of :func:`timing`.

    Args:
        model: The network.
        batch: The inputs of the pass.
        repeats: The number of timed calls, after a warm-up call.
    """
    with evaluating(model) as device:
        call = _Call(model, moved(batch.args, device), moved(dict(batch.kwargs), device))
        return _rounds([call], device, repeats, silent)[0]


def lengthen(batch: Batch, tokens: int) -> Batch:
    """Return the batch with ``tokens`` tokens in each row, its own repeated.

    >>> lengthen(Batch((torch.tensor([[1, 2, 3]]),)), 5).args[0].tolist()
    [[1, 2, 3, 1, 2]]

    Args:
        batch: A batch of token ids, ``[batch, tokens]``.
        tokens: The new length.

    Raises:
        ValueError: If it has no rows of integers.
    """
    found: list[Tensor] = []

    def longer(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
            return value
        found.append(value)
        return value.repeat(1, -(-tokens // value.shape[1]))[:, :tokens]

    args, kwargs = tree_map(longer, batch.args), tree_map(longer, dict(batch.kwargs))
    if not found:
        raise ValueError(f"the example has no rows of tokens, so none of {tokens} can be made: leave @{tokens} away")
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
    paths = [slot.name.split(".")[:-1] for one in _together(axes, axis) for slot in one.slots]
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return [".".join(paths[0][:n]) for n in range(shared, -1, -1)]


def _met(whole: _Call, holders: Iterable[list[str]]) -> list[_Call]:
    """Return, for each list of modules, the first that is called in a pass, with the input of its first call."""
    holders = list(holders)
    seen: dict[str, _Call] = {"": whole}

    def watch(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            known = seen.get(path)
            seen[path] = replace(known, times=known.times + 1) if known else _Call(module, args, kwargs, path)

        return note

    paths = {path for row in holders for path in row if path}
    hooks = [
        whole.module.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True) for path in paths
    ]
    try:
        whole()
    finally:
        for hook in hooks:
            hook.remove()
    return [next(seen[path] for path in row if path in seen) for row in holders]


def _widths(axis: Axis, round_to: int) -> list[int]:
    """Return the widths at which an axis is measured, widest first."""
    step = lcm(round_to, axis.multiple) if axis.size >= lcm(round_to, axis.multiple) else axis.multiple
    least = -(-max(axis.least, 1) // step) * step
    odd = int(step == 1 and axis.size >= 64)
    inner = {max(least, round(share * axis.size / step) * step - odd) for share in SHARES}
    return sorted({axis.size, *inner, min(least, axis.size)}, reverse=True)


def _at(model: nn.Module, axes: AxisGraph, axis: Axis, width: int, met: _Call) -> _Call:
    """Return the call of a module with the axis at another width."""
    sizes = axes.sizes() | {one.key: width for one in _together(axes, axis)}
    copy = resize_copy(model, axes, Resizing(sizes))[0].get_submodule(met.path)
    made = replace(met, module=_filled(copy, met.module).eval())
    try:
        made()
    except Exception as error:
        raise ValueError(
            f"{met.path or 'the network'} does not run at {width} units of {axis.key!r}, so its time is not known; "
            f"leave that axis out with --exclude ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        ) from error
    return made


def _filled(part: nn.Module, like: nn.Module) -> nn.Module:
    """Give a module without data the first entries of the tensors of the module that it was cut from."""
    state: dict[str, Tensor] = {**dict(like.named_parameters(remove_duplicate=False)), **dict(like.named_buffers())}
    for path, module in part.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, own in list(module._parameters.items()):
            if own is not None:
                setattr(module, name, nn.Parameter(_first(state[prefix + name], own), requires_grad=False))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _first(state[prefix + name], buffer)
    return part


def _first(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach()[tuple(slice(n) for n in like.shape)].clone(memory_format=torch.contiguous_format)


def _rounds(calls: Sequence[_Call], device: torch.device, repeats: int, progress: Progress) -> list[int]:
    """Return the fastest call of each in nanoseconds; calls alternate, and each round begins with another one."""
    fastest = [0] * len(calls)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time_ns if alone else time.perf_counter_ns
    with pause_collection():
        for turn in range(1 + repeats):
            for step in range(len(calls)):
                at = (turn + step) % len(calls)
                waiting_for(device)
                begin = clock()
                calls[at]()
                waiting_for(device)
                taken = clock() - begin
                if turn:
                    fastest[at] = min(fastest[at] or taken, taken)
            progress(turn + 1, 1 + repeats, "timing widths")
    return fastest


@contextmanager
def pause_collection() -> Iterator[None]:
    """Disable garbage collection in the block, so that it does not fall into a timed call."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _never_falling(curve: dict[int, float]) -> list[tuple[int, float]]:
    """Return (width, time) by width; a width that is slower than a wider one gets the time of the wider one.

    >>> _never_falling({4: 9.0, 3: 10.0, 1: 2.0})
    [(1, 2.0), (3, 9.0), (4, 9.0)]
    """
    result: list[tuple[int, float]] = []
    for width in sorted(curve, reverse=True):
        result.append((width, min(curve[width], result[-1][1]) if result else curve[width]))
    return result[::-1]
