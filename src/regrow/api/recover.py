"""``regrow.recover`` and ``regrow.finetune``: win back what a cut lost, with the dense network or without."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from regrow.api.call import Call, digest_repr
from regrow.api.inputs import DeviceLike, LossLike, ModelLike, Precision
from regrow.api.learn import OptimizerLike, with_optimizer
from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import device_of
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.progress_bar import ensure_progress
from regrow.jobs.recording import ActiveRun
from regrow.jobs.recover import RecoverInputs, recover_network
from regrow.nets.devices import autocasting
from regrow.settings import prune
from regrow.settings.recover import Settings
from regrow.store.building import describe_origin
from regrow.store.ledger import with_branches_of
from regrow.store.statistics import parameter_sums
from regrow.training import tune
from regrow.training.schedule import Schedule


def recover(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    data: Any,
    *,
    validation: Any = None,
    by: str = "refit",
    example: Any = None,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 4,
    device: DeviceLike = None,
    precision: Precision = "float32",
    seed: int = 0,
    axes: AxisGraph | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Recover a pruned network in place: by least squares (``refit``), LoRA, or distillation.

    Args:
        model: The network after the cut, changed in place.
        dense: The network before the cut.
        plan: The plan of the cut, as :func:`regrow.prune` returned it.
        data: The data to learn from, as for :func:`regrow.prune`; the last part of each source is held out
            (an eighth; the setting ``held_out``).
        validation: With ``out``: labelled data on which all three networks are measured; ``None``: none is.
        by: One of ``regrow.methods.RECOVERIES``: ``refit``, ``lora``, ``distil``.
        example: The input with which the dense network is traced; ``None``: two rows of the first batch.
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
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        A summary as JSON data: of ``refit`` the ``layers`` with their errors before and after, those ``left_out`` with
        the reason, and the ``target``; of ``lora`` and ``distil`` the ``steps``, the ``best`` one, which is restored,
        the ``history`` of held-out losses, and the number of ``trained`` parameters.

    Raises:
        ValueError: If the method or a setting is unknown, or the data are of no use for it.

    >>> import copy, torch, regrow
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> dense, inputs = copy.deepcopy(net), torch.randn(256, 4)
    >>> small, plan = regrow.prune(net, method="magnitude", keep=0.5, example=inputs[:1])
    >>> summary = recover(small, dense, plan, inputs, by="refit", batch_size=64)
    >>> before, after = (torch.dist(one(inputs), dense(inputs)) for one in (small, dense))
    """
    if not (isinstance(model, nn.Module) and isinstance(dense, nn.Module) and isinstance(plan, Plan)):
        got = ", ".join(type(argument).__name__ for argument in (model, dense, plan))
        raise InputError(
            "recover takes the networks after and before the cut (regrow.load loads one), and the plan that "
            f"regrow.prune returned, got {got}; write recover(model, dense, plan, data)"
        )
    call = Call(dense, data, validation, example, loss, tokenizer, batch_size, device, precision, axes, out)
    call = call.with_generators(data=data, validation=validation)
    name = call.name
    pruning = asdict(prune.Settings(name))
    config = Settings(f"{name}()", by, 1, settings or {}, pruning, model=name, method=f"prune+{by}", seed=seed)
    config = replace(config, precision="" if precision == "float32" else precision)
    with ensure_progress(progress) as bar:
        run = call.start_run("recover", bar, model)
        summary = recover_network(config, partial(_open_inputs, call, model, plan), run)
    return {name: value for name, value in summary.items() if name not in ("tokens", "seconds")}


def _open_inputs(call: Call, model: nn.Module, plan: Plan, run: ActiveRun) -> RecoverInputs:
    """Read the data, trace the dense network, and move ``model``, the cut one, to its device; InputError without data.

    ``call``: the arguments, whose network is the dense one; ``plan``: that of the cut.
    """
    inputs = call.read(run.progress).with_two_rows()
    if not inputs.sources:
        raise InputError("recovery learns from data; give data, for example a DataLoader")
    dense = inputs.model
    axes = with_branches_of([plan], dense, inputs.trace()) if call.axes is None else call.axes
    _check_dense(model, dense)
    model.to(device_of(dense))
    small = replace(inputs.for_saving(), model=model, origin=describe_origin(model))
    recorded = call.describe_inputs(inputs, partial(parameter_sums, model))
    if recorded is not None:
        recorded["dense"] = digest_repr(parameter_sums(dense))
        recorded["plan"] = digest_repr(replace(plan, origin={}).to_json())
    halves = SourceHalves(inputs.sources, () if call.validation is None else inputs.tests)
    return RecoverInputs(
        replace(small, model=dense), small, axes, plan, halves, objective=inputs.objective, python_call=recorded
    )


