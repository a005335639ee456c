"""BatchNorm recalibration and fine-tuning after a cut, without which a pruned convolutional network is useless."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.core.objectives import Objective, choose_objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source, device_of
from regrow.core.tasks import Task
from regrow.data.batch_streams import BatchStream
from regrow.training.fit import fit
from regrow.training.learner import PLAIN, Context, Loss, Step
from regrow.training.optimizers import OptimizerSettings
from regrow.training.schedule import NO_AXES, Phase, Schedule, source_phase


def recalibrate(model: nn.Module, sources: Iterable[Iterable[Batch]]) -> int:
    """Measure the running statistics of every BatchNorm again, as plain averages over all batches.

    Everything but the BatchNorms runs in eval mode; modes and momenta are left as they were. Statistics of layers that
    the data do not reach are left, too, and batches with a single value per channel, which have no variance.

    Args:
        model: A network, changed in place.
        sources: The data; all batches have equal weight. Larger batches give better variances.

    Returns:
        The number of BatchNorm layers that were measured (0: nothing was run, or nothing reached them).
    """
    layers = find_running(model)
    if not layers:
        return 0
    modes = {module: module.training for module in model.modules()}
    before = [(layer, layer.momentum, layer.num_batches_tracked, _copies([layer])) for layer in layers]
    measured = [False] * len(layers)
    model.eval()
    for layer in layers:
        layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device_of(model))
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.train()
    try:
        with torch.no_grad():
            for batch in (batch for source in sources for batch in source):
                _measure(model, layers, batch.to(device_of(model)))
        measured = [bool(layer.num_batches_tracked) for layer in layers]
    finally:
        for new, (layer, momentum, count, copies) in zip(measured, before, strict=True):
            if new and count is not None and layer.num_batches_tracked is not None:
                count.copy_(layer.num_batches_tracked)
            layer.momentum, layer.num_batches_tracked = momentum, count
            _restore([] if new else copies)
        for module, mode in modes.items():
            module.training = mode
    return sum(measured)


def find_running(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms of a network that keep running statistics.

    Args:
        model: The network.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


def _copies(layers: Sequence[_BatchNorm]) -> list[tuple[Tensor, Tensor]]:
    """Return the running statistics of layers, each with a copy."""
    tensors = [x for layer in layers for x in (layer.running_mean, layer.running_var, layer.num_batches_tracked)]
    return [(x, x.clone()) for x in tensors if x is not None]


def _restore(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, copy in copies:
        tensor.copy_(copy)


def _measure(model: nn.Module, layers: Sequence[_BatchNorm], batch: Batch) -> None:
    """Run a batch; statistics are left as they were if a layer gets a single value per channel."""
    copies = _copies(layers)
    try:
        batch.run(model)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        _restore(copies)


def recalibrate_changed(model: nn.Module, plan: Plan, sources: Sequence[Source]) -> str:
    """Measure the running statistics of every BatchNorm again, if a plan has changed the network.

    Args:
        model: The network after the plan; changed in place.
        plan: The plan.
        sources: The data.

    Returns:
        What a user must know: that there were BatchNorms and nothing to measure them with; empty otherwise.
    """
    changed = plan.changes_modules or any(not change.idle for change in plan.changes.values())
    layers = find_running(model) if changed and device_of(model).type != "meta" else []
    if not layers:
        return ""
    if not sources:
        return (
            f"the running statistics of {len(layers)} BatchNorm layers are those of the uncut network, which costs "
            "accuracy; give data, on which they are measured again"
        )
    if recalibrate(model, sources):
        return ""
    return (
        f"the running statistics of {len(layers)} BatchNorm layers are those of the uncut network, which costs "
        "accuracy: the data do not reach them; give batches of several examples"
    )


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
