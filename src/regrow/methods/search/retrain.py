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


CLIP = 5.0  # the largest norm of the gradient; larger ones are scaled down to it


@dataclass(frozen=True)
class RetrainState:
    """The state of the retraining: the fixed weight masks."""

    # Weight name → which entries may differ from 0; weights without zeros have no mask.
    masks: Mapping[str, AxisTensor] = field(default_factory=dict)


def build(cutout: int, context: Context, weights: Mapping[str, Tensor]) -> Learner[RetrainState]:
    """Return the learner that retrains a found network; ``cutout``: side in pixels of a square that is blanked.

    ``weights``: name → weights as the search left them, whose zeros stay 0; others are free.
    """
    masks = {
        name: AxisTensor(weights[name].detach() != 0, context.axes.shapes[name])
        for name in context.weights
        if name in weights and not bool(weights[name].all())
    }
    return Learner(RetrainState(masks), parametrize=_mask, loss=partial(_compute_loss, cutout), project=_clip)


def _mask(state: RetrainState, context: Context) -> Replacements:
    """Hook ``parametrize``: the weights that have zeros, under their masks."""
    parameters = context.parameters()
    return Replacements({name: parameters[name] * mask.values for name, mask in state.masks.items()})


def _compute_loss(cutout: int, state: RetrainState, context: Context, step: Step) -> Loss:
    """Hook ``loss``: the loss of a batch; images are randomly shifted, mirrored and partly blanked before."""
    batch = step.batch
    if is_images(batch.inputs):
        batch = Examples(cut_out(shift_and_flip(batch.inputs), cutout), batch.labels)
    return task_loss(state, context, replace(step, batch=batch))


def _clip(state: RetrainState, context: Context, step: Step) -> RetrainState:
    """Hook ``project``: clip the norm of all gradients to ``CLIP``, in place."""
    nn.utils.clip_grad_norm_(context.parameters().values(), CLIP)
    return state
