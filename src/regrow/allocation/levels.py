"""The three levels of a search (operations, filters, weights) as flat vectors, and the cost under masks.

Where gradients flow, entries are picked by ``index_select``: on several threads, the gradient of ``x[i]`` adds up in a
varying order, so that runs could not be reproduced. Networks of more than ``ENTRYWISE`` entries are priced and masked
tensor by tensor, unless single weights are searched: the same numbers but for rounding, without vectors. Without
gradients, smaller ones with large tensors are priced so too, if prices are whole numbers. Thresholds are learned as in
Dynamic Sparse Training (Liu et al., ICLR 2020; read in its authors' code).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regrow.allocation.cost import enclosing_modules, prices_in
from regrow.allocation.latency import Latency, TimeCurves, build_times
from regrow.core.amounts import Measure
from regrow.core.axes import AxisGraph, Role
from regrow.core.axes.operations import Branch

GRANULARITIES = ("operations", "filters", "weights")  # from the coarsest to the finest
# The most entries of a network that is priced and masked entry by entry where only operations and filters are
ENTRYWISE = 2**24
# The mean number of entries of a tensor above which pricing tensors is faster than pricing entries
_LARGE = 2**12


@dataclass(frozen=True)
class TensorLayout:
    """Which filters and operations the entries of one parameter belong to, and what they cost.

    Args:
        shape: The parameter's shape.
        makes: A dimension, and the index of the filter that each position along it makes, ``[size]``; ``None``: none.
        reads: A dimension, and the index of the filter that each position along it reads, ``[size]``; ``None``: none.
        ops: The index of the operation that each entry lies in, ``[entries]``, or one for all, ``[1]``.
        price: The cost of each entry, ``[entries]`` float64, or one for all, ``[1]``.
    """

    shape: torch.Size
    makes: tuple[int, Tensor] | None
    reads: tuple[int, Tensor] | None
    ops: Tensor
    price: Tensor

    @property
    def entries(self) -> int:
        """The number of entries."""
        return self.shape.numel()

    def spread(self, line: tuple[int, Tensor] | None, default: int) -> Tensor:
        """Return each entry's filter, ``[entries]``, by ``makes`` or ``reads`` (``line``); ``default`` for ``None``."""
        if line is None:
            return torch.full((self.entries,), default, device=self.price.device)
        dim, filters = line
        return self.along(dim, filters).expand(self.shape).reshape(-1)

    def along(self, dim: int, values: Tensor) -> Tensor:
        """Return ``values``, one per position of dimension ``dim``, in a shape that broadcasts to the parameter's."""
        return values.view([-1 if d == dim else 1 for d in range(len(self.shape))])

    def size(self, ops: Tensor, filters: Tensor) -> Tensor:
        """Return the parameter's cost, ``[]`` float64; both masks end with a 1 for "none", ``filters`` is float64."""
        if self.makes and self.reads and self.makes[0] == self.reads[0]:  # one dimension makes and reads filters
            both = filters.index_select(0, self.makes[1]) * filters.index_select(0, self.reads[1])
            count = both.sum() * (self.entries / max(1, len(both)))
        else:
            count = filters.new_tensor(float(self.entries))
            for _, line in filter(None, (self.makes, self.reads)):
                count = count * filters.index_select(0, line).sum() / max(1, len(line))
        share = ops.index_select(0, self.ops) * self.price
        return share.sum() * count / max(len(self.ops), len(self.price))


