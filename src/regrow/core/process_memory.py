"""The memory of this process as the system counts it, and the freed memory that the C library keeps."""

import ctypes
from contextlib import suppress
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""The numbers of the parameters in ``malloc.h``."""


def read_resident() -> int:
    """Return the bytes of memory that this process has now; 0 if the system does not say."""
    return _read("VmRSS") or 0


def read_peak() -> int | None:
    """Return the most resident memory of this process since :func:`reset_peak`; ``None`` if the system does not say."""
    return _read("VmHWM")


def reset_peak() -> bool:
    """Set the peak of this process's resident memory to what it holds now; returns whether the system can."""
    try:  # Linux: writing 5 resets the high-water mark
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def return_memory() -> bool:
    """Give freed memory that the C library keeps back to the system; returns whether the library can."""
    return _call("malloc_trim", 0)


def set_mmap_threshold(size: int, kept: int = 0) -> None:
    """Let pieces of memory from a size on go back to the system once they are freed, where the C library can.

    Of smaller pieces, freed at the end of its memory, it keeps ``kept`` bytes; 0: as before.
    """
    _call("mallopt", _MMAP_THRESHOLD, size)
    if kept:
        _call("mallopt", _TRIM_THRESHOLD, kept)


def limit_arenas() -> None:
    """Let threads use memory that others have freed, for the rest of the process, where the C library keeps it apart.

    It has an effect before the process has many threads.
    """
    _call("mallopt", _ARENA_MAX, 1)


def _call(function: str, *arguments: int) -> bool:
    """Call a function of the C library; returns False where it is another than that of Linux."""
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError, TypeError):
        return False
    return True


def _read(field: str) -> int | None:
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(dict(line.split(":", 1) for line in lines if ":" in line)[field].split()[0]) * 1024
    return None
