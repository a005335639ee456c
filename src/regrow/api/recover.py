"""``regrow.recover``: win back what a cut lost, from the dense network and data."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from regrow.api.inputs import DeviceLike, Inputs, LossLike, read_inputs
from regrow.api.runs import Destination, digest, finish, loaded_of, log_size, name_of, run_of
from regrow.axes import AxisGraph
from regrow.axes.inventory import inventory
from regrow.commands.calibration import parameter_sums
from regrow.commands.recovering import recover as recover_in
from regrow.commands.recovering import work_in
from regrow.errors import InputError
from regrow.ledger import with_branches_of
from regrow.methods import MethodKind, find_method
from regrow.methods.recovery import RecoveryTask
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.progress_bar import visible
from regrow.settings import prune
from regrow.settings.declaration import record_settings
from regrow.settings.recover import CLOSED_FORM, Settings
from regrow.sources import device_of
from regrow.store.building import describe_origin
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
    out: str | Path | None = None,
    track: str = "",
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
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        track: With ``out``: a tracker that gets every measurement, too: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``.
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
    _check_types(model, dense, plan)
    place = Destination(out, track).checked(data=data)
    if precision != "float32" and by in CLOSED_FORM:
        raise InputError(f"{by} solves for weights in their own format; leave out precision={precision!r}, or use lora")
    given: Any = {"loss": loss, "tokenizer": tokenizer, "batch_size": batch_size, "device": device}
    inputs = read_inputs(dense, data, example=example, **given, precision=precision, progress=progress, generates=True)
    if not inputs.sources:
        raise InputError("recovery learns from data; give data, for example a DataLoader")
    if axes is None:
        axes = with_branches_of([plan], dense, inputs.trace())
    _check_dense(model, dense)
    model.to(device_of(dense))
    work = find_method(MethodKind.RECOVERY, by).made(by, settings or {})
    if place.out is None:
        task = RecoveryTask(model, dense, axes, plan, inputs.sources, seed, objective=inputs.objective)
        return work_in(precision, by, work, replace(task, progress=progress))
    name = describe_origin(dense).name
    pruning = record_settings(prune.Settings(name))
    described = Settings(f"{name}()", by, 1, settings or {}, pruning, (), name, f"prune+{by}", None, seed)
    described = replace(described, precision="" if precision == "float32" else precision)
    inputs = replace(inputs, model=model)
    return _recover_in_folder(inputs, dense, axes, plan, place, described, name_of(loss), progress)


def _check_types(model: object, dense: object, plan: object) -> None:
    """Raise InputError if one of the first arguments is of another kind, as where one is left out."""
    for name, one in (("model", model), ("dense", dense)):
        if not isinstance(one, nn.Module):
            load = f"; regrow.load({str(one)!r}) loads a network" if isinstance(one, str | Path) else ""
            raise InputError(
                f"{name} must be a torch.nn.Module, got a {type(one).__name__}; write "
                f"recover(model, dense, plan, data) with the networks after and before the cut{load}"
            )
    if not isinstance(plan, Plan):
        raise InputError(
            f"plan must be the regrow.Plan that regrow.prune returned, got a {type(plan).__name__}; write "
            "recover(model, dense, plan, data)"
        )


def _check_dense(model: nn.Module, dense: nn.Module) -> None:
    """Raise InputError if the dense network is smaller somewhere than the one that was cut from it."""
    whole = dict(dense.named_parameters())
    for name, small in model.named_parameters():
        large = whole.get(name, small)
        if any(one > other for one, other in zip(small.shape, large.shape, strict=False)):
            raise InputError(
                f"dense must be the network before the cut, and its {name!r} has shape {list(large.shape)}, that of "
                f"model {list(small.shape)}; write recover(model, dense, plan, data)"
            )


def _recover_in_folder(
    inputs: Inputs,
    dense: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    place: Destination,
    settings: Settings,
    loss: str,
    progress: Progress,
) -> dict[str, Any]:
    """Recover the network of the inputs and write the run, or resume it."""
    loaded, start, by = loaded_of(inputs), time.perf_counter(), settings.by
    given = {"dense": digest(parameter_sums(dense)), "plan": digest(replace(plan, origin={}).to_json()), "loss": loss}
    data = place.describe(inputs.sources)
    with (
        run_of(place, "recover", settings, inputs.model, loaded, data=data, **given) as folder,
        visible(progress) as shown,
    ):
        if not len(folder.ledger):  # which begins with the cut that this makes up for
            folder.ledger.append(plan)
            folder.update(parent={**folder.run()["parent"], "plans": 1})
        cut = trace(inputs.model, *inputs.example.args, **inputs.example.kwargs)
        log_size(folder, replace(loaded, model=dense), axes, "dense")
        rows = log_size(folder, loaded, cut, "pruned")
        options: Any = {"settings": settings.recovery_settings, "seed": settings.seed, "objective": inputs.objective}
        options |= {"precision": settings.precision or "float32", "progress": shown}
        teaching = replace(loaded, model=dense)
        row = recover_in(folder, inputs.model, teaching, axes, plan, inputs.sources, by, **options)
        folder.write_axes([one.record() for one in inventory(axes)], rows)
        log_size(folder, loaded, cut, "recovered")
        finish(folder, loaded, recover=time.perf_counter() - start)
    return {name: value for name, value in row.items() if name not in ("by", "tokens", "seconds")}
