"""A torch-function mode that sums the inputs of chosen weights wherever they are contracted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from regrow.core.scores import Moments
from regrow.core.sources import Batch, visible_positions

Fed = tuple[Tensor, Tensor, int]
"""A weight, the input it is contracted with, and which dimension of the input that is."""


def _layers(func: Callable[..., Any], x: Tensor, state: Any, params: Sequence[Tensor], *how: Any) -> Iterator[Fed]:
    """Run each direction of each layer by itself, to see the inputs of each layer and each time step."""
    if not isinstance(params, list | tuple):  # packed sequences: their form is not that of sequences
        return
    biased, many, _, training, both, batch_first = how
    ways, time = 2 if both else 1, 1 if batch_first else 0
    states = state if isinstance(state, list | tuple) else [state]
    each = len(params) // (many * ways)
    for layer in range(many):
        outs = []
        for way in range(ways):
            place = layer * ways + way
            own = params[place * each : (place + 1) * each]
            start = [one[place : place + 1] for one in states]
            turned = x.flip(time) if way else x
            first = start if isinstance(state, list | tuple) else start[0]
            out = func(turned, first, own, biased, 1, 0.0, training, False, batch_first)[0]
            before = start[0].transpose(0, 1) if batch_first else start[0]
            yield own[0], turned, -1
            yield own[1], torch.cat([before, out.narrow(time, 0, out.shape[time] - 1)], time), -1
            outs.append(out.flip(time) if way else out)
        x = torch.cat(outs, -1)


def _cell(func: Callable[..., Any], x: Tensor, state: Any, inner: Tensor, back: Tensor, *biases: Any) -> Iterator[Fed]:
    yield inner, x, -1
    yield back, state[0] if isinstance(state, list | tuple) else state, -1


RECURRENT: Mapping[Callable[..., Any], Callable[..., Iterator[Fed]]] = {
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _layers),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell),
}
"""Function → the (weight, input, dimension) triples of a call. The projection of ``proj_size`` is not covered."""


CHUNK = 1 << 18
"""Entries summed at a time on a CPU: a chunk in float32 fits the cache, so half precision costs no extra memory."""
GROUP = 64
"""How many columns a kernel sums side by side."""

Operands = tuple[Any, Any, int]
"""A weight, the input it is contracted with, and which dimension of the input that is."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Operands]:
    yield weight, input, -1


def _matmul(a: Tensor, b: Tensor, **more: Any) -> Iterator[Operands]:
    yield b, a, -1
    yield a, b, -2 if b.dim() > 1 else -1


def _right_matmul(b: Tensor, a: Tensor) -> Iterator[Operands]:
    yield from _matmul(a, b)


def _addmm(bias: Tensor, mat1: Tensor, mat2: Tensor, **more: Any) -> Iterator[Operands]:
    yield from _matmul(mat1, mat2)


def _conv(input: Tensor, weight: Tensor, *more: Any, **names: Any) -> Iterator[Operands]:
    yield weight, input, 1 - weight.dim()


CONTRACTIONS: Mapping[Callable[..., Any], Callable[..., Iterator[Operands]]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _right_matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.conv_transpose1d: _conv,
    torch.conv_transpose2d: _conv,
    torch.conv_transpose3d: _conv,
}
"""Function → the (weight, input, dimension) triples that a call of it contracts."""


def watched_name(watched: Mapping[int, str], weight: object) -> str | None:
    """Return the name of the watched weight that an operand is, or is the transpose of (``x @ weight.T``).

    Args:
        watched: ``id`` of a weight → its name.
        weight: The operand.
    """
    name = watched.get(id(weight))
    if name is None and isinstance(weight, Tensor) and weight._base is not None:
        base = weight._base
        if weight.dim() == 2 and weight.shape == base.shape[::-1] and weight.stride() == base.stride()[::-1]:
            name = watched.get(id(base))
    return name


