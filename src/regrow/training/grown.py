"""Train a network that has grown: all of its parameters, or only what the growth has added."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.core.axes import AxisGraph, size_of
from regrow.core.axis_tensor import AxisTensor
from regrow.core.errors import InputError
from regrow.core.objectives import Objective, choose_objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source
from regrow.surgery.insert import renaming
from regrow.surgery.layout import resize_axis_tensor
from regrow.tracing.capture import evaluating
from regrow.training.fit import fit
from regrow.training.learner import PLAIN, Boundary, Context, NoState, Step, set_train_mode
from regrow.training.optimizers import OptimizerSettings
from regrow.training.schedule import NO_AXES, Schedule, source_phase
from regrow.training.tune import objective_loss


@dataclass(frozen=True)
class GrowthTraining:
    """How a grown network is trained, by AdamW with a learning rate that falls as a half cosine.

    Args:
        steps: The number of steps, of one batch each.
        lr: The first learning rate.
        new_only: Whether only entries that the growth has added are trained; all others stay as they are, bit for bit.
        seed: Seed of the order of batches, and of Dropout.
    """

    steps: int
    lr: float = 1e-3
    new_only: bool = True
    seed: int = 0


def added_entries(model: nn.Module, axes: AxisGraph, plan: Plan) -> dict[str, Tensor]:
    """Return name of a parameter → which of its entries a growth has added; parameters without any are left out.

    Args:
        model: The network after the plan.
        axes: Its axes before the plan.
        plan: The plan, which adds units and inserts blocks.
    """
    rename = renaming(model, plan)
    old = {rename(name): name for name in axes.shapes}
    parameters = dict(model.named_parameters())
    result: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name not in old:
            result[name] = torch.ones_like(parameter, dtype=torch.bool)
            continue
        dims = axes.shapes[old[name]]
        before = torch.ones([size_of(dim, axes.sizes()) for dim in dims], dtype=torch.bool)
        new = ~resize_axis_tensor(AxisTensor(before, dims), axes, plan).values
        if bool(new.any()):
            result[name] = new.to(parameter.device)
    return result


def train_grown(
    model: nn.Module,
    sources: Sequence[Source],
    new: Mapping[str, Tensor],
    training: GrowthTraining,
    *,
    objective: Objective | None = None,
    progress: Progress = silent,
) -> None:
    """Train a grown network on the labels of sources, in place; it is left in the mode it was in.

    Args:
        model: The network.
        sources: The data; in each pass over them every batch is used once, in random order.
        new: The entries that the growth has added (:func:`added_entries`).
        training: How it is trained.
        objective: What it is trained for; ``None``: what fits the labels.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If there are no batches, they have no labels, or the loss stops being finite.
    """
    batches = [batch for source in sources for batch in source.batches]
    if not batches:
        raise InputError("there is nothing to train on; give a source with batches")
    objective = objective or choose_objective(None, batches[0])
    phase = source_phase("training", [training.steps], _ordered(batches, training))
    schedule = Schedule(OptimizerSettings("adamw", training.lr), "cosine", clip=1.0, seed=training.seed)
    learner = replace(PLAIN, loss=objective_loss(objective))
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    if training.new_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in new)
        learner = replace(learner, project=_masking(new), boundary=_holding_statistics(new))
    torch.manual_seed(training.seed)
    try:
        fit(model, NO_AXES, [phase], learner, schedule, progress=progress)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def mean_loss(model: nn.Module, sources: Sequence[Source], objective: Objective | None = None) -> float:
    """Return the mean loss of a network over the batches of sources, in eval mode.

    Args:
        model: The network.
        sources: The data.
        objective: What it is trained for; ``None``: what fits the labels.
    """
    batches = [batch for source in sources for batch in source.batches]
    objective = objective or choose_objective(None, batches[0])
    device = next(model.parameters()).device
    with evaluating(model):
        losses = [float(objective.compute_loss(b.run(model), b)) for b in (x.to(device) for x in batches)]
    return sum(losses) / len(losses)


def _ordered(batches: Sequence[Batch], training: GrowthTraining) -> Callable[[int], list[Batch]]:
    generator = torch.Generator().manual_seed(training.seed)
    rounds = -(-training.steps // len(batches))
    order = [i for _ in range(rounds) for i in torch.randperm(len(batches), generator=generator).tolist()]
    return lambda step: [batches[order[step]]]


def _masking(new: Mapping[str, Tensor]) -> Callable[[NoState, Context, Step], NoState]:
    """Return the ``project`` hook that sets the gradients of old entries to 0."""

    def project(state: NoState, context: Context, step: Step) -> NoState:
        parameters = dict(context.model.named_parameters())
        for name, entries in new.items():
            if (gradient := parameters[name].grad) is not None:
                gradient.mul_(entries)
        return state

    return project


def _holding_statistics(new: Mapping[str, Tensor]) -> Callable[[NoState, Context, Boundary], NoState]:
    """Return the ``boundary`` hook that keeps the statistics of BatchNorms without new channels."""

    def boundary(state: NoState, context: Context, event: Boundary) -> NoState:
        state = set_train_mode(state, context, event)
        for path, module in context.model.named_modules():
            if isinstance(module, _BatchNorm) and f"{path}.weight" not in new:
                module.eval()
        return state

    return boundary
