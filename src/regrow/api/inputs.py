"""Read what users pass to the Python interface: a network or its name, an example input, data, and a loss."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Example
from regrow.core.errors import InputError
from regrow.core.names import GENERATED
from regrow.core.objectives import LossFunction, Objective, choose_objective
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source, device_of, moved
from regrow.data.batch_forms import ReadOptions
from regrow.data.batches import to_sources
from regrow.evaluation.generation import generate_source
from regrow.jobs.models import ModelSpec, load_model, with_origin
from regrow.nets import Origin
from regrow.nets.devices import check_precision, choose_device
from regrow.nets.loaded import WeightFile, guessed_example
from regrow.store.building import describe_origin
from regrow.tracing import TraceError, trace

ModelLike = nn.Module | str | Path
"""A network, a name that :func:`regrow.nets.load` takes, or the path of a saved model or run folder."""
DeviceLike = str | torch.device | None
"""A device, ``"auto"`` for the best one of this machine, or ``None``: where the network is."""
TOKENS = 4096
"""How many tokens a network generates where its own text is among the data."""
LossLike = str | LossFunction | Objective | None
"""A loss by name, as a function (what the network returned, labels) → scalar, or ``None``: what fits the labels."""


@dataclass(frozen=True)
class Inputs:
    """A network with everything that is needed to trace it, measure it and train it.

    Args:
        model: The network.
        example: An input to trace it with.
        sources: The data, as named batches.
        objective: What the network is trained for; ``None`` without data.
        tokenizer: Its tokenizer, or ``None``.
        tests: The data on which quality is measured.
        files: The files of its weights, if it was loaded by name.
        where: What messages call the batch that the example is; empty: it comes from elsewhere.
    """

    model: nn.Module
    example: Example
    sources: tuple[Source, ...]
    objective: Objective | None
    tokenizer: Any
    tests: tuple[Source, ...] = ()
    files: tuple[WeightFile, ...] = ()
    where: str = ""

    def trace(self) -> AxisGraph:
        """Return the axes of the network, traced with the example.

        Raises:
            TraceError: If it cannot be traced; the message names the batch that the example is.
        """
        try:
            return trace(self.model, *self.example.args, **self.example.kwargs)
        except TraceError as error:
            if not self.where:
                raise
            raise TraceError(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class Arguments:
    """What a call is given to read its network and its data from; as for :func:`regrow.prune`.

    Args:
        model: The network, or its name.
        data: The data.
        validation: The data on which quality is measured; ``None``: ``data``.
        example: An input to trace the network with.
        loss: The loss.
        tokenizer: The tokenizer, for text.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to which the network is moved.
        precision: The precision of forward passes.
        axes: The axes of the network, whose example then counts; ``None``: it is traced.
    """

    model: ModelLike
    data: Any = None
    validation: Any = None
    example: Any = None
    loss: LossLike = None
    tokenizer: Any = None
    batch_size: int = 32
    device: DeviceLike = None
    precision: str = "float32"
    axes: AxisGraph | None = None

    @property
    def name(self) -> str:
        """The name of the network in the settings of a run."""
        return describe_origin(self.model).name if isinstance(self.model, nn.Module) else str(self.model)

    def read(self, progress: Progress = silent, *, generates: bool = False) -> Inputs:
        """Load the network if it is named, read the data, and choose an example input and an objective.

        Args:
            progress: Called with (steps done, steps in all, what is being done).
            generates: Whether ``"generated"`` among the data is text that the network generates.

        Raises:
            InputError: If there is neither an example nor data, or no network.
            ResourceError: If this machine does not have the device.
        """
        device = None if self.device is None else choose_device(self.device)
        model, tokenizer, known = self.model, self.tokenizer, None
        files: tuple[WeightFile, ...] = ()
        if isinstance(model, str | Path):
            loaded = load_model(ModelSpec(str(model), device=str(device or "cpu")), progress)
            model, known, files = with_origin(loaded), None if loaded.guessed else loaded.example, loaded.files
            tokenizer = tokenizer or loaded.tokenizer
        if not isinstance(model, nn.Module):
            raise InputError(_no_network(model, self.data))
        if self.data is not None:
            require_weights(model)
        check_precision(model, self.precision)
        model = model if device is None else model.to(device)
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        example = self.example if self.axes is None else self.axes.example
        known = known if example is None else to_example(example)
        guess = known or guessed_example(model)
        size = next((arg.shape[-1] for arg in (guess.args if guess else ()) if isinstance(arg, Tensor)), 224)
        reading = choose_reading(model, tokenizer, self.batch_size, size)
        data = _generate(self.data, model, reading, progress) if generates else self.data
        sources = tuple(to_sources(data, reading))
        tests = sources if self.validation is None else tuple(to_sources(self.validation, reading))
        labelled = next((source.batches[0] for source in (*sources[:1], *tests[:1])), None)
        objective = choose_objective(self.loss, labelled) if labelled is not None else None
        where = ""
        if known is None:
            if not sources:
                raise InputError(
                    "there is no input to run the network with; give example=, for example "
                    "example=torch.ones(1, 3, 224, 224), or data"
                )
            first = sources[0].batches[0]
            known, where = Example(first.args, first.kwargs), first.where
        if (device := device_of(model)).type != "meta":
            known = Example(moved(known.args, device), moved(dict(known.kwargs), device))
        return Inputs(model, known, sources, objective, tokenizer, tests, files, where)


def _generate(data: Any, model: nn.Module, reading: ReadOptions, progress: Progress) -> Any:
    """Return the data with text that the network generates in the place of ``"generated"``."""
    if not names_generated(data):
        return data
    if isinstance(data, Mapping):
        return {
            name: replace(_generate(part, model, reading, progress), name=str(name)) if _is_generated(part) else part
            for name, part in data.items()
        }
    if reading.tokenizer is None:
        raise InputError(f"{GENERATED!r} is text that the model generates, and it has no tokenizer; give tokenizer=")
    return generate_source(model, reading.tokenizer, TOKENS // reading.seq_len, reading.seq_len, progress=progress)


def names_generated(data: object) -> bool:
    """Return whether ``"generated"`` is among the data."""
    parts = data.values() if isinstance(data, Mapping) else [data]
    return any(_is_generated(part) for part in parts)


def _is_generated(data: object) -> bool:
    return isinstance(data, str) and data == GENERATED and not Path(data).exists()


def choose_reading(model: nn.Module, tokenizer: Any, batch_size: int, size: int = 224) -> ReadOptions:
    """Return how the data of a network are read.

    Args:
        model: The network; images are normalised unless its ``origin`` says that regrow built it itself.
        tokenizer: The tokenizer, for text.
        batch_size: Examples per batch.
        size: Height and width of images that are read from files.
    """
    shift = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    origin = getattr(model, "origin", None)
    normalised = not isinstance(origin, Origin) or origin.normalised_images
    formats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = formats.pop() if len(formats) == 1 else None
    return ReadOptions(batch_size, tokenizer, size=size, shift=shift, normalised=normalised, dtype=dtype)


def require_weights(model: nn.Module) -> None:
    """Raise InputError for a network on the device meta, which cannot be run on data."""
    if device_of(model).type == "meta":
        raise InputError(
            "the network is on the device meta and has no weights; give it some: model.to_empty(device='cpu'), then "
            "model.load_state_dict(weights)"
        )


def _no_network(model: object, data: object) -> str:
    """Return what is given in the place of a network, and the remedy."""
    got = f"got a {type(model).__name__}"
    if isinstance(model, type):
        got = f"got the class {model.__name__}; write {model.__name__}()"
    elif isinstance(data, nn.Module):
        got += "; the network comes first, then the data"
    return f"model must be a torch.nn.Module, a model's name or a run folder, {got}"


def to_example(example: Any) -> Example:
    """Return an example input as users write it.

    Args:
        example: A tensor, a tuple or list of positional inputs, a dict of inputs by name, a batch, or an ``Example``.

    Raises:
        InputError: If it is none of these.

    >>> import torch
    >>> to_example({"x": torch.ones(1)}).kwargs
    {'x': tensor([1.])}
    """
    match example:
        case Example():
            return example
        case Batch():
            return Example(example.args, example.kwargs)
        case Tensor():
            return Example((example,))
        case tuple() | list() if example and all(isinstance(size, int) for size in example):
            sizes = ", ".join(map(str, example))
            raise InputError(f"example must hold tensors, got sizes; write torch.ones({sizes})")
        case tuple() | list():
            return Example(tuple(example))
    if isinstance(example, Mapping):
        return Example((), {str(name): value for name, value in example.items()})
    raise InputError(
        f"example must be a tensor, a tuple of inputs or a dict of inputs by name, got a {type(example).__name__}; "
        "for example torch.ones(1, 3, 224, 224)"
    )
