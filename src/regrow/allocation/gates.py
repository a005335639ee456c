"""Which operations, filters and weights stand at one moment: importances against thresholds, on three levels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.allocation.levels import Levels, levels
from regrow.allocation.thresholds import step_mask
from regrow.allocation.timed import Prices
from regrow.axes import AxisGraph
from regrow.method import Measure

NEVER = -2.0
"""Further below a threshold than its surrogate's gradient reaches."""

_JUST = 1e-6
"""A threshold of 0 leaves out what is not important at all."""


@dataclass(frozen=True)
class GateMasks:
    """The three levels at one moment.

    Args:
        ops: Mask of operations, ``[operations]``.
        filters: Mask of filters, ``[filters]``.
        op_scale: What operations are scaled by, the mask included, ``[operations]``; 1 at first.
        filter_scale: What is read of a filter is scaled by this, the mask included, ``[filters]``; 1 at first.
        over: How far each weight is above its threshold, ``[N]``; ``None`` where that level is not searched.
        margins: How far operations and filters are above theirs.
    """

    ops: Tensor
    filters: Tensor
    op_scale: Tensor
    filter_scale: Tensor
    over: Tensor | None
    margins: tuple[Tensor, Tensor]

    @property
    def weights(self) -> Tensor | None:
        """Mask of weights, ``[N]``."""
        return None if self.over is None else step_mask(self.over)


