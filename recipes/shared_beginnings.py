"""Score the choices of multiple-choice items so that what the choices of an item begin with runs once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.errors import InputError
from regrow.core.sources import Batch, logits_in
from regrow.evaluation import CHOICE_TOKENS, Choices
from regrow.evaluation.choice import Item, Row, encode_choices, rate_choices
from regrow.evaluation.generation import empty_cache
from regrow.evaluation.language import token_losses
from regrow.evaluation.measure import evaluating

Rows = list[tuple[int, Row]]
"""Rows that begin alike, with their numbers."""


def shared_choices(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], task: str = "choice", most: int = CHOICE_TOKENS
) -> Choices:
    """Measure a model as :func:`regrow.evaluation.choices` does, but for rounding; keys and values are reused.

    Items whose rows have equally many tokens in common run together, so that no beginning is padded.

    Args:
        model: A causal language model of transformers, in memory, that takes a cache of keys and values.
        tokenizer: Its tokenizer.
        items: The items.
        task: The name of the task.
        most: The most tokens per forward pass; a longer row runs alone.

    Raises:
        InputError: If the model takes no cache.
    """
    if not (hasattr(model, "config") and empty_cache(model)):
        raise InputError(f"a {type(model).__name__} takes no cache of keys and values; use regrow.evaluation.choices")
    rows = encode_choices(tokenizer, items)
    numbered, groups = iter(enumerate(rows)), dict[int, list[Rows]]()
    for item in items:
        options = item["context_options"] if "continuation" in item else item["choices"]
        group = [next(numbered) for _ in options]
        columns = list(zip(*(tokens[:begin] for _, (tokens, begin) in group), strict=False))
        common = next((i for i, column in enumerate(columns) if len({*column}) > 1), len(columns))
        common = max(0, common - 1)  # the last token in common runs with each row: it predicts what follows
        groups.setdefault(common, []).extend(_split(group, common, most))
    scores: dict[int, float] = {}
    with evaluating(model) as device:
        for common, several in sorted(groups.items()):
            for part in _parts(several, common, most):
                scores |= _score(model, part, common, device)
    return rate_choices(task, items, [scores[i] for i in range(len(rows))])


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
    arguments = _beginnings(model, items, common, device) if common else {"use_cache": False}
    logits = logits_in(Batch((inputs,), arguments).to(device).run(model))
    losses = token_losses(logits, labels.to(device)).sum(-1).tolist()
    return {number: -loss for (number, _), loss in zip(rows, losses, strict=True)}


def _beginnings(model: nn.Module, items: Sequence[Rows], common: int, device: torch.device) -> dict[str, Any]:
    """Run the beginning of each item; return the keys and values of all, repeated for each of its rows."""
    tokens: Tensor = torch.tensor([item[0][1][0][:common] for item in items], device=device)
    arguments = empty_cache(model)
    model(tokens, **arguments, logits_to_keep=1)
    each = torch.tensor([len(item) for item in items], device=device)
    cache = arguments.get("cache") or arguments["past_key_values"]
    cache.reorder_cache(torch.arange(len(items), device=device).repeat_interleave(each))
    return arguments
