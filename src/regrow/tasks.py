"""Tasks: what a network learns one after the other."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Inputs and the class of each, in memory.

    Args:
        inputs: ``[N, ...]``, as the network takes them.
        labels: ``[N]`` int64.

    Raises:
        ValueError: If there are not equally many, or none.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels) or not len(self.labels):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.labels)} labels: one label each, at least one")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Examples":
        """The same examples on a device."""
        return self if device.type == "cpu" else Examples(self.inputs.to(device), self.labels.to(device))

    def batches(self, size: int, seed: int | None = None) -> Iterator["Examples"]:
        """All examples once, ``size`` at a time; in a drawn order if there is a seed, and then no rest of one.

        A BatchNorm cannot train on a single example; where batches are of one anyway, none is left out.

        >>> found = Examples(torch.arange(5.0), torch.zeros(5)).batches(2, seed=0)
        >>> [len(batch) for batch in found]
        [2, 2]
        """
        n = len(self)
        order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        for part in order.split(size):
            if len(part) > 1 or size == 1 or n == 1 or seed is None:
                yield Examples(self.inputs[part], self.labels[part])


def among(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Logits with −∞ for every class that answers are not chosen among.

    Args:
        logits: ``[N, outputs]``.
        classes: ``[classes]`` or ``[N, classes]`` bool, for the first outputs; no others are chosen. ``None``: all.

    >>> among(torch.zeros(1, 3), torch.tensor([True, False])).tolist()
    [[0.0, -inf, -inf]]
    """
    if classes is None:
        return logits
    shape = (*classes.shape[:-1], logits.shape[-1])
    chosen = torch.zeros(shape, dtype=torch.bool, device=logits.device)
    chosen[..., : classes.shape[-1]] = classes.to(logits.device)
    return logits.masked_fill(~chosen, -torch.inf)


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Args:
        name: How results refer to it.
        train: What is learned from.
        test: What is only evaluated on.
        classes: The classes that it is about, ascending.
        gone: Whether its examples are not there any more and a few zeros stand for them: it is not evaluated on.
    """

    name: str
    train: Examples
    test: Examples
    classes: tuple[int, ...]
    gone: bool = False

    @classmethod
    def of_gone(cls, name: str, shape: tuple[int, ...], classes: tuple[int, ...]) -> "Task":
        """A task of which no more is known than what its inputs were like, without the first dimension."""
        none = Examples(torch.zeros(2, *shape), torch.full((2,), classes[0]))
        return cls(name, none, none, classes, gone=True)
