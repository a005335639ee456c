"""DARTS, first order: a softmax over the operations of each edge; the one with the largest weight is kept at the end.

Liu, Simonyan, Yang: DARTS, Differentiable Architecture Search (arXiv 1806.09055), with ξ = 0, in our spaces and loop.
On an edge (the operations of one node that read the same source) operation i is scaled by

    exp α_i / (exp α_none + Σ exp α_j).

One half of the training examples of the search trains the weights, the other α, both in the same step; the validation
part is only used for reports. At the end each node keeps its two edges with the largest weight of an operation, and of
each edge that operation. If that costs more than the target, all axes then lose the same fraction of their filters.

Where we differ: every cell has its own α; there is no operation "none", only its logit; BatchNorms
are affine; and the learning rate of α is divided by the number of steps; it equals the authors' at their 50 epochs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regrow.allocation.commits import least_cost
from regrow.allocation.darts import Edges, select_operations
from regrow.allocation.gates import GateMasks
from regrow.core.amounts import Measure
from regrow.core.axes.axis import AxisTensor
from regrow.core.sources import move_tensors
from regrow.core.tasks import Examples
from regrow.methods.search import Commit, Search
from regrow.methods.search.commit import plan_fit, plan_masked_cut
from regrow.methods.search.space import SearchSpace, SearchState, rank_evenly, split_scale
from regrow.surgery.gate import parametrize
from regrow.training.learner import Boundary, Context, Event, Replacements, Step, Stream

CITATION = "Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search (arXiv 1806.09055), first order"


@dataclass(frozen=True)
class Settings:
    """Settings of DARTS: target size, and how the architecture parameters α are trained.

    Args:
        target: The largest allowed size of the found network, in units of ``measure``.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        stages: The last part of the network that is used; set by the run.
        lr: The learning rate of α times the number of steps; the authors' 3e-4 for 50 epochs of 391 steps is 5.9.
        decay: Weight decay of α.
        clip: The largest norm of the gradient of the network's parameters; larger ones are scaled down to it.
        augment: Whether images are shifted and mirrored at random.
    """

    target: float = 0.0
    measure: str = "params"
    stages: tuple[int, ...] = ()
    lr: float = 5.9
    decay: float = 1e-3
    clip: float = 5.0
    augment: bool = True

    def __post_init__(self) -> None:
        Measure(self.measure)


class Darts(Search):
    """The DARTS search: softmax over α on each edge; half of the training examples train α."""

    second_share = 0.5

    def __init__(self, s: Settings) -> None:
        removable = ("operations", "filters")
        space = SearchSpace(s.target, Measure(s.measure), ("filters",), s.stages[-1:], removable=removable)
        super().__init__(s, space)
        self.s = s
        self.mask_bytes = 2

    def masks(
        self, state: SearchState, context: Context, flat: Tensor | None = None, learning: bool = False
    ) -> GateMasks:
        """Return masks that keep everything; once operations are chosen, only these."""
        masks = super().masks(state, context, flat, learning)
        return masks if state.chosen is None else replace(masks, ops=masks.ops * choose_operations(state))

    def learning_rates(self, context: Context) -> tuple[float, float]:
        """Return the learning rate of α, and 0 for thresholds, which are not trained."""
        return self.s.lr / (context.epochs * context.steps or 1), 0.0

    def allowed_size(self, state: SearchState, context: Context, target: float) -> float:
        """Return the target; 0 until operations are chosen, so that all others are removed whatever their size."""
        return target if state.chosen else 0.0

    def kept_fractions(self, state: SearchState, masks: GateMasks) -> dict[str, float]:
        """Return the kept fractions, and that of skips among the chosen operations; near 1 DARTS has collapsed."""
        chosen = [path for path, is_kept in zip(state.layout.ops, choose_operations(state), strict=True) if is_kept]
        skips = sum(path.rpartition(".")[2].startswith("skip") for path in chosen)
        return super().kept_fractions(state, masks) | {"skips": skips / max(1, len(chosen))}

    def summary(self, state: SearchState) -> dict[str, float]:
        """Return the size with the chosen operations and all their filters, and whether it is at most the target."""
        size = state.chosen
        return {} if size is None else {"discretised": size, "below": size <= self.s.target}

    @torch.no_grad()
    def parametrize(self, state: SearchState, context: Context) -> Replacements:
        """Return the candidates' scales, without gradients to α, which other examples train (:meth:`project`)."""
        return Replacements(_scale_by_softmax(state, context))

    def boundary(self, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
        """Return the state after an event: with the edges, once it starts or resumes, and at first random α."""
        is_start = boundary.event == Event.TASK_START
        if is_start or boundary.event == Event.RESUME:
            state = replace(state, edges=move_tensors(Edges.of(context.model), context.device))
        edges = state.edges
        state = super().boundary(state, context, boundary)
        if not is_start:
            return state
        # Small, so that at first all operations of an edge have about the same weight.
        alpha = (1e-3 * torch.randn(edges.entries, generator=context.generator(Stream.ALPHA))).to(context.device)
        return replace(state, edges=edges, alpha=AxisTensor(alpha, (edges.entries,), self.learning_rates(context)[0]))

    def project(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Clip the gradients of the network; set that of α from the second part of the examples, both in place."""
        state = super().project(state, context, step)
        if step.second is not None:
            self._set_alpha_gradient(state, context, step.second)
        return state

    def _set_alpha_gradient(self, state: SearchState, context: Context, batch: Examples) -> None:
        """Set the gradient of α to that of the loss on a batch; parameters and running statistics do not change."""
        alpha, buffers = state.alpha.values, [*context.model.buffers()]
        before = [buffer.clone() for buffer in buffers]
        with parametrize(context.model, _scale_by_softmax(state, context)):
            (gradient,) = torch.autograd.grad(self.compute_loss(context, batch), [alpha])
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        alpha.grad = gradient + self.s.decay * alpha.detach()

    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """Return the plan that drops operations that are not chosen; called again, one that cuts filters, if needed."""
        if state.chosen is None:
            self._avoid_dear_operations(state, target)
            state = replace(state, chosen=0.0)  # not None: masks keep the chosen operations alone
            plan, state = plan_masked_cut(self, state, context, self.masks(state, context), target)
            state = replace(state, chosen=self.size(state, context))
            if plan:
                return plan, state
        return plan_fit(self, rank_evenly(state), context, target)

    @torch.no_grad()
    def _avoid_dear_operations(self, state: SearchState, target: float) -> None:
        """Set α in place so that, while no cut of filters meets the target, the next best of an edge is chosen."""
        layout, edges, prices = state.layout, state.edges, state.layout.prices()
        while True:
            chosen, share = choose_operations(state) & layout.alive, _shares(state)
            if least_cost(replace(layout, alive=chosen), ("filters",)) <= target:
                return
            on_one_edge = edges.edge[:, None] == edges.edge
            cheaper = on_one_edge & (prices < prices[:, None]) & layout.alive & (share > 0)
            dear = chosen & cheaper.any(1)
            if not dear.any():
                return  # the plan that cuts filters says what is missing
            i = layout.tied[torch.where(dear, share, torch.inf).argmin()]
            state.alpha.values[edges.table[edges.edge[i], edges.column[i]]] = -torch.inf


build = Darts


def choose_operations(state: SearchState) -> Tensor:
    """Return the final choice, ``[operations]`` bool: the best operation on each of the two best edges of a node."""
    return select_operations(_shares(state).detach(), state.edges.edge, state.layout.node)


def _scale_by_softmax(state: SearchState, context: Context) -> dict[str, Tensor]:
    """Return name of each node's parameter ``scale`` → one number per operation, softmax(α) per edge; 0: dropped."""
    share = _shares(state) * state.layout.alive
    return split_scale(context, share)


def _shares(state: SearchState) -> Tensor:
    """Return the softmax of α on each edge, ``[operations]``; of tied operations that of the first."""
    return state.edges.share(state.alpha.values).index_select(0, state.layout.tied)
