"""A toy method in a package of its own: plain training that pulls parameters towards those of the task before."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from regrow import AxisTensor
from regrow.methods import Kind, MethodEntry
from regrow.training.learner import (
    Boundary,
    Context,
    Event,
    Learner,
    Loss,
    Step,
    cross_entropy_loss,
    set_train_mode,
    tensor_along,
)


@dataclass(frozen=True)
class Settings:
    """The toy's.

    Args:
        strength: How hard it pulls.
    """

    strength: float = 0.01


@dataclass(frozen=True)
class State:
    """The parameters after the last task."""

    anchor: Mapping[str, AxisTensor] = field(default_factory=dict)


def build(settings: Settings) -> Learner[State]:
    """The learner."""

    def pull(state: State, context: Context, step: Step) -> Loss:
        loss = cross_entropy_loss(state, context, step).value
        for name, one in state.anchor.items():
            loss = loss + settings.strength * (context.parameters()[name] - one.values).square().sum()
        return Loss(loss)

    def remember(state: State, context: Context, boundary: Boundary) -> State:
        set_train_mode(state, context, boundary)
        if boundary.event != Event.TASK_END:
            return state
        return State(
            {name: tensor_along(context, name, p.detach().clone()) for name, p in context.parameters().items()}
        )

    return Learner(State(), loss=pull, boundary=remember)


TOY = MethodEntry(Kind.CONTINUAL, Settings, build, "nobody", "Toy: pull parameters towards those of the task before.")
