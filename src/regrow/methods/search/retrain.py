"""Retraining of a found network from scratch, where weights that the search set to 0 stay 0.

As MG-DARTS trains its networks (the authors' code): from scratch, with fixed weight masks, on images that are shifted
and mirrored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from regrow.core.axes.axis import AxisTensor
from regrow.core.tasks import Examples
from regrow.data.vision import cut_out, is_images, shift_and_flip
from regrow.training.learner import Context, Learner, Loss, Replacements, Step, task_loss

CITATION = "Liu et al., MG-DARTS (arXiv 2310.15074), code"


@dataclass(frozen=True)
class Settings:
    """Settings of the retraining of a found network.

    Args:
        clip: The largest norm of the gradient; larger ones are scaled down to it.
        augment: Whether images are shifted and mirrored at random.
        cutout: The side of the square that is blanked in each image, in pixels; 0: none.
    """

    clip: float = 5.0
    augment: bool = True
    cutout: int = 0


@dataclass(frozen=True)
class RetrainState:
    """The state of the retraining: the fixed weight masks."""

    # Weight name → which entries may differ from 0; weights without zeros have no mask.
    masks: Mapping[str, AxisTensor] = field(default_factory=dict)


def build(settings: Settings, context: Context, weights: Mapping[str, Tensor]) -> Learner[RetrainState]:
    """Return the learner that retrains a found network."""
    masks = {
        name: AxisTensor(weights[name].detach() != 0, context.axes.shapes[name])
        for name in context.weights
        if not bool(weights[name].all())
    }
    return Learner(
        RetrainState(masks), parametrize=_mask, loss=partial(_compute_loss, settings), project=partial(_clip, settings)
    )


def _mask(state: RetrainState, context: Context) -> Replacements:
    parameters = context.parameters()
    return Replacements({name: parameters[name] * mask.values for name, mask in state.masks.items()})


def _compute_loss(settings: Settings, state: RetrainState, context: Context, step: Step) -> Loss:
    batch = step.batch
    if is_images(batch.inputs):
        inputs = shift_and_flip(batch.inputs) if settings.augment else batch.inputs
        batch = Examples(cut_out(inputs, settings.cutout), batch.labels)
    return task_loss(state, context, replace(step, batch=batch))


def _clip(settings: Settings, state: RetrainState, context: Context, step: Step) -> RetrainState:
    nn.utils.clip_grad_norm_(context.parameters().values(), settings.clip)
    return state
