"""What is measured for methods that prune."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from regrow.amounts import Measure
from regrow.budget import Budget
from regrow.scores import Statistics, merged
from regrow.sources import Source

__all__ = ["Budget", "Evidence", "Measure", "Need"]


class Need(StrEnum):
    """Which evidence a method asks for."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"


@dataclass(frozen=True)
class Evidence:
    """What was measured for a method.

    Args:
        statistics: Source name → the sums of its shards (as many as the method asks for).
        data: Source name → the batches themselves, for methods that learn.
        notes: What a reader should know about the sources (one had to be split).
    """

    statistics: Mapping[str, Sequence[Statistics]] = field(default_factory=dict)
    data: Mapping[str, Source] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self.statistics)

    def pooled(self) -> Statistics:
        """All sources and shards together.

        Raises:
            ValueError: If nothing was measured.
        """
        shards = [shard for shards in self.statistics.values() for shard in shards]
        if not shards:
            raise ValueError("this method needs calibration text or images; give it at least one --source")
        return merged(shards)
