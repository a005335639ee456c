"""The three levels of a search (operations, filters, weights) as flat vectors, and the cost under masks.

For every entry of every parameter there is the index of the filter it makes, of the filter it reads, and of the
operation it lies in. So masks and costs of all levels take a few operations on long vectors.

Where gradients flow, entries are picked by ``index_select``: on several threads, the gradient of ``x[i]`` adds up in
a varying order, so that runs could not be reproduced.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.allocation.thresholds import keep_above
from regrow.allocation.timed import Prices, above, count_macs
from regrow.amounts import Measure
from regrow.axes import AxisGraph, Role


@dataclass(frozen=True)
class Levels:
    """Index vectors that say which filter, operation and weight every parameter entry belongs to, and its cost.

    Args:
        weights: Names of the parameters that can be masked: those that read filters, and those in
            ``AxisGraph.counted``; N entries in all.
        shapes: The shapes of ``weights``.
        axes: Axis key → the index of its first filter among all filters.
        filters: How many filters there are.
        reads: The filter that each entry of a weight reads, ``[N]``; ``filters`` if none.
        makes: The filter that each entry makes, ``[N + M]``, the M entries of other parameters included; ``filters`` if
            none.
        ops: The operation that each entry lies in, ``[N + M]``; the number of operations if none.
        weight: The index in ``weights`` of the tensor that each entry lies in, ``[N]``.
        price: The cost of each entry, ``[N + M]`` float64.
        rest: The cost of the network that no entry accounts for.
        sparse: Whether a weight of 0 costs nothing (measure ``nonzero``); dense kernels and files do not save it.
        timed: Whether the cost is time, of which operations without weights take some too.
    """

    weights: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    axes: Mapping[str, int]
    filters: int
    reads: Tensor
    makes: Tensor
    ops: Tensor
    weight: Tensor
    price: Tensor
    rest: float = 0.0
    sparse: bool = False
    timed: bool = False

    def flat(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Concatenate all maskable weights into one vector, ``[N]``.

        Args:
            parameters: Name → tensor.
        """
        return torch.cat([parameters[name].reshape(-1) for name in self.weights])

    def apart(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a vector ``[N]`` into tensors by name: the inverse of :meth:`flat`.

        Args:
            flat: The vector, ``[N]``.
        """
        parts = flat.split([shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.weights, parts, self.shapes, strict=True)}

    def relative(self, flat: Tensor, stands: Tensor) -> Tensor:
        """Return each weight's magnitude relative to its tensor's mean, ``[N]``, so one threshold suits all layers.

        Args:
            flat: The weights, ``[N]``.
            stands: Which weights lie between active filters, ``[N]`` bool: the mean is over those alone, so that it
                does not change when the others are cut.
        """
        size, here = flat.detach().abs(), stands.to(flat.dtype)
        none = size.new_zeros(len(self.weights))
        total, many = none.index_add(0, self.weight, size * here), none.index_add(0, self.weight, here)
        return size / (total / many.clamp_min(1)).clamp_min(1e-12)[self.weight]

    def masked(self, flat: Tensor, filters: Tensor, over_by: Tensor | None) -> Tensor:
        """Return the weights times the scale of the filter they read, and 0 below their threshold, ``[N]``.

        Args:
            flat: The weights, ``[N]``.
            filters: The scale of each filter, ``[filters]``.
            over_by: How far each weight is above its threshold, ``[N]``; ``None`` if weights are not masked.
        """
        scaled = flat * torch.cat([filters, filters.new_ones(1)]).index_select(0, self.reads)
        return scaled if over_by is None else keep_above(scaled, over_by)

    def standing(self, ops: Tensor, filters: Tensor) -> Tensor:
        """Return which weights lie in active operations and between active filters, ``[N]`` bool.

        Args:
            ops: Mask of operations, ``[operations]``.
            filters: Mask of filters, ``[filters]``.
        """
        n = len(self.reads)
        here = torch.cat([filters, filters.new_ones(1)]) > 0
        inside = (torch.cat([ops, ops.new_ones(1)]) > 0)[self.ops[:n]]
        return inside & here[self.makes[:n]] & here[self.reads]

    def size(self, ops: Tensor, filters: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the network's cost under masks: Σ over entries of price · its operation · its filters · itself.

        Args:
            ops: Mask of operations, ``[operations]``.
            filters: Mask of filters, ``[filters]``.
            weights: Mask of weights, ``[N]``; ``None`` for all.

        Returns:
            A scalar that is differentiable with respect to the masks.
        """
        here = torch.cat([filters, filters.new_ones(1)])
        alive = torch.cat([ops, ops.new_ones(1)]).index_select(0, self.ops) * here.index_select(0, self.makes)
        n = len(self.reads)
        inner = alive[:n] * here.index_select(0, self.reads)
        if weights is not None and self.sparse:
            inner = inner * weights
        return (inner * self.price[:n]).sum() + (alive[n:] * self.price[n:]).sum() + self.rest


def counted_tensors(model: nn.Module, measure: Measure) -> dict[str, Tensor]:
    """Return the tensors that a measure counts, by name: parameters, tied ones once; for bytes buffers too.

    Args:
        model: The network.
        measure: The measure.
    """
    result: dict[str, Tensor] = dict(model.named_parameters())
    if measure == Measure.BYTES:
        stored = model.state_dict().keys()
        result |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return result


def check_levels(searched: Collection[str], measure: Measure) -> None:
    """Raise ValueError if weights are searched under a target that counts zero weights like any other.

    Args:
        searched: The levels that are searched: ``"operations"``, ``"filters"``, ``"weights"``.
        measure: What the target counts.

    Raises:
        ValueError: If weights are searched and the measure is not ``nonzero``.
    """
    if "weights" in searched and measure != Measure.NONZERO:
        raise ValueError(
            f"a weight that is 0 counts in {measure} like any other, so weights cannot be searched for such a target; "
            f"got {', '.join(searched)}: leave weights out, or take a target in nonzero"
        )


def levels(
    axes: AxisGraph,
    parameters: Mapping[str, Tensor],
    candidates: Mapping[str, Sequence[str]],
    *,
    measure: Measure = Measure.PARAMETERS,
    counts: Callable[[str], bool] = lambda name: True,
    timed: Prices | None = None,
) -> Levels:
    """Build the index vectors and costs of a network's operations, filters and weights.

    Args:
        axes: The network's axes.
        parameters: Its parameters, tied ones once; and, where bytes are counted, the buffers of its state.
        candidates: Path of each sum of candidate operations → the paths of its operations, in order; operations are
            numbered from 0 across all sums.
        measure: What an entry costs: 1, the multiply–accumulates per example that it takes part in, its bytes, or
            milliseconds.
        counts: Function: whether a parameter counts (a stage of a search runs only a part of the network).
        timed: The milliseconds of entries and operations; required if the measure is time.
    """
    names = [name for name in parameters if counts(name) and name in axes.shapes]
    units = [
        axis
        for axis in axes.units()
        if any(slot.name in parameters for slot in axis.consumers()) and not axis.count and axis.multiple == 1
    ]
    reading = {slot.name for axis in units for slot in axis.consumers()}
    weights = [name for name in names if name in axes.parameters and (name in reading or name in axes.counted)]
    order = [*weights, *(name for name in names if name not in {*weights})]
    places: dict[str, int] = {}
    lines: dict[tuple[str, bool], tuple[int, Tensor]] = {}
    filters = 0
    for axis in units:
        slots = [(slot, slot.role is Role.CONSUMES) for slot in axis.slots if slot.name in parameters]
        if any(lines.get((slot.name, reads), (slot.dim,))[0] != slot.dim for slot, reads in slots):
            continue  # an entry would read filters of two axes
        places[axis.key] = filters
        for slot, reads in slots:
            many = parameters[slot.name].shape[slot.dim]
            _, line = lines.setdefault((slot.name, reads), (slot.dim, torch.full((many,), -1)))
            at = slot.positions(axis.size)
            line[at] = filters + torch.arange(axis.size)[:, None].expand_as(at)
        filters += axis.size

    def laid(name: str, reads: bool) -> Tensor:
        shape = parameters[name].shape
        if (name, reads) not in lines:
            return torch.full(shape, filters).reshape(-1)
        dim, line = lines[name, reads]
        return (
            torch.where(line < 0, filters, line)
            .view([-1 if d == dim else 1 for d in range(len(shape))])
            .expand(shape)
            .reshape(-1)
        )

    of = {path: i for i, path in enumerate(path for paths in candidates.values() for path in paths)}
    lies = [next((of[path] for path in above(name) if path in of), len(of)) for name in order]
    paths = {f"{path}.scale".lstrip("."): own for path, own in candidates.items()}
    scales = {name: [of[one] for one in own] for name, own in paths.items()}
    numbers = [parameters[name].numel() for name in order]
    prices = _prices(axes, measure, timed, of)

    return Levels(
        weights=tuple(weights),
        shapes=tuple(parameters[name].shape for name in weights),
        axes=places,
        filters=filters,
        reads=torch.cat([laid(name, True) for name in weights]),
        makes=torch.cat([laid(name, False) for name in order]),
        ops=torch.cat(
            [torch.tensor(scales.get(name, [at] * n)) for name, at, n in zip(order, lies, numbers, strict=True)]
        ),
        weight=torch.arange(len(weights)).repeat_interleave(torch.tensor(numbers[: len(weights)])),
        price=_price(prices, dict(zip(order, numbers, strict=True)), paths),
        rest=prices.rest,
        sparse=measure == Measure.NONZERO,
        timed=measure == Measure.TIME,
    )


def _price(prices: Prices, numbers: Mapping[str, int], sums: Mapping[str, Sequence[str]]) -> Tensor:
    """Return the cost of each entry; entries of ``scale`` also carry what their operation costs by itself."""
    parts = []
    for name, n in numbers.items():
        own = torch.full((n,), prices.entries.get(name, 0.0), dtype=torch.float64)
        parts.append(own + torch.tensor([prices.ops.get(path, 0.0) for path in sums[name]]) if name in sums else own)
    return torch.cat(parts)


def _prices(axes: AxisGraph, measure: Measure, timed: Prices | None, ops: Collection[str]) -> Prices:
    match measure:
        case Measure.PARAMETERS | Measure.NONZERO:
            return Prices(dict.fromkeys(axes.shapes, 1.0))
        case Measure.BYTES:
            return Prices({name: float(axes.itemsize.get(name, 4)) for name in axes.shapes})
        case Measure.TIME:
            if timed is None:
                raise ValueError("how long operations take was not measured: evaluation.latency(…) does it")
            return timed
        case Measure.CACHE | Measure.WEIGHTS:
            raise ValueError(f"a search does not count {measure}; count params, nonzero, macs, bytes or ms")
    return count_macs(axes, ops)
