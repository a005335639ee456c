"""DARTS, first order: a softmax over the operations of each edge; the one with the largest weight is kept at the end.

Liu, Simonyan, Yang: DARTS, Differentiable Architecture Search (arXiv 1806.09055), with ξ = 0, in our spaces and loop.
On an edge (the operations of one node that read the same source) operation i is scaled by

    exp α_i / (exp α_none + Σ exp α_j).

One half of the training examples of the search trains the weights, the other α, both in the same step; the validation
part is only used for reports. At the end each node keeps its two edges with the largest weight of an operation, and of
each edge that operation. If that costs more than the target, all axes then lose the same fraction of their filters.

With ``edges`` each edge also has a weight, a softmax over β of the edges into its node, which scales its operations and
counts in the choice; with ``warm`` only weights are trained at first; with ``partial`` operations read and change one
channel in ``partial``, and the others bypass them. These three are PC-DARTS (Xu et al., arXiv 1907.05737):
``partial=4``, ``edges=true``, ``warm=0.3`` and ``lr=2.9`` are its numbers. Channels are masked, not
cut: the search needs the memory and time of the whole network, and the found network has weights that were not trained.

Where we differ: every cell has its own α, unless ``shared``; there is no operation "none", only its logit; BatchNorms
are affine; and the learning rate of α is divided by the number of steps; it equals the authors' at their 50 epochs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regrow.allocation.darts import Edges, partial_channels, select_operations
from regrow.allocation.gates import GateMasks
from regrow.allocation.timed import Prices
from regrow.core.amounts import Measure
from regrow.core.axes.axis import AxisTensor
from regrow.core.sources import move_tensors
from regrow.core.tasks import Examples
from regrow.methods.search import Commit, Search
from regrow.methods.search.commit import cut_masked, fit_to_budget
from regrow.methods.search.space import SearchSpace, SearchState, rank_evenly, scale_candidates
from regrow.nets.cells import Cells
from regrow.settings.constraints import Count, FractionBelowOne, check_constraints
from regrow.surgery.gate import parametrize
from regrow.training.learner import Boundary, Context, Event, Replacements, Step

CITATION = (
    "Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search (arXiv 1806.09055), first order; edges, warm, "
    "partial: Xu et al., PC-DARTS (arXiv 1907.05737)"
)


@dataclass(frozen=True)
class Settings:
    """Settings of DARTS and PC-DARTS: target size, and how the architecture parameters α are trained.

    Args:
        target: The largest allowed size of the found network, in units of ``measure``.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        stages: The last part of the network that is used; set by the run.
        shared: Whether all normal cells share one α and all reduction cells another, as in the paper.
        lr: The learning rate of α times the number of steps; the authors' 3e-4 for 50 epochs of 391 steps is 5.9, and
            PC-DARTS's 6e-4 for 50 epochs of 98 steps 2.9.
        edges: Whether edges have weights, β (PC-DARTS).
        warm: The fraction of the epochs, at the start, in which α and β are not trained; PC-DARTS's 15 of 50 are 0.3.
        partial: Operations read and change one in this many channels during the search (PC-DARTS: 4); 1: all channels.
        decay: Weight decay of α and β.
        clip: The largest norm of the gradient of the network's parameters; larger ones are scaled down to it.
        augment: Whether images are shifted and mirrored at random.
    """

    target: float = 0.0
    measure: str = "params"
    stages: tuple[int, ...] = ()
    shared: bool = False
    lr: float = 5.9
    edges: bool = False
    warm: FractionBelowOne = 0.0
    partial: Count = 1
    decay: float = 1e-3
    clip: float = 5.0
    augment: bool = True

    def __post_init__(self) -> None:
        check_constraints(self)
        Measure(self.measure)


class Darts(Search):
    """The DARTS search."""

    second_share = 0.5

    def __init__(self, s: Settings, prices: Prices | None = None) -> None:
        removable = ("operations", "filters")
        super().__init__(
            s, SearchSpace(s.target, Measure(s.measure), ("filters",), s.stages[-1:], prices, removable=removable)
        )
        self.s = s

    def masks(
        self, state: SearchState, context: Context, flat: Tensor | None = None, learning: bool = False
    ) -> GateMasks:
        """Everything is kept; in the end only the chosen operations are."""
        masks = super().masks(state, context, flat, learning)
        return masks if state.chosen is None else replace(masks, ops=masks.ops * choose_operations(state))

    def rates(self, context: Context) -> tuple[float, float]:
        """Return the learning rates of α, and of thresholds, which are not trained."""
        return self.s.lr / (context.epochs * context.steps or 1), 0.0

    def allowed(self, state: SearchState, context: Context, target: float) -> float:
        """Before operations are chosen, and for that, as much is removed as is masked."""
        return target if state.chosen else 0.0

    def shares(self, state: SearchState, masks: GateMasks) -> dict[str, float]:
        """Return the kept fractions, and that of skips among the chosen operations; near 1 DARTS has collapsed."""
        chosen = [path for path, here in zip(state.layout.ops, choose_operations(state), strict=True) if here]
        skips = sum(path.rpartition(".")[2].startswith("skip") for path in chosen)
        return super().shares(state, masks) | {"skips": skips / max(1, len(chosen))}

    def summary(self, state: SearchState) -> dict[str, float]:
        """Return the size of the chosen operations with all their filters, and whether it met the target already."""
        size = state.chosen
        return {} if size is None else {"discretised": size, "below": size <= self.s.target}

    @torch.no_grad()
    def parametrize(self, state: SearchState, context: Context) -> Replacements:
        """Return the candidates' scales without gradients for α, for the examples that train the weights."""
        return Replacements(_scale_by_softmax(state, context))

    def boundary(self, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
        """Find edges, draw α and β at the start, and let channels bypass operations."""
        begins, s = boundary.event == Event.TASK_START, self.s
        if begins or boundary.event == Event.RESUME:
            if (s.shared or s.partial > 1) and not isinstance(context.model, Cells):
                raise ValueError("shared and partial need a network of cells, and this is none; use a space cells:…")
            alike = context.model.alike() if s.shared and isinstance(context.model, Cells) else {}
            state = replace(state, edges=move_tensors(Edges.of(context.model, alike), context.device))
        edges = state.edges
        state = super().boundary(state, context, boundary)
        if begins:
            lr = self.rates(context)[0]
            beta = _draw_importance(context, edges.betas, lr, 14) if s.edges else None
            state = replace(state, edges=edges, alpha=_draw_importance(context, edges.entries, lr, 11), beta=beta)
        if s.partial > 1 and state.chosen is None and not state.handles:
            weights = state.edge_weights
            state = replace(state, handles=tuple(partial_channels(context.model, s.partial, lambda: weights)))
        return state

    def project(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Clip the gradients of the network; set those of α and β from the second part of the examples."""
        state = super().project(state, context, step)
        if context.epoch >= self.s.warm * context.epochs and step.second is not None:
            self._differentiate(state, context, step.second)
        return state

    def _differentiate(self, state: SearchState, context: Context, batch: Examples) -> None:
        """Set the gradients of α and β to those of a loss; parameters and running statistics do not change."""
        learned = [tensor.values for tensor in (state.alpha, state.beta) if tensor is not None]
        buffers = [*context.model.buffers()]
        before = [buffer.clone() for buffer in buffers]
        with parametrize(context.model, _scale_by_softmax(state, context)):
            gradients = torch.autograd.grad(self.compute_loss(context, batch), learned)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        for values, gradient in zip(learned, gradients, strict=True):
            values.grad = gradient + self.s.decay * values.detach()

    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """First drop all operations that are not chosen; then cut filters, if the target requires it."""
        if state.chosen is None:
            for handle in state.handles:
                handle.remove()
            state = replace(state, chosen=0.0)
            plan, state = cut_masked(self, state, context, self.masks(state, context), target)
            state = replace(state, chosen=self.size(state, context))
            if plan:
                return plan, state
        return fit_to_budget(self, rank_evenly(state), context, target)


build = Darts


def weigh_operations(state: SearchState) -> Tensor:
    """Return the softmax weight of each operation on its edge, times the edge's weight if it has one."""
    return state.edges.share(state.alpha.values, None if state.beta is None else state.beta.values)


def choose_operations(state: SearchState) -> Tensor:
    """Return the final choice as a mask: per node the best operation of its two best edges, ``[operations]`` bool."""
    return select_operations(weigh_operations(state).detach(), state.edges.edge, state.layout.node)


def _draw_importance(context: Context, n: int, lr: float, purpose: int) -> AxisTensor:
    """Return small random importances, so that at first all operations of an edge have about the same weight."""
    return AxisTensor((1e-3 * torch.randn(n, generator=context.generator(purpose))).to(context.device), (n,), lr)


def _scale_by_softmax(state: SearchState, context: Context) -> dict[str, Tensor]:
    """Return the scale of each candidate by name, and store the edges' weights for channels that bypass operations."""
    share, edges = weigh_operations(state) * state.layout.alive, state.edges
    weight = share.new_ones(len(edges.node)) if state.beta is None else edges.between(state.beta.values)
    state.edge_weights[:] = weight.split(edges.into)
    return scale_candidates(context, share, keep=False)
