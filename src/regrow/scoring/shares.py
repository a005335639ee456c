"""Calibration batches over several ranks: each measures its share, rank 0 adds the sums in the order of the batches.

Rank 0 adds what a single process adds, one batch after the other, so the sums are equal bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from regrow.core.scores import Statistics
from regrow.core.sources import Batch, to_host
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import Outbox, receive


def add_batches(
    step: Callable[[Batch, Statistics], None], batches: Iterable[Batch], sums: Statistics, ranks: ProcessRank
) -> Iterator[None]:
    """Measure batches, the same on all ranks, and add their sums, which end up on rank 0; yields after each batch."""
    outbox = Outbox()
    for number, batch in enumerate(batches):
        owner = number % ranks.size
        if owner == ranks.rank and ranks.leads:
            step(batch, sums)
        elif owner == ranks.rank:
            part = Statistics(sums.source)
            step(batch, part)
            _send(outbox, part)
        elif ranks.leads:
            sums.accumulate(Statistics.assemble("", *receive(owner)))
        yield
    outbox.flush()


def gather_sums(parts: Sequence[Statistics], many: int, ranks: ProcessRank) -> Iterator[Statistics]:
    """Yield the sums of all ``many`` batches on rank 0, in their order; the other ranks send theirs."""
    if ranks.leads:
        for number in range(many):
            owner = number % ranks.size
            yield parts[number // ranks.size] if not owner else Statistics.assemble("", *receive(owner))
        return
    outbox = Outbox()
    for part in parts:
        _send(outbox, part)
    outbox.flush()


def _send(outbox: Outbox, sums: Statistics) -> None:
    outbox.send(sums.header(), to_host(sums.tensors()))
