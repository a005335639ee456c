"""The peak memory of a command, measured beside its prediction."""

from dataclasses import dataclass


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
