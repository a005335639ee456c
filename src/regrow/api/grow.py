"""``regrow.grow``: from a network to a wider or deeper one that computes the same, and the plan that made it."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from regrow.api.call import Call
from regrow.api.inputs import DeviceLike, LossLike, ModelLike, Precision
from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.jobs.grow import GrowInputs, grow_network
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.progress_bar import ensure_progress
from regrow.jobs.recording import ActiveRun
from regrow.settings.grow import Settings
from regrow.store.statistics import parameter_sums

# An increase: ``"+25%"``, ``"+32"`` or ``32``.
Amount = int | str


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
    data: Any = None,
    validation: Any = None,
    steps: int = 0,
    train: Literal["new", "all"] = "new",
    lr: float = 1e-3,
    loss: LossLike = None,
    batch_size: int = 32,
    example: Any = None,
    device: DeviceLike = None,
    precision: Precision = "float32",
    axes: AxisGraph | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> tuple[nn.Module, Plan]:
    """Grow a network such that its outputs do not change, and train it afterwards if there are steps.

    Args:
        model: The network, changed in place; or a model's name or a run folder, which is loaded.
        mlp: How many hidden neurons every MLP gains: a number, or a share of the width, rounded up (``"+25%"``).
        heads: How many attention heads every attention gains; whole groups where key-value heads are shared.
        channels: How many channels the convolutions inside of blocks gain.
        blocks: How many blocks every stack of residual blocks gains, copies that pass their input on until they are
            trained; or path (or pattern) of a stack → how many.
        axis: Axis key, or a pattern of keys or tensor names → how many units each such axis gains.
        fill: How new units are initialised: ``"zero_out"`` or ``"split"`` (:class:`regrow.Fill`).
        seed: The random seed of the fill.
        data: What the grown network is trained on, as for :func:`regrow.prune`.
        validation: With ``out``: labelled data on which quality is measured; ``None``: ``data``.
        steps: The number of training steps, of one batch each; 0: it is not trained.
        train: Whether only what was added is trained (``"new"``; the rest stays bit for bit), or ``"all"``.
        lr: The learning rate of AdamW, which falls to 0.
        loss: What it is trained for, as for :func:`regrow.prune`.
        batch_size: Examples per batch, where the data do not come in batches.
        example: The input with which the network is traced; not needed if it is loaded, or ``axes`` are given.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"``: forward passes compute in it, as for :func:`regrow.prune`.
        axes: The network's axes, if they are known (:func:`regrow.trace`); the network is then not traced.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        The same model, wider, and the plan that was applied. A warning is issued for axes that cannot be widened.

    Raises:
        ValueError: If nothing can grow, an amount is not allowed, or outputs would change; the model is as it was then.

    >>> import torch
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    >>> before, (net, plan) = net(x), grow(net, mlp="+25%", example=x)
    >>> net[0].out_features, torch.allclose(net(x), before)
    (10, True)
    """
    names = _check_training(data, steps, train)
    call = Call(model, data, validation, example, loss, None, batch_size, device, precision, axes, out)
    call = call.with_generators(data=data, validation=validation)
    copies, units = _format_amounts(blocks), _format_amounts(axis)
    settings = Settings(call.name, _format_amount(mlp), _format_amount(heads), _format_amount(channels), copies, units)
    settings = replace(settings, fill=fill, seed=seed, on=names, steps=steps, train=train, lr=lr)
    settings = replace(settings, precision=precision if steps else "float32")
    with ensure_progress(progress) as bar:
        result = grow_network(settings, partial(_open_inputs, call, steps), call.start_run("grow", bar))
    for note in result.warnings:
        warnings.warn(note, stacklevel=2)
    return result.model, result.plan


def _open_inputs(call: Call, steps: int, run: ActiveRun) -> GrowInputs:
    """Load the network if it is named, trace it unless its axes are given, and read the data."""
    inputs = call.read(run.progress).with_two_rows()
    return GrowInputs(
        inputs.for_saving(),
        inputs.trace() if call.axes is None else call.axes,
        SourceHalves(inputs.sources, inputs.tests),
        inputs.objective,
        python_call=call.describe_inputs(inputs, partial(parameter_sums, inputs.model)),
    )


def _check_training(data: Any, steps: int, train: str) -> tuple[str, ...]:
    """Return the names of the data, as settings have them: the keys of a dict, ``"data"``, or none without data.

    Raise InputError for steps without data, data without steps, or a ``train`` that is neither ``new`` nor ``all``.
    """
    if bool(steps) != (data is not None) or train not in ("new", "all"):
        got = f"steps={steps}, train={train!r:.20}"
        raise InputError(f"training takes data=, steps= and train='new' or 'all'; got {got}")
    if data is None:
        return ()
    return tuple(map(str, data)) if isinstance(data, Mapping) else ("data",)


def _format_amount(amount: Amount) -> str:
    """Return an amount as the command line takes it.

    >>> _format_amount(8), _format_amount("+25%"), _format_amount("")
    ('+8', '+25%', '')
    """
    return f"+{amount}" if isinstance(amount, int) else str(amount)


def _format_amounts(amounts: Amount | Mapping[str, Amount] | None) -> tuple[str, ...]:
    """Return name → amount as texts ``NAME=+8``, a single amount, which is for all, as ``+8``, and none as ``()``."""
    if isinstance(amounts, Mapping):
        return tuple(f"{name}={_format_amount(amount)}" for name, amount in amounts.items())
    return (_format_amount(amounts),) if amounts else ()
