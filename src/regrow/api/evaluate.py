"""``regrow.evaluate``: loss and score of a network on a user's data."""

from typing import Any

from regrow.api.inputs import DeviceLike, LossLike, ModelLike, read_inputs
from regrow.errors import InputError
from regrow.evaluation.objective import Evaluation, evaluate_objective
from regrow.nets.precision import autocasting
from regrow.progress import Progress, silent


def evaluate(
    model: ModelLike,
    data: Any,
    *,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: DeviceLike = None,
    precision: str = "float32",
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
        progress: Called with (batches done, batches in all, what is being done).

    Returns:
        Name of the source → its evaluation: accuracy for classes, perplexity and token accuracy for text, squared error
        for values.

    Raises:
        ValueError: If there are no data, or the loss cannot be computed.

    >>> import torch
    >>> inputs, labels = torch.eye(3), torch.tensor([0, 1, 1])
    >>> print(evaluate(torch.nn.Identity(), (inputs, labels))["data"])
    data: loss 0.8848, accuracy 0.6667 ± 0.27 (3 examples)
    """
    inputs = read_inputs(
        model,
        data,
        loss=loss,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=device,
        precision=precision,
        progress=progress,
    )
    if inputs.objective is None:
        raise InputError("there are no data to evaluate on; give data, for example a DataLoader or (inputs, labels)")
    objective = inputs.objective
    with autocasting(inputs.model, precision):
        return {
            source.name: evaluate_objective(inputs.model, source, objective, progress=progress)
            for source in inputs.sources
        }
