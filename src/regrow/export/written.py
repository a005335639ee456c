"""What an export left behind, and how it was checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from regrow.errors import RefusedError


class ExportError(ValueError):
    """A network that a format cannot hold, or a file that does not say what the network says."""


class CheckError(ExportError, RefusedError):
    """An export that does not say what the network says, found when it was read back; it is not kept."""


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
