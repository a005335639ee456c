"""Quality of a network on a source, with standard errors: perplexity, accuracy, and loss and score of any objective."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.objectives import IGNORED
from regrow.core.sources import Source, logits_in
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import gather_rows
from regrow.evaluation.measure import evaluating

_ENTRIES = 2**22  # of logits turned into float32 at a time (16 MB): 32 rows of a 131,072-token vocabulary


@dataclass(frozen=True)
class Perplexity:
    """The negative log-likelihood of a language model on each window of a source.

    Args:
        source: The name of the source.
        nll: Per window, −Σ log p(token) over its labelled positions, in nats.
        tokens: Per window, the number of its labelled positions.
        bytes: Per window, the number of UTF-8 bytes of those tokens; empty if unknown.
        origin: Where the source comes from.
    """

    source: str
    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...] = ()
    origin: str = ""

    @property
    def mean(self) -> float:
        """The mean negative log-likelihood in nats per token: Σ nll / Σ tokens."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def error(self) -> float:
        """The standard error of :attr:`mean`, a ratio of sums over windows; NaN for a single window.

        √(n/(n−1) · Σ (nllᵢ − mean · tokensᵢ)²) / Σ tokens
        """
        n, mean = len(self.nll), self.mean
        if n < 2:
            return math.nan
        squares = sum((x - mean * t) ** 2 for x, t in zip(self.nll, self.tokens, strict=True))
        return math.sqrt(n / (n - 1) * squares) / sum(self.tokens)

    @property
    def ppl(self) -> float:
        """The perplexity, e^mean; infinite where it exceeds a float.

        >>> round(Perplexity("a", (10.0, 14.0), (4, 4)).ppl, 3)
        20.086
        """
        return math.exp(self.mean) if not self.mean > 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte, Σ nll / (ln 2 · Σ bytes), comparable between tokenizers; ``None`` if unknown."""
        return sum(self.nll) / math.log(2) / sum(self.bytes) if self.bytes else None

    def record(self) -> dict[str, object]:
        """Return the result as JSON data; numbers that are not finite become ``None``."""
        return {
            "source": self.source,
            "origin": self.origin,
            "windows": len(self.nll),
            "tokens": sum(self.tokens),
            "bytes": sum(self.bytes) or None,
            "mean_nll": finite_or_none(self.mean),
            "error": finite_or_none(self.error),
            "ppl": finite_or_none(self.ppl),
            "ppl_error": finite_or_none(self.ppl * self.error),
            "bits_per_byte": finite_or_none(self.bits_per_byte),
            "nll_per_window": [finite_or_none(value) for value in self.nll],
            "tokens_per_window": list(self.tokens),
        }


def perplexity(
    model: nn.Module,
    source: Source,
    *,
    tokenizer: Any | None = None,
    outputs: Iterable[object] | None = None,
    ranks: ProcessRank = SINGLE,
) -> Perplexity:
    """Measure the perplexity of a language model on a source.

    Args:
        model: Called with the inputs of each batch; returns logits ``[batch, tokens, vocabulary]``.
        source: Windows of text with shifted labels.
        tokenizer: If given, the bytes of the labelled tokens are counted, for bits per byte.
        outputs: The model's output for each batch of this rank, if the model is not in memory as a whole; ``None``:
            the model is called.
        ranks: The processes that share the batches; all of them call this function and get the result.

    Raises:
        ValueError: If a batch has no labels, or the source no labelled position.
    """
    # Per batch, for each of its windows: the negative log-likelihood, the number of labelled positions, and of bytes.
    rows, batches = list[tuple[list[float], list[int], list[int]]](), ranks.share(source.batches)
    with evaluating(model) as device:
        answers = (batch.to(device).run(model) for batch in batches) if outputs is None else outputs
        for batch, answer in zip(batches, answers, strict=False):
            if batch.labels is None:
                raise ValueError(f"source {source.name!r} has no labels; make it with regrow.data.windows")
            losses = token_losses(logits_in(answer), batch.labels.to(device))
            counts = (batch.labels != IGNORED).sum(-1).tolist()
            lengths = [] if tokenizer is None else [_count_bytes(row, tokenizer) for row in batch.labels]
            rows.append((losses.sum(-1).tolist(), counts, lengths))
    rows = gather_rows(ranks, rows)
    nll = tuple(loss for losses, _, _ in rows for loss in losses)
    tokens = tuple(count for _, counts, _ in rows for count in counts)
    sizes = tuple(length for _, _, lengths in rows for length in lengths)
    if not sum(tokens) and ranks.leads:
        raise ValueError(f"source {source.name!r} has no labelled position; give longer windows")
    return Perplexity(source.name, nll, tokens, sizes, source.origin)


def paired_difference(before: Perplexity, after: Perplexity) -> tuple[float, float]:
    """Return the mean over windows of after − before in nats per token, above 0 if ``after`` is worse, and its error.

    A window's difference is divided by its own number of tokens, and every window counts alike; windows without tokens
    are left out. So where windows have different numbers of tokens, this is not ``after.mean − before.mean``, in which
    a window counts by its tokens. The error is the standard error of the mean over windows; since both networks read
    the same windows, it is much smaller than the errors of the two perplexities.

    >>> paired_difference(Perplexity("a", (8.0, 12.0), (4, 4)), Perplexity("a", (9.0, 14.0), (4, 4)))[0]
    0.375

    Raises:
        ValueError: If the two were not measured on the same windows, or on none.
    """
    if not before.tokens:
        raise ValueError(f"{before.source!r} has no windows; evaluate both models on at least one")
    for name in ("source", "origin", "tokens"):
        if getattr(before, name) != getattr(after, name):
            problem = f"{before.source!r} and {after.source!r} are not the same windows: their {name} differ"
            raise ValueError(f"{problem}; evaluate both models with the same sources, windows and tokenizer")
    rows = zip(before.nll, after.nll, before.tokens, strict=True)
    return mean_and_error([(new - old) / tokens for old, new, tokens in rows if tokens])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent values, at least one, and its standard error s / √n, NaN for a single value.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    n = len(values)
    mean = sum(values) / n
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each (already shifted) label: float64, in their shape, 0 where it is −100."""
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    for rows in (targets != IGNORED).nonzero()[:, 0].split(max(1, _ENTRIES // flat.shape[-1])):
        block = flat[rows]
        precise = block if block.dtype == torch.float64 else block.float()
        losses[rows] = nn.functional.cross_entropy(precise, targets[rows], reduction="none").double()
    return losses.reshape(labels.shape)


def _count_bytes(labels: Tensor, tokenizer: Any) -> int:
    """Return the number of UTF-8 bytes of the text that a window's labelled tokens decode to."""
    return len(tokenizer.decode(labels[labels != IGNORED].tolist(), clean_up_tokenization_spaces=False).encode())


def finite_or_none(value: float | None) -> float | None:
    """Return the number if it is finite, else ``None``, since JSON has neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None


def share_error(share: float, n: int) -> float:
    """Return the standard error √(p(1−p)/n) of ``share`` = p, the fraction of ``n`` independent items.

    >>> share_error(0.5, 100)
    0.05
    """
    return math.sqrt(share * (1 - share) / n)


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
        """The standard error of the accuracy over images, √(p(1−p)/n)."""
        return share_error(self.accuracy, len(self.right))

    def record(self) -> dict[str, object]:
        """Return source, number of images, accuracy and its error as JSON data."""
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
        ValueError: If a batch has no labels, no image has one, or a label is not one of the model's classes.
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
            labelled = labels != IGNORED
            right += (logits.argmax(-1)[labelled] == labels[labelled]).tolist()
    if not right:
        raise ValueError(f"source {source.name!r} has no labelled image")
    return Accuracy(source.name, tuple(right), source.origin)
