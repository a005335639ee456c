"""Calibration batches over several ranks: each measures its share, rank 0 adds the sums in the order of the batches.

Rank 0 adds what a single process adds, one batch after the other, so the sums are equal bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.core.scores import Moments, Statistics
from regrow.core.sources import Batch, to_host
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import Outbox, receive

SUMS = ("total", "square", "mean_total", "mean_square")


def add_batches(
    step: Callable[[Batch, Statistics], None], batches: Iterable[Batch], sums: Statistics, ranks: ProcessRank
) -> Iterator[None]:
    """Measure batches and add their sums, which end up on rank 0; yields after each batch.

    Args:
        step: Runs a batch and adds its sums.
        batches: The batches, the same on all ranks.
        sums: The sums so far; changed in place.
        ranks: The processes.
    """
    if not ranks.several:
        for batch in batches:
            step(batch, sums)
            yield
        return
    outbox = Outbox()
    for number, batch in enumerate(batches):
        owner = number % ranks.size
        if owner == ranks.rank:
            own = Statistics(sums.source)
            step(batch, own)
            if ranks.leads:
                add(sums, own)
            else:
                outbox.send(*_packed(own))
        elif ranks.leads:
            add(sums, _unpacked(sums.source, *receive(owner)))
        yield
    outbox.flush()


def gather_sums(parts: Sequence[Statistics], many: int, ranks: ProcessRank) -> Iterator[Statistics]:
    """Yield the sums of all batches on rank 0, in the order of the batches; the other ranks send theirs.

    Args:
        parts: The sums of the batches of this rank.
        many: How many batches there are in all.
        ranks: The processes.
    """
    if ranks.leads:
        for number in range(many):
            owner = number % ranks.size
            yield parts[number // ranks.size] if owner == 0 else _unpacked("", *receive(owner))
    else:
        outbox = Outbox()
        for part in parts:
            outbox.send(*_packed(part))
        outbox.flush()


def add(sums: Statistics, more: Statistics) -> None:
    """Add the sums of a batch, in place.

    Args:
        sums: The sums so far.
        more: The sums of the batch.
    """
    sums.tokens += more.tokens
    for name, moments in more.moments.items():
        sums.moments[name] = sums.moments[name] + moments if name in sums.moments else moments
    for name, gradient in more.gradients.items():
        sums.gradients[name] = sums.gradients[name].add_(gradient) if name in sums.gradients else gradient
    for key, squares in more.fisher.items():
        sums.fisher[key] = sums.fisher[key] + squares if key in sums.fisher else squares


def _packed(sums: Statistics) -> tuple[dict[str, Any], list[Tensor]]:
    moments = [torch.stack([getattr(one, name) for name in SUMS]) for one in sums.moments.values()]
    record = {
        "tokens": sums.tokens,
        "moments": [[name, one.count, one.sequences] for name, one in sums.moments.items()],
        "gradients": list(sums.gradients),
        "fisher": list(sums.fisher),
    }
    return record, to_host([*moments, *sums.gradients.values(), *sums.fisher.values()])


def _unpacked(source: str, record: dict[str, Any], tensors: list[Tensor]) -> Statistics:
    values = iter(tensors)
    moments = {}
    for name, count, sequences in record["moments"]:
        total, square, mean_total, mean_square = next(values)
        moments[name] = Moments(count, total, square, sequences, mean_total, mean_square)
    gradients = {name: next(values) for name in record["gradients"]}
    return Statistics(source, record["tokens"], moments, gradients, dict(zip(record["fisher"], values, strict=True)))
