"""Training of one network by several ranks: each takes its share of a step's data, and gradients are summed.

The shares are batches, or the examples of each batch (``by_rows``).
Either every rank holds the whole network (data parallel), or its parameters, gradients and optimizer state are sharded
by block among the ranks (FSDP2, ``torch.distributed.fsdp.fully_shard``).
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from regrow.core.errors import ResourceError
from regrow.distributed.exchange import broadcast_record, checksum, everywhere
from regrow.distributed.ranks import SINGLE, ProcessRank

T = TypeVar("T")
BUCKET = 2**25
"""The bytes of gradients that are summed in one message."""


@dataclass(frozen=True)
class Parallel:
    """How the ranks train a network together.

    Args:
        ranks: The processes.
        fsdp: Whether parameters, gradients and optimizer state are sharded among them.
        by_rows: Whether they share the examples of each batch (:func:`regrow.training.shared_rows.sharing_rows`), so
            that every rank computes the whole loss, instead of the batches of a step.
    """

    ranks: ProcessRank = SINGLE
    fsdp: bool = False
    by_rows: bool = False

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """Return the batches of this rank."""
        if self.by_rows:
            return batches
        if len(batches) % self.ranks.size:
            raise ValueError(
                f"a step takes {len(batches)} batches, which {self.ranks.size} processes cannot share evenly; set "
                f"windows to a multiple of {self.ranks.size}"
            )
        return self.ranks.share(batches)

    def divisor(self, many: int) -> float:
        """Return by what the loss of each batch is divided, so that gradients add up to that of the mean."""
        return many / self.ranks.size if self.fsdp else many  # FSDP takes the mean over ranks

    def reduce(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Sum the gradients of all ranks, in place, and return the mean loss of a step over all batches.

        By rows, gradients are averaged, and the loss is returned as it is, since all ranks have the same.
        """
        if not self.ranks.several:
            return loss
        if not self.fsdp:
            _sum_gradients([one for one in parameters if one.requires_grad], self.ranks.size if self.by_rows else 1)
        if self.by_rows:
            return loss
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / (self.ranks.size if self.fsdp else 1)

    def decide(self, holds: bool) -> bool:
        """Return the decision of rank 0."""
        if self.ranks.several:
            flag = torch.tensor(int(holds))
            dist.broadcast(flag, 0)
            return bool(flag)
        return holds

    def check_same(self, what: str, *data: object) -> None:
        """Raise ResourceError on every rank unless all have the same data."""
        if not self.ranks.several:
            return
        own = zlib.crc32(repr([checksum(one) if isinstance(one, Tensor) else one for one in data]).encode())
        if not everywhere(self.ranks, broadcast_record(self.ranks, own) == own):
            raise ResourceError(
                f"the processes have computed different {what} from the same data, as different kinds of CPU may; "
                "start them on machines of one kind, with the same number of threads and version of torch"
            )

    def values(self, function: Callable[[T], float], items: Sequence[T]) -> list[float]:
        """Return the value of each item, on all ranks; each rank computes its share."""
        size, last = self.ranks.size, len(items) - 1
        # All ranks call the function equally often: a sharded network runs on all of them at once.
        own = [function(items[min(first + self.ranks.rank, last)]) for first in range(0, len(items), size)]
        if size == 1:
            return own
        here = torch.tensor(own, dtype=torch.float64)
        parts = [torch.empty_like(here) for _ in range(size)]
        dist.all_gather(parts, here)
        return [float(parts[i % size][i // size]) for i in range(len(items))]


ALONE = Parallel()
"""Training by a single process."""


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shards of all ranks, which all call this; others are returned unchanged."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _sum_gradients(parameters: Sequence[Tensor], divisor: int) -> None:
    """Sum the gradients of all ranks over ``divisor``, in place; a parameter that no rank has one of stays without."""
    there = torch.tensor([one.grad is not None for one in parameters], dtype=torch.uint8)
    if len(there):
        dist.all_reduce(there, dist.ReduceOp.MAX)
    parameters = [one for one, holds in zip(parameters, there.tolist(), strict=True) if holds]
    for one in parameters:
        if one.grad is None:
            one.grad = torch.zeros_like(one)
    bucket: list[Tensor] = []
    for i, one in enumerate(parameters):
        assert one.grad is not None
        bucket.append(one.grad)
        following = parameters[i + 1] if i + 1 < len(parameters) else None
        if following is None or following.dtype != one.dtype or sum(grad.nbytes for grad in bucket) > BUCKET:
            joined = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(joined)
            if divisor > 1:
                joined /= divisor
            for grad, part in zip(bucket, joined.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))
            bucket = []
