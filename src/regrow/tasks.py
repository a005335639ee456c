"""Tasks of continual learning: labelled examples that a network learns one task after the other."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Labelled examples in memory.

    Args:
        inputs: ``[N, ...]``, as the network takes them.
        labels: The class of each example, ``[N]`` int64.

    Raises:
        ValueError: If the numbers of inputs and labels differ, or there are none.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels) or not len(self.labels):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.labels)} labels: one label each, at least one")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Examples":
        """Return the examples on a device.

        Args:
            device: The device.
        """
        return self if device.type == "cpu" else Examples(self.inputs.to(device), self.labels.to(device))

    def batches(self, size: int, seed: int | None = None) -> Iterator["Examples"]:
        """Yield all examples in batches of ``size``; a seed shuffles them, and leaves out a last batch of one example.

        BatchNorm cannot train on a single example; with ``size`` 1, or one example in all, none is left out.

        Args:
            size: Examples per batch; the last batch may have fewer.
            seed: Seed of the shuffling; ``None``: in order.

        >>> parts = Examples(torch.arange(5.0), torch.zeros(5)).batches(2, seed=0)
        >>> [len(batch) for batch in parts]
        [2, 2]
        """
        n = len(self)
        order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        for part in order.split(size):
            if len(part) > 1 or size == 1 or n == 1 or seed is None:
                yield Examples(self.inputs[part], self.labels[part])


def among(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Mask logits with −∞ for every class that may not be predicted.

    Args:
        logits: ``[N, outputs]``.
        classes: Which of the first outputs may be predicted, ``[classes]`` or ``[N, classes]`` bool; all further
            outputs are masked. ``None``: nothing is masked.

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
    """One task of a continual-learning sequence: its training and test examples and its classes.

    Args:
        name: What results call it.
        train: The training examples.
        test: The test examples, never trained on.
        classes: The class indices of the task, ascending.
        gone: Whether its data are no longer available, so that a few zeros replace them and it is not evaluated.
    """

    name: str
    train: Examples
    test: Examples
    classes: tuple[int, ...]
    gone: bool = False

    @classmethod
    def of_gone(cls, name: str, shape: tuple[int, ...], classes: tuple[int, ...]) -> "Task":
        """Return a task whose data are no longer available: zeros in the shape of its inputs replace its examples.

        Args:
            name: What results call it.
            shape: The shape of one input, without the batch dimension.
            classes: The class indices of the task, ascending.
        """
        none = Examples(torch.zeros(2, *shape), torch.full((2,), classes[0]))
        return cls(name, none, none, classes, gone=True)
