"""The result of an export, and the errors of exporting."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from regrow.core.errors import RefusedError


class ExportError(ValueError):
    """Raised if a format cannot represent the network, or the file cannot be written or read back."""


class CheckError(ExportError, RefusedError):
    """Raised if an export, read back, differs from the network; the export is not kept."""


@dataclass(frozen=True)
class Written:
    """The result of an export: where it is, its size, and how it compared with the network.

    Args:
        path: The file or folder.
        bytes: Its size on disk in bytes.
        checked: Results of the comparison after reading it back: name (``max_abs_diff``, ``next_tokens_differ``) →
            value.
        notes: What a user of the file must know.
        memory: The limit, the prediction and the peak in bytes, if memory was limited.
    """

    path: Path
    bytes: int
    checked: Mapping[str, float | int | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: Mapping[str, int | None] = field(default_factory=dict)
