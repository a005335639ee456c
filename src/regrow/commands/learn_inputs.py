"""The typed inputs of a learning run, converted from its settings, and the network that it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from regrow.axes import AxisGraph
from regrow.commands.starting import image_shape
from regrow.commands.task_sequences import TaskSpecs
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import ALONE, Parallel
from regrow.methods import MethodKind, find_method
from regrow.nets.devices import choose_device
from regrow.nets.loaded import Loaded, Origin
from regrow.nets.small import small
from regrow.objectives import NEXT_TOKEN
from regrow.settings.learn import Settings
from regrow.sources import moved
from regrow.tasks import Task, first_examples, input_shape
from regrow.tracing import trace
from regrow.tracing.meta_copy import clone_model
from regrow.training.continual import TaskSchedule, learn, untrained_accuracies
from regrow.training.fit import Fitted
from regrow.training.learner import Learner
from regrow.training.schedule import NO_AXES
from regrow.training.state import TrainState


@dataclass(frozen=True)
class LearnInputs:
    """Everything that a sequence of tasks is learned with.

    Args:
        tasks: The sequences of tasks.
        model: The name of the network.
        classes: The least number of outputs.
        learner: The method.
        schedule: How each task is trained, with the seed.
        device: The device that it is trained on.
        start: The network with its weights; ``None``: a new one is built.
    """

    tasks: TaskSpecs
    model: str
    classes: int
    learner: Learner[Any]
    schedule: TaskSchedule
    device: torch.device
    start: Loaded | None = None


def read_inputs(settings: Settings, start: Loaded | None = None, ranks: ProcessRank = SINGLE) -> LearnInputs:
    """Return the typed inputs that the settings of a run describe.

    Args:
        settings: The settings.
        start: The network with its weights; ``None``: a new one is built.
        ranks: The processes that share the run.

    Raises:
        ValueError: If there is no such method, or a setting of it is wrong.
        ResourceError: If this machine does not have the device.
    """
    shared: dict[str, Any] = {
        one.name: getattr(settings, one.name) for one in fields(TaskSchedule) if hasattr(settings, one.name)
    }
    specs = TaskSpecs(settings.tasks, settings.train, settings.test, settings.scenario, settings.seed)
    learner = build_learner(settings.method, settings.method_settings, settings.seed)
    if start and start.tokenizer is not None:
        specs = replace(specs, tokenizer=start.tokenizer, seq_len=settings.seq_len)
        shared["objective"] = NEXT_TOKEN
    elif start:
        specs = replace(specs, shape=image_shape(start), normalised=start.origin.normalised_images)
    schedule, device = TaskSchedule(**shared), choose_device(settings.device, ranks)
    return LearnInputs(specs, settings.model, settings.classes, learner, schedule, device, start)


def build_learner(method: str, settings: Mapping[str, object], seed: int) -> Learner[Any]:
    """Return a learner; a method with a seed gets the run's, unless it was given its own.

    Args:
        method: The method's name.
        settings: Its settings that differ from the defaults.
        seed: The seed of the run.

    Raises:
        ValueError: If there is no such method, or a setting of it is wrong.
    """
    entry = find_method(MethodKind.CONTINUAL, method)
    has_seed = any(one.name == "seed" for one in fields(entry.settings))
    learner: Learner[Any] = entry.made(method, {**({"seed": seed} if has_seed else {}), **settings})
    return learner


def build_network(inputs: LearnInputs, tasks: Sequence[Task]) -> tuple[nn.Module, Origin]:
    """Return the network before the run, new or with its weights, and the record of how it was built.

    Args:
        inputs: The inputs of the run.
        tasks: All tasks.
    """
    if inputs.start:
        return clone_model(inputs.start.model).to(inputs.device), inputs.start.origin
    model, origin = small(inputs.model, input_shape(tasks[0].train), count_outputs(inputs, tasks), inputs.tasks.seed)
    return model.to(inputs.device), origin


def trace_network(inputs: LearnInputs, model: nn.Module, tasks: Sequence[Task]) -> AxisGraph:
    """Return the axes of the network; none for a loaded network whose method needs none.

    Args:
        inputs: The inputs of the run.
        model: The network.
        tasks: All tasks.
    """
    if inputs.start is None:
        return trace(model, moved(first_examples(tasks[0].train, 2).inputs, inputs.device))
    args, kwargs = moved((inputs.start.example.args, dict(inputs.start.example.kwargs)), inputs.device)
    return trace(model, *args, **kwargs) if inputs.learner.uses_axes else NO_AXES


def count_outputs(inputs: LearnInputs, tasks: Sequence[Task]) -> int:
    """Return the number of outputs of the network: the classes of all tasks, or as many as are asked for.

    Args:
        inputs: The inputs of the run.
        tasks: All tasks.
    """
    return max(inputs.classes, 1 + max((c for task in tasks for c in task.classes), default=0))


def train_tasks(
    inputs: LearnInputs,
    tasks: Sequence[Task],
    model: nn.Module,
    axes: AxisGraph,
    state: TrainState[Any],
    parallel: Parallel = ALONE,
    **more: Any,
) -> Fitted[Any]:
    """Train a network on all tasks, or resume; all ranks that share the work call this.

    Args:
        inputs: The inputs of the run.
        tasks: All tasks.
        model: The network, as ``state`` left it.
        axes: Its present axes.
        state: The state of the training.
        parallel: The processes that train together.
        **more: Further arguments of :func:`regrow.training.continual.learn`.
    """
    if len(state.before) < len(tasks):
        # Tasks have been added since: what an untrained network knows of them is measured again.
        row = untrained_accuracies(build_network(inputs, tasks)[0], tasks, inputs.schedule, parallel.ranks)
        state = replace(state, before=state.before + row[len(state.before) :])
    return learn(model, axes, tasks, inputs.learner, inputs.schedule, state=state, parallel=parallel, **more)
