"""``regrow.grow``: from a network to a wider or deeper one that computes the same, and the plan that made it."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from regrow.allocation.widening import Part
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, read_inputs
from regrow.api.quality import measure_run
from regrow.api.runs import Destination, describe_inputs, finish, loaded_of, name_of, run_of
from regrow.axes import AxisGraph
from regrow.axes.inventory import inventory
from regrow.commands.growing import Amount, GrowthSpec, plan_growth
from regrow.commands.growth import CheckedGrowth, GrowthData
from regrow.errors import InputError
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.progress_bar import visible
from regrow.run_folder import RunFolder
from regrow.settings.grow import Settings
from regrow.store.building import describe_origin
from regrow.training.grown import GrowthTraining


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
    parts: dict[Part, Amount] = {"mlp": mlp, "heads": heads, "channels": channels}
    stacks = blocks if isinstance(blocks, Mapping) else {"*": blocks} if blocks else {}
    spec = GrowthSpec.parse(parts, axis or {}, stacks, fill=fill, seed=seed, round_to=round_to, regular=regular)
    training = _training(data, steps, lr, train, seed)
    more: Any = {"loss": loss, "batch_size": batch_size, "device": device, "precision": precision, "progress": progress}
    more |= {"example": example if axes is None else axes.example, "validation": validation}
    inputs = read_inputs(model, data, need=steps, **more)
    work = _Growth(inputs, inputs.trace() if axes is None else axes, spec, training, precision, progress)
    plan = work.plan()
    if out is None:
        return inputs.model, _grow(work, plan)
    return inputs.model, _grow_in_folder(work, plan, place, _describe(parts, axis or {}, stacks, work), model, loss)


@dataclass(frozen=True)
class _Growth:
    """What is grown, how much, and how it is trained."""

    inputs: Inputs
    axes: AxisGraph
    spec: GrowthSpec
    training: GrowthTraining
    precision: str
    progress: Progress

    def plan(self) -> Plan:
        """Return the plan, and warn of axes that cannot be widened."""
        plan, notes = plan_growth(self.inputs.model, self.axes, self.spec)
        for note in notes:
            warnings.warn(note, stacklevel=3)
        return plan

    def measure(self, folder: RunFolder, axes: AxisGraph, name: str) -> None:
        """Log size and quality of the network in its present state, under a name."""
        measure_run(folder, self.inputs, axes, name, self.precision, self.progress)


def _grow(work: _Growth, plan: Plan, folder: RunFolder | None = None) -> Plan:
    """Grow the network, and train it if there are steps; in a folder, log its size and the loss of the training."""
    inputs = work.inputs
    if folder:
        work.measure(folder, work.axes, "before")
    grown, proof = CheckedGrowth(inputs.model, work.axes, plan, folder is not None, progress=work.progress).carry_out()
    if folder:
        folder.own_ledger.replace(plan)
        folder.write_axes([row.record() for row in inventory(work.axes)], [row.record() for row in inventory(grown)])
        if proof:
            folder.log("verify", **proof)
    if work.training.steps:
        data = GrowthData(inputs.sources, work.training, work.precision, inputs.objective)
        data.train(inputs.model, work.axes, plan, folder, work.progress)
    if folder:
        work.measure(folder, grown, "after")
    return plan


def _grow_in_folder(
    work: _Growth, plan: Plan, place: Destination, settings: Settings, model: ModelLike, loss: LossLike
) -> Plan:
    """Grow and write the run; what was interrupted starts again."""
    inputs, start = work.inputs, time.perf_counter()
    data = describe_inputs(place, inputs)
    with (
        run_of(place, "grow", settings, model, loaded_of(inputs), data=data, loss=name_of(loss)) as folder,
        visible(work.progress) as shown,
    ):
        _grow(replace(work, progress=shown), plan, folder)
        finish(folder, loaded_of(inputs), grow=time.perf_counter() - start)
    return plan


def _describe(
    parts: Mapping[Part, Amount], axis: Mapping[str, Amount], stacks: Mapping[str, Amount], work: _Growth
) -> Settings:
    """Return the settings of the command that say what a call does."""
    spec, training = work.spec, work.training
    return Settings(
        describe_origin(work.inputs.model).name,
        _written(parts["mlp"]),
        _written(parts["heads"]),
        _written(parts["channels"]),
        blocks=tuple(f"{stack}={_written(amount)}" for stack, amount in stacks.items()),
        axis=tuple(f"{key}={_written(amount)}" for key, amount in axis.items()),
        fill=spec.fill.rule,
        round_to=spec.round_to,
        regular=spec.regular,
        seed=training.seed,
        on=tuple(source.name for source in work.inputs.sources),
        steps=training.steps,
        train="new" if training.new_only else "all",
        lr=training.lr,
        precision=work.precision if work.inputs.sources else "float32",
    )


def _written(amount: Amount) -> str:
    """Return an amount as the command line takes it.

    >>> _written(8), _written("+25%"), _written("")
    ('+8', '+25%', '')
    """
    return f"+{amount}" if isinstance(amount, int) else str(amount)


def _training(data: object, steps: int, lr: float, train: str, seed: int) -> GrowthTraining:
    """Return how the grown network is trained, after checking that there are data if and only if there are steps."""
    if bool(steps) != (data is not None) or train not in ("new", "all"):
        got = f"steps={steps}, train={train!r:.20}"
        raise InputError(f"training takes data=, steps= and train='new' or 'all'; got {got}")
    return GrowthTraining(steps, lr, train == "new", seed)
