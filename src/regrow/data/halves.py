"""Split sources into a calibration and an evaluation half that have nothing in common; the errors of reading one."""

from collections.abc import Sequence
from enum import StrEnum

from regrow.core.errors import InputError

FEW = 8  # with fewer documents than this, each is cut in two instead of assigning whole documents to halves
PARAGRAPH = 80  # paragraphs of at least this many characters may not occur in both halves


class SourceError(InputError):
    """Raised if a source cannot be read or is too small; one line with the value and the remedy."""


class MissingError(SourceError):
    """Raised if a source does not exist."""


class Half(StrEnum):
    """Which part of a source is read: the calibration half, the evaluation half, or all of it."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"
    WHOLE = "whole"

    @property
    def words(self) -> str:
        """What the origin of a source calls it."""
        return "the whole" if self is Half.WHOLE else f"its {self} half"


def half_of(documents: Sequence[str], half: Half, name: str = "text") -> tuple[str, ...]:
    """Return the calibration or the evaluation half of some documents; always the same split.

    Documents alternate: the first, third, ... are for calibration; the second, fourth, ... for evaluation. Where there
    are fewer than eight, or one half would get less than a quarter of the text, each document is cut in its middle
    instead, at the end of a paragraph, line or word. Repeated documents count once, and a paragraph of the calibration
    half that recurs in the evaluation half (a quoted passage, a licence) is removed from the latter.

    >>> half_of(["the first half\\n\\nthe second half"], Half.EVALUATION)
    ('the second half',)
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
    if half is Half.EVALUATION:
        seen = {p for document in calibration for p in document.split("\n\n") if len(p) >= PARAGRAPH}
        evaluation = ["\n\n".join(p for p in document.split("\n\n") if p not in seen) for document in evaluation]
    chosen = calibration if half is Half.CALIBRATION else evaluation
    return tuple(document for document in chosen if document.strip())


def _cut(document: str) -> tuple[str, str]:
    middle = len(document) // 2
    for mark in ("\n\n", "\n", " "):
        positions = [document.rfind(mark, 1, middle), document.find(mark, middle)]
        # The nearest such mark, unless it would leave one side with next to nothing.
        near = [position for position in positions if position > 0 and abs(position - middle) <= middle // 2]
        if near:
            at = min(near, key=lambda position: abs(position - middle))
            return document[:at], document[at + len(mark) :]
    return document[:middle], document[middle:]
