"""Distillation: train the cut network on the dense network's output distribution.

L = (1 − mix) · T² · KL(softmax(z_dense / T) ‖ softmax(z / T)) + mix · the loss by labels

Where outputs are no logits of classes, the divergence is that of each label's chance (``multi-label``), or the mean
squared difference (``regression``). Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
Both networks are in memory, and for the cut one, in float32, more numbers per trained parameter: its gradient, Adam's
two moments and the best value so far.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regrow.core.objectives import MULTI_LABEL, REGRESSION, choose_objective
from regrow.core.sources import Batch, labelled_logits, logits_in
from regrow.methods.recovery import Recovery, RecoveryTask, fit_recovery
from regrow.settings.constraints import CheckedSettings, Count, Fraction, OpenFraction, Positive
from regrow.training.hooks import freeze

CITATION = "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531"
PIECE = 2**22  # logits of which the divergence is computed at a time


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``distil``: learning rate, loss, and evaluation on held-out text.

    Args:
        lr: The peak learning rate.
        temperature: T, above 0; a higher one gives tokens of low probability more influence.
        mix: The weight of the text's own cross-entropy in the loss, 0 to 1.
        passes: The number of passes over the training batches.
        windows: Batches per step.
        checks: The number of evaluations on the held-out part of the text; the best evaluated network is kept.
        held_out: The fraction of the text that is held out.
    """

    lr: float = 1e-4
    temperature: Positive = 1.0
    mix: Fraction = 0.1
    passes: Count = 2
    windows: Count = 4
    checks: Count = 4
    held_out: OpenFraction = 0.125


def build(settings: Settings) -> Recovery:
    """Return the recovery that distils the dense network into the cut one."""
    return partial(distil, settings=settings)


def distil(task: RecoveryTask, settings: Settings) -> dict[str, object]:
    """Train the cut network to predict what the dense one predicts, in place; return a summary as JSON data."""
    parameters = dict(task.model.named_parameters())
    with freeze(task.model, task.dense), use_float32(task.model):
        summary = fit_recovery(task, parameters, partial(_compute_loss, settings=settings), settings)
        task.model.zero_grad()
    return {**summary, "trained": sum(p.numel() for p in parameters.values())}


def compute_divergence(logits: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² · KL(softmax(dense / T) ‖ softmax(logits / T)) of ``[positions, classes]``, in nats per position.

    >>> bool(compute_divergence(torch.ones(2, 3), torch.zeros(2, 3)).abs() < 1e-6)
    True
    """
    return cast(Tensor, _Divergence.apply(logits, dense, temperature))


class _Divergence(torch.autograd.Function):
    """The divergence, and its gradient by the logits in the same pass, some positions at a time to save memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dense: Tensor, temperature: float) -> Tensor:
        gradient, total = torch.empty_like(logits, dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
        size = max(1, PIECE // logits.shape[-1])
        for part, z, z_dense in zip(gradient.split(size), logits.split(size), dense.split(size), strict=True):
            student, teacher = ((x.float() / temperature).log_softmax(-1) for x in (z, z_dense))
            total += F.kl_div(student, teacher, reduction="sum", log_target=True)
            torch.sub(student.exp_(), teacher.exp_(), out=part)
        ctx.save_for_backward(gradient.mul_(temperature).div_(len(logits)))
        ctx.dtype = logits.dtype
        return total * temperature**2 / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * of_loss).to(ctx.dtype), None, None


def _compute_loss(task: RecoveryTask, batch: Batch, *, settings: Settings) -> Tensor:
    """Return (1 − mix) · divergence from the dense network + mix · the loss by labels, a scalar."""
    with torch.no_grad():
        wanted = logits_in(batch.run(task.dense))
    output = batch.run(task.model)
    found, name, t = logits_in(output), (task.objective or choose_objective(None, batch)).name, settings.temperature
    if name == MULTI_LABEL.name:
        gap = F.binary_cross_entropy_with_logits(found.float() / t, (wanted.float() / t).sigmoid()) * t**2
    elif name == REGRESSION.name:
        gap = F.mse_loss(found.float(), wanted.float())
    else:
        gap = compute_divergence(labelled_logits(found, batch.labels), labelled_logits(wanted, batch.labels), t)
    loss = (1 - settings.mix) * gap
    if settings.mix:
        loss = loss + settings.mix * task.compute_loss(output, batch)
    return loss


@contextmanager
def use_float32(model: nn.Module) -> Iterator[None]:
    """Context manager in which half-precision tensors of a network are float32, in place; then they are rounded."""
    tensors = (*model.parameters(), *model.buffers())
    half = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]
    for tensor, _ in half:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in half:
            tensor.data = tensor.data.to(dtype)