class Feed(TorchFunctionMode, ABC):
    """A torch-function mode that replaces the inputs with which watched weights are contracted.

    Args:
        watched: ``id`` of a weight → its name.
    """

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.watched = watched

    @abstractmethod
    def fed(self, name: str, value: Tensor, dim: int) -> Tensor:
        """Return the input to use instead of ``value``.

        Args:
            name: The name of the watched weight.
            value: The input that it would be contracted with.
            dim: The dimension of ``value`` that is contracted.
        """

    def weighed(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight to use inside a recurrent layer, whose inputs cannot be replaced.

        Args:
            name: The name of the watched weight.
            weight: The weight.

        Raises:
            ValueError: Always, unless a subclass overrides it.
        """
        raise ValueError(f"{name!r} is read inside a recurrent layer, where its input cannot be exchanged")

    def _weighed(self, tensor: Tensor) -> Tensor:
        name = self.watched.get(id(tensor))
        return tensor if name is None else self.weighed(name, tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the input if a watched weight is contracted, then call the function."""
        kwargs = kwargs or {}
        if func in RECURRENT:
            args, kwargs = tree_map_only(Tensor, self._weighed, (args, kwargs))
        read = CONTRACTIONS.get(func)
        for weight, value, dim in read(*args, **kwargs) if read else ():
            name = watched_name(self.watched, weight)
            if name is not None:
                fed = self.fed(name, value, dim)
                args = tuple(fed if arg is value else arg for arg in args)
                kwargs = {key: fed if arg is value else arg for key, arg in kwargs.items()}
                break
        return func(*args, **kwargs)


class InputSums(TorchFunctionMode):
    """A torch-function mode that sums the inputs of watched weights into :class:`~regrow.core.scores.Moments`.

    Args:
        watched: ``id`` of a weight → its name.
        sequences: How many sequences the batch has; the rows of an input belong to them in equal, consecutive parts.
        mask: ``[sequences, tokens]``, false at positions that do not count (padding); ``None``: all count.
    """

    def __init__(self, watched: Mapping[int, str], sequences: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.watched, self.sequences = watched, sequences
        self.mask = mask
        self.sums: dict[str, Moments] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Sum the input if a watched weight is contracted, then call the function."""
        kwargs = kwargs or {}
        read, inside = CONTRACTIONS.get(func), RECURRENT.get(func)
        if self.watched and (read is not None or inside is not None):
            for weight, value, dim in inside(func, *args, **kwargs) if inside else read(*args, **kwargs):  # type: ignore[misc]
                name = watched_name(self.watched, weight)
                if name is not None:
                    with torch.no_grad():
                        self._add(name, value.detach(), dim)
        return func(*args, **kwargs)

    def _add(self, name: str, value: Tensor, dim: int) -> None:
        rows, channels = rows_of(value, dim, self.sequences)
        masked = self.mask is not None and channels == 2 and rows.shape[:2] == self.mask.shape
        moments = _moments(rows, channels, self.mask if masked else None)
        if moments.count:
            self.sums[name] = self.sums[name] + moments if name in self.sums else moments


def rows_of(value: Tensor, dim: int, sequences: int) -> tuple[Tensor, int]:
    """Return an input as ``[sequences, positions, channels]``, or with channels before positions, and their dimension.

    Args:
        value: The input of a weight.
        dim: The dimension that is contracted, counted from the end.
        sequences: How many sequences the batch has.
    """
    if dim != -1:
        return value.reshape(-1, *value.shape[dim:]).flatten(2), 1
    if value.dim() > 2 and value.shape[0] != sequences and value.shape[1] == sequences:
        value = value.transpose(0, 1)  # positions first, as nn.MultiheadAttention has it
    share = sequences if value.shape[:-1].numel() % sequences == 0 else 1
    return value.reshape(share, -1, value.shape[-1]), 2


def visible_rows(value: Tensor, dim: int, batch: Batch) -> Tensor | None:
    """Return which positions of an input are no padding, in the order in which it holds them, ``[positions]`` bool.

    Args:
        value: The input of a weight.
        dim: The dimension that is contracted, counted from the end.
        batch: The batch that runs.

    Returns:
        The positions; ``None`` if nothing is padding, or the input does not have the positions of the batch.

    >>> batch = Batch((), {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    >>> visible_rows(torch.zeros(2, 3, 4), -1, batch).tolist()
    [True, True, True, True, False, False]
    >>> visible_rows(torch.zeros(3, 2, 4), -1, batch).tolist()  # positions first
    [True, True, True, False, True, False]
    """
    mask = visible_positions(batch)
    if mask is None or dim != -1 or value.dim() < 2:
        return None
    if value.shape[:-1] == mask.shape:
        return mask.flatten().cpu()
    if value.shape[:-1] == mask.T.shape:
        return mask.T.flatten().cpu()
    return mask.flatten().cpu() if value.dim() == 2 and len(value) == mask.numel() else None


def _moments(rows: Tensor, channels: int, mask: Tensor | None) -> Moments:
    """Return sums over the sequences and positions of ``rows``; float32 within a chunk, float64 between chunks."""
    positions = 3 - channels
    hidden = None if mask is None else ~mask.to(rows.device)
    # Memory that is reused: fresh memory costs as much as the sums. Sums depend on the layout, which copies have anew.
    reuse = rows.is_contiguous()
    step = max(1, CHUNK // max(1, rows[0].numel())) if rows.device.type == "cpu" and len(rows) else max(1, len(rows))
    sums = [_sums(strip, channels, step, hidden, reuse) for strip in rows.split(_strip(rows, channels), channels)]
    total, square = torch.cat([one for one, _ in sums], 1), torch.cat([one for _, one in sums])
    if mask is None:
        means, count, sequences = total / max(1, rows.shape[positions]), len(rows) * rows.shape[positions], len(rows)
    else:
        lengths = mask.sum(1)  # where the mask is on the CPU, the host waits for no device
        means = total / lengths.to(total.device, torch.float64).clamp_min(1)[:, None]
        count, sequences = int(lengths.sum()), int((lengths > 0).sum())
    return Moments(count, total.sum(0), square, sequences, means.sum(0), means.square().sum(0))


def _strip(rows: Tensor, channels: int) -> int:
    """Return how many channels are summed at a time: so many that a sequence fits the cache, or all.

    A thread sums columns in groups of GROUP, and those that are left over in another order. So channels are split only
    where nothing is left over in any thread, neither in the whole nor in a strip.
    """
    width, group = rows.shape[channels], GROUP * torch.get_num_threads()
    splits = rows.device.type == "cpu" and channels == 2 and rows.is_contiguous() and width % group == 0
    if not splits or not len(rows) or rows[0].numel() <= CHUNK:
        return max(1, width)
    return max(1, CHUNK // rows.shape[1] // group) * group


def _sums(rows: Tensor, channels: int, step: int, hidden: Tensor | None, reuse: bool) -> tuple[Tensor, Tensor]:
    """Return float64 sums: of each sequence, ``[sequences, channels]``, and of all squares, ``[channels]``."""
    positions = 3 - channels
    home = torch.device("cpu") if rows.device.type == "mps" else rows.device
    totals, square = [], torch.zeros(rows.shape[channels], dtype=torch.float64, device=home)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    room = torch.empty((min(step, len(rows)), *rows.shape[1:]), dtype=wide, device=rows.device) if reuse else None
    for index, part in enumerate(rows.split(step)):
        own = None if room is None else room[: len(part)]
        if part.dtype != wide:
            part = part.to(wide) if own is None else own.copy_(part)
        if hidden is not None:
            part = part.masked_fill(hidden[index * step : index * step + len(part), :, None], 0)
        totals.append(part.sum(positions).to(home, torch.float64))
        squares = part * part if own is None else torch.mul(part, part, out=own)
        square += squares.sum((0, positions)).to(home, torch.float64)
    return torch.cat(totals), square
