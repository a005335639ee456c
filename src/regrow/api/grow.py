"""``regrow.grow``: from a network to a wider or deeper one that computes the same, and the plan that made it."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from regrow.allocation.widening import Part
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, read_inputs, run_once
from regrow.axes import AxisGraph
from regrow.commands.growing import Amount, GrowthSpec, plan_growth
from regrow.errors import InputError
from regrow.nets.precision import autocasting
from regrow.plan import Plan
from regrow.surgery import apply
from regrow.tracing import trace
from regrow.training.grown import GrowthTraining, added_entries, train_grown


def grow(
    model: ModelLike,
    *,
    mlp: Amount = "",
    heads: Amount = "",
    channels: Amount = "",
    blocks: Amount | Mapping[str, Amount] = "",
    axis: Mapping[str, Amount] | None = None,
    fill: str = "zero_out",
    seed: int = 0,
    round_to: int = 1,
    regular: bool = False,
    data: Any = None,
    steps: int = 0,
    train: Literal["new", "all"] = "new",
    lr: float = 1e-3,
    loss: LossLike = None,
    batch_size: int = 32,
    example: Any = None,
    device: DeviceLike = None,
    precision: str = "float32",
    axes: AxisGraph | None = None,
) -> tuple[nn.Module, Plan]:
    """Grow a network in one call such that its outputs do not change, and train it afterwards if there are steps.

    Amounts are numbers of units (``32``, ``"+32"``) or percentages of the present width (``"+25%"``), rounded up.

    Args:
        model: The network, changed in place; or a model's name or a run folder, which is loaded.
        mlp: How many hidden neurons every MLP gains.
        heads: How many attention heads every attention gains: where key-value heads are shared, whole groups with
            their query heads.
        channels: How many channels the convolutions inside of blocks gain.
        blocks: How many copies of residual blocks every stack of blocks gains, evenly among its blocks, or path of a
            stack (``"layer3"``) → how many. The last projections of a copy are 0, so that it gives its input unchanged.
        axis: Axis key, or a pattern of keys → how many units such axes gain.
        fill: How new units are initialised: ``"zero_out"``, ``"split"`` or ``"pair"`` (:class:`regrow.Fill`).
        seed: The random seed of the fill.
        round_to: Widths become multiples of this, rounded up.
        regular: Whether axes with the same role in several blocks get one width, the largest among them.
        data: What the grown network is trained on, as for :func:`regrow.prune`.
        steps: The number of training steps, of one batch each; 0: it is not trained.
        train: Whether only what the growth has added is trained (``"new"``; the rest stays bit for bit), or ``"all"``.
        lr: The learning rate of AdamW, which falls to 0.
        loss: What it is trained for, as for :func:`regrow.prune`.
        batch_size: Examples per batch, where the data do not come in batches.
        example: The input with which the network is traced: a tensor, a tuple of inputs, or a dict of inputs by name;
            not needed for a model that is loaded, or if ``axes`` are given.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16; weights,
            sums and surgery keep their formats.
        axes: The network's axes, if they are known (:func:`regrow.declare`); the network is then not traced.

    Returns:
        The same model, wider, and the plan that was applied. A warning is issued for axes that cannot be widened.

    Raises:
        ValueError: If nothing is to grow or can grow, or an amount is not allowed; the model is not changed then.

    >>> import torch
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    >>> before = net(x)
    >>> net, plan = grow(net, mlp="+25%", example=x)
    >>> net[0].out_features, torch.allclose(net(x), before)
    (10, True)
    """
    parts: dict[Part, Amount] = {"mlp": mlp, "heads": heads, "channels": channels}
    stacks = blocks if isinstance(blocks, Mapping) else {"*": blocks} if blocks else {}
    spec = GrowthSpec.parse(parts, axis or {}, stacks, fill=fill, seed=seed, round_to=round_to, regular=regular)
    _check_training(data, steps, train)
    given: Any = {"example": axes.example if axes is not None else example, "loss": loss, "batch_size": batch_size}
    inputs = read_inputs(model, data, **given, device=device, precision=precision)
    net = inputs.model
    if axes is None:
        axes = trace(net, *inputs.example.args, **inputs.example.kwargs)
    return net, _grow(inputs, axes, spec, GrowthTraining(steps, lr, train == "new", seed), precision)


def _grow(inputs: Inputs, axes: AxisGraph, spec: GrowthSpec, training: GrowthTraining, precision: str) -> Plan:
    """Grow the network, train it if there are steps, and return the plan."""
    net = inputs.model
    plan, notes = plan_growth(net, axes, spec)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    run_once(net, inputs.example)
    apply(net, axes, plan)
    if training.steps:
        with autocasting(net, precision):
            train_grown(net, inputs.sources, added_entries(net, axes, plan), training, objective=inputs.objective)
    return plan


def _check_training(data: object, steps: int, train: str) -> None:
    if bool(steps) != (data is not None) or train not in ("new", "all"):
        got = f"steps={steps}, train={train!r:.20}"
        raise InputError(f"training takes data=, steps= and train='new' or 'all'; got {got}")
