"""Accuracy of an image classifier on a source."""

from dataclasses import dataclass

from torch import nn

from regrow.core.progress import Progress, silent
from regrow.core.sources import Source
from regrow.evaluation.choice_results import share_error
from regrow.evaluation.forward import evaluating, logits_of


@dataclass(frozen=True)
class Accuracy:
    """The result of an image classifier on a source: whether each image was classified correctly.

    Args:
        source: The name of the source.
        right: Per labelled position, in order, whether the greatest logit is that of the label.
        origin: Where the source comes from.
    """

    source: str
    right: tuple[bool, ...]
    origin: str = ""

    @property
    def accuracy(self) -> float:
        """The fraction of images classified correctly."""
        return sum(self.right) / len(self.right)

    @property
    def error(self) -> float:
        """The standard error of the accuracy, √(p(1−p)/n)."""
        return share_error(self.accuracy, len(self.right))

    def record(self) -> dict[str, object]:
        """Return a summary as JSON-able data."""
        return {
            "source": self.source,
            "origin": self.origin,
            "images": len(self.right),
            "accuracy": self.accuracy,
            "error": self.error,
        }


def accuracy(model: nn.Module, source: Source, *, progress: Progress = silent) -> Accuracy:
    """Measure the accuracy of an image classifier on a source.

    Args:
        model: Called with the inputs of each batch; returns logits ``[batch, classes]``.
        source: Batches with a class per image, ``[batch]``; −100 leaves an image out.
        progress: Called with (batches done, batches in all, description).

    Raises:
        ValueError: If no image has a label, or a label is not one of the model's classes.
    """
    right: list[bool] = []
    with evaluating(model) as device:
        for done, batch in enumerate(source, start=1):
            if batch.labels is None:
                raise ValueError(f"source {source.name!r} has no labels")
            labels = batch.labels.to(device)
            logits = logits_of(model, batch, device)
            if int(labels.max()) >= logits.shape[-1]:
                raise ValueError(
                    f"source {source.name!r} has class {int(labels.max())}, the model knows {logits.shape[-1]} classes"
                )
            asked = labels != -100
            right += (logits.argmax(-1)[asked] == labels[asked]).tolist()
            progress(done, len(source), f"accuracy on {source.name}")
    if not right:
        raise ValueError(f"source {source.name!r} has no labelled image")
    return Accuracy(source.name, tuple(right), source.origin)
