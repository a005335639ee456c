"""``regrow.finetune``: train a network on a user's data for a few epochs, for example after a cut."""

from typing import Any

import torch
from torch import nn

from regrow.api.inputs import DeviceLike, LossLike, ModelLike, read_inputs
from regrow.core.errors import InputError
from regrow.core.progress import Progress, silent
from regrow.nets.devices import autocasting
from regrow.training import tune


def finetune(
    model: ModelLike,
    data: Any,
    *,
    epochs: int = 1,
    lr: float = 0.01,
    weight_decay: float = 1e-4,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: DeviceLike = None,
    precision: str = "float32",
    seed: int = 0,
    recalibrate: bool = False,
    progress: Progress = silent,
) -> nn.Module:
    """Train a network by SGD with Nesterov momentum 0.9, with a learning rate that falls as a half cosine.

    Args:
        model: The network, changed in place and left in the mode it was in; or a model's name or a run folder.
        data: The training data, as for :func:`regrow.prune`, with labels; or batches for a network that returns its
            own loss, as detection models do.
        epochs: Passes over the data.
        lr: The first learning rate.
        weight_decay: Weight decay.
        loss: The loss, as for :func:`regrow.prune`.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16; weights,
            sums and surgery keep their formats.
        seed: Seed of the order of batches, and of Dropout.
        recalibrate: Whether the running statistics of BatchNorms are measured anew afterwards.
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        The network.

    Raises:
        ValueError: If there are no data, or the loss is not finite.

    >>> import torch
    >>> net = nn.Linear(3, 1)
    >>> inputs = torch.randn(64, 3)
    >>> finetune(net, (inputs, inputs.sum(1, keepdim=True)), epochs=20, lr=0.05).weight.round()
    tensor([[1., 1., 1.]], grad_fn=<RoundBackward0>)
    """
    if data is None:
        raise InputError("there are no data to train on; give data, for example a DataLoader or (inputs, labels)")
    if epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}")
    reading: Any = {"loss": loss, "tokenizer": tokenizer, "batch_size": batch_size, "device": device}
    inputs = read_inputs(model, data, **reading, precision=precision, progress=progress)
    if not inputs.sources:
        raise InputError("there are no data to train on; give data, for example a DataLoader or (inputs, labels)")
    if not any(p.requires_grad for p in inputs.model.parameters()):
        raise InputError("no parameter of the network has requires_grad; set it for what is to be trained")
    schedule: Any = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "seed": seed}
    with torch.enable_grad(), autocasting(inputs.model, precision):
        for source in inputs.sources:
            tune.finetune(inputs.model, source, **schedule, objective=inputs.objective, progress=progress)
        if recalibrate:
            tune.recalibrate(inputs.model, inputs.sources)
    return inputs.model
