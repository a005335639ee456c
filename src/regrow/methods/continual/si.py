"""Synaptic intelligence (SI): parameters are penalised for moving, by how much they reduced earlier losses.

Zenke, Poole, Ganguli, ICML 2017 (arXiv 1703.04200):  w ← w − g · Δθ along the path,  Ω ← Ω + w / (Δ² + ξ) at a task's
end,  loss + c Σ Ω (θ − θ*)².  Where we differ: g is the gradient of the whole loss, penalty included (the paper's
is that of the task's loss alone), and negative contributions to Ω are set to 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from regrow.core.axes.axis import AxisTensor
from regrow.settings.constraints import CheckedSettings, NonNegative, Positive
from regrow.training.hooks import copy_parameters
from regrow.training.learner import (
    Boundary,
    Context,
    Event,
    Learner,
    Loss,
    Step,
    make_tensor,
    set_train_mode,
    task_loss,
)

CITATION = "Zenke et al., Continual learning through synaptic intelligence, ICML 2017"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of synaptic intelligence: penalty strength, and damping of the importance.

    Args:
        strength: c, the strength of the penalty.
        damping: ξ, added to the squared distance moved, so that parameters that hardly moved matter little.
    """

    strength: NonNegative = 0.1
    damping: Positive = 0.1


@dataclass(frozen=True)
class SiState:
    """The state of synaptic intelligence, by parameter name."""

    weight: Mapping[str, AxisTensor] = field(default_factory=dict)  # Ω, the importance to earlier tasks
    # w, the path integral in the current task: how much the parameter has reduced the loss.
    path: Mapping[str, AxisTensor] = field(default_factory=dict)
    anchor: Mapping[str, AxisTensor] = field(default_factory=dict)  # θ*, the values at the start of the current task
    last: Mapping[str, AxisTensor] = field(default_factory=dict)  # the values after the last step


def build(settings: Settings) -> Learner[SiState]:
    """Return the learner that trains with synaptic intelligence."""

    def compute_loss(state: SiState, context: Context, step: Step) -> Loss:
        loss = task_loss(None, context, step).value
        if context.number:
            for name, parameter in context.parameters().items():
                moved = parameter - state.anchor[name].values
                loss = loss + settings.strength * (state.weight[name].values * moved.square()).sum()
        return Loss(loss)

    def integrate(state: SiState, context: Context, step: Step) -> SiState:
        with torch.no_grad():
            for name, parameter in context.parameters().items():
                last = state.last[name].values
                if parameter.grad is not None:
                    state.path[name].values.addcmul_(parameter.grad, parameter - last, value=-1)
                last.copy_(parameter)
        return state

    def consolidate(state: SiState, context: Context, boundary: Boundary) -> SiState:
        set_train_mode(state, context, boundary)
        parameters = context.parameters()
        if boundary.event == Event.TASK_START:
            weight, path = ({name: make_tensor(context, name) for name in parameters} for _ in range(2))
            return SiState({**weight, **state.weight}, path, copy_parameters(context), copy_parameters(context))
        if boundary.event == Event.TASK_END:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    moved = parameter - state.anchor[name].values
                    gain = state.path[name].values / (moved.square() + settings.damping)
                    state.weight[name].values.add_(gain.clamp_min(0))
        return state

    return Learner(SiState(), loss=compute_loss, after_step=integrate, boundary=consolidate)