@dataclass(frozen=True)
class Levels:
    """Which filter (unit of an axis), operation and weight every parameter entry belongs to, and its cost.

    Args:
        weights: Names of the parameters that can be masked: those that read filters, and those in
            ``AxisGraph.counted``; N entries in all.
        layouts: The layouts of ``weights``, and then of all other parameters, of M entries.
        axes: Axis key → the index of its first filter among all filters.
        filters: How many filters there are.
        rest: The cost of the network that no entry accounts for.
        sparse: Whether a weight of 0 costs nothing (measure ``nonzero``); dense kernels and files do not save it.
        times: The times of modules, if the cost is time; prices of entries are 0 then.
    """

    weights: tuple[str, ...]
    layouts: tuple[TensorLayout, ...]
    axes: Mapping[str, int]
    filters: int
    rest: float = 0.0
    sparse: bool = False
    times: TimeCurves | None = None

    @property
    def maskable_layouts(self) -> tuple[TensorLayout, ...]:
        """The layouts of the parameters that can be masked, ``weights``: the first of ``layouts``."""
        return self.layouts[: len(self.weights)]

    @property
    def entries(self) -> int:
        """N, the number of entries of ``weights``."""
        return sum(tensor.entries for tensor in self.maskable_layouts)

    @cached_property
    def all_entries(self) -> int:
        """N + M, the number of all entries."""
        return sum(tensor.entries for tensor in self.layouts)

    @property
    def entrywise(self) -> bool:
        """Whether the network is small enough to be priced and masked entry by entry."""
        return self.all_entries <= ENTRYWISE

    @cached_property
    def reads(self) -> Tensor:
        """The index of the filter that each entry of a weight reads, ``[N]``; ``filters`` if none."""
        return _concat([tensor.spread(tensor.reads, self.filters) for tensor in self.maskable_layouts])

    @cached_property
    def makes(self) -> Tensor:
        """The index of the filter that each entry makes, ``[N + M]``; ``filters`` if none."""
        return _concat([tensor.spread(tensor.makes, self.filters) for tensor in self.layouts])

    @cached_property
    def ops(self) -> Tensor:
        """The index of the operation that each entry lies in, ``[N + M]``; the number of operations if none."""
        return _concat([tensor.ops.expand(tensor.entries) for tensor in self.layouts])

    @cached_property
    def weight(self) -> Tensor:
        """The index in ``weights`` of the tensor that each entry lies in, ``[N]``."""
        return _concat([tensor.ops.new_full((tensor.entries,), i) for i, tensor in enumerate(self.maskable_layouts)])

    @cached_property
    def price(self) -> Tensor:
        """The cost of each entry, ``[N + M]`` float64."""
        return _concat([tensor.price.expand(tensor.entries) for tensor in self.layouts], torch.float64)

    def precompute(self) -> None:
        """Compute and cache the vectors of a network that is priced entry by entry, so that no step has to."""
        if self.entrywise:
            _ = self.reads, self.makes, self.ops, self.weight, self.price

    def flat(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return all maskable weights as one vector, ``[N]``, from name → parameter."""
        return torch.cat([parameters[name].reshape(-1) for name in self.weights])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a vector ``[N]`` into weights, name → tensor: the inverse of :meth:`flat`."""
        parts = flat.split([tensor.entries for tensor in self.maskable_layouts])
        rows = zip(self.weights, parts, self.maskable_layouts, strict=True)
        return {name: part.view(tensor.shape) for name, part, tensor in rows}

    def relative(self, flat: Tensor, active: Tensor) -> Tensor:
        """Return each weight's magnitude relative to its tensor's mean, ``[N]``, so one threshold suits all layers.

        The mean is over weights between active filters (``active``, ``[N]`` bool) alone, so that it does not change
        when the others are cut.
        """
        size, counted = flat.detach().abs(), active.to(flat.dtype)
        zeros = size.new_zeros(len(self.weights))
        total, count = zeros.index_add(0, self.weight, size * counted), zeros.index_add(0, self.weight, counted)
        return size / (total / count.clamp_min(1)).clamp_min(1e-12)[self.weight]

    def replace_weights(
        self, parameters: Mapping[str, Tensor], flat: Tensor | None, filters: Tensor, over_by: Tensor | None
    ) -> dict[str, Tensor]:
        """Return name → weight times the scale, in ``filters``, of the filters that it reads; 0 below its threshold.

        ``flat``: all weights, ``[N]``, masked where ``over_by`` (how far each is above its threshold; ``None``: no
        mask) is below 0. ``flat=None``: only the weights of ``parameters`` that read filters, without a mask.
        """
        scale, result = _append_one(filters), {}
        if flat is not None:
            scaled = flat * scale.index_select(0, self.reads)
            return self.unflatten(scaled if over_by is None else keep_above(scaled, over_by))
        for name, tensor in zip(self.weights, self.maskable_layouts, strict=True):
            if tensor.reads:
                dim, line = tensor.reads
                result[name] = parameters[name] * tensor.along(dim, scale.index_select(0, line))
        return result

    def active(self, ops: Tensor, filters: Tensor) -> Tensor:
        """Return which weights lie in active operations and between active filters, by their masks, ``[N]`` bool."""
        n, active = len(self.reads), _append_one(filters) > 0
        return (_append_one(ops) > 0)[self.ops[:n]] & active[self.makes[:n]] & active[self.reads]

    def size(self, ops: Tensor, filters: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the cost under masks, ``[]``; that of weights, ``[N]``, counts only if the measure is ``nonzero``."""
        op_masks, filter_masks = _append_one(ops), _append_one(filters)
        if self.times:
            return self.times.total(op_masks, filter_masks)
        exact = not (ops.requires_grad or filters.requires_grad)  # added up without rounding
        by_tensor = not self.entrywise or (exact and self.all_entries > _LARGE * len(self.layouts))
        if by_tensor and (weights is None or not self.sparse):
            wide = filter_masks.double()
            return torch.stack([layout.size(op_masks, wide) for layout in self.layouts]).sum() + self.rest
        alive = op_masks.index_select(0, self.ops) * filter_masks.index_select(0, self.makes)
        n = len(self.reads)
        inner = alive[:n] * filter_masks.index_select(0, self.reads)
        if weights is not None and self.sparse:
            inner = inner * weights
        return (inner * self.price[:n]).sum() + (alive[n:] * self.price[n:]).sum() + self.rest


def check_levels(searched: Collection[str], measure: Measure) -> None:
    """Raise ValueError unless all are granularities; or if zeros of the ``"weights"`` searched count in ``measure``."""
    if not searched or not {*searched} <= {*GRANULARITIES}:
        raise ValueError(f"levels are some of {', '.join(GRANULARITIES)}; got {', '.join(searched) or 'none'}")
    if "weights" in searched and measure != Measure.NONZERO:
        raise ValueError(
            f"a weight that is 0 counts in {measure} like any other, so weights cannot be searched for such a target; "
            f"got {', '.join(searched)}: leave weights out, or take a target in nonzero"
        )


def build_levels(
    axes: AxisGraph,
    parameters: Mapping[str, Tensor],
    candidates: Mapping[str, Sequence[str]],
    measure: Measure,
    latency: Latency | None,
    blocks: Mapping[str, Branch],
) -> Levels:
    """Return what ties a network's ``parameters`` to operations, filters and weights, and what they cost.

    ``candidates``: path of a sum → paths of its operations; ``latency``: measured times, if ``measure`` is time;
    ``blocks``: path → branch, the operations after those of ``candidates``.
    """
    names = [name for name in parameters if name in axes.shapes]
    free = (axis for axis in axes.units() if not axis.count and axis.multiple == 1)
    units = [axis for axis in free if any(slot.name in parameters for slot in axis.consumers())]
    reading = {slot.name for axis in units for slot in axis.consumers()}
    weights = [name for name in names if name in axes.parameters and (name in reading or name in axes.counted)]
    first: dict[str, int] = {}
    lines: dict[tuple[str, bool], tuple[int, Tensor]] = {}
    filters = 0
    for axis in units:
        slots = [(slot, slot.role is Role.CONSUMES) for slot in axis.slots if slot.name in parameters]
        if any(lines.get((slot.name, reads), (slot.dim,))[0] != slot.dim for slot, reads in slots):
            continue  # an entry would read filters of two axes
        first[axis.key] = filters
        for slot, reads in slots:
            many = parameters[slot.name].shape[slot.dim]
            _, line = lines.setdefault((slot.name, reads), (slot.dim, torch.full((many,), -1)))
            positions = slot.positions(axis.size)
            line[positions] = filters + torch.arange(axis.size)[:, None].expand_as(positions)
        filters += axis.size
    for _, line in lines.values():
        line[line < 0] = filters  # none

    numbers = {path: i for i, path in enumerate(path for paths in candidates.values() for path in paths)}
    count = len(numbers) + len(blocks)
    for i, block in enumerate(blocks.values(), len(numbers)):
        numbers |= dict.fromkeys(block.placeholders, i)
    scales = {f"{path}.scale".lstrip("."): paths for path, paths in candidates.items()}
    prices = prices_in(axes, measure, numbers)
    maskable, tensors = {*weights}, []
    for name in [*weights, *(name for name in names if name not in maskable)]:
        price = torch.tensor([prices.entries.get(name, 0.0)], dtype=torch.float64)
        if paths := scales.get(name):  # which also carries what operations cost alone
            ops = [numbers[path] for path in paths]
            price = price + torch.tensor([prices.ops.get(path, 0.0) for path in paths])
        else:
            ops = [next((numbers[path] for path in enclosing_modules(name) if path in numbers), count)]
        read = lines.get((name, True)) if name in maskable else None
        tensors.append(TensorLayout(parameters[name].shape, lines.get((name, False)), read, torch.tensor(ops), price))
    for path in (path for block in blocks.values() for path in block.placeholders if prices.ops.get(path)):
        price = torch.tensor([prices.ops[path]], dtype=torch.float64)  # of work without weights
        tensors.append(TensorLayout(torch.Size([1]), None, None, torch.tensor([numbers[path]]), price))
    times = build_times(latency, parameters, lines, filters, candidates, numbers) if latency else None
    return Levels(tuple(weights), tuple(tensors), first, filters, prices.rest, measure == Measure.NONZERO, times)


def _append_one(values: Tensor) -> Tensor:
    """Return a mask with a 1 behind it, for entries that have no operation or filter."""
    return torch.cat([values, values.new_ones(1)])


def _concat(parts: Sequence[Tensor], dtype: torch.dtype = torch.long) -> Tensor:
    """Return vectors one behind the other; of none, an empty one of ``dtype``."""
    return torch.cat([*parts]) if parts else torch.zeros(0, dtype=dtype)


def margin(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return abs(weight) − threshold; ``threshold`` has one entry per output unit (dimension 0), or a single one."""
    return weight.abs().sub_(threshold.reshape(-1, *[1] * (weight.dim() - 1)))


def surrogate(x: Tensor) -> Tensor:
    """Return the surrogate derivative of step(x): 2 − 4 abs(x) for abs(x) ≤ 0.4, 0.4 for abs(x) ≤ 1, 0 beyond.

    >>> surrogate(torch.tensor([0.0, 0.25, -0.5, 2.0])).tolist()
    [2.0, 1.0, 0.4000000059604645, 0.0]
    """
    size = x.abs()
    return torch.rsub(size, 2, alpha=4).clamp_min_(0.4).mul_(size.le_(1))  # in its format: bool is slower


def apply_threshold(weight: Tensor, threshold: Tensor, owned: Tensor) -> Tensor:
    """Return weights with 0 where their magnitude is below their threshold; they get the dense gradient.

    The weight's gradient is taken as if nothing were left out: a weight of exactly 0 under a strict step would never
    get one again. ``threshold`` is that of :func:`margin`; its gradient is Σ −g · w · surrogate(|w| − t) over the
    entries that are not ``owned``; those that are (1; others 0) count as far above, and are never masked.

    >>> w, t = torch.tensor([[0.5, -0.1, 0.0]], requires_grad=True), torch.tensor([0.2], requires_grad=True)
    >>> y = apply_threshold(w, t, torch.zeros(1, 3))
    >>> y.sum().backward()
    >>> y.tolist(), w.grad.tolist(), round(t.grad.item(), 3)
    ([[0.5, -0.0, 0.0]], [[1.0, 1.0, 1.0]], -0.24)
    """
    return keep_above(weight, margin(weight.detach(), threshold).add_(owned, alpha=torch.finfo(weight.dtype).max))


def step_mask(over_by: Tensor) -> Tensor:
    """Return 1 where ``over_by`` is at least 0, else 0; the backward pass uses the surrogate gradient."""
    return keep_above(over_by.new_ones(()), over_by)


def keep_above(values: Tensor, over_by: Tensor) -> Tensor:
    """Return values where ``over_by`` is at least 0, else 0.

    The gradient of the values is dense, as if none were masked; that of ``over_by`` is the surrogate's.
    """
    result: Tensor = _KeepAbove.apply(values, over_by)
    return result


class _KeepAbove(torch.autograd.Function):
    """The function and gradients of :func:`keep_above`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, over_by: Tensor) -> Tensor:
        """Return values where ``over_by`` is at least 0, else 0."""
        ctx.save_for_backward(values, over_by)
        return torch.ge(over_by, 0, out=torch.empty_like(over_by)).mul_(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dense gradient of the values and the surrogate's of ``over_by``."""
        values, over_by = ctx.saved_tensors
        return gradient, surrogate(over_by).mul_(values).mul_(gradient)
