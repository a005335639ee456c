"""Windows: fixed-length stretches of tokenised text."""

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from regrow.core.sources import Batch, Source
from regrow.data.errors import SourceError
from regrow.data.halves import Half, half_of
from regrow.data.text import Text

_NO_CACHE: Mapping[str, Any] = MappingProxyType({"use_cache": False})

# Characters reserved per token of a window. Common text has 3 to 5 per token, so nearly every stretch suffices.
_ROOM = 8


def windows(
    text: Text,
    tokenizer: Any,
    *,
    n: int | None,
    seq_len: int,
    seed: int = 0,
    half: Half = Half.CALIBRATION,
    batch_size: int = 1,
    kwargs: Mapping[str, Any] = _NO_CACHE,
) -> Source:
    """Return a source of token windows that do not overlap, chosen at random from one half of a text.

    Each window is ``seq_len`` input tokens (the first is the tokenizer's beginning-of-text token, where it adds one)
    and as many labels: ``labels[:, t]`` is the token after ``input[:, t]``, and the last one is −100.

    Args:
        text: The documents of a text domain.
        tokenizer: A transformers tokenizer.
        n: The number of windows; if the half holds fewer, all of them, and ``origin`` says so. ``None``: all.
        seq_len: Tokens per window.
        seed: The random seed of the choice of windows.
        half: The calibration half, the evaluation half, or both; the halves share no document and no long paragraph.
        batch_size: Windows per batch.
        kwargs: Further keyword arguments for the model.

    Raises:
        SourceError: If the half is shorter than one window, or a number is not at least 1 (``seq_len``: 2).
    """
    if (n is not None and n < 1) or batch_size < 1 or seq_len < 2:
        raise SourceError(
            f"source {text.name!r}: at least 1 window, of 2 tokens or more, and 1 per batch; "
            f"got {n} windows of {seq_len}, {batch_size} per batch"
        )
    start = find_start(tokenizer)
    joined = "\n\n".join(half_of(text.documents, half, text.name))
    body = seq_len - len(start)
    rows = _drawn(joined, tokenizer, n, body, seed) if n is not None else []
    if n is None or len(rows) < n:
        rows = _all(joined, tokenizer, body, text, half)
        if n is not None:
            rows = random.Random(seed).sample(rows, min(n, len(rows)))
    short = f" (the half holds no more; {n} were asked for)" if n is not None and len(rows) < n else ""
    which = "the whole" if half is Half.WHOLE else f"its {half} half"
    origin = f"{text.origin}; {which}; {len(rows)} windows of {seq_len} tokens{short}, seed {seed}"
    batches = [_batch(start, rows[i : i + batch_size], kwargs) for i in range(0, len(rows), batch_size)]
    return Source(text.name, batches, origin)


def _drawn(joined: str, tokenizer: Any, n: int, body: int, seed: int) -> list[list[int]]:
    # Cut the text into stretches and tokenise only as many as are needed: a corpus of megabytes would take seconds.
    span = body * _ROOM
    places = range(0, len(joined) - span + 1, span)
    if len(places) < 2 * n:
        return []
    rows: list[list[int]] = []
    for place in random.Random(seed).sample(places, len(places)):
        stretch = joined[place : place + span]
        if place:
            # Begin with a whole line, or at least a whole word.
            line, word = stretch.find("\n", 0, span // 4), stretch.find(" ", 0, span // 4)
            stretch = stretch[max(line if line >= 0 else word, 0) :].lstrip(" \n")
        # The last token may be a word that the stretch cuts.
        tokens = _tokens(stretch, tokenizer)[:-1]
        if len(tokens) >= body:
            rows.append(tokens[:body])
        if len(rows) == n:
            break
    return rows


def _all(joined: str, tokenizer: Any, body: int, text: Text, half: Half) -> list[list[int]]:
    tokens = _tokens(joined, tokenizer)
    if len(tokens) < body:
        raise SourceError(
            f"source {text.name!r}: its {half} half has {len(tokens)} tokens, shorter than one window of {body}; "
            "give more text or a smaller --seq-len"
        )
    return [tokens[i : i + body] for i in range(0, len(tokens) - body + 1, body)]


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def find_start(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token with which every window begins; empty if the tokenizer adds none.

    Args:
        tokenizer: A transformers tokenizer.
    """
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def find_separator(tokenizer: Any) -> int:
    """Return the token after which a document starts: that of every window, or else the separator of documents.

    Args:
        tokenizer: A transformers tokenizer.

    Raises:
        SourceError: If it has no such token.
    """
    named = tokenizer.get_vocab().get("<|endoftext|>")  # chat models may call others their first and last token
    known = (*find_start(tokenizer), named, tokenizer.eos_token_id, tokenizer.bos_token_id)
    separator = next((one for one in known if one is not None), None)
    if separator is None:
        raise SourceError(
            "source 'generated': the tokenizer has no token with which a document starts; set tokenizer.eos_token, or "
            "name another source"
        )
    return int(separator)


def token_windows(name: str, tokens: Tensor, start: Sequence[int], origin: str) -> Source:
    """Return a source of windows of given tokens, in the form of :func:`windows`.

    Args:
        name: The name of the source.
        tokens: ``[windows, length]``, without the tokens of ``start``.
        start: What precedes each window, from :func:`find_start`.
        origin: Where the tokens come from.
    """
    return Source(name, [_batch([*start], [row], _NO_CACHE) for row in tokens.tolist()], origin)


def _batch(start: list[int], rows: Sequence[list[int]], kwargs: Mapping[str, Any]) -> Batch:
    inputs = torch.tensor([start + row for row in rows])
    labels = torch.full_like(inputs, -100)
    labels[:, :-1] = inputs[:, 1:]
    return Batch((inputs,), dict(kwargs), labels)