def _check_dense(model: nn.Module, dense: nn.Module) -> None:
    """Raise InputError if a parameter of ``dense`` is smaller in some dimension than that of its name in ``model``."""
    parameters = dict(dense.named_parameters())
    for name, small in model.named_parameters():
        large = parameters.get(name, small)
        if any(cut > whole for cut, whole in zip(small.shape, large.shape, strict=False)):
            raise InputError(
                f"dense must be the network before the cut, and its {name!r} has shape {list(large.shape)}, that of "
                f"model {list(small.shape)}; write recover(model, dense, plan, data)"
            )


def finetune(
    model: ModelLike,
    data: Any,
    *,
    epochs: int = 1,
    optimizer: OptimizerLike = "sgd",
    lr: float | None = None,
    weight_decay: float = 1e-4,
    decay: Literal["cosine", "constant"] = "cosine",
    warm_up: float = 0.0,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: DeviceLike = None,
    precision: Precision = "float32",
    seed: int = 0,
    recalibrate: bool = False,
    progress: Progress = silent,
) -> nn.Module:
    """Train a network on all of the data.

    Args:
        model: The network, changed in place and left in the mode it was in; or a model's name or a run folder.
        data: The training data, as for :func:`regrow.prune`, with labels; or batches for a network that returns its
            own loss, as detection models do.
        epochs: Passes over the data, in which several sets are mixed; loaders among them come one after the other.
        optimizer: ``"sgd"``, with Nesterov momentum 0.9; ``"adamw"``, for transformers; or a function from parameter
            groups to an optimizer, which replaces ``lr`` and ``weight_decay``.
        lr: The largest learning rate; ``None``: 0.01, of AdamW 0.0001.
        weight_decay: Weight decay.
        decay: ``"cosine"``: the learning rate falls to 0 over all steps; ``"constant"``: it does not.
        warm_up: The fraction of the steps over which the learning rate first rises to ``lr``.
        loss: The loss, as for :func:`regrow.prune`.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16; weights,
            sums and surgery keep their formats.
        seed: Seed of the order of batches, and of Dropout.
        recalibrate: Whether the running statistics of BatchNorms are measured on the data again afterwards.
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        The network: the one that was given, or the loaded one.

    Raises:
        ValueError: If there are no data, or the loss is not finite.

    >>> import torch
    >>> net = nn.Linear(3, 1)
    >>> inputs = torch.randn(64, 3)
    >>> finetune(net, (inputs, inputs.sum(1, keepdim=True)), epochs=20, lr=0.05).weight.round()
    tensor([[1., 1., 1.]], grad_fn=<RoundBackward0>)
    """
    if epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}")
    call = Call(model, data, None, None, loss, tokenizer, batch_size, device, precision)
    inputs = call.read(progress) if data is not None else None
    if inputs is None or not inputs.sources:
        raise InputError("there are no data to train on; give data, for example a DataLoader or (inputs, labels)")
    if not any(p.requires_grad for p in inputs.model.parameters()):
        raise InputError("no parameter of the network has requires_grad; set it for what is to be trained")
    rate = lr if lr is not None else 1e-4 if optimizer == "adamw" else 0.01
    schedule = Schedule("sgd", rate, weight_decay, decay, warm_up, clip=1.0, seed=seed)
    schedule = with_optimizer(schedule, optimizer)
    with torch.enable_grad(), autocasting(inputs.model, precision):
        objective = inputs.objective
        tune.finetune(
            inputs.model, inputs.sources, epochs=epochs, schedule=schedule, objective=objective, progress=progress
        )
        if recalibrate:
            tune.recalibrate(inputs.model, inputs.sources)
    return inputs.model
