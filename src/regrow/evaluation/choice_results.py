"""Results of multiple-choice tasks, and the differences of two models on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regrow.core.errors import InputError
from regrow.evaluation.language import finite, mean_and_error


@dataclass(frozen=True)
class Choices:
    """The result of a multiple-choice task: whether each item was answered correctly, by two scores.

    Args:
        task: The task's name.
        right: Per item, whether the choice with the greatest Σ log p is the right one.
        right_per_byte: Per item, the same for Σ log p divided by the bytes of the choice.
        chance: The accuracy of guessing, the mean of 1 / choices.
        margins: Per item, Σ log p of the right choice minus the greatest of the others, in nats.
        margins_per_byte: Per item, the same for Σ log p divided by the bytes of the choice, in nats per byte.
    """

    task: str
    right: tuple[bool, ...]
    right_per_byte: tuple[bool, ...]
    chance: float
    margins: tuple[float, ...] = ()
    margins_per_byte: tuple[float, ...] = ()

    @property
    def accuracy(self) -> float:
        """The fraction of items answered correctly by Σ log p."""
        return sum(self.right) / len(self.right)

    @property
    def accuracy_per_byte(self) -> float:
        """The fraction answered correctly by Σ log p per byte, which does not favour short choices."""
        return sum(self.right_per_byte) / len(self.right_per_byte)

    @property
    def error(self) -> float:
        """The standard error of :attr:`accuracy`, √(p(1−p)/n)."""
        return share_error(self.accuracy, len(self.right))

    @property
    def error_per_byte(self) -> float:
        """The standard error of :attr:`accuracy_per_byte`."""
        return share_error(self.accuracy_per_byte, len(self.right))

    def record(self) -> dict[str, object]:
        """Return the result as JSON-able data."""
        return {
            "task": self.task,
            "items": len(self.right),
            "accuracy": self.accuracy,
            "error": self.error,
            "accuracy_per_byte": self.accuracy_per_byte,
            "error_per_byte": self.error_per_byte,
            "chance": self.chance,
            "right": list(self.right),
            "right_per_byte": list(self.right_per_byte),
            "margins": [finite(value) for value in self.margins],
            "margins_per_byte": [finite(value) for value in self.margins_per_byte],
        }


@dataclass(frozen=True)
class PairedChoices:
    """The difference of two models on the same multiple-choice items: the second minus the first.

    Accuracy changes on the few items near a tie alone, margins on every item: their error is the smaller one.

    Args:
        task: The task's name.
        items: The number of items.
        accuracy: Of the accuracy: mean over items and standard error.
        accuracy_per_byte: Of the accuracy per byte.
        margin: Of the margins, in nats.
        margin_per_byte: Of the margins per byte, in nats per byte.
    """

    task: str
    items: int
    accuracy: tuple[float, float]
    accuracy_per_byte: tuple[float, float]
    margin: tuple[float, float]
    margin_per_byte: tuple[float, float]


def paired_choices(before: Choices, after: Choices) -> PairedChoices:
    """Return the differences after − before per item, with their standard errors over items.

    >>> first = Choices("a", (True, False), (True, False), 0.5, (1.0, -2.0), (0.5, -1.0))
    >>> second = Choices("a", (True, True), (True, False), 0.5, (2.0, 1.0), (0.5, -0.5))
    >>> paired_choices(first, second).accuracy, paired_choices(first, second).margin
    ((0.5, 0.5), (2.0, 1.0))

    Args:
        before: The first model's result.
        after: The second model's result, on the same items.

    Raises:
        ValueError: If the two were not measured on the same items, or one lacks margins.
    """
    if (before.task, len(before.right)) != (after.task, len(after.right)):
        raise InputError(
            f"{before.task!r} ({len(before.right)} items) and {after.task!r} ({len(after.right)} items) are not the "
            "same items; evaluate both models on the same file, with the same --items"
        )
    n, each = len(before.right), (before, after)
    lengths = {len(a) for one in each for a in (one.right_per_byte, one.margins, one.margins_per_byte)}
    if odd := sorted(lengths - {n}):
        raise InputError(f"{before.task!r} has {n} items, and scores or margins of {odd[0]}; run choices on both again")

    def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
        return mean_and_error([b - a for a, b in zip(first, second, strict=True)])

    return PairedChoices(
        before.task,
        len(before.right),
        difference(before.right, after.right),
        difference(before.right_per_byte, after.right_per_byte),
        difference(before.margins, after.margins),
        difference(before.margins_per_byte, after.margins_per_byte),
    )


def share_error(share: float, n: int) -> float:
    """Return the standard error of a proportion, √(p(1−p)/n).

    Args:
        share: The proportion p, 0 to 1.
        n: The number of items.

    >>> share_error(0.5, 100)
    0.05
    """
    return math.sqrt(share * (1 - share) / n)
