"""Masks of operations, filters and weights in a search: importances compared with learned thresholds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from regrow.allocation.latency import Latency
from regrow.allocation.levels import Levels, build_levels, step_mask
from regrow.core.amounts import Measure
from regrow.core.axes import AxisGraph
from regrow.core.axes.operations import Branch, lies_in
from regrow.core.candidates import candidate_paths, tied_operations

# A margin so far below 0 that the surrogate gradient of the step function vanishes there
NEVER = -2.0

# Added to every threshold, so that a threshold of 0 removes what has importance 0
_EPS = 1e-6


@dataclass(frozen=True)
class GateMasks:
    """The masks of operations, filters and weights at one moment of a search; 1 keeps, 0 removes.

    Args:
        ops: The mask of operations, ``[operations]``.
        filters: The mask of filters, ``[filters]``.
        op_scale: What the output of each operation is multiplied by, mask included, ``[operations]``; 1 at the start.
        filter_scale: What each filter's output is multiplied by where it is read, ``[filters]``; at first 1.
        over: How far each weight is above its threshold, ``[N]``; ``None`` if weights are not searched.
        margins: How far the importances of operations, ``[operations]``, and of filters, ``[filters]``, are above their
            thresholds; 1 where these are not searched.
    """

    ops: Tensor
    filters: Tensor
    op_scale: Tensor
    filter_scale: Tensor
    over: Tensor | None
    margins: tuple[Tensor, Tensor]

    @property
    def weights(self) -> Tensor | None:
        """The mask of weights, ``[N]``; ``None`` if weights are not searched."""
        return None if self.over is None else step_mask(self.over)


@dataclass(frozen=True)
class Gates:
    """Where the operations, filters and weights that a search may remove lie in the running part of a network.

    Args:
        levels: Where filters and weights lie in the network's parameters, and what they cost.
        ops: Paths of all operations, including those already dropped; those of ``blocks`` come last.
        alive: Which operations are not dropped, ``[operations]`` bool.
        runs: Which of them lie in the part that runs, ``[operations]`` bool.
        needed: Sets of operations, as indices, of each of which at least one must stay.
        tied: The index of the operation whose importance and threshold decide each one: its own, unless several are
            decided together.
        node: The index of the sum that each operation's output is added to, ``[operations]``.
        axis: The index, in the order of their thresholds, of the axis of each filter, ``[filters]``.
        spans: Per axis of ``levels.axes``: the index of its first filter, how many it has, and how many it must keep.
        round_to: An axis that has that many filters and loses some keeps a multiple of this number.
        blocks: Path of a block that can be dropped → its branch; such operations are in no sum of candidates.
    """

    levels: Levels
    ops: tuple[str, ...]
    alive: Tensor
    runs: Tensor
    needed: tuple[Tensor, ...]
    tied: Tensor
    node: Tensor
    axis: Tensor
    spans: tuple[tuple[int, int, int], ...]
    round_to: int = 1
    blocks: Mapping[str, Branch] = field(default_factory=dict)

    def holds(self, op: str, name: str) -> bool:
        """Whether the tensor ``name`` goes with the operation at path ``op``."""
        return self.blocks[op].holds(name) if op in self.blocks else lies_in(name, op)

    def masks(
        self,
        ops: tuple[Tensor, Tensor] | None,
        filters: tuple[Tensor, Tensor] | None,
        weights: tuple[Tensor, Tensor, Tensor] | None,
    ) -> GateMasks:
        """Compare importances (sigmoids of logits) with thresholds; return the masks and scales of all three levels.

        ``ops``: importance logits and thresholds, ``[operations]`` each. ``filters``: importance logits, ``[filters]``,
        and thresholds, ``[axes]``. ``weights``: values, ``[N]``; which of them are removed for good, ``[N]`` bool;
        thresholds, one per operation and a last one for weights in none. ``None``: a level that is not searched.
        """
        ones = self.alive.new_ones(len(self.ops), dtype=torch.float32)
        if ops is None:
            margin_o, mask_o, scale_o = ones, self.alive.float(), self.alive.float()
        else:
            share = ops[0].sigmoid().index_select(0, self.tied)
            margin_o = torch.where(self.alive & self.runs, share - ops[1].index_select(0, self.tied) - _EPS, NEVER)
            mask_o = step_mask(margin_o).masked_fill(self._protected_operations(margin_o.detach()), 1.0)
            mask_o = torch.where(self.runs, mask_o, self.alive.float())
            scale_o = 2 * share * mask_o
        if filters is None:
            margin_f = mask_f = scale_f = ones.new_ones(self.levels.filters)
        else:
            share = filters[0].sigmoid()
            margin_f = share - filters[1].index_select(0, self.axis) - _EPS
            mask_f = step_mask(margin_f).masked_fill(self._protected_filters(margin_f.detach()), 1.0)
            scale_f = 2 * share * mask_f
        over = None
        if weights is not None:
            flat, gone, thresholds = weights
            n, active = len(flat), self.levels.active(mask_o.detach(), mask_f.detach())
            over = self.levels.relative(flat, active) - thresholds.index_select(0, self.levels.ops[:n]) - _EPS
            over = over.masked_fill(gone, NEVER)
        return GateMasks(mask_o, mask_f, scale_o, scale_f, over, (margin_o, margin_f))

    def round_filters(self, filters: Tensor, margin: Tensor) -> Tensor:
        """Return a mask of filters with others put back, the highest ``margin`` first, up to multiples of round_to."""
        result = filters.clone()
        for base, size, _ in self.spans if self.round_to > 1 else ():
            part = result[base : base + size]
            missing = min(size, -(-int((part > 0).sum()) // self.round_to) * self.round_to) - int((part > 0).sum())
            if size >= self.round_to and missing:
                part[torch.where(part > 0, -torch.inf, margin[base : base + size]).topk(missing).indices] = 1.0
        return result

    def tied_with(self, op: int) -> Tensor:
        """Return the mask of the operations tied to operation ``op``, itself included, ``[operations]`` bool."""
        return self.tied == self.tied[op]

    def removable(self, mask: Tensor) -> Tensor:
        """Return which operations of ``mask`` could be removed next, ``[operations]`` bool: not the last of a set."""
        result = (mask > 0) & self.alive & self.runs
        for ops in self.needed:
            if int((mask[ops] > 0).sum()) <= 1:
                result[ops] = False
        return result

    def prices(self) -> Tensor:
        """Return the cost of each operation with its parameters, unmasked, in the search's unit, ``[operations]``."""
        if self.ops and self.levels.times:
            ops = self.alive.double().requires_grad_()
            with torch.enable_grad():
                (price,) = torch.autograd.grad(self.levels.size(ops, ops.new_ones(self.levels.filters)), [ops])
            return price
        return self._sum_entries([layout.price for layout in self.levels.layouts])

    def _sum_entries(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum of values, ``[entries]`` or ``[1]`` per tensor, over each operation's entries."""
        total = self.alive.new_zeros(len(self.ops) + 1, dtype=torch.float64)
        for layout, value in zip(self.levels.layouts, values, strict=True):
            each = max(len(layout.ops), len(value))
            total.index_add_(0, layout.ops.expand(each), value.expand(each) * (layout.entries / each))
        return total[:-1]

    def _protected_operations(self, margin: Tensor) -> Tensor:
        """Return the best of each set in ``needed`` that is below its thresholds, ``[operations]`` bool: it stays."""
        result = torch.zeros_like(margin, dtype=torch.bool)
        for ops in self.needed:
            best = ops.index_select(0, margin.index_select(0, ops).argmax().view(1))
            below = margin.index_select(0, best) < 0  # the host waits for none of these
            result.index_put_((best,), result.index_select(0, best) | below)
        return result

    def _protected_filters(self, margin: Tensor) -> Tensor:
        """Return the best filters of each axis with too few above their thresholds, ``[filters]`` bool: they stay."""
        result = torch.zeros_like(margin, dtype=torch.bool)
        for base, size, least in self.spans:
            part = margin[base : base + size]
            result.index_put_((base + part.topk(min(least, size)).indices,), (part >= 0).sum() < least)
        return result


def counted_tensors(model: nn.Module, measure: Measure) -> dict[str, Tensor]:
    """Return name → tensor that a measure counts: parameters, tied ones once; for bytes stored buffers, too."""
    result: dict[str, Tensor] = dict(model.named_parameters())
    if measure == Measure.BYTES:
        stored = model.state_dict().keys()
        result |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return result


def build_gates(
    model: nn.Module,
    axes: AxisGraph,
    parameters: Mapping[str, Tensor],
    keys: Sequence[str],
    needed: Sequence[Sequence[str]],
    runs: Callable[[str], bool],
    measure: Measure,
    latency: Latency | None = None,
    round_to: int = 1,
    blocks: Mapping[str, Branch] | None = None,
) -> Gates:
    """Return which operations, filters and weights may be removed in the running part of a network.

    ``parameters``: name → parameter, those of that part. ``keys``: the axes that have thresholds, in their order.
    ``needed``: sets of paths of operations; one of each must stay. ``runs``: whether the operation at a path runs.
    ``measure``: what costs count; ``latency``: the measured times, needed if that is time.
    ``round_to``, ``blocks``: as in :class:`Gates`.
    """
    blocks = blocks or {}

    def is_alive(path: str) -> bool:
        return any(name in axes.shapes for name in blocks[path].scales) if path in blocks else path in axes.branches

    sums, leaders, order = candidate_paths(model), tied_operations(model), {key: i for i, key in enumerate(keys)}
    if measure == Measure.TIME and latency is None:
        raise ValueError("how long operations take was not measured: measure_latency(…) does it")
    index = build_levels(axes, parameters, sums, measure, latency, blocks)
    ops = (*(path for paths in sums.values() for path in paths), *blocks)
    number = {path: i for i, path in enumerate(ops)}
    spans, axis = [], []
    for key, base in index.axes.items():
        size = axes[key].size
        # An axis of one unit is none to a later recording, and could not get its units back.
        step = round_to if size >= round_to else 1
        spans.append((base, size, min(size, -(-max(2, axes[key].least) // step) * step)))
        axis += [order[key]] * size
    return Gates(
        levels=index,
        ops=ops,
        alive=torch.tensor([*map(is_alive, ops)], dtype=torch.bool),
        runs=torch.tensor([runs(path) for path in ops], dtype=torch.bool),
        needed=tuple(torch.tensor([number[path] for path in paths]) for paths in needed if all(map(runs, paths))),
        tied=torch.tensor([number[leaders.get(path, path)] for path in ops], dtype=torch.long),
        node=torch.tensor(
            [i for i, paths in enumerate((*sums.values(), *zip(blocks, strict=True))) for _ in paths], dtype=torch.long
        ),
        axis=torch.tensor(axis, dtype=torch.long),
        spans=tuple(spans),
        round_to=round_to,
        blocks=blocks,
    )
