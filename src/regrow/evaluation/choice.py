"""Multiple-choice accuracy: whether a model gives the right ending the highest likelihood."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.core.errors import InputError
from regrow.core.limits import MAX_TEXT_BYTES, expanded, parse_json, read_head
from regrow.core.objectives import IGNORED
from regrow.core.sources import Batch, logits_in
from regrow.data.text import find_bos_tokens
from regrow.evaluation.measure import evaluating
from regrow.evaluation.quality import finite_or_none, share_error, token_losses
from regrow.nets.loaded import longest_input

LONGEST = 2048  # tokens per row, at most
CHOICE_TOKENS = 1024  # per forward pass of choices: the logits of a 262,144-token vocabulary take 1 GB
Row = tuple[list[int], int]  # tokens of context and ending, and the index at which the ending begins
# {"query", "choices", "gold"}, or {"context_options", "continuation", "gold"} if the beginnings differ.
Item = Mapping[str, Any]
Outputs = Callable[[Sequence[Batch]], Iterable[object]]  # batches → the output of a model for each


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
        """The standard error of :attr:`accuracy` over items, √(p(1−p)/n)."""
        return share_error(self.accuracy, len(self.right))

    def record(self) -> dict[str, object]:
        """Return the result as JSON data; margins that are not finite, those of single choices, become ``None``."""
        return {
            "task": self.task,
            "items": len(self.right),
            "accuracy": self.accuracy,
            "error": self.error,
            "accuracy_per_byte": self.accuracy_per_byte,
            "error_per_byte": share_error(self.accuracy_per_byte, len(self.right)),
            "chance": self.chance,
            "right": list(self.right),
            "right_per_byte": list(self.right_per_byte),
            "margins": [finite_or_none(value) for value in self.margins],
            "margins_per_byte": [finite_or_none(value) for value in self.margins_per_byte],
        }


def items_in(path: Path, n: int | None = None) -> list[Item]:
    """Read multiple-choice items (:data:`Item`) from a ``.jsonl`` or ``.jsonl.gz`` file: the first ``n``, or all.

    Raises:
        ValueError: If the file cannot be read or has no item, or a line is not an item; names the line.
    """
    data = read_head(expanded(path), MAX_TEXT_BYTES)
    if len(data) > MAX_TEXT_BYTES:
        raise InputError(f"{path} holds more than {MAX_TEXT_BYTES:,} bytes of items; give a smaller file")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; give a .jsonl or .jsonl.gz file") from None
    items: list[Any] = []
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    for number, line in islice(numbered, n):
        where = f"line {number} of {path}"
        items.append(parse_json(line, where))
        _split_choices(items[-1], where)
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def choices(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], *, task: str = "choice", outputs: Outputs | None = None
) -> Choices:
    """Measure the multiple-choice accuracy of a causal language model, by the likelihood that it gives each choice.

    Args:
        model: A causal model, called with tokens ``[batch, tokens]``, that returns logits. Rows are padded on the
            right, which earlier positions do not see.
        tokenizer: A transformers tokenizer.
        items: Mappings with ``query``, ``choices`` (texts) and ``gold``, the index of the right one; or with
            ``context_options``, ``continuation`` and ``gold`` if the beginnings differ.
        task: The name of the task in the result.
        outputs: Returns the model's output for each batch, in order, if the model is not in memory as a whole;
            ``None``: the model is called.

    Raises:
        ValueError: If there is no item, or one is malformed.
    """
    if not items:
        raise ValueError(f"task {task!r} has no items; give at least one")
    scores: dict[int, float] = {}  # index of a choice among those of all items → Σ log p of its ending
    groups = _batch_choices(model, tokenizer, items)
    batches = [batch for _, batch in groups]
    with evaluating(model) as device:
        answers = (batch.to(device).run(model) for batch in batches) if outputs is None else outputs(batches)
        for (group, batch), answer in zip(groups, answers, strict=False):
            assert batch.labels is not None
            losses = token_losses(logits_in(answer), batch.labels.to(device)).sum(-1).tolist()
            scores.update((i, -loss) for i, loss in zip(group, losses, strict=True))
    judged, judged_per_byte = list[tuple[bool, float]](), list[tuple[bool, float]]()
    first_choice, chance = 0, 0.0
    for item in items:
        pairs, gold = _split_choices(item), item["gold"]
        sums = [scores[first_choice + i] for i in range(len(pairs))]
        judged.append(_judge(sums, gold))
        sizes = [max(len(ending.strip().encode()), 1) for _, ending in pairs]
        judged_per_byte.append(_judge([value / size for value, size in zip(sums, sizes, strict=True)], gold))
        first_choice += len(pairs)
        chance += 1 / len(pairs)
    right, margins = zip(*judged, strict=True)
    right_per_byte, margins_per_byte = zip(*judged_per_byte, strict=True)
    return Choices(task, right, right_per_byte, chance / len(items), margins, margins_per_byte)


def _judge(values: Sequence[float], gold: int) -> tuple[bool, float]:
    """Return whether choice ``gold`` is the first with the greatest value, and its value minus the greatest other."""
    others = (*values[:gold], *values[gold + 1 :])
    return values.index(max(values)) == gold, values[gold] - max(others, default=-math.inf)


def count_choice_tokens(model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> int:
    """Return how many tokens :func:`choices` runs through a model, padding included."""
    return sum(batch.args[0].numel() for _, batch in _batch_choices(model, tokenizer, items))


def encode_choices(tokenizer: Any, items: Sequence[Item], longest: int = LONGEST) -> list[Row]:
    """Return, for every choice in order, its tokens and the index at which its ending begins.

    Of more than ``longest`` tokens the first are cut off.
    """
    bos, rows = find_bos_tokens(tokenizer), list[Row]()
    for number, item in enumerate(items):
        for context, ending in _split_choices(item, f"item {number}"):
            # Tokenised together, as the model would meet them; the ending begins where the context alone ends.
            together = bos + tokenizer(context + ending, add_special_tokens=False)["input_ids"]
            alone = bos + tokenizer(context, add_special_tokens=False)["input_ids"]
            end = getattr(tokenizer, "eos_token_id", None)
            if not alone and end is not None:  # as lm-eval; else its first token is not scored
                alone, together = [end], [end, *together]
            # At least one token before the ending to predict it from, and one in it.
            begin = max(1, min(len(alone), len(together) - 1))
            cut = max(0, min(len(together) - longest, begin - 1))
            rows.append((together[cut:], begin - cut))
    return rows


def _batch_choices(model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> list[tuple[list[int], Batch]]:
    """Return batches of choices with their indices among those of all items; padded right, labels on endings only."""
    # Choices of similar length go together, so that little is computed for padding.
    rows = encode_choices(tokenizer, items, min(LONGEST, longest_input(model)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    result, first = [], 0
    while first < len(order):
        count = 1
        while first + count < len(order) and len(rows[order[first + count]][0]) * (count + 1) <= CHOICE_TOKENS:
            count += 1
        group = order[first : first + count]
        width = max(len(rows[i][0]) for i in group) - 1
        inputs, labels = torch.zeros(count, width, dtype=torch.int64), torch.full((count, width), IGNORED)
        for row, (tokens, begin) in enumerate(rows[i] for i in group):
            inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            labels[row, begin - 1 : len(tokens) - 1] = torch.tensor(tokens[begin:])
        # Only transformers models have a cache to switch off.
        result.append((group, Batch((inputs,), {"use_cache": False} if hasattr(model, "config") else {}, labels)))
        first += count
    return result


def _split_choices(item: Any, where: str = "") -> list[tuple[str, str]]:
    """Return (context, ending) of each choice of an item; raise ValueError, which names ``where``, if malformed."""
    item = item if isinstance(item, Mapping) else {}
    options, shared = item.get("choices"), item.get("query")
    if "continuation" in item:
        options, shared = item.get("context_options"), item["continuation"]
    has_texts = isinstance(shared, str) and isinstance(options, list | tuple)
    has_texts = has_texts and all(isinstance(option, str) and option.strip() for option in options)
    if not has_texts or type(item.get("gold")) is not int or item["gold"] not in range(len(options)):
        needs = '"query", "choices" and "gold", the index of the right one'
        raise ValueError(f"{where} is not a choice: it needs {needs}; mend it")
    if "continuation" in item:
        return [(option.rstrip(), _add_space(option, shared)) for option in options]
    query = shared.rstrip(" ")
    return [(query, _add_space(query, choice)) for choice in options]


def _add_space(context: str, ending: str) -> str:
    """Return the stripped ending with a space in front, unless the context is empty or ends with a line break."""
    ending = ending.strip()
    return ending if not context or context.endswith("\n") else f" {ending}"
