"""Stages of a search: when masks are trained, when the network is cut, and how one stage follows another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from regrow.methods.search.commit import Commit, CommitStep
from regrow.methods.search.space import (
    Rules,
    SearchSpace,
    build_layout,
    check_space,
    clear_thresholds,
    measure_size,
    update_layout,
)
from regrow.methods.search.state import SearchState
from regrow.training.learner import Context


@dataclass(frozen=True)
class Stages:
    """The schedule of a search in stages: when masks are trained and when the network is cut.

    Args:
        number: The number of stages.
        warm: Epochs at the start of a stage in which only weights are trained.
        every: The number of epochs between two commits after those.
        share: The fraction of its size that a stage leaves, except the last one.
        penalty: λ, the weight of the regulariser of operations, at the start of a stage.
        reprune: Whether a stage prunes further what earlier stages kept.
    """

    number: int
    warm: int
    every: int
    share: float
    penalty: float
    reprune: bool

    def bounds(self, epochs: int, stage: int) -> tuple[int, int]:
        """Return the first epoch of a stage, and of the next stage.

        Args:
            epochs: The number of epochs of the whole search.
            stage: The number of the stage, from 0.
        """
        return round(stage * epochs / self.number), round((stage + 1) * epochs / self.number)

    def trains(self, state: SearchState, context: Context) -> bool:
        """Whether masks are trained in the current epoch.

        Args:
            state: The state of the search.
            context: The progress of training.
        """
        return context.epoch >= self.bounds(context.epochs, state.stage)[0] + self.warm

    def steps(self, context: Context) -> int:
        """Return the number of steps of a stage in which masks are trained, by which learning rates are divided.

        Args:
            context: The number of epochs, and of steps per epoch.
        """
        return max(1, (context.epochs // self.number - self.warm) * context.steps)

    def progress(self, state: SearchState, context: Context) -> float:
        """Return the fraction of a stage's removal that is scheduled by now, 0 to 1; it is 1 in the last fifth.

        Args:
            state: The state of the search.
            context: The progress of training.
        """
        first, end = self.bounds(context.epochs, state.stage)
        training = max(1, end - first - self.warm)
        done = context.epoch - first - self.warm + state.examples / len(context.task.train)
        return min(1.0, max(0.0, done / (0.8 * training)))

    def commits(self, state: SearchState, context: Context) -> bool:
        """Whether the network is cut before this epoch; it always is at the end of a stage.

        Args:
            state: The state of the search.
            context: The progress of training.
        """
        first, end = self.bounds(context.epochs, state.stage)
        epochs = context.epoch - first - self.warm
        return context.epoch == end or (epochs > 0 and epochs % self.every == 0)


def check_stages(stages: Stages, space: SearchSpace, context: Context) -> None:
    """Raise ValueError for stages without an epoch that trains masks, or a target that cannot be reached.

    Args:
        stages: The stages.
        space: What the search may remove.
        context: The network, and the number of epochs.

    Raises:
        ValueError: For such a search; says how many epochs all stages need.
    """
    n, warm = stages.number, stages.warm
    if n == 1 and not stages.reprune:
        raise ValueError("reprune=false needs several stages, and this search has one; use --stages 2")
    bounds = [stages.bounds(context.epochs, stage) for stage in range(n)]
    if any(end - first <= warm for first, end in bounds):
        raise ValueError(
            f"{context.epochs} epochs leave a stage of {n} no epoch to learn masks in, since the first {warm} of each "
            f"stage train weights alone; use --epochs {n * (warm + 1)} or more, fewer --stages, or a smaller --set warm"
        )
    check_space(space, context)


def start_stage(stages: Stages, rules: Rules, state: SearchState, context: Context, stage: int) -> SearchState:
    """Return the state at the start of a stage, with thresholds at 0 and the size that the stage has to reach.

    Args:
        stages: The stages.
        rules: The choices of the method.
        state: The state of the search.
        context: The network.
        stage: The number of the stage, from 0.
    """
    state = replace(state, stage=stage, multiplier=0.0, dropped=(), cut={}, turn=0)
    state = replace(state, penalty=stages.penalty, penalty_step=1e-5, penalty_cap=100.0)
    clear_thresholds(state)
    state = protect_earlier(stages, rules, update_layout(rules, state, context), context)
    size = measure_size(rules, state, context)
    goal = rules.space.target if stage == stages.number - 1 else stages.share * size
    return replace(state, start=size, goal=goal)


def protect_earlier(stages: Stages, rules: Rules, state: SearchState, context: Context) -> SearchState:
    """Return the state with the operations and axes of earlier stages, where these are not pruned again.

    Args:
        stages: The stages.
        rules: The choices of the method.
        state: The state of the search.
        context: The network.
    """
    if stages.reprune or not state.stage:
        return replace(state, earlier=())
    layout = build_layout(rules.space, state.axes, context, rules.space.part(state.stage - 1))
    return replace(state, earlier=(layout.runs, layout.axis.unique()))


def take_turns(steps: Sequence[CommitStep], state: SearchState, context: Context) -> Commit:
    """Return the plan of the first step that makes one; steps taken before at this boundary are skipped.

    Args:
        steps: The steps in order.
        state: The state of the search, with the number of steps taken.
        context: The network.
    """
    for turn in range(state.turn, len(steps)):
        plan, state = steps[turn](replace(state, turn=turn + 1), context)
        if plan:
            return plan, state
    return None, replace(state, turn=0)
