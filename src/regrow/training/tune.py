"""After a cut: BatchNorm recalibration and a short fine-tune; a pruned convolutional network is useless without."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.scoring.gradients import cross_entropy
from regrow.sources import Batch, Source


def recalibrate(model: nn.Module, sources: Sequence[Source]) -> int:
    """Measure the running statistics of every BatchNorm anew, as plain averages over all batches.

    Everything but the BatchNorms runs in eval mode; modes and momenta are left as they were.

    Args:
        model: A network, changed in place.
        sources: What to measure on; their batches count equally. Larger batches give better variances.

    Returns:
        How many layers were measured (0: the network has none, nothing was run).
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
                batch = _moved(batch, model)
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
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train on a source's labels for a few epochs, the learning rate falling as a half cosine.

    Args:
        model: A network, changed in place; left in the mode it was in.
        source: Batches with labels.
        epochs: Passes over the source, each in its own order.
        lr: The first learning rate.
        weight_decay: L2 penalty of the default optimiser.
        clip: Largest norm of the gradient.
        seed: The order of batches, and what Dropout draws.
        optimizer: Makes another optimiser than SGD with Nesterov momentum 0.9 (its own learning rate is the first).
        progress: Called with (step, steps in all, loss) after each step.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: If batches have no labels, or the loss stops being finite.
    """
    if any(batch.labels is None for batch in source) or not len(source):
        raise ValueError(f"source {source.name!r} has no labels to train on")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make = optimizer or (lambda p: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay))
    optimiser = make(trained)
    first = [group["lr"] for group in optimiser.param_groups]
    order = torch.Generator().manual_seed(seed)
    steps, step, losses, was = epochs * len(source), 0, [], model.training
    torch.manual_seed(seed)
    model.train()
    try:
        for _ in range(epochs):
            total = 0.0
            for index in torch.randperm(len(source), generator=order).tolist():
                for group, start in zip(optimiser.param_groups, first, strict=True):
                    group["lr"] = start * 0.5 * (1 + math.cos(math.pi * step / steps))
                loss = _step(model, _moved(source.batches[index], model), optimiser, trained, clip)
                step, total = step + 1, total + loss
                if progress:
                    progress(step, steps, loss)
            losses.append(total / len(source))
    finally:
        model.train(was)
    return losses


def _step(
    model: nn.Module, batch: Batch, optimiser: torch.optim.Optimizer, trained: list[nn.Parameter], clip: float
) -> float:
    assert batch.labels is not None
    loss = cross_entropy(model(*batch.args, **batch.kwargs), batch.labels)
    if not torch.isfinite(loss):
        raise ValueError("the loss is no longer finite; use a smaller learning rate")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(trained, clip)
    optimiser.step()
    return float(loss.detach())


def _moved(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    kwargs = {name: move(value) for name, value in batch.kwargs.items()}
    labels = batch.labels.to(device) if batch.labels is not None else None
    return Batch(tuple(move(value) for value in batch.args), kwargs, labels)
