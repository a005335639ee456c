"""What an export left behind, and how it was checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class ExportError(ValueError):
    """A network that a format cannot hold, or a file that does not say what the network says."""


@dataclass(frozen=True)
class Written:
    """An export.

    Args:
        path: The file or folder.
        bytes: Its size on disk.
        checked: What was compared after it was read back → what came out (``max_abs_diff``, ``next_tokens_differ``).
        notes: What its user must know.
    """

    path: Path
    bytes: int
    checked: Mapping[str, float | int | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
