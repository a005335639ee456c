"""The typed inputs of a search, converted from its settings, and its data, split by purpose."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from regrow.amounts import parse_bytes
from regrow.axes import AxisGraph
from regrow.commands.starting import image_shape
from regrow.commands.task_sequences import TaskSpecs, read_text
from regrow.data import streams
from regrow.distributed import SINGLE, ProcessRank
from regrow.nets import Loaded
from regrow.nets.devices import choose_device
from regrow.objectives import CLASSIFICATION, NEXT_TOKEN, Objective
from regrow.references import names_code
from regrow.settings.search import Settings
from regrow.sources import device_of, moved
from regrow.tasks import CappedExamples, ExampleSet, Task, first_examples
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule

WINDOWS = 4
"""The most windows of text that are evaluated in one pass: each has as many outputs as there are tokens."""


@dataclass(frozen=True)
class DataSpec:
    """The data of a search, and how much of it is used.

    Args:
        name: ``digits``, a folder of images, or a text domain.
        train: The number of training examples; 0: all.
        test: The number of test examples; 0: all.
        validation: The fraction of the training examples that the search holds out.
        seed: Seed of the choice of examples.
        shape: The shape ``[C, H, W]`` that images are converted to; empty: as they are.
        normalised: Whether the network takes normalised images (``Origin.normalised_images``).
        tokenizer: The tokenizer of a language model, whose data are text; ``None``: they are images.
        seq_len: Tokens per window of text.
        kwargs: Further keyword arguments with which the network is traced.
    """

    name: str
    train: int
    test: int
    validation: float
    seed: int
    shape: tuple[int, ...] = ()
    normalised: bool = False
    tokenizer: Any = None
    seq_len: int = 256
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Retraining:
    """The training of the found network on all training examples.

    Args:
        schedule: Epochs, batches and optimizer.
        inherit: Whether it starts from the weights that the search left, instead of new ones.
        cutout: The side in pixels of the square that is cut out of each image; 0: none.
    """

    schedule: TaskSchedule
    inherit: bool
    cutout: int


@dataclass(frozen=True)
class SearchInputs:
    """Everything that a search depends on.

    Args:
        space: The name of the search space, or ``pkg.mod:fn``.
        stages: The number of stages; 0: as many as suit the space.
        stride: The stride of the stem.
        memory: The largest memory of a stage in bytes; 0: no budget.
        target: The target as text (:func:`regrow.commands.targets.parse_target`).
        method: The name of the method.
        method_settings: Its settings that differ from the defaults.
        data: The data.
        batch_size: Examples per step.
        epochs: Epochs of the search.
        schedule: How the search is trained; ``None`` for no epochs.
        retraining: The training after the search; ``None``: none.
        device: The device that everything runs on.
        seed: Seed of everything random.
        objective: What the network is trained for.
        start: The network with its weights that is searched; ``None``: a new one is built.
    """

    space: str
    stages: int
    stride: int
    memory: int
    target: str
    method: str
    method_settings: Mapping[str, object]
    data: DataSpec
    batch_size: int
    epochs: int
    schedule: TaskSchedule | None
    retraining: Retraining | None
    device: torch.device
    seed: int
    objective: Objective = CLASSIFICATION
    start: Loaded | None = None


@dataclass(frozen=True)
class Parts:
    """The data of a search, split by purpose.

    Args:
        search: Training and validation examples of the search.
        whole: Both together, for retraining; the validation examples are also its test examples, which are only
            reported.
        test: Test examples, evaluated once at the end.
        kwargs: Further keyword arguments with which the network is traced.
    """

    search: Task
    whole: Task
    test: ExampleSet
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All data as tasks: of the search, of retraining, and the test examples."""
        return self.search, self.whole, Task("test", self.test, self.test, self.whole.classes)


