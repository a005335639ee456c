"""The peak memory of a command, measured beside its prediction."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PeakMemory:
    """The limit of a command's memory, what it was predicted to need, and what the process took, in bytes.

    Args:
        limit: The limit.
        predicted: The predicted peak.
        peak: The most resident memory of the process; ``None`` if the system does not say.
    """

    limit: int
    predicted: int
    peak: int | None

    def record(self) -> dict[str, int | None]:
        """Return the numbers as JSON-able data."""
        return {"limit": self.limit, "predicted": self.predicted, "peak": self.peak}


def start_peak() -> None:
    """Forget the peak of this process's resident memory so far, where the system can."""
    with suppress(OSError):  # Linux: writing 5 sets the high-water mark to what the process holds now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_peak() -> int | None:
    """Return the most resident memory of this process since :func:`start_peak`; ``None`` if the system does not say."""
    return _read("VmHWM")


def read_resident() -> int:
    """Return the bytes of memory that this process has now; 0 if the system does not say."""
    return _read("VmRSS") or 0


def _read(field: str) -> int | None:
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(dict(line.split(":", 1) for line in lines if ":" in line)[field].split()[0]) * 1024
    return None
