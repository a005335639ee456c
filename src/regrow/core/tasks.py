"""Tasks of continual learning: labelled examples that a network learns one task after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from regrow.core.sources import Batch, device_of, move_inputs


@runtime_checkable
class ExampleSet(Protocol):
    """Interface of a set of labelled examples, in memory or elsewhere, that is read in batches."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def batches(self, size: int, seed: int | None = None) -> Iterator["Examples"]:
        """Yield all examples in batches of ``size``; a seed shuffles them and leaves out a last batch of one."""

    def take(self, indices: Tensor) -> "Examples":
        """Return the examples at positions ``[N]`` (int64), in memory."""

    def subset(self, indices: Tensor) -> "ExampleSet":
        """Return the examples at positions ``[N]`` (int64) as a set that is read like this one."""

    def labels_of(self) -> Tensor | None:
        """Return the labels of all examples, ``[N]``; ``None`` if the examples would have to be read for that."""


@dataclass(frozen=True)
class Examples:
    """Labelled examples in memory.

    Args:
        inputs: ``[N, ...]``, as the network takes them; or several such tensors, in a tuple or by name.
        labels: The labels, ``[N, ...]``: classes int64, values float.
        where: What error messages call a batch of a user's data; empty: other examples.

    Raises:
        ValueError: If the numbers of inputs and labels differ, or there are none.
    """

    inputs: Any
    labels: Tensor
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if first_tensor(self.inputs).shape[:1] != self.labels.shape[:1] or not len(self.labels):
            n = len(first_tensor(self.inputs))
            raise ValueError(f"{n} inputs and {len(self.labels)} labels: one label each, at least one")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Examples":
        """Return the examples on a device; themselves if they are there already."""
        inputs, labels = move_inputs(self.inputs, device), self.labels.to(device)
        return self if inputs is self.inputs and labels is self.labels else replace(self, inputs=inputs, labels=labels)

    def batches(self, size: int, seed: int | None = None) -> Iterator["Examples"]:
        """Yield all examples in batches of ``size``; a seed shuffles them, and leaves out a last batch of one example.

        BatchNorm cannot train on a single example; with ``size`` 1, or one example in all, none is left out.
        """
        return (self.take(part) for part in batch_indices(len(self), size, seed))

    def take(self, indices: Tensor) -> "Examples":
        """Return the examples at positions, ``[N]`` int64, or under a mask, ``[examples]`` bool."""
        return Examples(select_inputs(self.inputs, indices), self.labels[indices], self.where)

    subset = take

    def labels_of(self) -> Tensor | None:
        """Return the labels of all examples, ``[N, ...]``."""
        return self.labels


@dataclass(frozen=True)
class ExamplesView:
    """Examples that are read from ``base``, with changed inputs or in smaller batches, so that tasks can share them.

    ``change``: inputs ``[N, ...]`` → the changed ones; ``most``: the largest batch; ``None``: as in ``base``.
    """

    base: ExampleSet
    change: Callable[[Any], Any] | None = None
    most: int | None = None

    def __len__(self) -> int:
        return self._number

    @cached_property
    def _number(self) -> int:
        """The number of examples."""
        return len(self.base)  # which may take a pass over them

    @property
    def inputs(self) -> Any:
        """The inputs of all examples, in memory."""
        return first_examples(self, len(self)).inputs

    @property
    def labels(self) -> Tensor:
        """The labels of all examples."""
        return first_examples(self, len(self)).labels

    def batches(self, size: int, seed: int | None = None) -> Iterator[Examples]:
        """Yield all examples in batches, as :meth:`Examples.batches`."""
        return map(self._apply_change, self.base.batches(size if self.most is None else min(size, self.most), seed))

    def take(self, indices: Tensor) -> Examples:
        """Return the examples at some positions, in memory, with their changed inputs."""
        return self._apply_change(self.base.take(indices))

    def subset(self, indices: Tensor) -> "ExamplesView":
        """Return the examples at some positions as a view with the same changes."""
        return replace(self, base=self.base.subset(indices))

    def labels_of(self) -> Tensor | None:
        """Return the labels of all examples; ``None`` if the examples would have to be read for that."""
        return self.base.labels_of()

    def _apply_change(self, examples: Examples) -> Examples:
        """Return examples with their inputs changed by ``change``."""
        return examples if self.change is None else Examples(self.change(examples.inputs), examples.labels)


