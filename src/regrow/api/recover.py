"""``regrow.recover``: win back what a cut lost, from the dense network and data."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from regrow.api.inputs import DeviceLike, LossLike, read_inputs
from regrow.axes import AxisGraph
from regrow.commands.recovering import work_in
from regrow.errors import InputError
from regrow.methods import MethodKind, find_method
from regrow.methods.recovery import RecoveryTask
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.settings.recover import CLOSED_FORM
from regrow.sources import device_of
from regrow.tracing import trace


def recover(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    data: Any,
    *,
    by: str = "refit",
    example: Any = None,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 4,
    device: DeviceLike = None,
    precision: str = "float32",
    seed: int = 0,
    axes: AxisGraph | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Recover a pruned network in place: by least squares (``refit``), new biases, LoRA, or distillation.

    Args:
        model: The network after the cut, changed in place.
        dense: The network before the cut.
        plan: The plan of the cut, as :func:`regrow.prune` returned it.
        data: The data to learn from, as for :func:`regrow.prune`; the last part of each source is held out.
        by: One of ``regrow.methods.RECOVERIES``: ``refit``, ``bias``, ``lora``, ``distil``.
        example: The input with which the dense network is traced; ``None``: the first batch.
        loss: The loss of methods that train, as for :func:`regrow.prune`.
        tokenizer: The tokenizer, for text; ``None``: ``dense.tokenizer``.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16; weights,
            sums and surgery keep their formats.
        seed: Seed of all random choices.
        axes: The axes of the dense network, if they are known; it is then not traced.
        settings: Settings of the method that differ from its defaults.
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        A summary: the held-out error before and after, and what the method counts.

    Raises:
        ValueError: If the method or a setting is unknown, or the data are of no use for it.

    >>> import copy, torch, regrow
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> dense, inputs = copy.deepcopy(net), torch.randn(256, 4)
    >>> small, plan = regrow.prune(net, method="magnitude", keep=0.5, example=inputs[:1])
    >>> summary = recover(small, dense, plan, inputs, by="refit", batch_size=64)
    >>> before, after = (torch.dist(one(inputs), dense(inputs)) for one in (small, dense))
    """
    if precision != "float32" and by in CLOSED_FORM:
        raise InputError(f"{by} solves for weights in their own format; leave out precision={precision!r}, or use lora")
    inputs = read_inputs(
        dense,
        data,
        example=example,
        loss=loss,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=device,
        precision=precision,
        progress=progress,
    )
    if not inputs.sources:
        raise InputError("recovery learns from data; give data, for example a DataLoader")
    if axes is None:
        axes = trace(dense, *inputs.example.args, **inputs.example.kwargs)
    model.to(device_of(dense))
    work = find_method(MethodKind.RECOVERY, by).made(by, settings or {})
    task = RecoveryTask(model, dense, axes, plan, inputs.sources, seed, progress=progress, objective=inputs.objective)
    return work_in(precision, by, work, task)
