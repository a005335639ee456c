"""``regrow.evaluate``: loss and score of a network on a user's data."""

from functools import partial
from typing import Any

from regrow.api.call import Call
from regrow.api.inputs import DeviceLike, LossLike, ModelLike, Precision
from regrow.core.errors import InputError
from regrow.core.progress import Progress, silent
from regrow.evaluation.scores import Evaluation, Evaluations
from regrow.jobs.evaluate import EvaluateInputs, evaluate_network, plan_evaluation_memory
from regrow.jobs.memory_needs import check_memory_plan
from regrow.settings.evaluate import Settings


def evaluate(
    model: ModelLike,
    data: Any,
    *,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: DeviceLike = None,
    precision: Precision = "float32",
    memory: str = "",
    progress: Progress = silent,
) -> Evaluations:
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
        Name of the source → its evaluation: accuracy of classes, perplexity of text, squared error of values.

    Raises:
        ValueError: If there are no data, or the loss cannot be computed.
        ResourceError: If the network does not fit into ``memory`` even with one block at a time.

    >>> import torch
    >>> inputs, labels = torch.eye(3), torch.tensor([0, 1, 1])
    >>> print(evaluate(torch.nn.Identity(), (inputs, labels))["data"])
    data: loss 0.8848, accuracy 0.6667 ± 0.27 (3 examples)
    """
    call = Call(model, data, None, None, loss, tokenizer, batch_size, device, precision)
    settings = Settings(call.name, precision=precision)
    result = evaluate_network(settings, partial(_open_inputs, call, settings, memory, progress), progress=progress)
    return Evaluations({row.source: row for row in result.sources if isinstance(row, Evaluation)})


def _open_inputs(call: Call, settings: Settings, memory: str, progress: Progress) -> EvaluateInputs:
    """Open the network and read the data; InputError without data, ResourceError if nothing fits into ``memory``.

    With ``memory``, such as ``"4GiB"``, a network that does not fit is opened to be read one block at a time.
    """
    opened = plan = None
    if memory:
        opened, inputs = call.open_files(memory)
        plan = plan_evaluation_memory(opened, inputs.sources, memory, settings)
        needs = {
            f"device={call.device}": call.device not in (None, "cpu"),
            f"precision={call.precision}": call.precision != "float32",
            "a model without text": opened.loaded.tokenizer is None,
        }
        if not check_memory_plan(opened, plan, needs, lambda line: progress(0, 1, line)):
            opened = None
    if opened is None:
        inputs = call.read(progress)
    if inputs.objective is None:
        raise InputError("there are no data to evaluate on; give data, for example a DataLoader or (inputs, labels)")
    return EvaluateInputs(inputs.for_saving(), inputs.sources, inputs.objective, opened, plan)
