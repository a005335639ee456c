"""GOLD-NAS-like: only operations are searched, and dropped a few at a time under a growing regulariser.

Bi et al., GOLD-NAS: Gradual, One-Level, Differentiable (arXiv 2007.03331). **Reconstructed** from notes on the authors'
code; neither the code nor the paper was available. With a = σ(α) of an operation, and sums over
the N operations that flow into its node, α and weights are trained on the same examples to minimise

    cross-entropy + λ Σ (1 + μ cost / mean cost) log(1 + N a / Σ a).

After each epoch all operations are dropped whose fraction a / Σ a is at most ``drop_below``, and of those where it is
at most ``keep_above`` the ``drops_per_epoch`` lowest. If fewer were dropped, λ grows, by steps that double; if twice as
many were, it is halved.
The last operation of a node, and the last one that reads an input of its cell, stay; tied operations count as one.

Ours: operations are dropped until the target is met and no further, and λ is 0 then; ``drops_per_epoch`` follows from
the number of epochs; what exceeds the target at the end is dropped by the size of α; learning rates scale with
1 / steps; and the seven operations of our space are searched, not the authors' two.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks
from regrow.core.amounts import Measure
from regrow.core.candidates import candidate_paths
from regrow.core.sources import to_host
from regrow.methods.search import Commit, Search
from regrow.methods.search.commit import plan_drop, plan_fit, select_lowest
from regrow.methods.search.space import SearchSpace, SearchState
from regrow.settings.constraints import NonNegative, Positive, Range, check_constraints
from regrow.training.learner import Boundary, Context, Event, Loss, Step

CITATION = "Bi et al., GOLD-NAS: Gradual, One-Level, Differentiable (arXiv 2007.03331); reconstructed"


@dataclass(frozen=True)
class Settings:
    """Settings of the GOLD-NAS-like search: target size, and how operations are dropped.

    Args:
        target: The largest allowed size of the found network, in units of ``measure``.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        stages: The last part of the network that is used; set by the run.
        warm: The number of epochs at the start in which only weights are trained.
        drop_below: Every operation is dropped whose fraction of its node's importance is at most this.
        keep_above: No operation is dropped whose fraction of its node's importance is above this.
        drops_per_epoch: How many of the operations between are dropped after an epoch (the authors: 4); 0: as many as
            would drop all of them by the last epoch.
        cost_weight: μ, how much stronger the regulariser is for operations that cost more.
        lr: The learning rate of α times the number of steps in which it is trained: how far α can move.
        clip: The largest norm of the gradient of the network's parameters; larger ones are scaled down to it.
        augment: Whether images are shifted and mirrored at random.
    """

    target: float = 0.0
    measure: str = "params"
    stages: tuple[int, ...] = ()
    warm: Annotated[int, Range(0)] = 2
    drop_below: float = 0.01
    keep_above: float = 0.05
    drops_per_epoch: Annotated[int, Range(0)] = 0
    cost_weight: NonNegative = 1.0
    lr: NonNegative = 8.0
    clip: Positive = 5.0
    augment: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop_below <= self.keep_above <= 1:
            raise ValueError(
                f"drop_below must be at most keep_above, both from 0 to 1; got drop_below={self.drop_below:g} and "
                f"keep_above={self.keep_above:g}; lower drop_below"
            )
        check_constraints(self)
        Measure(self.measure)


class GoldNas(Search):
    """The GOLD-NAS-like search: a growing regulariser of operations, and drops after each epoch."""

    def __init__(self, s: Settings) -> None:
        super().__init__(s, SearchSpace(s.target, Measure(s.measure), ("operations",), s.stages[-1:]))
        self.s = s

    def check(self, context: Context) -> None:
        """Raise ValueError as :class:`Search` does, or if there are no candidates."""
        if not candidate_paths(context.model):
            raise ValueError("GOLD-NAS searches operations, and this network has no candidates: mark some")
        super().check(context)

    def check_epochs(self, epochs: int) -> None:
        """Raise ValueError if there are too few epochs to drop any operation."""
        if epochs < self.s.warm + 2:
            raise ValueError(
                f"in {epochs} epochs no operation is dropped: the first {self.s.warm} train weights only, and "
                f"nothing is dropped after the last one; use --epochs {self.s.warm + 2} or more, or a smaller warm"
            )

    def learning_rates(self, context: Context) -> tuple[float, float]:
        """Return the learning rate of α, and 0 for thresholds, which are not trained."""
        return self.s.lr / max(1, (context.epochs - self.s.warm) * context.steps), 0.0

    def trains(self, state: SearchState, context: Context) -> bool:
        """Whether α is trained in this epoch."""
        return context.epoch >= self.s.warm

    def masks(
        self, state: SearchState, context: Context, flat: Tensor | None = None, learning: bool = False
    ) -> GateMasks:
        """Return masks that keep every operation until it is dropped (or σ(α) is below 10⁻⁶), scaled by 2 σ(α)."""
        masks = super().masks(state, context, flat, learning)
        alpha = state.alpha.values if learning else state.alpha.values.detach()
        importance = alpha.sigmoid().index_select(0, state.layout.tied)
        return replace(masks, ops=masks.ops.detach(), op_scale=2 * importance * masks.ops.detach())

    def loss(self, state: SearchState, context: Context, step: Step) -> Loss:
        """Hook ``loss``: cross-entropy + λ · regulariser of operations; ``aux``: both terms, or ``()`` without λ."""
        cross_entropy = self.compute_loss(context, step.batch)
        if not self.trains(state, context) or not state.penalty:
            return Loss(cross_entropy, ())
        kept, share, count = state.layout.shares(step.replaced.aux, state.alpha.values)
        cost = torch.where(kept, state.layout.prices(), 0.0)
        weight = 1 + self.s.cost_weight * cost / (cost.sum() / kept.sum()).clamp_min(1e-12)
        regularizer = state.penalty * torch.where(kept, weight * torch.log1p(count * share), 0.0).sum()
        return Loss(cross_entropy + regularizer, (cross_entropy.detach(), regularizer.detach()))

    def after_step(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Hook ``after_step``: add the terms of the loss to ``state.losses``, the sums of the epoch."""
        if not step.aux:
            return state
        cross_entropy, regularizer = (float(loss) for loss in to_host(step.aux))
        return replace(state, losses=(state.losses[0] + cross_entropy, state.losses[1] + regularizer))

    def boundary(self, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
        """Hook ``boundary``: as of :class:`Search`, with the sums of losses at 0 when an epoch starts."""
        state = super().boundary(state, context, boundary)
        return replace(state, losses=(0.0, 0.0)) if boundary.event == Event.EPOCH_START else state

    def plan(self, state: SearchState, context: Context) -> Commit:
        """Hook ``plan``: drop the lowest operations after epochs that trained α, and return the state with a new λ.

        After the last epoch: that of :meth:`finalize`.
        """
        s = self.s
        if context.epoch == context.epochs:
            return self.finalize(state, context, s.target)
        if context.epoch <= s.warm or context.plans_applied:
            return None, state
        if self.size(state, context) <= s.target:
            return None, replace(state, penalty=0.0)
        goal = s.drops_per_epoch or -(-len(state.layout.tied.unique()) // (context.epochs - s.warm - 1))
        remaining, dropped = select_lowest(self, state, context, s.drop_below, s.keep_above, goal)
        return plan_drop(self, _update_penalty(state, dropped, goal), context, remaining)

    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """Return the plan that drops operations of the smallest α until the target is met."""
        return plan_fit(self, state, context, target)


build = GoldNas


def _update_penalty(state: SearchState, dropped: int, goal: int) -> SearchState:
    """Return the state with λ (``penalty``) changed after ``dropped`` operations were dropped.

    ``goal``: the number that an epoch should drop. After twice the goal or more, λ is halved and its step is reset.
    After fewer than the goal, it rises by twice its last step, unless the regulariser exceeds the cross-entropy: then
    it has reached its cap.
    """
    cross_entropy, regularizer = state.losses
    state = replace(state, penalty_cap=state.penalty if cross_entropy < regularizer else state.penalty_cap)
    if dropped >= 2 * goal:
        return replace(state, penalty_step=SearchState.penalty_step, penalty=state.penalty / 2)
    if dropped < goal and state.penalty < state.penalty_cap:
        step = 2 * state.penalty_step
        return replace(state, penalty_step=step, penalty=state.penalty + step)
    return state
