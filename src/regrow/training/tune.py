"""Training after a change of shape: BatchNorm recalibration, fine-tuning, and training of what a growth has added."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.core.axes import AxisGraph, size_of
from regrow.core.axes.axis import AxisTensor
from regrow.core.errors import InputError
from regrow.core.objectives import Objective, choose_objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source, device_of
from regrow.core.tasks import Task
from regrow.data.batch_streams import BatchChain, BatchStream
from regrow.surgery.insert import make_rename
from regrow.surgery.layout import resize_axis_tensor
from regrow.tracing.capture import in_eval_mode, keep_modes
from regrow.training.fit import FitOptions, fit
from regrow.training.learner import PLAIN, Boundary, Context, Loss, NoState, Step, set_train_mode
from regrow.training.schedule import NO_AXES, Phase, Schedule, source_phase

FINETUNING = Schedule("sgd", 0.01, 1e-4, "cosine", clip=1.0)


def recalibrate(model: nn.Module, sources: Iterable[Iterable[Batch]]) -> int:
    """Measure the running statistics of every BatchNorm again, in place; return how many layers have new ones.

    They become plain averages over all batches. Everything but the BatchNorms runs in eval mode; modes and momenta are
    restored. Layers that the data do not reach keep their statistics; batches with a single value per channel, which
    have no variance, are left out.
    """
    layers = find_batch_norms(model)
    if not layers:
        return 0
    device = device_of(model)
    before = [(layer, layer.momentum, layer.num_batches_tracked, _copy_statistics([layer])) for layer in layers]
    measured = [False] * len(layers)  # per layer; if a batch fails, all old statistics are restored
    with keep_modes(model), torch.no_grad():
        model.eval()
        for layer in layers:
            layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        try:
            for source in sources:
                for batch in source:
                    _measure_batch(model, layers, batch.to(device))
            measured = [bool(layer.num_batches_tracked) for layer in layers]
        finally:
            for is_measured, (layer, momentum, count, copies) in zip(measured, before, strict=True):
                if is_measured and count is not None and layer.num_batches_tracked is not None:
                    count.copy_(layer.num_batches_tracked)
                layer.momentum, layer.num_batches_tracked = momentum, count
                _restore_statistics([] if is_measured else copies)
    return sum(measured)


def find_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms of a network that keep running statistics, in the order of its modules."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Context manager after which the running statistics of BatchNorms are what they were."""
    copies = _copy_statistics(find_batch_norms(model))
    try:
        yield
    finally:
        _restore_statistics(copies)


def _copy_statistics(layers: Sequence[_BatchNorm]) -> list[tuple[Tensor, Tensor]]:
    """Return (running mean, variance or batch count of a layer, a copy of it), for each of these and each layer."""
    tensors = [x for layer in layers for x in (layer.running_mean, layer.running_var, layer.num_batches_tracked)]
    return [(x, x.clone()) for x in tensors if x is not None]


