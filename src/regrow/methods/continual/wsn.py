"""Winning subnetworks (WSN): each task learns which weights it uses; those of earlier tasks are shared and frozen.

Kang et al., ICML 2022 (read in the authors' code): every weight has a score, a task uses the fraction ``share`` of a
layer with the largest |score|, the gradient passes straight through to the scores, and used weights never change again.
With ``use_task_id``, a task is evaluated with its own mask; otherwise with the weights that any task uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.settings.constraints import CheckedSettings, Range
from regrow.training.hooks import copy_weights, protect_entries, restore_entries, train_with_frozen_norms
from regrow.training.learner import Boundary, Context, Event, Learner, Replacements, Step, make_mask, make_tensor
from regrow.training.state import derived

CITATION = "Kang et al., Forget-free continual learning with winning subnetworks, ICML 2022"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of winning subnetworks: density of the masks, use of task identities, and the scores' learning rate.

    Args:
        share: The fraction of each layer's weights that a task uses, above 0 and at most 1.
        use_task_id: Whether the task's identity is given at evaluation, so that the task's own mask can be used.
        lr: Learning rate of the scores.
        seed: Seed of the initial scores.
    """

    share: Annotated[float, Range(0, 1, exclusive_minimum=True)] = 0.5
    use_task_id: bool = False
    lr: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class WsnState:
    """The state of winning subnetworks, by name of a weight."""

    score: Mapping[str, AxisTensor] = field(default_factory=dict)  # the learned scores, of the weight's shape
    used: Mapping[str, AxisTensor] = field(default_factory=dict)  # which entries any finished task uses
    # Which entries one task uses; the key is `"NUMBER NAME"`, with the task's number from 0.
    mask: Mapping[str, AxisTensor] = field(default_factory=dict)
    before: Mapping[str, Tensor] = derived(dict)  # the weights when the task started, or the run was resumed


def build(settings: Settings) -> Learner[WsnState]:
    """Return the learner that trains with winning subnetworks."""

    def select_weights(state: WsnState, context: Context) -> Replacements:
        parameters, number = context.parameters(), context.eval_task
        if number is None:
            sizes = {name: state.score[name].values.abs() for name in context.weights}
            masks = {
                name: _SelectLargest.apply(size, settings.share).to(parameters[name]) for name, size in sizes.items()
            }
            return Replacements({name: parameters[name] * mask for name, mask in masks.items()})
        masks = _values(state.used)
        if settings.use_task_id and number <= context.number:
            prefix = f"{number} "
            masks = {k.removeprefix(prefix): mask.values for k, mask in state.mask.items() if k.startswith(prefix)}
        return Replacements({name: parameters[name].detach() * mask for name, mask in masks.items()})

    def mask_gradients(state: WsnState, context: Context, step: Step) -> WsnState:
        if context.number and not state.before:
            state = replace(state, before=copy_weights(context))
        protect_entries(context, _values(state.used))
        return state

    def restore_used(state: WsnState, context: Context, step: Step) -> WsnState:
        restore_entries(context, state.before, _values(state.used))
        return state

    def react(state: WsnState, context: Context, boundary: Boundary) -> WsnState:
        train_with_frozen_norms(state, context, boundary)
        match boundary.event:
            case Event.TASK_START if context.number:
                return replace(state, before={})
            case Event.TASK_START:
                generator, scores = torch.Generator().manual_seed(settings.seed), {}
                for name in context.weights:
                    weight = context.model.get_parameter(name).detach()
                    values = torch.randn(weight.shape, generator=generator).to(weight.device) * weight.std()
                    scores[name] = make_tensor(context, name, values, settings.lr)
                return WsnState(scores, {name: make_mask(context, name) for name in context.weights})
            case Event.TASK_END:
                masks = dict(state.mask)
                for name in context.weights:
                    mask = _select_largest(state.score[name].values.detach(), settings.share)
                    masks[f"{context.number} {name}"] = make_tensor(context, name, mask)
                    state.used[name].values.logical_or_(mask)
                return replace(state, mask=masks)
        return state

    return Learner(
        WsnState(), parametrize=select_weights, project=mask_gradients, after_step=restore_used, boundary=react
    )


def _values(tensors: Mapping[str, AxisTensor]) -> dict[str, Tensor]:
    """Return name → plain tensor of the tensors of a state."""
    return {name: tensor.values for name, tensor in tensors.items()}


def _select_largest(scores: Tensor, share: float) -> Tensor:
    """Return a bool mask, true for the ``share`` (a fraction) of the scores with the largest absolute values."""
    magnitudes = scores.abs()
    smaller = min(round((1 - share) * magnitudes.numel()), magnitudes.numel() - 1)
    return magnitudes >= magnitudes.flatten().kthvalue(smaller + 1).values


class _SelectLargest(torch.autograd.Function):
    """:func:`_select_largest` as numbers 0 and 1, with a straight-through gradient to the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, share: float) -> Tensor:
        """Return 1 for the fraction ``share`` of the scores that are largest in absolute value, 0 for the others."""
        return _select_largest(scores, share).to(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient on as it is."""
        return gradient, None
