"""What pruning methods need measured (weights, activations or gradients), and the container of these measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from regrow.core.scores import Statistics, merged
from regrow.core.sources import Source


class Need(StrEnum):
    """What a pruning method needs measured: weights only, activations, gradients of weights, or of unit masks."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    FISHER = "fisher"


@dataclass(frozen=True)
class Evidence:
    """Calibration measurements that a pruning method scores units with, per source.

    Args:
        statistics: Source name → the sums of its shards (as many shards as the method asks for).
        data: Source name → the batches themselves, for methods that read them again.
        notes: Remarks for the report on the sources (such as one that had to be split).
    """

    statistics: Mapping[str, Sequence[Statistics]] = field(default_factory=dict)
    data: Mapping[str, Source] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources that were measured."""
        return tuple(self.statistics)

    def pooled(self, *, gradients: bool = True) -> Statistics:
        """Return the sums over all sources and shards.

        Args:
            gradients: Whether those of gradients are added up, too, which takes as much memory as the weights.

        Raises:
            ValueError: If nothing was measured.
        """
        shards = [shard for shards in self.statistics.values() for shard in shards]
        if not shards:
            raise ValueError("this method needs calibration text or images; give it at least one --source")
        return merged(shards if gradients else [replace(one, gradients={}) for one in shards])
