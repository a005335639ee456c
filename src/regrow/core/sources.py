"""Calibration and training data: named sequences of batches, and the logits and labels of a batch."""

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.core.errors import InputError, first_line

R = TypeVar("R")
# The errors that networks and losses raise where inputs do not fit them; subclasses do not count (lack of memory)
MISFITS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)
# The keys under which a batch or a row may hold its labels
LABEL_KEYS = ("labels", "label", "target", "targets", "y")


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass and the labels of its outputs.

    Args:
        args: Positional inputs.
        kwargs: Inputs by name.
        labels: Class per position, int64, −100 where the loss ignores the position: ``[batch]`` for images, ``[batch,
            tokens]`` for text (already shifted: ``labels[:, t]`` is the token after ``input[:, t]``); or float values.
        where: What error messages call a batch of a user's data: ``"source 'data', batch 3"``; empty: another batch.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def size(self) -> int:
        """The number of labels that are not −100, of float labels all of them; without labels, of examples."""
        if self.labels is not None:
            counted = self.labels.numel() if self.labels.is_floating_point() else int((self.labels != -100).sum())
            return counted if self.labels.dim() else 1
        inputs = [*self.args, *self.kwargs.values()]
        return next((len(value) for value in inputs if isinstance(value, Tensor | list | tuple)), 1)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with every tensor on a device.

        Args:
            device: The device.
        """
        labels = self.labels if self.labels is None else self.labels.to(device)
        args, kwargs = move_inputs((self.args, dict(self.kwargs)), device)
        return replace(self, args=args, kwargs=kwargs, labels=labels)

    def run(self, model: Callable[..., Any]) -> Any:
        """Run a network on the inputs and return its output.

        Args:
            model: The network, or a part of it that takes the same inputs.

        Raises:
            InputError: If the network cannot take the inputs of a user's batch, which the message names.
        """
        try:
            return model(*self.args, **self.kwargs)
        except MISFITS as error:
            if not self.where or type(error) not in MISFITS:
                raise
            got = ", ".join([*map(describe, self.args), *(f"{key}={describe(x)}" for key, x in self.kwargs.items())])
            raise InputError(
                f"{self.where}: the network does not take its inputs ({got}): {type(error).__name__}: "
                f"{first_line(error)}; give batches as the network's forward takes them"
            ) from error


@dataclass(frozen=True)
class Source:
    """A named sequence of batches from one data source, such as a text domain, a data set or a task.

    Args:
        name: What results and settings call it: ``"wiki"``, ``"task-3"``.
        batches: The batches, in order; the same each time they are read.
        origin: Where the data came from, for reports (path, package, calibration or evaluation half).
    """

    name: str
    batches: Sequence[Batch]
    origin: str = ""

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def held_out(self, share: float) -> tuple[list[Batch], list[Batch]]:
        """Return the batches as (training, held-out): the last ones are held out; a single batch serves as both.

        Args:
            share: The fraction of the batches that is held out, at least one batch.
        """
        count, batches = max(1, round(len(self.batches) * share)), list(self.batches)
        return batches[:-count] or batches, batches[-count:]

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators of the loader that the batches come from, if there is one."""
        return generators_of(getattr(self.batches, "loader", None))

    @property
    def tokens(self) -> int:
        """The number of labelled positions of all batches (tokens of text, or images); reads them all."""
        return sum(int((batch.labels != -100).sum()) for batch in self.batches if batch.labels is not None)


