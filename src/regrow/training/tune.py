"""BatchNorm recalibration and fine-tuning after a cut, without which a pruned convolutional network is useless."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.data.batch_streams import BatchStream
from regrow.objectives import Objective, choose_objective
from regrow.progress import Progress, silent
from regrow.sources import Source, device_of
from regrow.tasks import Task
from regrow.training.fit import fit
from regrow.training.learner import PLAIN, Context, Loss, Step
from regrow.training.optimizers import OptimizerSettings
from regrow.training.schedule import NO_AXES, Phase, Schedule, source_phase


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
                batch = batch.to(device_of(model))
                batch.run(model)
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
    objective: Objective | None = None,
    progress: Progress = silent,
) -> None:
    """Train on a source's labels for a few epochs, with a learning rate that falls as a half cosine.

    Args:
        model: A network, changed in place; left in the mode it was in.
        source: Batches with labels.
        epochs: Passes over the source, each in its own order; that of the loader, if the source is one.
        lr: The first learning rate, of SGD with Nesterov momentum 0.9.
        weight_decay: Weight decay of the optimizer.
        clip: The largest norm of the gradient; larger ones are scaled down to it.
        seed: Seed of the order of batches, and of Dropout.
        objective: What the network is trained for; ``None``: what fits the labels.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If the source is empty, its batches have no labels and the network returns no loss, or the loss
            stops being finite.
    """
    if not len(source):
        raise ValueError(f"source {source.name!r} is empty; give one with batches to train on")
    objective = objective or choose_objective(None, source.batches[0])
    generator = torch.Generator().manual_seed(seed)
    order = [i for _ in range(epochs) for i in torch.randperm(len(source), generator=generator).tolist()]
    phase = (
        _stream_phase(source, epochs)
        if isinstance(source.batches, BatchStream)
        else source_phase("fine-tuning", [len(source)] * epochs, lambda step: [source.batches[order[step]]])
    )
    schedule = Schedule(OptimizerSettings("sgd", lr, weight_decay), "cosine", clip=clip, seed=seed)
    torch.manual_seed(seed)
    modes = {module: module.training for module in model.modules()}
    try:
        fit(model, NO_AXES, [phase], replace(PLAIN, loss=objective_loss(objective)), schedule, progress=progress)
    finally:
        for module, mode in modes.items():
            module.training = mode


def objective_loss(objective: Objective) -> Callable[[Any, Context, Step], Loss]:
    """Return the ``loss`` hook that computes an objective on batches of inputs and labels.

    Args:
        objective: What the network is trained for.
    """

    def loss(state: object, context: Context, step: Step) -> Loss:
        batch = step.batch
        return Loss(objective.compute_loss(batch.run(context.model), batch))

    return loss


def _stream_phase(source: Source, epochs: int) -> Phase:
    """Return a phase that reads a user's loader from its start in every epoch, in the loader's own order."""
    task = Task.of_gone("fine-tuning", (), (0,))
    steps = (len(source),) * epochs
    return Phase(task, steps, lambda context: (([batch], None) for batch in source), seeded=False)