def _restore_statistics(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set running statistics to their copies, in place; ``copies``: as of :func:`_copy_statistics`."""
    for tensor, copy in copies:
        tensor.copy_(copy)


def _measure_batch(model: nn.Module, layers: Sequence[_BatchNorm], batch: Batch) -> None:
    """Run a batch, which updates the running statistics of ``layers``; not if one gets a single value per channel."""
    copies = _copy_statistics(layers)
    try:
        batch.run(model)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        _restore_statistics(copies)


def recalibrate_changed(model: nn.Module, plan: Plan, sources: Sequence[Source]) -> str:
    """Call :func:`recalibrate` if a plan has changed the network; return a warning if it cannot, or ``""``."""
    changed = plan.changes_modules or any(not change.idle for change in plan.changes.values())
    layers = find_batch_norms(model) if changed and device_of(model).type != "meta" else []
    if not layers or (sources and recalibrate(model, sources)):
        return ""
    problem = f"the running statistics of {len(layers)} BatchNorm layers are those of the uncut network"
    if not sources:
        return f"{problem}, which costs accuracy; give data, on which they are measured again"
    return f"{problem}, which costs accuracy: the data do not reach them; give batches of several examples"


def finetune(
    model: nn.Module,
    sources: Sequence[Source],
    *,
    epochs: int = 1,
    schedule: Schedule = FINETUNING,
    objective: Objective | None = None,
    progress: Progress = silent,
) -> None:
    """Train a network in place on the labels of all sources together.

    Batches in memory come in a new random order in each epoch; with a user's loader among the sources, these are read
    one after the other. ``objective``: ``None``: by the labels. Modes are restored. ValueError for an empty source.
    """
    if empty := next((source for source in sources if not len(source)), None):
        raise ValueError(f"source {empty.name!r} is empty; give one with batches to train on")
    learner = replace(PLAIN, loss=_make_loss_hook(objective or choose_objective(None, sources[0].batches[0])))
    steps = sum(map(len, sources))
    if any(isinstance(source.batches, BatchStream) for source in sources):  # read from its start in every epoch
        task = Task.of_gone("fine-tuning", (), (0,))
        read = chain.from_iterable
        phase = Phase(
            task, (steps,) * epochs, lambda context: (([batch], None) for batch in read(sources)), seeded=False
        )
    else:
        batches = BatchChain(tuple(source.batches for source in sources))
        order = _shuffle_batches(steps, epochs, schedule.seed)
        phase = source_phase("fine-tuning", [steps] * epochs, lambda step: [batches[order[step]]])
    torch.manual_seed(schedule.seed)
    with keep_modes(model):
        fit(model, NO_AXES, [phase], learner, schedule, options=FitOptions(progress=progress))


def _make_loss_hook(objective: Objective) -> Callable[[Any, Context, Step], Loss]:
    """Return the ``loss`` hook that computes an objective on :class:`Batch`es, instead of a task's examples."""
    return lambda state, context, step: Loss(objective.compute_loss(step.batch.run(context.model), step.batch))


def _shuffle_batches(count: int, epochs: int, seed: int) -> list[int]:
    """Return the indices of ``count`` batches in a new random order for each epoch, one epoch after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [i for _ in range(epochs) for i in torch.randperm(count, generator=generator).tolist()]


def find_added_entries(model: nn.Module, axes: AxisGraph, plan: Plan) -> dict[str, Tensor]:
    """Return name of a parameter → bool mask of the entries that a growth has added; only parameters that have any.

    ``model`` is the grown network, ``axes`` are those before ``plan``.
    """
    rename = make_rename(model, plan)
    old_names = {rename(name): name for name in axes.shapes}
    result: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name not in old_names:
            result[name] = torch.ones_like(parameter, dtype=torch.bool)
            continue
        dims = axes.shapes[old_names[name]]
        before = torch.ones([size_of(dim, axes.sizes()) for dim in dims], dtype=torch.bool)
        new = ~resize_axis_tensor(AxisTensor(before, dims), axes, plan).values  # new entries of an AxisTensor are 0
        if bool(new.any()):
            result[name] = new.to(parameter.device)
    return result


def train_grown(
    model: nn.Module,
    sources: Sequence[Source],
    objective: Objective | None = None,
    *,
    steps: int,
    lr: float,
    seed: int,
    new: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> None:
    """Train a grown network, or its ``new`` entries alone, in place, by AdamW with a rate that falls as a half cosine.

    ``new``: masks of entries, as of :func:`find_added_entries`; ``None``: all are trained. ``objective``: ``None``:
    chosen by the labels. Raise InputError if there are no batches.
    """
    batches = [batch for source in sources for batch in source.batches]
    if not batches:
        raise InputError("there is nothing to train on; give a source with batches")
    order = _shuffle_batches(len(batches), -(-steps // len(batches)), seed)  # epochs: rounded up
    phase = source_phase("training", [steps], lambda step: [batches[order[step]]])
    schedule = Schedule("adamw", lr, decay="cosine", clip=1.0, seed=seed)
    learner = replace(PLAIN, loss=_make_loss_hook(objective or choose_objective(None, batches[0])))
    entries = new or {}

    def mask_old(state: NoState, context: Context, step: Step) -> NoState:
        """Set the gradients of entries that are not new to 0."""
        for name, parameter in context.parameters().items():
            if name in entries and parameter.grad is not None:
                parameter.grad.mul_(entries[name])
        return state

    def keep_statistics(state: NoState, context: Context, event: Boundary) -> NoState:
        """Set training mode, but for BatchNorms without new channels."""
        state = set_train_mode(state, context, event)
        for path, module in context.model.named_modules():
            if isinstance(module, _BatchNorm) and f"{path}.weight" not in entries:
                module.eval()
        return state

    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if new is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in new)
        learner = replace(learner, project=mask_old, boundary=keep_statistics)
    torch.manual_seed(seed)
    try:
        with keep_modes(model):
            fit(model, NO_AXES, [phase], learner, schedule, options=FitOptions(progress=progress))
    finally:
        for parameter, before in requires_grad.items():
            parameter.requires_grad_(before)
            parameter.grad = None


@torch.no_grad()
def measure_mean_loss(model: nn.Module, sources: Sequence[Source], objective: Objective | None) -> float:
    """Return the mean loss over all batches (one or more) in eval mode; ``objective`` ``None``: by their labels."""
    batches = [batch for source in sources for batch in source.batches]
    objective = objective or choose_objective(None, batches[0])
    device = device_of(model)
    with in_eval_mode(model):
        losses = [float(objective.compute_loss(b.run(model), b)) for b in (batch.to(device) for batch in batches)]
    return sum(losses) / len(losses)