def read_inputs(settings: Settings, start: Loaded | None = None, ranks: ProcessRank = SINGLE) -> SearchInputs:
    """Return the typed inputs that the settings of a search describe.

    Args:
        settings: The settings of the run.
        start: The network with its weights that is searched, if it is not a new one; training goes on from its weights.
        ranks: The processes that share the run.

    Raises:
        ValueError: If a setting is for the training after the search, and there is none.
        ResourceError: If this machine does not have the device.
    """
    for name in ("cutout", "inherit"):
        if getattr(settings, name) and not settings.retrain:
            raise ValueError(f"--{name} is of the training after the search, and --retrain 0 leaves that out")
    own = ("space", "stages", "stride", "target", "method", "method_settings", "batch_size", "epochs")
    data = DataSpec(settings.data, settings.train, settings.test, settings.validation, settings.seed)
    data = replace(data, normalised=names_code(settings.space))
    if start and start.tokenizer is not None:
        if settings.cutout:
            raise ValueError(f"--cutout {settings.cutout} is of images, and the data are text: drop it")
        flags = {name: value for name, value in start.example.kwargs.items() if isinstance(value, bool)}
        data = replace(data, tokenizer=start.tokenizer, seq_len=settings.seq_len, kwargs=flags)
    elif start:
        data = replace(data, shape=image_shape(start), normalised=start.origin.normalised_images)
    objective = CLASSIFICATION if data.tokenizer is None else NEXT_TOKEN
    inherit = settings.inherit or start is not None
    retrained = _schedule(settings, settings.retrain, "cosine", objective) if settings.retrain else None
    retraining = Retraining(retrained, inherit, settings.cutout) if retrained else None
    return SearchInputs(
        **{name: getattr(settings, name) for name in own},
        memory=parse_bytes(settings.memory) if settings.memory else 0,
        data=data,
        schedule=_schedule(settings, settings.epochs, "constant", objective) if settings.epochs else None,
        retraining=retraining,
        device=choose_device(settings.device, ranks),
        seed=settings.seed,
        objective=objective,
        start=start,
    )


def _schedule(settings: Settings, epochs: int, decay: str, objective: Objective) -> TaskSchedule:
    shared = {name: getattr(settings, name) for name in ("batch_size", "lr", "weight_decay", "precision", "seed")}
    return TaskSchedule(epochs=epochs, decay=decay, objective=objective, **shared)


def read_parts(data: DataSpec) -> Parts:
    """Return the data of a search, split into training, validation and test examples.

    Args:
        data: Which data, and how much of them.

    Raises:
        SourceError: If the data are missing.
    """
    base = _read_task(data)
    if data.shape:
        (base,) = streams.alike([base], data.shape)
    n = len(base.train)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(data.seed))
    many = max(1, round(data.validation * n))
    if n - many < 2:
        raise ValueError(f"--validation {data.validation:g} of {n} examples leaves {n - many} to learn from")
    held, learned = (base.train.subset(part) for part in order.split([many, n - many]))
    if data.tokenizer is not None:
        held = CappedExamples(held, WINDOWS)
    return Parts(
        search=Task("search", learned, held, base.classes),
        whole=Task("retraining", base.train, held, base.classes),
        test=base.test,
        kwargs=data.kwargs,
    )


def _read_task(data: DataSpec) -> Task:
    """Return all training and test examples."""
    if data.tokenizer is None:
        return streams.of(data.name, data.train, data.test, data.seed, size=data.shape[1:], normalised=data.normalised)
    some: dict[str, Any] = {"train": data.train, "test": data.test, "seed": data.seed, "seq_len": data.seq_len}
    return read_text(data.name, TaskSpecs((data.name,), tokenizer=data.tokenizer, **some))


def trace_examples(model: nn.Module, task: Task, kwargs: Mapping[str, Any]) -> AxisGraph:
    """Return the axes of a network, traced with two training examples.

    Args:
        model: The network.
        task: The data.
        kwargs: Further keyword arguments of the network.
    """
    return trace(model, moved(first_examples(task.train, 2).inputs, device_of(model)), **kwargs)
