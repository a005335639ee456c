"""Split sources into a calibration and an evaluation half that have nothing in common; the errors of reading one."""

from collections.abc import Sequence
from enum import StrEnum

from regrow.core.errors import InputError

FEW_DOCUMENTS = 8  # with fewer documents than this, each is cut in two instead of assigning whole documents to halves
PARAGRAPH_CHARACTERS = 80  # paragraphs of at least this many characters may not occur in both halves


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
    def phrase(self) -> str:
        """Its words in the origin of a source: ``its calibration half``, ``its evaluation half`` or ``the whole``."""
        return "the whole" if self is Half.WHOLE else f"its {self} half"


def select_half(documents: Sequence[str], half: Half, name: str = "text") -> tuple[str, ...]:
    """Return one half of some documents, or all of them, without repeated ones; SourceError if empty or a single line.

    The split is always the same. Documents alternate: the first, third, ... are for calibration; the second, fourth,
    ... for evaluation. Where there are fewer than eight, or one half would get less than a quarter of the text, each
    document is cut in its middle instead, at the end of a paragraph, line or word. A paragraph of the calibration half
    that recurs in the evaluation half (a quoted passage, a licence) is removed from the latter.

    >>> select_half(["the first half\\n\\nthe second half"], Half.EVALUATION)
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
    if len(distinct) < FEW_DOCUMENTS or min(sizes) * 4 < sum(sizes):
        cuts = [_cut_in_middle(document) for document in distinct]
        calibration, evaluation = [first for first, _ in cuts], [second for _, second in cuts]
    if half is Half.EVALUATION:
        shared = {p for document in calibration for p in document.split("\n\n") if len(p) >= PARAGRAPH_CHARACTERS}
        evaluation = ["\n\n".join(p for p in document.split("\n\n") if p not in shared) for document in evaluation]
    chosen = calibration if half is Half.CALIBRATION else evaluation
    return tuple(document for document in chosen if document.strip())


def _cut_in_middle(document: str) -> tuple[str, str]:
    """Return both halves of a document, cut at the end of a paragraph, line or word near its middle if there is one."""
    middle = len(document) // 2
    for mark in ("\n\n", "\n", " "):
        positions = [document.rfind(mark, 1, middle), document.find(mark, middle)]
        # The nearest such mark, unless it would leave one side with next to nothing.
        near = [position for position in positions if position > 0 and abs(position - middle) <= middle // 2]
        if near:
            end = min(near, key=lambda position: abs(position - middle))
            return document[:end], document[end + len(mark) :]
    return document[:middle], document[middle:]
