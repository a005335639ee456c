"""Split sources into a calibration and an evaluation half that have nothing in common."""

from collections.abc import Sequence
from enum import StrEnum

from regrow.data.errors import SourceError

FEW = 8
"""With fewer documents than this, each document is cut in two instead of assigning whole documents to halves."""

PARAGRAPH = 80
"""Paragraphs of at least this many characters may not occur in both halves."""


class Half(StrEnum):
    """Which part of a source is read: the calibration half, the evaluation half, or all of it."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"
    WHOLE = "whole"


def half_of(documents: Sequence[str], half: Half, name: str = "text") -> tuple[str, ...]:
    """Return the calibration or the evaluation half of some documents; always the same split.

    Documents alternate: the first, third, ... are for calibration; the second, fourth, ... for evaluation. Where there
    are fewer than eight, or one half would get less than a quarter of the text, each document is cut in its middle
    instead, at the end of a paragraph, line or word. Repeated documents count once, and a paragraph of the calibration
    half that recurs in the evaluation half (a quoted passage, a licence) is removed from the latter.

    >>> half_of(["the first half\\n\\nthe second half"], Half.EVALUATION)
    ('the second half',)

    Args:
        documents: The documents, in a fixed order.
        half: Which half.
        name: The name of the source, for error messages.

    Raises:
        SourceError: If there is no text, or only one line of it.
    """
    distinct = [document for document in dict.fromkeys(documents) if document.strip()]
    if not distinct:
        raise SourceError(f"source {name!r} is empty; give a file or folder with text in it")
    if half is Half.WHOLE:
        return tuple(distinct)
    if sum(len([line for line in document.splitlines() if line.strip()]) for document in distinct) < 2:
        raise SourceError(f"source {name!r} holds a single line, which has no two halves; give more text")
    calibration, evaluation = distinct[0::2], distinct[1::2]
    sizes = [sum(map(len, part)) for part in (calibration, evaluation)]
    if len(distinct) < FEW or min(sizes) * 4 < sum(sizes):
        cuts = [_cut(document) for document in distinct]
        calibration, evaluation = [first for first, _ in cuts], [second for _, second in cuts]
    if half is Half.CALIBRATION:
        return tuple(document for document in calibration if document.strip())
    return _without(evaluation, calibration)


def _cut(document: str) -> tuple[str, str]:
    middle = len(document) // 2
    for mark in ("\n\n", "\n", " "):
        places = [document.rfind(mark, 1, middle), document.find(mark, middle)]
        # The nearest such mark, unless it would leave one side with next to nothing.
        near = [place for place in places if place > 0 and abs(place - middle) <= middle // 2]
        if near:
            at = min(near, key=lambda place: abs(place - middle))
            return document[:at], document[at + len(mark) :]
    return document[:middle], document[middle:]


def _without(documents: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    seen = {p for document in others for p in document.split("\n\n") if len(p) >= PARAGRAPH}
    kept = ("\n\n".join(p for p in document.split("\n\n") if p not in seen) for document in documents)
    return tuple(document for document in kept if document.strip())
