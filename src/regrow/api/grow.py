"""``regrow.grow``: from a network to a wider or deeper one that computes the same, and the plan that made it."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from regrow.api.inputs import DeviceLike, LossLike, ModelLike, read_inputs
from regrow.api.runs import Destination, describe_inputs, digest, loaded_of, name_of
from regrow.axes import AxisGraph
from regrow.commands.calibration import parameter_sums
from regrow.commands.clock import Clock
from regrow.commands.grow import GrowInputs, carry_out
from regrow.commands.growing import Amount
from regrow.commands.inputs import SourceHalves
from regrow.errors import InputError
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.progress_bar import visible
from regrow.settings.grow import Settings
from regrow.store.building import describe_origin


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
    validation: Any = None,
    steps: int = 0,
    train: Literal["new", "all"] = "new",
    lr: float = 1e-3,
    loss: LossLike = None,
    batch_size: int = 32,
    example: Any = None,
    device: DeviceLike = None,
    precision: str = "float32",
    axes: AxisGraph | None = None,
    out: str | Path | None = None,
    track: str = "",
    progress: Progress = silent,
) -> tuple[nn.Module, Plan]:
    """Grow a network such that its outputs do not change, and train it afterwards if there are steps.

    Args:
        model: The network, changed in place; or a model's name or a run folder, which is loaded.
        mlp: How many hidden neurons every MLP gains: a number, or a share of the width, rounded up (``"+25%"``).
        heads: How many attention heads every attention gains; whole groups where key-value heads are shared.
        channels: How many channels the convolutions inside of blocks gain.
        blocks: How many copies of residual blocks, which pass their input on, every stack gains; or path → how many.
        axis: Axis key, or a pattern of keys → how many units such axes gain.
        fill: How new units are initialised: ``"zero_out"``, ``"split"`` or ``"pair"`` (:class:`regrow.Fill`).
        seed: The random seed of the fill.
        round_to: Widths become multiples of this, rounded up.
        regular: Whether axes with the same role in several blocks get one width, the largest among them.
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
        axes: The network's axes, if they are known (:func:`regrow.declare`); the network is then not traced.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        track: With ``out``: a tracker that gets every measurement, too: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``.
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
    place = Destination(out, track).checked(data=data, validation=validation)
    _check_training(data, steps, train)
    stacks = blocks if isinstance(blocks, Mapping) else {"*": blocks} if blocks else {}
    names = tuple(map(str, data)) if isinstance(data, Mapping) else ("data",)
    job = Settings(
        describe_origin(model).name if isinstance(model, nn.Module) else str(model),
        _written(mlp),
        _written(heads),
        _written(channels),
        blocks=tuple(f"{stack}={_written(amount)}" for stack, amount in stacks.items()),
        axis=tuple(f"{key}={_written(amount)}" for key, amount in (axis or {}).items()),
        fill=fill,
        round_to=round_to,
        regular=regular,
        seed=seed,
        on=names if data is not None else (),
        steps=steps,
        train=train,
        lr=lr,
        precision=precision if data is not None else "float32",
    )

    def open_inputs(clock: Clock) -> GrowInputs:
        inputs = read_inputs(
            model,
            data,
            need=steps,
            example=example if axes is None else axes.example,
            loss=loss,
            batch_size=batch_size,
            device=device,
            precision=precision,
            validation=validation,
            progress=shown,
        )
        call: dict[str, object] | None = None
        if out is not None:
            weights = digest(parameter_sums(inputs.model))
            call = {"data": describe_inputs(place, inputs), "loss": name_of(loss), "weights": weights}
        return GrowInputs(
            loaded_of(inputs),
            inputs.trace() if axes is None else axes,
            SourceHalves(inputs.sources, inputs.tests),
            inputs.objective,
            lenient=inputs.tests is inputs.sources,
            call=call,
        )

    with visible(progress) as shown:
        result = carry_out(job, open_inputs, place.recorder("grow", model), progress=shown)
    for note in result.warnings:
        warnings.warn(note, stacklevel=2)
    return result.model, result.plan


def _written(amount: Amount) -> str:
    """Return an amount as the command line takes it.

    >>> _written(8), _written("+25%"), _written("")
    ('+8', '+25%', '')
    """
    return f"+{amount}" if isinstance(amount, int) else str(amount)


def _check_training(data: object, steps: int, train: str) -> None:
    """Raise InputError unless there are data if and only if there are steps."""
    if bool(steps) != (data is not None) or train not in ("new", "all"):
        got = f"steps={steps}, train={train!r:.20}"
        raise InputError(f"training takes data=, steps= and train='new' or 'all'; got {got}")
