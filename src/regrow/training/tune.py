"""BatchNorm recalibration and fine-tuning after a cut, without which a pruned convolutional network is useless."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.progress import Progress, silent
from regrow.scoring.gradients import cross_entropy
from regrow.sources import Source
from regrow.training.fit import fit
from regrow.training.learner import PLAIN, Context, Loss, Step
from regrow.training.optimizers import OptimizerSettings
from regrow.training.schedule import NO_AXES, Schedule, source_phase


def recalibrate(model: nn.Module, sources: Sequence[Source]) -> int:
    """Measure the running statistics of every BatchNorm again, as plain averages over all batches.

    Everything but the BatchNorms runs in eval mode; modes and momenta are left as they were.

    Args:
        model: A network, changed in place.
        sources: The data; all batches have equal weight. Larger batches give better variances.

    Returns:
        The number of BatchNorm layers (0: nothing was run).
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.train()
    try:
        with torch.no_grad():
            for batch in (batch for source in sources for batch in source):
                batch = batch.to(next(model.parameters()).device)
                model(*batch.args, **batch.kwargs)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(layers)


def finetune(
    model: nn.Module,
    source: Source,
    *,
    epochs: int = 1,
    lr: float = 0.01,
    weight_decay: float = 1e-4,
    clip: float = 1.0,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Train on a source's labels for a few epochs, with a learning rate that falls as a half cosine.

    Args:
        model: A network, changed in place; left in the mode it was in.
        source: Batches with labels.
        epochs: Passes over the source, each in its own order.
        lr: The first learning rate, of SGD with Nesterov momentum 0.9.
        weight_decay: Weight decay of the optimizer.
        clip: The largest norm of the gradient; larger ones are scaled down to it.
        seed: Seed of the order of batches, and of Dropout.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If batches have no labels, or the loss stops being finite.
    """
    if any(batch.labels is None for batch in source) or not len(source):
        raise ValueError(f"source {source.name!r} has no labels to train on")
    generator = torch.Generator().manual_seed(seed)
    order = [i for _ in range(epochs) for i in torch.randperm(len(source), generator=generator).tolist()]
    phase = source_phase("fine-tuning", [len(source)] * epochs, lambda step: [source.batches[order[step]]])
    schedule = Schedule(OptimizerSettings("sgd", lr, weight_decay), "cosine", clip=clip, seed=seed)
    torch.manual_seed(seed)
    modes = {module: module.training for module in model.modules()}
    try:
        fit(model, NO_AXES, [phase], replace(PLAIN, loss=label_loss), schedule, progress=progress)
    finally:
        for module, mode in modes.items():
            module.training = mode


def label_loss(state: Any, context: Context, step: Step) -> Loss:
    """``loss`` hook that returns the cross-entropy of a batch's labels.

    Args:
        state: The learner's state.
        context: The network.
        step: The step, with its batch.

    Raises:
        ValueError: If the batch has no labels.
    """
    batch = step.batch
    if batch.labels is None:
        raise ValueError("training needs labels (of text: the next tokens), and this source has none")
    return Loss(cross_entropy(context.model(*batch.args, **batch.kwargs), batch.labels))
