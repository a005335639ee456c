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

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from torch import Tensor, nn

from regrow.allocation.darts import partial_channels
from regrow.allocation.gates import GateMasks
from regrow.allocation.timed import Prices
from regrow.core.amounts import Measure
from regrow.methods.search.assembly import Search, compute_loss, follow_training
from regrow.methods.search.commit import Commit, cut_masked, fit_to_budget
from regrow.methods.search.importance import (
    choose_operations,
    draw_importance,
    find_edges,
    mask_by_thresholds,
    measure_skips,
    rank_evenly,
    replace_scales,
    set_importance_gradients,
)
from regrow.methods.search.space import Rules, SearchSpace, check_space, measure_size
from regrow.methods.search.state import SearchState
from regrow.settings.constraints import Range, check_constraints
from regrow.training.learner import Boundary, Context, Event, Learner, Loss, Step

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
    warm: Annotated[float, Range(0, 1, below=True)] = 0.0
    partial: Annotated[int, Range(1)] = 1
    decay: float = 1e-3
    clip: float = 5.0
    augment: bool = True

    def __post_init__(self) -> None:
        check_constraints(self)
        Measure(self.measure)


def build(settings: Settings, prices: Prices | None = None) -> Search:
    """Return the DARTS search.

    Args:
        settings: Its settings.
        prices: The time that weights and operations take, if ``measure`` is ``ms``.
    """
    s = settings
    space = SearchSpace(
        s.target, Measure(s.measure), ("filters",), s.stages[-1:], prices, removable=("operations", "filters")
    )
    rules = Rules(
        space,
        partial(_mask, space),
        rates=lambda context: (s.lr / (context.epochs * context.steps or 1), 0.0),
        allowed=lambda state, context, target: 0.0 if state.chosen is None else target,
        shares=measure_skips,
        summary=lambda state: _summarize(s, state),
        own_parametrize=replace_scales,
    )
    learner = Learner(
        SearchState(),
        parametrize=rules.parametrize,
        loss=lambda state, context, step: Loss(compute_loss(context, step.batch, s.augment)),
        project=partial(_project, s),
        plan=partial(_plan, rules),
        boundary=partial(_follow, s, rules),
        optimizer="adam",
        second_share=0.5,
    )
    return Search(rules, learner, partial(_finalize, rules), asdict(s), check=partial(check_space, space))


def _mask(space: SearchSpace, state: SearchState, context: Context, flat: Tensor | None, learning: bool) -> GateMasks:
    """Everything is kept; in the end only the chosen operations are."""
    masks = mask_by_thresholds(space, True, state, context, flat, learning)
    return masks if state.chosen is None else replace(masks, ops=masks.ops * choose_operations(state))


def _summarize(s: Settings, state: SearchState) -> dict[str, float]:
    """Return the size of the chosen operations with all their filters, and whether it met the target already."""
    size = state.chosen
    return {} if size is None else {"discretised": size, "below": size <= s.target}


def _follow(s: Settings, rules: Rules, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
    begins = boundary.event == Event.TASK_START
    if begins or boundary.event == Event.RESUME:
        state = replace(state, edges=find_edges(context, s.shared, s.shared or s.partial > 1))
    edges = state.edges
    state = follow_training(rules, state, context, boundary)
    if begins:
        lr = rules.rates(context)[0]
        beta = draw_importance(context, edges.betas, lr, 14) if s.edges else None
        state = replace(state, edges=edges, alpha=draw_importance(context, edges.entries, lr, 11), beta=beta)
    if s.partial > 1 and state.chosen is None and not state.handles:
        weights = state.edge_weights
        state = replace(state, handles=tuple(partial_channels(context.model, s.partial, lambda: weights)))
    return state


def _project(s: Settings, state: SearchState, context: Context, step: Step) -> SearchState:
    """Clip the gradients of the network; set those of α and β from the second part of the examples."""
    nn.utils.clip_grad_norm_(context.parameters().values(), s.clip)
    if context.epoch >= s.warm * context.epochs and step.second is not None:
        second = step.second
        set_importance_gradients(state, context, lambda: compute_loss(context, second, s.augment), s.decay)
    return state


def _plan(rules: Rules, state: SearchState, context: Context) -> Commit:
    at_end = context.epoch == context.epochs
    return _finalize(rules, state, context, rules.space.target) if at_end else (None, state)


def _finalize(rules: Rules, state: SearchState, context: Context, target: float) -> Commit:
    """First drop all operations that are not chosen; then cut filters, if the target requires it."""
    if state.chosen is None:
        for handle in state.handles:
            handle.remove()
        state = replace(state, chosen=0.0)
        masks = rules.masks(state, context, None, False)
        plan, state = cut_masked(replace(rules, allowed=lambda *_: 0.0), state, context, masks, target)
        state = replace(state, chosen=measure_size(rules, state, context))
        if plan:
            return plan, state
    return fit_to_budget(rules, rank_evenly(state), context, target)
