"""The three levels of a search (operations, filters, weights) as flat vectors, and the cost under masks.

For every entry of every parameter there is the index of the filter it makes, of the filter it reads, and of the
operation it lies in. So masks and costs of all levels take a few operations on long vectors.

Where gradients flow, entries are picked by ``index_select``: on several threads, the gradient of ``x[i]`` adds up in
a varying order, so that runs could not be reproduced. Networks of more than ``ENTRYWISE`` entries are priced and masked
tensor by tensor instead, unless single weights are searched: the same numbers but for rounding, without the vectors.
Where there are no gradients, smaller networks with large tensors are priced so too, if prices are whole numbers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from regrow.allocation.tensor_layout import TensorLayout
from regrow.allocation.thresholds import keep_above
from regrow.allocation.timed import Prices, above, count_macs
from regrow.core.amounts import Measure
from regrow.core.axes import AxisGraph, Role

ENTRYWISE = 2**24
"""The most entries of a network that is priced and masked entry by entry where only operations and filters are."""
_LARGE = 2**12
"""The mean number of entries of a tensor above which pricing tensors is faster than pricing entries."""


@dataclass(frozen=True)
class Levels:
    """Which filter, operation and weight every parameter entry belongs to, and its cost.

    Args:
        weights: Names of the parameters that can be masked: those that read filters, and those in
            ``AxisGraph.counted``; N entries in all.
        tensors: The layouts of ``weights``, and of all other parameters, of M entries.
        axes: Axis key → the index of its first filter among all filters.
        filters: How many filters there are.
        rest: The cost of the network that no entry accounts for.
        sparse: Whether a weight of 0 costs nothing (measure ``nonzero``); dense kernels and files do not save it.
        timed: Whether the cost is time, of which operations without weights take some too.
    """

    weights: tuple[str, ...]
    tensors: tuple[TensorLayout, ...]
    axes: Mapping[str, int]
    filters: int
    rest: float = 0.0
    sparse: bool = False
    timed: bool = False

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of ``weights``."""
        return tuple(one.shape for one in self.tensors[: len(self.weights)])

    @property
    def entries(self) -> int:
        """N, the number of entries of ``weights``."""
        return sum(map(prod, self.shapes))

    @cached_property
    def every(self) -> int:
        """N + M, the number of all entries."""
        return sum(prod(one.shape) for one in self.tensors)

    @property
    def entrywise(self) -> bool:
        """Whether the network is small enough to be priced and masked entry by entry."""
        return self.every <= ENTRYWISE

    @cached_property
    def reads(self) -> Tensor:
        """The filter that each entry of a weight reads, ``[N]``; ``filters`` if none."""
        return _join([one.spread(one.reads, self.filters) for one in self.tensors[: len(self.weights)]])

    @cached_property
    def makes(self) -> Tensor:
        """The filter that each entry makes, ``[N + M]``; ``filters`` if none."""
        return _join([one.spread(one.makes, self.filters) for one in self.tensors])

    @cached_property
    def ops(self) -> Tensor:
        """The operation that each entry lies in, ``[N + M]``; the number of operations if none."""
        return _join([one.ops.expand(prod(one.shape)) for one in self.tensors])

    @cached_property
    def weight(self) -> Tensor:
        """The index in ``weights`` of the tensor that each entry lies in, ``[N]``."""
        own = enumerate(self.tensors[: len(self.weights)])
        return _join([one.ops.new_full((prod(one.shape),), i) for i, one in own])

    @cached_property
    def price(self) -> Tensor:
        """The cost of each entry, ``[N + M]`` float64."""
        return _join([one.price.expand(prod(one.shape)) for one in self.tensors], torch.float64)

    def precompute(self) -> None:
        """Compute the vectors of a network that is priced entry by entry, which would else be made within a step."""
        if self.entrywise:
            _ = self.reads, self.makes, self.ops, self.weight, self.price

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

    def relative(self, flat: Tensor, active: Tensor) -> Tensor:
        """Return each weight's magnitude relative to its tensor's mean, ``[N]``, so one threshold suits all layers.

        Args:
            flat: The weights, ``[N]``.
            active: Which weights lie between active filters, ``[N]`` bool: the mean is over those alone, so that it
                does not change when the others are cut.
        """
        size, here = flat.detach().abs(), active.to(flat.dtype)
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

    def replace_weights(
        self, parameters: Mapping[str, Tensor], flat: Tensor | None, filters: Tensor, over_by: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the weights under their masks (:meth:`masked`), by name.

        Args:
            parameters: Name → tensor.
            flat: All weights in one vector, ``[N]``; ``None``: the network is masked tensor by tensor.
            filters: The scale of each filter, ``[filters]``.
            over_by: How far each weight is above its threshold, ``[N]``; ``None`` if weights are not masked.
        """
        if flat is not None:
            return self.apart(self.masked(flat, filters, over_by))
        scale = torch.cat([filters, filters.new_ones(1)])
        pairs = zip(self.weights, self.tensors, strict=False)
        lines = {name: (one, *one.reads) for name, one in pairs if one.reads}
        return {
            name: parameters[name] * one.along(dim, scale.index_select(0, line))
            for name, (one, dim, line) in lines.items()
        }

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
        whole = not (self.timed or ops.requires_grad or filters.requires_grad)  # added up without rounding
        fast = not self.entrywise or (whole and self.every > _LARGE * len(self.tensors))
        if fast and (weights is None or not self.sparse):
            every, wide = torch.cat([ops, ops.new_ones(1)]), here.double()
            return torch.stack([one.size(every, wide) for one in self.tensors]).sum() + self.rest
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
        timed: The milliseconds of entries and operations; required if the measure is time.
    """
    names = [name for name in parameters if name in axes.shapes]
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

    def line_of(name: str, reads: bool) -> tuple[int, Tensor] | None:
        if (name, reads) not in lines:
            return None
        dim, line = lines[name, reads]
        return dim, torch.where(line < 0, filters, line)

    of = {path: i for i, path in enumerate(path for paths in candidates.values() for path in paths)}
    lies = [next((of[path] for path in above(name) if path in of), len(of)) for name in order]
    paths = {f"{path}.scale".lstrip("."): own for path, own in candidates.items()}
    scales = {name: [of[one] for one in own] for name, own in paths.items()}
    prices = _prices(axes, measure, timed, of)
    readers = {*weights}
    return Levels(
        weights=tuple(weights),
        tensors=tuple(
            TensorLayout(
                parameters[name].shape,
                line_of(name, False),
                line_of(name, True) if name in readers else None,
                torch.tensor(scales.get(name, [at])),
                _price(prices, name, paths.get(name, ())),
            )
            for name, at in zip(order, lies, strict=True)
        ),
        axes=places,
        filters=filters,
        rest=prices.rest,
        sparse=measure == Measure.NONZERO,
        timed=measure == Measure.TIME,
    )


def _join(parts: Sequence[Tensor], dtype: torch.dtype = torch.long) -> Tensor:
    return torch.cat([*parts]) if parts else torch.zeros(0, dtype=dtype)


def _price(prices: Prices, name: str, ops: Sequence[str]) -> Tensor:
    """Return the cost of a parameter's entries; those of a ``scale`` also carry what their operation costs alone."""
    own = torch.full((len(ops) or 1,), prices.entries.get(name, 0.0), dtype=torch.float64)
    return own + torch.tensor([prices.ops.get(path, 0.0) for path in ops]) if ops else own


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