@dataclass(frozen=True)
class Gates:
    """What may go in the part of a network that runs.

    Args:
        levels: Where the units of the three levels lie.
        ops: Paths of all operations, dropped ones too.
        alive: Which of them are there, ``[operations]`` bool.
        runs: Which of them lie in the part that runs, ``[operations]`` bool.
        needed: Sets of operations of each of which one stays, as numbers.
        tied: The operation whose importance and threshold decide each one: itself, unless several are decided together.
        node: The sum that each operation flows into, ``[operations]``.
        single: Whether one operation of that sum is left at the end, whatever learns, ``[operations]`` bool.
        axis: The number of the axis of each filter, among ``keys``, ``[filters]``.
        keys: The axes in the order of their thresholds.
        spans: Per axis: the place of its first filter, how many it has, and how many it keeps at least.
    """

    levels: Levels
    ops: tuple[str, ...]
    alive: Tensor
    runs: Tensor
    needed: tuple[Tensor, ...]
    tied: Tensor
    node: Tensor
    single: Tensor
    axis: Tensor
    keys: tuple[str, ...]
    spans: tuple[tuple[int, int, int], ...]

    def masks(
        self,
        ops: tuple[Tensor, Tensor] | None,
        filters: tuple[Tensor, Tensor] | None,
        weights: tuple[Tensor, Tensor, Tensor] | None,
    ) -> GateMasks:
        """Hold importances against thresholds.

        Args:
            ops: α ``[operations]`` and their thresholds; ``None`` where that level is not searched.
            filters: κ ``[filters]`` and the thresholds of ``keys``.
            weights: All weights ``[N]``, which of them are 0 for good, and the thresholds of operations, with one more
                for what lies in none.
        """
        one = torch.ones(len(self.ops))
        if ops is None:
            margin_o, mask_o, scale_o = one, self.alive.float(), self.alive.float()
        else:
            share = ops[0].sigmoid().index_select(0, self.tied)
            margin_o = torch.where(self.alive & self.runs, share - ops[1].index_select(0, self.tied) - _JUST, NEVER)
            mask_o = step_mask(margin_o).masked_fill(self._last(margin_o.detach()), 1.0)
            mask_o = torch.where(self.runs, mask_o, self.alive.float())
            scale_o = 2 * share * mask_o
        if filters is None:
            margin_f = mask_f = scale_f = torch.ones(self.levels.filters)
        else:
            share = filters[0].sigmoid()
            margin_f = share - filters[1].index_select(0, self.axis) - _JUST
            mask_f = step_mask(margin_f).masked_fill(self._fewest(margin_f.detach()), 1.0)
            scale_f = 2 * share * mask_f
        over = None
        if weights is not None:
            flat, gone, thresholds = weights
            n, stands = len(flat), self.levels.standing(mask_o.detach(), mask_f.detach())
            over = self.levels.relative(flat, stands) - thresholds.index_select(0, self.levels.ops[:n]) - _JUST
            over = over.masked_fill(gone, NEVER)
        return GateMasks(mask_o, mask_f, scale_o, scale_f, over, (margin_o, margin_f))

    def together(self, at: int) -> Tensor:
        """The operations that are decided with one, as bool."""
        return self.tied == self.tied[at]

    def open(self, level: int, mask: Tensor) -> Tensor:
        """Which operations (level 0) or filters (1) that stand could still go, as bool."""
        result = mask > 0
        if level == 0:
            result = result & self.alive & self.runs
            for one in self.needed:
                if int((mask[one] > 0).sum()) <= 1:
                    result[one] = False
            return result
        if not self.spans:
            return result
        _, sizes, least = torch.tensor(self.spans).unbind(1)
        axis = torch.arange(len(sizes)).repeat_interleave(sizes)
        many = torch.zeros_like(sizes).index_add(0, axis, result.long())
        return result & (many > least)[axis]

    def prices(self) -> Tensor:
        """What each operation costs with all that it has, ``[operations]``."""
        return self.levels.price.new_zeros(len(self.ops) + 1).index_add(0, self.levels.ops, self.levels.price)[:-1]

    def typical(self) -> Tensor:
        """What operations of the same node that hold more than their scale cost in the mean, ``[operations]``; or 0."""
        counted = self.alive & ~self.bare()
        node, n = self.node[counted], len(self.ops)
        prices = self.prices()[counted]
        total = prices.new_zeros(n).index_add(0, node, prices)
        return (total / torch.bincount(node, minlength=n).clamp_min(1)).index_select(0, self.node)

    def bare(self) -> Tensor:
        """The operations that hold nothing but their scale, such as pools, unless it is time that counts, as bool."""
        many = torch.bincount(self.levels.ops, minlength=len(self.ops) + 1)[:-1]
        return (many <= 1) & (not self.levels.timed)

    def shares(self, masks: GateMasks, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How much each operation that stands weighs in its node.

        Args:
            masks: What stands.
            alpha: Of every operation.

        Returns:
            Which ones stand, ``[operations]`` bool; and of those a / Σ a over their node, with its gradients, and N,
            how many it has.
        """
        stands = (masks.ops.detach() > 0) & self.alive & self.runs
        node, share = self.node[stands], alpha.sigmoid().index_select(0, self.tied[stands])
        total = share.new_zeros(len(self.ops)).index_add(0, node, share)
        many = share.new_zeros(len(self.ops)).index_add(0, node, torch.ones_like(share))
        return stands, share / total.index_select(0, node), many[node]

    def operation_regularizer(self, masks: GateMasks, alpha: Tensor, among: Tensor) -> Tensor:
        """Σ log(1 + N a / Σ a) over operations that stand, N and Σ a of their node.

        Of each node it is greatest where all weigh the same, and least where one has all.

        Args:
            masks: What stands.
            alpha: Of every operation.
            among: Which of them count, ``[operations]`` bool: whole nodes.

        Source: the authors' code (model_search.py, after GOLD-NAS), with N of each node its own.
        """
        stands, share, many = self.shares(masks, alpha)
        return torch.log1p(many * share)[among[stands]].sum()

    def threshold_regularizer(self, masks: GateMasks, thresholds: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Σ exp(−t) over the thresholds of what stands.

        Args:
            masks: What stands.
            thresholds: Of operations, of the filters of ``keys``, and of the weights in each operation.

        Source: the authors' code (model_search.py, after Dynamic Sparse Training).
        """
        stands = (masks.ops.detach() > 0) & self.alive & self.runs
        ops, filters, weights = thresholds
        own = [ops.index_select(0, self.tied[stands]), filters[self.axis.unique()], weights[:-1][stands]]
        return torch.exp(-torch.cat(own)).sum()

    def _last(self, margin: Tensor) -> Tensor:
        """The operations that stay because all others of a needed set go."""
        result = torch.zeros_like(margin, dtype=torch.bool)
        for one in self.needed:
            best = margin[one].argmax()
            if margin[one[best]] < 0:
                result[one[best]] = True
        return result

    def _fewest(self, margin: Tensor) -> Tensor:
        """The filters that stay because an axis keeps so many."""
        result = torch.zeros_like(margin, dtype=torch.bool)
        for base, size, least in self.spans:
            own = margin[base : base + size]
            if int((own >= 0).sum()) < least:
                result[base + own.topk(min(least, size)).indices] = True
        return result


def gates(
    axes: AxisGraph,
    parameters: Mapping[str, Tensor],
    sums: Mapping[str, Sequence[str]],
    keys: Sequence[str],
    needed: Sequence[Sequence[str]],
    runs: Callable[[str], bool],
    measure: Measure,
    tied: Mapping[str, str] | None = None,
    single: Sequence[Sequence[str]] = (),
    timed: Prices | None = None,
) -> Gates:
    """Work out what may go in the part of a network that runs.

    Args:
        axes: The network's axes.
        parameters: The parameters of the part that runs.
        sums: Path of each sum of candidates → the paths of its operations.
        keys: The axes that have thresholds, in their order.
        needed: Sets of operations of each of which one stays.
        runs: Whether an operation lies in the part that runs.
        measure: What is priced.
        tied: Path of each operation that is decided together with others → the one that decides.
        single: Sets of operations of which one is left at the end.
        timed: What entries and operations take of a pass, where time is priced.
    """
    found = levels(axes, parameters, sums, measure=measure, timed=timed)
    ops = tuple(path for paths in sums.values() for path in paths)
    number, alone = {path: i for i, path in enumerate(ops)}, {path for paths in single for path in paths}
    sizes = {key: axes[key].size for key in found.axes}
    order = {key: i for i, key in enumerate(keys)}
    return Gates(
        levels=found,
        ops=ops,
        alive=torch.tensor([path in axes.branches for path in ops], dtype=torch.bool),
        runs=torch.tensor([runs(path) for path in ops], dtype=torch.bool),
        needed=tuple(torch.tensor([number[path] for path in one]) for one in needed if all(map(runs, one))),
        tied=torch.tensor([number[(tied or {}).get(path, path)] for path in ops], dtype=torch.long),
        node=torch.tensor([i for i, paths in enumerate(sums.values()) for _ in paths], dtype=torch.long),
        single=torch.tensor([path in alone for path in ops], dtype=torch.bool),
        axis=torch.tensor([order[key] for key, n in sizes.items() for _ in range(n)], dtype=torch.long),
        keys=tuple(keys),
        # An axis of one unit is none to a later recording, and could not get its units back.
        spans=tuple((base, sizes[key], max(2, axes[key].least)) for key, base in found.axes.items()),
    )
