"""Loss and score of a network on a source, for any objective, and the accuracy of an image classifier."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from regrow.core.objectives import NEXT_TOKEN, OWN, Objective, Score
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source, logits_in
from regrow.core.tables import Table, format_html
from regrow.evaluation.forward import evaluating
from regrow.evaluation.language import share_error


@dataclass(frozen=True)
class Evaluation:
    """Loss and score of a network on a source.

    Args:
        source: The name of the source.
        objective: The name of the objective.
        loss: The mean loss per labelled position (of text: nats per token).
        loss_error: The standard error of the loss over batches; NaN for a single batch.
        metric: The name of the score.
        score: The mean score per labelled position; higher is better.
        score_error: The standard error of the score.
        count: The number of labelled positions.
    """

    source: str
    objective: str
    loss: float
    loss_error: float
    metric: str
    score: float
    score_error: float
    count: int

    @property
    def perplexity(self) -> float | None:
        """The perplexity of a language model, e^loss; ``None`` for other objectives."""
        return math.exp(min(self.loss, 700.0)) if self.objective == NEXT_TOKEN.name else None

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4g}" + ("" if math.isnan(self.loss_error) else f" ± {self.loss_error:.2g}")
        perplexity = "" if self.perplexity is None else f", perplexity {self.perplexity:.4g}"
        score = f", {self.metric} {self.score:.4g} ± {self.score_error:.2g}" if self.objective != "own" else ""
        return f"{self.source}: {loss}{perplexity}{score} ({self.count:,} examples)"

    def _repr_html_(self) -> str:
        """Return the measurements as an HTML table, for notebooks."""
        rows = [("loss", f"{self.loss:.4g}", f"{self.loss_error:.2g}")]
        rows += [] if self.perplexity is None else [("perplexity", f"{self.perplexity:.4g}", "")]
        rows += [] if self.objective == OWN.name else [(self.metric, f"{self.score:.4g}", f"{self.score_error:.2g}")]
        return format_html([Table(self.source, ("", "mean", "± se"), rows, (1, 2))], f"{self.count:,} examples")


def evaluate_objective(
    model: nn.Module,
    source: Source,
    objective: Objective,
    *,
    outputs: Iterator[Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure the loss and the score of a network on a source, one batch at a time.

    Args:
        model: The network; evaluated in eval mode, and in training mode if it returns its loss only there.
        source: The data.
        objective: What is measured.
        outputs: What the network returns for each batch; ``None``: it is run.
        progress: Called with (batches done, batches in all, description).

    Raises:
        ValueError: If the source is empty, or the loss cannot be computed.
    """
    total, rows = Score(), list[tuple[float, int]]()
    with evaluating(model) as device:
        if objective is OWN:  # such a network returns its losses in training mode
            for module in model.modules():
                module.training = not isinstance(module, _BatchNorm | _DropoutNd)
        for done, batch in enumerate(source, start=1):
            batch = batch.to(device)
            output = batch.run(model) if outputs is None else next(outputs)
            if n := batch.size:  # of a batch without a label there is no mean
                rows.append((float(objective.compute_loss(output, batch)), n))
                total += objective.compute_score(output, batch)
            progress(done, len(source), f"evaluating on {source.name}")
    count = sum(n for _, n in rows)
    if not count:
        raise ValueError(f"source {source.name!r} has no labelled example; give one with labels")
    mean = sum(loss * n for loss, n in rows) / count
    k = len(rows)
    squares = sum(((loss - mean) * n) ** 2 for loss, n in rows)
    error = math.sqrt(k / (k - 1) * squares) / count if k > 1 else math.nan
    return Evaluation(source.name, objective.name, mean, error, objective.metric, total.mean, total.error, count)


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


def accuracy(model: nn.Module, source: Source) -> Accuracy:
    """Measure the accuracy of an image classifier on a source.

    Args:
        model: Called with the inputs of each batch; returns logits ``[batch, classes]``.
        source: Batches with a class per image, ``[batch]``; −100 leaves an image out.

    Raises:
        ValueError: If no image has a label, or a label is not one of the model's classes.
    """
    right: list[bool] = []
    with evaluating(model) as device:
        for batch in source:
            if batch.labels is None:
                raise ValueError(f"source {source.name!r} has no labels")
            labels = batch.labels.to(device)
            logits = logits_in(batch.to(device).run(model))
            if int(labels.max()) >= logits.shape[-1]:
                raise ValueError(
                    f"source {source.name!r} has class {int(labels.max())}, the model knows {logits.shape[-1]} classes"
                )
            labelled = labels != -100
            right += (logits.argmax(-1)[labelled] == labels[labelled]).tolist()
    if not right:
        raise ValueError(f"source {source.name!r} has no labelled image")
    return Accuracy(source.name, tuple(right), source.origin)
