"""Perplexity of a language model on a source, and paired differences of two models, with standard errors."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        """The standard error of :attr:`mean` over windows (of a ratio; NaN for a single window).

        √(n/(n−1) · Σ (nllᵢ − mean · tokensᵢ)²) / Σ tokens
        """
        n = len(self.nll)
        if n < 2:
            return math.nan
        squares = sum((x - self.mean * t) ** 2 for x, t in zip(self.nll, self.tokens, strict=True))
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
        """Return the result as JSON-able data; numbers that are not finite become ``None``."""
        summary = {
            "mean_nll": self.mean,
            "error": self.error,
            "ppl": self.ppl,
            "ppl_error": self.ppl * self.error,
            "bits_per_byte": self.bits_per_byte,
        }
        return {
            "source": self.source,
            "origin": self.origin,
            "windows": len(self.nll),
            "tokens": sum(self.tokens),
            "bytes": sum(self.bytes) or None,
            **{key: finite(value) for key, value in summary.items()},
            "nll_per_window": [finite(value) for value in self.nll],
            "tokens_per_window": list(self.tokens),
        }


@dataclass(frozen=True)
class Paired:
    """The difference of two models on the same windows, in nats per token (positive: the second is worse).

    Args:
        source: The source's name.
        mean: Mean over windows of the difference.
        error: Its standard error over windows; NaN for a single window.
        t: The t statistic, mean / error.
        windows: The number of windows.
    """

    source: str
    mean: float
    error: float
    t: float
    windows: int

    @property
    def ratio(self) -> float:
        """The factor by which the perplexity changed, e^mean (geometric mean over windows)."""
        return math.exp(self.mean) if not self.mean > 700 else math.inf


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
        outputs: The model's output for each batch of this rank, where it does not run as a whole; ``None``: it is
            called.
        ranks: The processes that share the batches; all of them call this function, and rank 0 gets the result.

    Raises:
        ValueError: If the source has no labelled position.
    """
    # Of each window in a batch: the negative log-likelihood, the number of labelled positions, and of bytes.
    rows, batches = list[tuple[list[float], list[int], list[int]]](), ranks.share(source.batches)
    with evaluating(model) as device:
        answers = (batch.to(device).run(model) for batch in batches) if outputs is None else outputs
        for batch, answer in zip(batches, answers, strict=False):
            if batch.labels is None:
                raise ValueError(f"source {source.name!r} has no labels; make it with regrow.data.windows")
            losses = token_losses(logits_in(answer), batch.labels.to(device))
            counts = (batch.labels != -100).sum(-1).tolist()
            lengths = [] if tokenizer is None else [_count_bytes(row, tokenizer) for row in batch.labels]
            rows.append((losses.sum(-1).tolist(), counts, lengths))
    rows = gather_rows(ranks, rows)
    nll = tuple(loss for losses, _, _ in rows for loss in losses)
    tokens = tuple(count for _, counts, _ in rows for count in counts)
    sizes = tuple(length for _, _, lengths in rows for length in lengths)
    if not sum(tokens) and ranks.leads:
        raise ValueError(f"source {source.name!r} has no labelled position; give longer windows")
    return Perplexity(source.name, nll, tokens, sizes, source.origin)


def paired_difference(before: Perplexity, after: Perplexity) -> Paired:
    """Return the difference after − before per window, with its standard error.

    The paired error is much smaller than the errors of the two perplexities.

    >>> paired_difference(Perplexity("a", (8.0, 12.0), (4, 4)), Perplexity("a", (9.0, 14.0), (4, 4))).mean
    0.375

    Raises:
        ValueError: If the two were not measured on the same windows.
    """
    same = (before.source, before.origin, before.tokens) == (after.source, after.origin, after.tokens)
    if not same or not before.tokens:
        sizes = f"{before.source!r} ({sum(before.tokens)} tokens) and {after.source!r} ({sum(after.tokens)} tokens)"
        remedy = "evaluate both models with the same sources, windows and tokenizer"
        raise ValueError(f"{sizes} are not the same windows; {remedy}")
    rows = zip(before.nll, after.nll, before.tokens, strict=True)
    differences = [(b - a) / t for a, b, t in rows if t]
    n = len(differences)
    mean, error = mean_and_error(differences)
    t = (0.0 if mean == 0 else math.copysign(math.inf, mean)) if error == 0 else mean / error
    return Paired(before.source, mean, error, t, n)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of one or more independent values and its standard error, s / √n; NaN for a single value.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else math.nan


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy −log p of each labelled token, and 0 where there is no label."""
    flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses = torch.zeros(wanted.shape, dtype=torch.float64, device=logits.device)
    for rows in (wanted != -100).nonzero()[:, 0].split(max(1, _ENTRIES // flat.shape[-1])):
        block = flat[rows]
        precise = block if block.dtype == torch.float64 else block.float()
        losses[rows] = nn.functional.cross_entropy(precise, wanted[rows], reduction="none").double()
    return losses.reshape(labels.shape)


def _count_bytes(labels: Tensor, tokenizer: Any) -> int:
    return len(tokenizer.decode(labels[labels != -100].tolist(), clean_up_tokenization_spaces=False).encode())


def finite(value: float | None) -> float | None:
    """Return the number if it is finite, else ``None``, as JSON has it."""
    return value if value is not None and math.isfinite(value) else None


def share_error(share: float, n: int) -> float:
    """Return the standard error of a proportion, √(p(1−p)/n).

    >>> share_error(0.5, 100)
    0.05
    """
    return math.sqrt(share * (1 - share) / n)
