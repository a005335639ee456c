"""Distillation: the cut network learns to answer as the dense one does.

L = (1 − mix) · T² · KL(softmax(z_dense / T) ‖ softmax(z / T)) + mix · cross entropy of the text

Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531). It holds both networks in memory, and of
the one that learns, in float32, five numbers more per trained parameter (gradient, two moments, the best value).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.axes import AxisGraph
from regrow.methods.recovery.fitting import fit_recovery
from regrow.methods.recovery.task import Recovery, RecoveryTask, precise
from regrow.plan import Plan
from regrow.scoring.gradients import cross_entropy
from regrow.sources import Batch, asked, logits_in
from regrow.training.freeze import freeze

CITATION = "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531"
TRAINED = ("all", "cut")


@dataclass(frozen=True)
class Settings:
    """Settings of ``distil``.

    Args:
        lr: The largest learning rate.
        temperature: T, above 0.
        mix: The share of the text's own cross entropy, 0 to 1.
        train: ``all`` parameters, or ``cut``: the tensors that the plan cut, and all vectors (gains of norms, biases).
        passes: How often each batch is seen.
        windows: Batches per step.
        checks: How often the network is evaluated on the held-out part of the text; the best one is kept.
        held_out: Which share of the text that is.
    """

    lr: float = 3e-4
    temperature: float = 1.0
    mix: float = 0.1
    train: str = "all"
    passes: int = 1
    windows: int = 4
    checks: int = 4
    held_out: float = 0.125


def build(settings: Settings) -> Recovery:
    """Distillation with these settings."""
    return partial(distil, settings=settings)


def distil(task: RecoveryTask, settings: Settings) -> dict[str, Any]:
    """Train the cut network on the dense one's answers.

    Args:
        task: The two networks and the text.
        settings: How.

    Returns:
        What :func:`regrow.methods.recovery.fitting.fit_recovery` returns, and how many parameters were trained.

    Raises:
        ValueError: If a setting is of no use, the text has no labels while ``mix`` asks for them, or the loss stops
            being finite.
    """
    if settings.train not in TRAINED:
        raise ValueError(f"distil trains {' or '.join(TRAINED)}; got train={settings.train!r}")
    if not settings.temperature > 0 or not 0 <= settings.mix <= 1:
        raise ValueError(
            f"distil takes a temperature above 0 and a mix from 0 to 1; got {settings.temperature} and {settings.mix}"
        )
    names = set(cut_tensors(task.model, task.axes, task.plan)) if settings.train == "cut" else None
    parameters = {name: p for name, p in task.model.named_parameters() if names is None or name in names}
    with freeze(task.model, task.dense), precise(task.model):
        found = fit_recovery(task, parameters, lambda batch: _loss(task, batch, settings), settings)
    return {**found, "trained": sum(p.numel() for p in parameters.values())}


def divergence(logits: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(softmax(dense / T) ‖ softmax(logits / T)), mean over positions, in nats.

    Args:
        logits: ``[positions, classes]``.
        dense: The same of the network that teaches.
        temperature: T.

    >>> bool(divergence(torch.ones(2, 3), torch.zeros(2, 3)).abs() < 1e-6)
    True
    """
    said, wanted = ((z.float() / temperature).log_softmax(-1) for z in (logits, dense))
    return F.kl_div(said, wanted, reduction="batchmean", log_target=True) * temperature**2


def cut_tensors(model: nn.Module, axes: AxisGraph, plan: Plan) -> list[str]:
    """The parameters of a cut network that a plan cut, and all vectors: gains of norms, biases."""
    cut = {
        axes.ties.get(slot.name, slot.name)
        for key, change in plan.changes.items()
        if not change.idle
        for slot in axes[key].slots
    }
    return [name for name, parameter in model.named_parameters() if name in cut or parameter.dim() < 2]


def _loss(task: RecoveryTask, batch: Batch, settings: Settings) -> Tensor:
    with torch.no_grad():
        wanted = asked(logits_in(task.dense(*batch.args, **batch.kwargs)), batch.labels)
    answer = task.model(*batch.args, **batch.kwargs)
    loss = (1 - settings.mix) * divergence(asked(logits_in(answer), batch.labels), wanted, settings.temperature)
    if settings.mix:
        if batch.labels is None:
            raise ValueError("this text has no labels; distil with mix=0")
        loss = loss + settings.mix * cross_entropy(answer, batch.labels)
    return loss
