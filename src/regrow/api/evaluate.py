"""``regrow.evaluate``: loss and score of a network on a user's data."""

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from regrow.api.inputs import Arguments, DeviceLike, Inputs, LossLike, ModelLike
from regrow.api.streamed import open_to_evaluate
from regrow.core.errors import InputError
from regrow.core.objectives import Objective
from regrow.core.progress import Progress, silent
from regrow.evaluation.objective import Evaluation, evaluate_objective
from regrow.nets.devices import autocasting
from regrow.streaming.opening import OpenedNetwork


def evaluate(
    model: ModelLike,
    data: Any,
    *,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: DeviceLike = None,
    precision: str = "float32",
    memory: str = "",
    progress: Progress = silent,
) -> dict[str, Evaluation]:
    """Measure the loss and the score of a network on each source, with standard errors.

    Args:
        model: The network, a model's name, or a run folder.
        data: The data, as for :func:`regrow.prune`; never what the network was trained or calibrated on.
        loss: The loss, as for :func:`regrow.prune`.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16; weights,
            sums and surgery keep their formats.
        memory: How much memory the call may use, such as ``"4GiB"``: a language model that does not fit, given by its
            name or as a folder, is read one block at a time, with the same result. Empty: it is loaded whole.
        progress: Called with (batches done, batches in all, what is being done).

    Returns:
        Name of the source → its evaluation: accuracy for classes, perplexity and token accuracy for text, squared error
        for values.

    Raises:
        ValueError: If there are no data, or the loss cannot be computed.
        ResourceError: If the network does not fit into ``memory`` even with one block at a time.

    >>> import torch
    >>> inputs, labels = torch.eye(3), torch.tensor([0, 1, 1])
    >>> print(evaluate(torch.nn.Identity(), (inputs, labels))["data"])
    data: loss 0.8848, accuracy 0.6667 ± 0.27 (3 examples)
    """
    given = Arguments(model, data, None, None, loss, tokenizer, batch_size, device, precision)
    if memory:
        opened, inputs, plan = open_to_evaluate(given, memory, progress)
        if plan.streams:
            return _evaluate_streamed(opened, inputs, plan.on_disk, progress)
    inputs = given.read(progress)
    objective = _objective_of(inputs)
    with autocasting(inputs.model, precision):
        return {
            source.name: evaluate_objective(inputs.model, source, objective, progress=progress)
            for source in inputs.sources
        }


def _evaluate_streamed(
    opened: OpenedNetwork, inputs: Inputs, on_disk: bool, progress: Progress
) -> dict[str, Evaluation]:
    """Do what :func:`evaluate` does for a network that is larger than memory."""
    objective = _objective_of(inputs)
    with TemporaryDirectory(prefix="regrow-") as folder:
        network = opened.network(Path(folder) if on_disk else None)
        walk = network.outputs([batch for source in inputs.sources for batch in source])
        return {
            source.name: evaluate_objective(
                network.model, source, objective, outputs=islice(walk, len(source)), progress=progress
            )
            for source in inputs.sources
        }


def _objective_of(inputs: Inputs) -> Objective:
    if inputs.objective is None:
        raise InputError("there are no data to evaluate on; give data, for example a DataLoader or (inputs, labels)")
    return inputs.objective
