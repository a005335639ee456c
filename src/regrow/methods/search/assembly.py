"""The base of search methods: hooks of the training loop, and log rows, that all share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regrow.core.amounts import short
from regrow.core.tasks import Examples
from regrow.data.vision import is_images, shift_and_flip
from regrow.evaluation.continual import mean_score
from regrow.methods.search.commit import Commit, account_plan
from regrow.methods.search.space import (
    GRANULARITIES,
    Rules,
    SearchSpace,
    check_space,
    mask_parameters,
    measure_masked,
    measure_size,
    start_search,
    update_layout,
)
from regrow.methods.search.state import SearchState
from regrow.surgery.gate import parametrize
from regrow.training.learner import Boundary, Context, Event, Learner, Loss, Replacements, Step, task_loss


class Search(Rules, ABC):
    """A search method; subclasses override the hooks of :class:`regrow.training.learner.Learner` that they need.

    Args:
        s: The method's settings, a dataclass.
        space: What the search may remove.
    """

    needs_epochs = True
    """Whether the search has to be trained."""
    shrinks = False
    """Whether masks remove more and more in training, so that the network's size differs after each epoch."""
    stage_share = 1.0
    """The fraction of its operations that a part of the network is expected to have after its stage."""
    masked: tuple[str, ...] = GRANULARITIES
    """The granularities whose masks need memory in a step."""
    second_share = 0.0
    restores = False

    def __init__(self, s: Any, space: SearchSpace) -> None:
        super().__init__(space)
        self.settings: Mapping[str, Any] = asdict(s)

    def check(self, context: Context) -> None:
        """Raise ValueError for a search that cannot succeed."""
        check_space(self.space, context)

    @abstractmethod
    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """Return the next plan after the last epoch, and the new state."""

    @cached_property
    def learner(self) -> Learner[SearchState]:
        """The method's hooks of the training loop."""
        return Learner(
            SearchState(),
            parametrize=self.parametrize,
            loss=self.loss,
            project=self.project,
            after_step=self.after_step,
            plan=self.plan,
            boundary=self.boundary,
            optimizer="adam",
            second_share=self.second_share,
            restores=self.restores,
        )

    def parametrize(self, state: SearchState, context: Context) -> Replacements:
        """Return the tensors that replace parameters in the forward pass."""
        return mask_parameters(self, state, context)

    def loss(self, state: SearchState, context: Context, step: Step) -> Loss:
        """Return the loss of a batch, of randomly shifted and mirrored images with the setting ``augment``."""
        return Loss(self.compute_loss(context, step.batch))

    def project(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Clip the gradients of the network, with the setting ``clip``."""
        if (clip := self.settings.get("clip")) is not None:
            torch.nn.utils.clip_grad_norm_(context.parameters().values(), clip)
        return state

    def after_step(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Return the state after a step."""
        return state

    def plan(self, state: SearchState, context: Context) -> Commit:
        """Return the next plan: those of ``finalize`` after the last epoch."""
        at_end = context.epoch == context.epochs
        return self.finalize(state, context, self.space.target) if at_end else (None, state)

    def boundary(self, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
        """Start the state, let it follow plans, and log epochs and the result."""
        match boundary.event:
            case Event.TASK_START:
                state = start_search(self, context)
                self.log_status(state, context)
            case Event.RESUME:
                state = update_layout(self, state, context)
                self.log_status(state, context)
            case Event.EPOCH_START:
                context.model.train()
            case Event.EPOCH_END:
                state = self._log_epoch(state, context)
            case Event.FINISH:
                self._log_result(state, context)
        return account_plan(self, state, context, boundary.plan) if boundary.plan else state

    def compute_loss(self, context: Context, batch: Examples) -> Tensor:
        """Return the loss of the context's objective on a batch."""
        if self.settings.get("augment") and is_images(batch.inputs):
            batch = Examples(shift_and_flip(batch.inputs), batch.labels)
        return task_loss(None, context, Step(0, batch)).value

    def summary(self, state: SearchState) -> dict[str, float]:
        """Return values to log at the end, besides sizes and fractions."""
        return {}

    def log_status(self, state: SearchState, context: Context) -> None:
        """Log the text beside the progress: stage, size, validation accuracy and kept fractions of the last epoch."""
        words = [context.task.name] + [f"stage {state.stage + 1}"] * (len(self.space.ends) > 1)
        for row in state.history[-1:]:
            if row["stage"] == state.stage:
                most = f" of {short(row['allowed'])}" if row["allowed"] else ""
                words += [f"{short(row['size'])}{most} {self.space.measure}", f"validation {row['accuracy']:.2f}"]
                words += [f"{name} {row[name]:.0%}" for name in GRANULARITIES if name in self.space.granularities]
        context.log("status", text=", ".join(words))

    def _log_epoch(self, state: SearchState, context: Context) -> SearchState:
        """Log the validation score, current and allowed size, and the kept fraction of each granularity."""
        masks = self.masks(state, context)
        with parametrize(context.model, self.parametrize(state, replace(context, answered=context.number)).values):
            accuracy = mean_score(context.model, context.task.test, context.objective)
        row: dict[str, int | float] = {"epoch": context.epoch + 1, "stage": state.stage, "accuracy": accuracy}
        with torch.no_grad():
            row["size"] = float(measure_masked(state, masks))
        row |= {"allowed": self.allowed(state, context, self.space.target), "mu": state.multiplier}
        row |= self.shares(state, masks)
        context.log("epoch", **row)
        state = replace(state, history=(row,))
        self.log_status(state, context)
        return state

    def _log_result(self, state: SearchState, context: Context) -> None:
        """Log what each granularity saved and the size that remains, as a row ``levels``."""
        context.log(
            "levels",
            saved=asdict(state.saved),
            kept=self.shares(state, self.masks(state, context)),
            measure=str(self.space.measure),
            asked=self.space.target,
            size=measure_size(self, state, context),
            **self.summary(state),
        )


def raise_penalty(state: SearchState, dropped: int, *, few: int = 24, many: int = 48, factor: int = 4) -> SearchState:
    """Return the state with λ changed after a commit, as in MG-DARTS and, with other numbers, GOLD-NAS.

    After ``many`` dropped operations or more, λ is halved and its step is reset. After fewer than ``few``, it rises by
    ``factor`` times its last step, unless the regulariser exceeds the cross-entropy: then it has reached its cap.
    """
    plain, regularizer = state.losses
    state = replace(state, penalty_cap=state.penalty if plain < regularizer else state.penalty_cap)
    if dropped >= many:
        return replace(state, penalty_step=1e-5, penalty=state.penalty / 2)
    if dropped < few and state.penalty < state.penalty_cap:
        step = factor * state.penalty_step
        return replace(state, penalty_step=step, penalty=state.penalty + step)
    return state


def add_losses(state: SearchState, losses: Sequence[float]) -> SearchState:
    """Return the state with the cross-entropy and the regulariser of one more step added to its sums."""
    if not losses:
        return state
    return replace(state, losses=(state.losses[0] + losses[0], state.losses[1] + losses[1]))
