"""Log-likelihoods of rows of tokens of which several begin alike, such as the choices of a question."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from regrow.errors import InputError
from regrow.evaluation.forward import evaluating, logits_of
from regrow.evaluation.language import token_losses
from regrow.evaluation.replies import CacheArguments, empty_cache
from regrow.progress import Progress
from regrow.sources import Batch

Row = tuple[list[int], int]
"""Tokens, and where the part begins whose likelihood is wanted."""
Rows = list[tuple[int, Row]]
"""Rows that begin alike, with their numbers."""


def score_shared(
    model: nn.Module, rows: Sequence[Row], counts: Sequence[int], most: int, progress: Progress, task: str
) -> dict[int, float]:
    """Return number of a row → Σ log p of its part that is wanted; what rows begin with runs once.

    Items whose rows have equally many tokens in common run together, so that no beginning is padded.

    Args:
        model: A causal language model of transformers, in memory, that takes a cache of keys and values.
        rows: The rows of all items, one item after the other.
        counts: How many rows each item has.
        most: The most tokens per forward pass; a longer row runs alone.
        progress: Called with (rows done, rows in all, description).
        task: The name of the task.

    Raises:
        InputError: If the model takes no cache.
    """
    if not (hasattr(model, "config") and empty_cache(model)):
        raise InputError(f"a {type(model).__name__} takes no cache of keys and values; leave out share")
    numbered, items = iter(enumerate(rows)), dict[int, list[Rows]]()
    for count in counts:
        item = [next(numbered) for _ in range(count)]
        columns = list(zip(*(tokens[:begin] for _, (tokens, begin) in item), strict=False))
        common = next((i for i, column in enumerate(columns) if len({*column}) > 1), len(columns))
        common = max(0, common - 1)  # the last token in common runs with each row: it predicts what follows
        items.setdefault(common, []).extend(_split(item, common, most))
    scores: dict[int, float] = {}
    with evaluating(model) as device:
        for common, several in sorted(items.items()):
            for part in _parts(several, common, most):
                scores |= _score(model, part, common, device)
                progress(len(scores), len(rows), f"choices of {task}")
    return scores


def _split(item: Rows, common: int, most: int) -> Iterator[Rows]:
    """Yield the rows of an item in parts of at most so many tokens behind what they have in common."""
    size = max(1, most // max(1, _longest(item) - common)) if common else 1
    yield from (item[first : first + size] for first in range(0, len(item), size))


def _parts(items: list[Rows], common: int, most: int) -> Iterator[list[Rows]]:
    """Yield items in groups of at most so many tokens, those with rows of like length together."""
    part: list[Rows] = []
    for item in sorted(items, key=_longest):
        rows = sum(map(len, part)) + len(item)
        if part and max(rows * (_longest(item) - common), (len(part) + 1) * common) > most:
            yield part
            part = []
        part.append(item)
    yield part


def _longest(item: Rows) -> int:
    return max(len(tokens) for _, (tokens, _) in item)


def _score(model: nn.Module, items: Sequence[Rows], common: int, device: torch.device) -> dict[int, float]:
    """Return number → Σ log p of the rows of items that have their first ``common`` tokens in common."""
    rows = [row for item in items for row in item]
    width = max(len(tokens) for _, (tokens, _) in rows) - 1 - common
    inputs, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
    for i, (_, (tokens, begin)) in enumerate(rows):
        inputs[i, : len(tokens) - 1 - common] = torch.tensor(tokens[common:-1])
        labels[i, begin - 1 - common : len(tokens) - 1 - common] = torch.tensor(tokens[begin:])
    more: CacheArguments = _beginnings(model, items, common, device) if common else {"use_cache": False}
    losses = token_losses(logits_of(model, Batch((inputs,), more), device), labels.to(device)).sum(-1).tolist()
    return {number: -loss for (number, _), loss in zip(rows, losses, strict=True)}


def _beginnings(model: nn.Module, items: Sequence[Rows], common: int, device: torch.device) -> CacheArguments:
    """Run the beginning of each item; return the keys and values of all, repeated for each of its rows."""
    tokens: Tensor = torch.tensor([item[0][1][0][:common] for item in items], device=device)
    arguments = empty_cache(model)
    model(tokens, **arguments, logits_to_keep=1)
    each = torch.tensor([len(item) for item in items], device=device)
    cache = arguments.get("cache") or arguments["past_key_values"]
    cache.reorder_cache(torch.arange(len(items), device=device).repeat_interleave(each))
    return arguments