def find_decoder_inputs(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the function that makes a decoder's input of the tokens it is to predict, ``[sequences, tokens]``.

    That is how transformers trains its encoder-decoder models; of other networks, and of classifiers, ``None``.
    """
    config, name = getattr(model, "config", None), type(model).__name__
    generates = getattr(config, "is_encoder_decoder", False) and not name.endswith(("Classification", "Answering"))
    if not generates or "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return None

    def shift_right(labels: Tensor) -> Tensor:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return cast(Tensor, cast(Any, model).prepare_decoder_input_ids_from_labels(labels))
        start, padding = cast(Any, config).decoder_start_token_id, cast(Any, config).pad_token_id
        if start is None:
            raise InputError("the decoder needs a first token; set model.config.decoder_start_token_id")
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = start
        return shifted.masked_fill(shifted == -100, padding or 0)

    return shift_right


def visible_positions(batch: Batch) -> Tensor | None:
    """Return which positions ``attention_mask`` shows, ``[sequences, tokens]`` bool; ``None`` if nothing is hidden."""
    mask = batch.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    return mask != 0


def generators_of(loader: object) -> list[torch.Generator]:
    """Return the random generators of a ``DataLoader`` and its sampler; none for anything else."""
    owned = (getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None)))
    return [generator for generator in owned if isinstance(generator, torch.Generator)]


@contextmanager
def preserve_random_state(generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Context manager that restores the CPU's random state of Python, numpy and torch, and of ``generators``."""
    states = [(generator, generator.get_state()) for generator in generators]
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
        for generator, state in states:
            generator.set_state(state)


def seed_generators(generators: Iterable[torch.Generator] = ()) -> None:
    """Seed the global random generators of Python, numpy and torch on the CPU, and ``generators``, with 0."""
    torch.default_generator.manual_seed(0)  # not torch.manual_seed, which reaches every device
    random.seed(0)
    np.random.seed(0)
    for generator in generators:
        generator.manual_seed(0)


def describe(value: object) -> str:
    """Return the dtype and shape of an input or of labels as text, or the type of what is no tensor, for messages.

    >>> describe(torch.zeros(2, 3)), describe([torch.tensor(1)])
    ('float32 [2, 3]', 'list')
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's parameters; the CPU if it has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def move_inputs(value: object, device: torch.device) -> Any:
    """Return a nested structure of inputs with every tensor on a device; ``value`` itself if all are there already."""
    if all(leaf.device == device for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
        return value
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU; those of one device are copied together, so that the host waits for it once.

    >>> [tensor.tolist() for tensor in to_host([torch.ones(2), torch.tensor(3)])]
    [[1.0, 1.0], 3]
    """
    result = list(tensors)
    remote = [i for i, tensor in enumerate(result) if tensor.device.type != "cpu" and tensor.numel()]
    remote.sort(key=lambda i: -result[i].itemsize)  # so that each begins at a multiple of its own size
    chunks: list[list[int]] = []
    size = _CHUNK  # so that the first tensor begins a chunk
    for i in remote:
        if size + result[i].nbytes > _CHUNK or result[i].device != result[chunks[-1][0]].device:
            chunks.append([])
            size = 0
        chunks[-1].append(i)
        size += result[i].nbytes
    for chunk in chunks:
        parts = [result[i].contiguous().reshape(-1).view(torch.uint8) for i in chunk]
        joined = torch.cat(parts).cpu()
        for i, part in zip(chunk, joined.split([len(tensor) for tensor in parts]), strict=True):
            result[i] = part.view(result[i].dtype).view(result[i].shape).clone()
    return [tensor.cpu() for tensor in result]


# The most bytes that are copied to the CPU together, since they are in the device's memory twice
_CHUNK = 2**28


def move_tensors(record: R, device: torch.device) -> R:
    """Return a copy of a dataclass with the tensors in its fields, in tuples and dataclasses too, on a device."""

    def move(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(device)
        if is_dataclass(value) and not isinstance(value, type):
            return move_tensors(value, device)
        return tuple(map(move, value)) if type(value) is tuple else value

    names = [field_.name for field_ in fields(record)]  # type: ignore[arg-type]
    return replace(record, **{name: move(getattr(record, name)) for name in names})  # type: ignore[type-var]


def draw_batches(sources: Sequence[Sequence[Batch]], n: int, step: int, seed: int = 0) -> list[tuple[int, Batch]]:
    """Return the ``n`` batches of a training step (from 0) as (index of the source, batch), from the sources in turn.

    Each source is shuffled anew in every pass over it. The result depends on the step's number alone, so that training
    can be stopped and resumed.

    >>> sorted((i, word) for step in (0, 1) for i, word in draw_batches([["a", "b"], ["c"]], 2, step))
    [(0, 'a'), (0, 'b'), (1, 'c'), (1, 'c')]
    """
    result = []
    for i in range(step * n, (step + 1) * n):
        source, turn = i % len(sources), i // len(sources)
        count = len(sources[source])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 65537 + turn // count))
        result.append((source, sources[source][int(order[turn % count])]))
    return result


def logits_in(output: Any) -> Tensor:
    """Return the logits in an output: itself, ``.logits``, ``["logits"]``, ``["out"]`` or ``[0]``; else TypeError."""
    result = getattr(output, "logits", output)
    if isinstance(result, dict):
        result = result.get("logits", result.get("out"))
    if isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise TypeError(f"expected logits from the model, got {type(output).__name__}")
    return result


def labelled_logits(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the logits of the positions whose label is not −100, ``[positions, classes]``.

    ``logits``: classes come last, or second, as of images, ``[N, classes, h, w]``. Those of all positions are returned
    if there is not one label for each.

    >>> labels = torch.tensor([[0, -100]])
    >>> labelled_logits(torch.zeros(1, 2, 5), labels).shape, labelled_logits(torch.zeros(1, 5, 2), labels).shape
    (torch.Size([1, 5]), torch.Size([1, 5]))
    """
    shape = None if labels is None else labels.shape
    if logits.dim() > 1 and logits.shape[:-1] != shape:
        second = logits.movedim(1, -1)
        logits = second if logits.dim() == 4 or second.shape[:-1] == shape else logits
    rows = logits.flatten(0, -2)
    return rows if labels is None or labels.numel() != len(rows) else rows[labels.flatten() != -100]
