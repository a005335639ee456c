"""Loss and score of a network on a source, for any objective, and the accuracy of an image classifier."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from regrow.core.objectives import NEXT_TOKEN, OWN, Objective, Score
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source, logits_in
from regrow.core.tables import Table, format_html
from regrow.evaluation.language import Perplexity, share_error, token_losses
from regrow.evaluation.measure import evaluating


@dataclass(frozen=True)
class Evaluation:
    """Loss and score of a network on a source."""

    source: str  # the name of the source
    objective: str  # the name of the objective
    loss: float  # the mean loss per labelled position (of text: nats per token)
    loss_error: float  # the standard error of the loss over batches, or windows of text; NaN for a single one
    metric: str  # the name of the score
    score: float  # the mean score per labelled position; higher is better
    score_error: float  # the standard error of the score
    count: int  # the number of labelled positions

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
    """Measure the loss and the score of a network on a source, one batch at a time."""
    total, rows, windows = Score(), list[tuple[float, int]](), list[tuple[float, int]]()
    measured = replace(objective, loss=partial(_window_loss, windows)) if objective is NEXT_TOKEN else objective
    with evaluating(model) as device:
        if objective is OWN:  # such a network returns its losses in training mode
            for module in model.modules():
                module.training = not isinstance(module, _BatchNorm | _DropoutNd)
        for done, batch in enumerate(source, start=1):
            batch = batch.to(device)
            output = batch.run(model) if outputs is None else next(outputs)
            if n := batch.size:  # of a batch without a label there is no mean
                rows.append((float(measured.compute_loss(output, batch)), n))
                total += objective.compute_score(output, batch)
            progress(done, len(source), f"evaluating on {source.name}")
    count = sum(n for _, n in rows)
    if not count:
        raise ValueError(f"source {source.name!r} has no labelled example; give one with labels")
    mean = sum(loss * n for loss, n in rows) / count
    k = len(rows)
    squares = sum(((loss - mean) * n) ** 2 for loss, n in rows)
    error = math.sqrt(k / (k - 1) * squares) / count if k > 1 else math.nan
    if windows:
        text = Perplexity(source.name, tuple(loss for loss, _ in windows), tuple(n for _, n in windows))
        mean, error = text.mean, text.error
    return Evaluation(source.name, objective.name, mean, error, objective.metric, total.mean, total.error, count)


def _window_loss(windows: list[tuple[float, int]], output: object, labels: object) -> Tensor:
    """Return the mean loss of text; ``windows`` gets the sum of each window, and its number of labelled positions."""
    logits = logits_in(output)
    assert isinstance(labels, Tensor)
    if logits.shape[:-1] != labels.shape:
        logits = logits.movedim(1, -1)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}")
    sums = torch.atleast_2d(token_losses(logits, labels)).flatten(1).sum(-1)
    counts = torch.atleast_2d(labels != -100).flatten(1).sum(-1)
    windows += zip(sums.tolist(), counts.tolist(), strict=True)
    return sums.sum() / counts.sum()


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
                classes = f"class {int(labels.max())}, the model knows {logits.shape[-1]} classes"
                raise ValueError(f"source {source.name!r} has {classes}")
            labelled = labels != -100
            right += (logits.argmax(-1)[labelled] == labels[labelled]).tolist()
    if not right:
        raise ValueError(f"source {source.name!r} has no labelled image")
    return Accuracy(source.name, tuple(right), source.origin)
