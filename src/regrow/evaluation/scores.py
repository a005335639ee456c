"""Loss and score of a network by its objective, whatever it predicts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from regrow.core.errors import InputError
from regrow.core.objectives import IGNORED, NEXT_TOKEN, OWN, Objective, Score, returned_loss
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source, logits_in
from regrow.core.tables import Table, format_html, format_text
from regrow.evaluation.measure import evaluating
from regrow.evaluation.quality import Perplexity, token_losses


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
        """The perplexity of a language model, e^loss, at most e^700; ``None`` for other objectives."""
        return math.exp(min(self.loss, 700.0)) if self.objective == NEXT_TOKEN.name else None

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4g}" + ("" if math.isnan(self.loss_error) else f" ± {self.loss_error:.2g}")
        perplexity = "" if self.perplexity is None else f", perplexity {self.perplexity:.4g}"
        score = f", {self.metric} {self.score:.4g} ± {self.score_error:.2g}" if self.objective != "own" else ""
        return f"{self.source}: {loss}{perplexity}{score} ({self.count:,} examples)"

    def _repr_html_(self) -> str:
        """Return the measurements as an HTML table, for notebooks."""
        return Evaluations({self.source: self})._repr_html_()


class Evaluations(dict[str, Evaluation]):
    """Name of a source → its evaluation; printed as a table."""

    def _tables(self) -> list[Table]:
        """Return the table of the evaluations; what an objective does not have is left blank."""
        rows = []
        for result in self.values():
            perplexity = "" if result.perplexity is None else f"{result.perplexity:.4g}"
            score = result.metric, f"{result.score:.4g}", f"{result.score_error:.2g}"
            loss = result.source, f"{result.count:,}", f"{result.loss:.4g}", f"{result.loss_error:.2g}", perplexity
            rows.append((*loss, *(("", "", "") if result.objective == OWN.name else score)))
        columns = ("source", "examples", "loss", "± se", "perplexity", "score", "mean", "± se")
        return [Table("", columns, rows, (1, 2, 3, 4, 6, 7))]

    def __str__(self) -> str:
        return format_text(self._tables(), f"{sum(result.count for result in self.values()):,} examples")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        return format_html(self._tables())


def evaluate_objective(
    model: nn.Module,
    source: Source,
    objective: Objective,
    *,
    outputs: Iterator[Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Return mean loss and score of a network on a source, in eval mode; ValueError if no example has a label.

    ``outputs`` yields the network's output for each batch, if it is not in memory as a whole; ``None``: it is called. A
    network that returns its own loss in training mode alone runs in that, but for norms and dropout.
    """
    total = Score()
    batch_losses = list[tuple[float, int]]()  # of each batch: the mean loss, and the number of labelled positions
    windows = list[tuple[float, int]]()  # of each window of text: the summed loss, and the labelled positions
    measured = replace(objective, loss=partial(_window_loss, windows)) if objective is NEXT_TOKEN else objective
    with evaluating(model) as device:
        for done, batch in enumerate(source, start=1):
            batch = batch.to(device)
            output = batch.run(model) if outputs is None else next(outputs)
            if objective is OWN and done == 1 and not _has_loss(output):  # detectors have one in training mode
                for module in model.modules():
                    module.training = not isinstance(module, _BatchNorm | _DropoutNd)
                output = batch.run(model)
            if n := batch.size:  # of a batch without a label there is no mean
                batch_losses.append((float(measured.compute_loss(output, batch)), n))
                total += objective.compute_score(output, batch)
            progress(done, len(source), f"evaluating on {source.name}")
    count = sum(n for _, n in batch_losses)
    if not count:
        raise ValueError(f"source {source.name!r} has no labelled example; give one with labels")
    mean = sum(loss * n for loss, n in batch_losses) / count
    k = len(batch_losses)
    squares = sum(((loss - mean) * n) ** 2 for loss, n in batch_losses)
    error = math.sqrt(k / (k - 1) * squares) / count if k > 1 else math.nan
    if windows:
        text = Perplexity(source.name, tuple(loss for loss, _ in windows), tuple(n for _, n in windows))
        mean, error = text.mean, text.error
    return Evaluation(source.name, objective.name, mean, error, objective.metric, total.mean, total.error, count)


def _has_loss(output: object) -> bool:
    """Whether a network has returned its own loss."""
    try:
        returned_loss(output, None)
    except InputError:
        return False
    return True


def _window_loss(windows: list[tuple[float, int]], output: object, labels: object) -> Tensor:
    """Return the mean loss of a batch of text; append (Σ loss, labelled positions) of each window to ``windows``."""
    logits = logits_in(output)
    assert isinstance(labels, Tensor)
    if logits.shape[:-1] != labels.shape:
        logits = logits.movedim(1, -1)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}")
    sums = torch.atleast_2d(token_losses(logits, labels)).flatten(1).sum(-1)
    counts = torch.atleast_2d(labels != IGNORED).flatten(1).sum(-1)
    windows += zip(sums.tolist(), counts.tolist(), strict=True)
    return sums.sum() / counts.sum()