def first_examples(examples: ExampleSet, n: int) -> Examples:
    """Return the first ``n`` examples, in memory; all if there are no more."""
    return examples.take(torch.arange(min(n, len(examples))))


def input_shape(examples: ExampleSet) -> tuple[int, ...]:
    """Return the shape of one input (of several, of the first), without the batch dimension; reads one example."""
    return tuple(first_tensor(first_examples(examples, 1).inputs).shape[1:])


def batch_indices(n: int, size: int, seed: int | None = None) -> Iterator[Tensor]:
    """Return an iterator of the positions of ``n`` examples by batch, ``[size]`` int64, as :meth:`Examples.batches`."""
    order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = order.split(size)
    ends_in_single = seed is not None and n % size == 1 < min(n, size)
    return iter(parts[:-1] if ends_in_single else parts)


def first_tensor(inputs: Any) -> Tensor:
    """Return the first tensor of an input: itself, or of a tuple or dict of tensors; raise ``TypeError`` if none."""
    while not isinstance(inputs, Tensor):
        if not isinstance(inputs, Mapping | Sequence) or isinstance(inputs, str) or not inputs:
            raise TypeError(f"an input is a tensor, or a tuple or dict of tensors, got a {type(inputs).__name__}")
        inputs = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
    return inputs


def select_inputs(inputs: Any, indices: Tensor) -> Any:
    """Return the inputs at ``indices`` along the first dimension: of a tensor, or of a tuple or dict of tensors."""
    if isinstance(inputs, Tensor):
        return inputs[indices]
    if isinstance(inputs, Mapping):
        return {name: select_inputs(part, indices) for name, part in inputs.items()}
    return tuple(select_inputs(part, indices) for part in inputs)


def pack_batch(inputs: Any, labels: Tensor | None = None, where: str = "") -> Batch:
    """Return a :class:`Batch` of inputs: a tensor, a tuple of positional inputs, or a dict of inputs by name."""
    if isinstance(inputs, Mapping):
        return Batch((), inputs, labels, where)
    return Batch((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}, labels, where)


def run_network(model: nn.Module, inputs: Any, device: torch.device | None = None, where: str = "") -> Any:
    """Return a network's output for inputs that are moved to ``device`` (``None``: that of its parameters).

    ``where``: what the error for inputs that the network cannot take calls them, as :attr:`Batch.where`.
    """
    return pack_batch(move_inputs(inputs, device or device_of(model)), where=where).run(model)


def mask_classes(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Return logits with −∞ for every class that ``classes`` (``[..., classes]`` bool) lacks; ``None``: unchanged.

    >>> mask_classes(torch.zeros(1, 3), torch.tensor([True, False])).tolist()
    [[0.0, -inf, -inf]]
    """
    if classes is None:
        return logits
    shape = (*classes.shape[:-1], logits.shape[-1])
    allowed = torch.zeros(shape, dtype=torch.bool, device=logits.device)
    allowed[..., : classes.shape[-1]] = classes.to(logits.device)
    return logits.masked_fill(~allowed, -torch.inf)


@dataclass(frozen=True)
class Task:
    """One task of a continual-learning sequence: its data, and the class labels that occur in them.

    ``gone``: whether its data are no longer available, and zeros replace them.
    """

    name: str
    train: ExampleSet
    test: ExampleSet
    classes: tuple[int, ...]
    gone: bool = False

    @classmethod
    def of_gone(cls, name: str, shape: tuple[int, ...], classes: tuple[int, ...]) -> "Task":
        """Return a task whose data are no longer available: two inputs of zeros, each of ``shape``, replace them."""
        blank = Examples(torch.zeros((2, *shape)), torch.full((2,), classes[0]))
        return cls(name, blank, blank, classes, gone=True)
