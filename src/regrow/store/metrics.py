"""``metrics.jsonl``: the measurements of a run; each has a key, so that a resumed run adds none a second time."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from regrow.store.journal import append, mend, read
from regrow.store.measurements import KINDS

KEYS: Mapping[str, tuple[str, ...]] = {
    "budget": (),
    "choice": ("model", "task", "round"),
    "epoch": ("epoch",),
    "found": (),
    "front": ("epoch",),
    "gone": ("tasks",),
    "latency": (),
    "levels": (),
    "matrix": ("tasks",),
    "paired": ("source", "of", "round"),
    "perplexity": ("model", "source", "round"),
    "reconstruction": (),
    "recovery": ("round",),
    "result": (),
    "size": ("model", "round"),
    "stages": (),
    "training": (),
    "task": ("task",),
    "test": (),
    "verify": (),
}
"""Kind of measurement → the fields that, with the kind, identify a row of a run."""
NUMBERED = frozenset({"commit", "growth", "memory"})
"""Kinds whose rows are identified by their number: the first, the second."""


class Metrics:
    """The rows of a ``metrics.jsonl`` file, read and appended.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Return every row, in order; a last line that a crash truncated is left out.

        Raises:
            StoreError: If another line is damaged, or lacks what a row of its kind holds; names the line and the field.
        """
        return read(self.path, KINDS)

    def add(self, row: Mapping[str, object], number: int | None = None) -> bool:
        """Append a row, unless one with its key is there, and say whether; it is on the disk when this returns.

        Args:
            row: The measurement; ``what`` is its kind. Numbers that are not finite become null.
            number: The number of the row among its kind, from 0, for the kinds in ``NUMBERED``.

        Raises:
            StoreError: If the disk is full; the file then holds what it held.
        """
        plain = replace_nonfinite(row)
        key = _key(plain, number)
        if new := key is None or key not in self._keys:
            append(self.path, plain)
            if key is not None:
                self._keys.add(key)
        return new

    @cached_property
    def _keys(self) -> set[str]:
        mend(self.path)
        counts: Counter[Any] = Counter()
        keys = set()
        for row in read(self.path):
            keys.add(_key(row, counts[str(row.get("what"))]))
            counts[str(row.get("what"))] += 1
        return {key for key in keys if key is not None}


def replace_nonfinite(value: Any) -> Any:
    """Return JSON data in which NaN and infinity, which JSON does not have, are replaced by null.

    Args:
        value: The data.

    >>> replace_nonfinite({"loss": float("nan"), "steps": (1, 2)})
    {'loss': None, 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): replace_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(row: Mapping[str, object], number: int | None) -> str | None:
    """Return the key that identifies a row; ``None`` for kinds that may repeat."""
    what = str(row.get("what"))
    if what in NUMBERED and number is not None:
        return json.dumps([what, number])
    if what not in KEYS:
        return None
    return json.dumps([what, *(row.get(name) for name in KEYS[what])])
