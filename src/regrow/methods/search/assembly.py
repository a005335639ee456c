"""A search method as a record of its parts, with the hooks and log rows that all search methods share."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from regrow.core.amounts import short
from regrow.core.tasks import Examples
from regrow.data.augment import is_images, shift_and_flip
from regrow.evaluation.continual import mean_score
from regrow.methods.search.commit import Commit, account_plan
from regrow.methods.search.space import (
    GRANULARITIES,
    Rules,
    measure_masked,
    measure_size,
    start_search,
    update_layout,
)
from regrow.methods.search.state import SearchState
from regrow.surgery.gate import parametrize
from regrow.training.learner import Boundary, Context, Event, Learner, Step, task_loss


@dataclass(frozen=True)
class Search:
    """A search method: its rules, its hooks of the training loop, and what a run must know to plan stages and memory.

    Args:
        rules: The method's choices that the shared parts need.
        learner: The method's hooks of the training loop.
        finalize: (state, context, target) → the next plan after the last epoch, and the new state.
        settings: The method's settings, as JSON data.
        needs_epochs: Whether the search has to be trained.
        shrinks: Whether masks remove more and more in training, so that the network's size differs after each epoch.
        check: Raises ``ValueError`` for a search that cannot succeed.
        stage_share: The fraction of its operations that a part of the network is expected to have after its stage.
        masked: The granularities whose masks need memory in a step.
    """

    rules: Rules
    learner: Learner[SearchState]
    finalize: Callable[[SearchState, Context, float], Commit]
    settings: Mapping[str, object]
    needs_epochs: bool = True
    shrinks: bool = False
    check: Callable[[Context], None] = lambda context: None
    stage_share: float = 1.0
    masked: tuple[str, ...] = GRANULARITIES


def follow_training(rules: Rules, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
    """Boundary hook shared by all search methods: start the state, let it follow plans, and log epochs and the result.

    Args:
        rules: The choices of the method.
        state: The state of the search.
        context: The network and its data.
        boundary: The event, and the plan that was applied, if any.
    """
    match boundary.event:
        case Event.TASK_START:
            state = start_search(rules, context)
            log_status(rules, state, context)
        case Event.RESUME:
            state = update_layout(rules, state, context)
            log_status(rules, state, context)
        case Event.EPOCH_START:
            context.model.train()
        case Event.EPOCH_END:
            state = log_epoch(rules, state, context)
        case Event.FINISH:
            log_result(rules, state, context)
    return account_plan(rules, state, context, boundary.plan) if boundary.plan else state


def log_epoch(rules: Rules, state: SearchState, context: Context) -> SearchState:
    """Log the validation score, current and allowed size, and the kept fraction of each granularity; return the state.

    Args:
        rules: The choices of the method.
        state: The state of the search.
        context: The network and its data.
    """
    masks = rules.masks(state, context, None, False)
    with parametrize(context.model, rules.parametrize(state, replace(context, answered=context.number)).values):
        accuracy = mean_score(context.model, context.task.test, context.objective)
    row: dict[str, int | float] = {"epoch": context.epoch + 1, "stage": state.stage, "accuracy": accuracy}
    with torch.no_grad():
        row["size"] = float(measure_masked(state, masks))
    row |= {"allowed": rules.allowed(state, context, rules.space.target), "mu": state.multiplier}
    row |= rules.shares(state, masks)
    context.log("epoch", **row)
    state = replace(state, history=(row,))
    log_status(rules, state, context)
    return state


def log_status(rules: Rules, state: SearchState, context: Context) -> None:
    """Log the text shown beside the progress: stage, size, validation accuracy and kept fractions of the last epoch.

    Args:
        rules: The choices of the method.
        state: The state of the search.
        context: The network and its data.
    """
    words = [context.task.name] + [f"stage {state.stage + 1}"] * (len(rules.space.ends) > 1)
    for row in state.history[-1:]:
        if row["stage"] == state.stage:
            most = f" of {short(row['allowed'])}" if row["allowed"] else ""
            words += [f"{short(row['size'])}{most} {rules.space.measure}", f"validation {row['accuracy']:.2f}"]
            words += [f"{name} {row[name]:.0%}" for name in GRANULARITIES if name in rules.space.granularities]
    context.log("status", text=", ".join(words))


def compute_loss(context: Context, batch: Examples, augment: bool) -> Tensor:
    """Return the loss of the context's objective on a batch, of randomly shifted and mirrored images if ``augment``.

    Args:
        context: The network, and its objective.
        batch: Inputs and labels.
        augment: Whether images are shifted and mirrored at random; other inputs never are.
    """
    if augment and is_images(batch.inputs):
        batch = Examples(shift_and_flip(batch.inputs), batch.labels)
    return task_loss(None, context, Step(0, batch)).value


def log_result(rules: Rules, state: SearchState, context: Context) -> None:
    """Log what each granularity saved and the size that remains, as a row ``levels``.

    Args:
        rules: The choices of the method.
        state: The last state of the search.
        context: The found network.
    """
    masks = rules.masks(state, context, None, False)
    context.log(
        "levels",
        saved=asdict(state.saved),
        kept=rules.shares(state, masks),
        measure=str(rules.space.measure),
        asked=rules.space.target,
        size=measure_size(rules, state, context),
        **rules.summary(state),
    )
