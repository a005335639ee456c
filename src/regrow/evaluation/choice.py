"""Multiple-choice accuracy: whether a model gives the right ending the highest likelihood."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.errors import InputError
from regrow.core.limits import MAX_TEXT_BYTES, expanded, parse_json, read_content
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, logits_in
from regrow.evaluation.choice_results import Choices
from regrow.evaluation.forward import evaluating, logits_of
from regrow.evaluation.language import token_losses
from regrow.evaluation.replies import CacheArguments, empty_cache

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


LONGEST = 2048
"""The most tokens per row."""

Item = Mapping[str, Any]
"""``{"query", "choices", "gold"}``, or ``{"context_options", "continuation", "gold"}`` if the beginnings differ."""

Outputs = Callable[[Sequence[Batch]], Iterable[object]]
"""Function of batches → the output of a model for each."""
CHOICE_TOKENS = 1024
"""Tokens per forward pass of :func:`choices`: the logits of a 262,144-token vocabulary take 1 GB."""


def items_in(path: Path, n: int | None = None) -> list[Item]:
    """Read multiple-choice items from a ``.jsonl`` or ``.jsonl.gz`` file, the first ``n`` of them.

    Args:
        path: The file.
        n: The number of items; all if ``None``.

    Raises:
        ValueError: If the file cannot be read, or a line is not an item; names the line.
    """
    data = read_content(expanded(path), MAX_TEXT_BYTES)
    if len(data) > MAX_TEXT_BYTES:
        raise InputError(f"{path} holds more than {MAX_TEXT_BYTES:,} bytes of items; give a smaller file")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; give a .jsonl or .jsonl.gz file") from None
    items = [
        _checked(parse_json(line, f"line {number} of {path}"), f"line {number} of {path}")
        for number, line in islice(enumerate(lines, start=1), n)
    ]
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def choices(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    task: str = "choice",
    longest: int = LONGEST,
    outputs: Outputs | None = None,
    progress: Progress = silent,
    share: bool = False,
) -> Choices:
    """Measure a causal language model on multiple-choice items.

    Args:
        model: A causal model, called with tokens ``[batch, tokens]``, that returns logits. Rows are padded on the
            right, which earlier positions do not see.
        tokenizer: A transformers tokenizer.
        items: The items.
        task: The name of the task.
        longest: The most tokens per row; longer rows lose their beginning.
        outputs: Returns the model's output for each batch, where it does not run as a whole; ``None``: it is called.
        progress: Called with (rows done, rows in all, description).
        share: Whether the common beginning of an item's choices runs once and its keys and values are reused (a
            transformers model, in memory). Scores differ by rounding.

    Raises:
        ValueError: If there is no item, or one is malformed, or beginnings cannot be shared.
    """
    if not items:
        raise ValueError(f"task {task!r} has no items")
    if share and outputs is not None:
        raise InputError("share=True runs the model itself, and got outputs; leave one of them out")
    checked = [_checked(item, f"item {number}") for number, item in enumerate(items)]
    pairs = [pair for item in checked for pair in _pairs(item)]
    rows, counts = [_encoded(*pair, tokenizer, longest) for pair in pairs], [len(_options(item)) for item in checked]
    if share:
        scores = score_shared(model, rows, counts, CHOICE_TOKENS, progress, task)
    else:
        scores = _log_likelihoods(model, _batches(model, rows), task, outputs, progress)
    lengths = [len(ending.strip().encode()) for _, ending in pairs]
    totals = [scores[i] for i in range(len(pairs))]
    per_byte = [score / max(length, 1) for score, length in zip(totals, lengths, strict=True)]
    gold = [item["gold"] for item in checked]
    chance = sum(1 / count for count in counts) / len(checked)
    right, margins = _compare(totals, counts, gold)
    right_per_byte, margins_per_byte = _compare(per_byte, counts, gold)
    return Choices(task, right, right_per_byte, chance, margins, margins_per_byte)


def count_choice_tokens(model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> int:
    """Return how many tokens :func:`choices` runs through a model, padding included.

    Args:
        model: The model, as for :func:`choices`.
        tokenizer: Its tokenizer.
        items: The items.

    Raises:
        ValueError: If an item is malformed.
    """
    pairs = [pair for number, item in enumerate(items) for pair in _pairs(_checked(item, f"item {number}"))]
    rows = [_encoded(context, ending, tokenizer, LONGEST) for context, ending in pairs]
    return sum(batch.args[0].numel() for _, batch in _batches(model, rows))


def _compare(
    scores: Sequence[float], counts: Sequence[int], gold: Sequence[int]
) -> tuple[tuple[bool, ...], tuple[float, ...]]:
    """Return per item whether the right choice has the greatest score, and its score minus the greatest other one."""
    right, margins, at = [], [], 0
    for count, wanted in zip(counts, gold, strict=True):
        own = scores[at : at + count]
        right.append(own.index(max(own)) == wanted)
        margins.append(own[wanted] - max((*own[:wanted], *own[wanted + 1 :]), default=-math.inf))
        at += count
    return tuple(right), tuple(margins)


def _batches(model: nn.Module, rows: list[tuple[list[int], int]]) -> list[tuple[list[int], Batch]]:
    """Return (numbers of rows, batch of them) for all rows."""
    # Rows of like length go together, so that little is computed for padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    result, first = [], 0
    while first < len(order):
        count = 1
        while first + count < len(order) and len(rows[order[first + count]][0]) * (count + 1) <= CHOICE_TOKENS:
            count += 1
        group = order[first : first + count]
        result.append((group, _padded([rows[i] for i in group], model)))
        first += count
    return result


def _log_likelihoods(
    model: nn.Module, groups: list[tuple[list[int], Batch]], task: str, outputs: Outputs | None, progress: Progress
) -> dict[int, float]:
    scores: dict[int, float] = {}
    many, batches = sum(len(group) for group, _ in groups), [batch for _, batch in groups]
    with evaluating(model) as device:
        if outputs is None:
            answers = (logits_of(model, batch, device) for batch in batches)
        else:
            answers = (logits_in(output) for output in outputs(batches))
        for (group, batch), logits in zip(groups, answers, strict=False):
            assert batch.labels is not None
            losses = token_losses(logits, batch.labels.to(device)).sum(-1).tolist()
            scores.update((i, -loss) for i, loss in zip(group, losses, strict=True))
            progress(len(scores), many, f"choices of {task}")
    return scores


def _padded(rows: list[tuple[list[int], int]], model: nn.Module) -> Batch:
    width = max(len(tokens) for tokens, _ in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), -100)
    for row, (tokens, begin) in enumerate(rows):
        inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[row, begin - 1 : len(tokens) - 1] = torch.tensor(tokens[begin:])
    # Only transformers models have a cache to switch off.
    return Batch((inputs,), {"use_cache": False} if hasattr(model, "config") else {}, labels)


def _encoded(context: str, ending: str, tokenizer: Any, longest: int) -> tuple[list[int], int]:
    # Tokenised together, as the model would meet them; the ending begins where the context alone ends.
    start = tokenizer("a")["input_ids"][:1]
    begin_token = start if start == [tokenizer.bos_token_id] else []
    together = begin_token + tokenizer(context + ending, add_special_tokens=False)["input_ids"]
    alone = begin_token + tokenizer(context, add_special_tokens=False)["input_ids"]
    # At least one token before the ending to predict it from, and one in it.
    begin = max(1, min(len(alone), len(together) - 1))
    cut = max(0, min(len(together) - longest, begin - 1))
    return together[cut:], begin - cut


def _pairs(item: Item) -> list[tuple[str, str]]:
    if "continuation" in item:
        return [(option.rstrip(), _spaced(option, item["continuation"])) for option in item["context_options"]]
    query = item["query"]
    return [(query.rstrip(" "), _spaced(query.rstrip(" "), choice)) for choice in item["choices"]]


def _spaced(before: str, ending: str) -> str:
    ending = ending.strip()
    return ending if not before or before.endswith("\n") else f" {ending}"


def _options(item: Item) -> Sequence[str]:
    return item["context_options"] if "continuation" in item else item["choices"]


def _checked(item: Any, where: str) -> Item:
    fields = (
        ("context_options", "continuation")
        if isinstance(item, Mapping) and "continuation" in item
        else ("choices", "query")
    )
    good = (
        isinstance(item, Mapping)
        and all(field in item for field in (*fields, "gold"))
        and isinstance(item[fields[1]], str)
        and isinstance(item[fields[0]], list | tuple)
        and all(isinstance(option, str) and option.strip() for option in item[fields[0]])
        and type(item["gold"]) is int
        and item["gold"] in range(len(item[fields[0]]))
    )
    if not good:
        raise ValueError(
            f'{where} is not a choice: it needs "query", "choices" and "gold", the index of the right one; mend it'
        )
    return item
