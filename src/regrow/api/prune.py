"""``regrow.prune``: from a network and data to a smaller network and the plan that made it."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from regrow.amounts import Target, parse_share
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, read_inputs, run_once
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.commands.pruning import build_pruner, check_pruning, collect_evidence, with_timing
from regrow.errors import InputError
from regrow.methods.pruning.pruner import Pruner, plan_cut
from regrow.nets.precision import autocasting
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.settings.training import check_combination
from regrow.surgery import apply
from regrow.tracing import trace


def prune(
    model: ModelLike,
    data: Any = None,
    *,
    method: str = "flap",
    keep: float | None = None,
    target: str | Target = "",
    smaller: str | float | None = None,
    example: Any = None,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: DeviceLike = None,
    precision: str = "float32",
    axes: AxisGraph | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **budget: Any,
) -> tuple[nn.Module, Plan]:
    """Prune a network in one call: trace it, measure importance, choose units, and cut it.

    Args:
        model: The network, changed in place; or a model's name or a run folder, which is loaded.
        data: The data on which importance is measured: a ``DataLoader``, tensors (inputs, labels), a data set, a path,
            strings, or a dict of such by name; more text domains carry over better to unseen ones. Methods that score
            by weights alone need none.
        method: One of ``regrow.methods.METHODS``.
        keep: The fraction of the weights of linear layers and convolutions that stays (of a language model: of its
            decoder's linear layers), or of another ``measure``; ``None``: 0.8, unless there is a target.
        target: A size instead of a fraction: ``"params=100M"`` (all parameters), ``"macs=2G"``, ``"bytes=200M"``,
            ``"kv_cache=50M@4096"``, or ``"ms=120"`` of the example's pass on this device; or a share of what the
            network has, ``"params=70%"``.
        smaller: The share of all parameters that is removed: ``"30%"`` or 0.3 is the target ``"params=70%"``.
        example: The input with which the network is traced: a tensor, a tuple of inputs, or a dict of inputs by name;
            ``None``: the first batch of the data.
        loss: The loss of methods that measure gradients: a function (what the network returned, labels) → scalar, or
            ``"classification"``, ``"next-token"``, ``"multi-label"``, ``"regression"``, ``"own"``; ``None``: what fits
            the labels.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16; weights,
            sums and surgery keep their formats.
        axes: The network's axes, if they are known (:func:`regrow.declare`); the network is then not traced.
        settings: Settings of the method that differ from its defaults.
        progress: Called with (batches done, batches in all, what is being done).
        **budget: More fields of :class:`regrow.budget.Budget`: ``measure``, ``only``, ``exclude``, ``round_to``,
            ``regular``.

    Returns:
        The same model, smaller, and the plan that was applied. A warning is issued for a source that had to be split.

    Raises:
        ValueError: If the method is unknown, the budget cannot be met, or there is nothing to trace or measure with.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> net, plan = prune(net, (torch.randn(64, 4), torch.randint(2, (64,))), method="llm_pruner", keep=0.5)
    >>> net[0].out_features
    4
    """
    pruner = build_pruner(method, settings or {})
    limits = _budget(keep, target, smaller, budget)
    check_combination(precision, measure=limits.measure)
    if axes is not None:
        example = axes.example
    reading: Any = {
        "loss": loss,
        "tokenizer": tokenizer,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
    }
    inputs = read_inputs(model, data, example=example, **reading, progress=progress)
    if axes is None:
        axes = trace(inputs.model, *inputs.example.args, **inputs.example.kwargs)
    return _cut(inputs, axes, pruner, limits, precision, progress)


def _cut(
    inputs: Inputs, axes: AxisGraph, pruner: Pruner, limits: Budget, precision: str, progress: Progress
) -> tuple[nn.Module, Plan]:
    """Measure importance, choose the units that stay, and cut the network."""
    net = inputs.model
    limits = with_timing(net, axes, limits, progress=progress)
    check_pruning(pruner, axes, limits, inputs.sources)
    with autocasting(net, precision):
        evidence = collect_evidence(net, axes, pruner, inputs.sources, progress, objective=inputs.objective)
        for note in evidence.notes:
            warnings.warn(note, stacklevel=3)
        plan = plan_cut(pruner, net, axes, limits, evidence, progress=progress).plan
    run_once(net, inputs.example)
    apply(net, axes, plan)
    return net, plan


def _budget(keep: float | None, target: str | Target, smaller: str | float | None, more: Mapping[str, Any]) -> Budget:
    """Return the budget that is given in one of three ways."""
    given = {"keep": keep, "target": target or None, "smaller": smaller}
    names = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"keep, target and smaller exclude each other, got {' and '.join(names)}; give one of them")
    if smaller is not None:
        return Budget(target=Target.smaller(parse_share(str(smaller))), **more)
    if target:
        return Budget(target=Target.parse(str(target)), **more)
    return Budget(0.8 if keep is None else keep, **more)
