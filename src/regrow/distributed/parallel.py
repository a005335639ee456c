"""Training of one network by several ranks: each takes its share of a step's data, and gradients are summed.

The shares are batches, or the examples of each batch (``by_rows``).
Either every rank holds the whole network (data parallel), or its parameters, gradients and optimizer state are sharded
by block among the ranks (FSDP2, ``torch.distributed.fsdp.fully_shard``).
"""

import json
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regrow.core.errors import ResourceError
from regrow.distributed import SINGLE, ProcessRank

PENDING = 2**28
"""The most bytes that wait to be sent; a rank that is further ahead waits."""


class Outbox:
    """Sends messages to rank 0 while the next ones are computed; they arrive in order."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Any, Tensor]] = deque()
        self.bytes = 0

    def send(self, record: object, tensors: Sequence[Tensor] = ()) -> None:
        """Send a record and tensors to rank 0."""
        plain = [tensor.contiguous() for tensor in tensors]
        forms = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in plain]
        text = _text({"record": record, "tensors": forms})
        for part in (torch.tensor([len(text)]), text, *(as_bytes(tensor) for tensor in plain if tensor.numel())):
            self.waiting.append((dist.isend(part, 0), part))
            self.bytes += part.nbytes
        while self.bytes > PENDING:
            self._wait()

    def flush(self) -> None:
        """Wait until everything is sent."""
        while self.waiting:
            self._wait()

    def _wait(self) -> None:
        work, part = self.waiting.popleft()
        work.wait()
        self.bytes -= part.nbytes


def receive(rank: int) -> tuple[Any, list[Tensor]]:
    """Return the next record and tensors that a rank sent to this one."""
    length = torch.empty(1, dtype=torch.int64)
    dist.recv(length, rank)
    text = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(text, rank)
    message = json.loads(text.numpy().tobytes())
    tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in message["tensors"]]
    for tensor in tensors:
        if tensor.numel():
            dist.recv(as_bytes(tensor), rank)
    return message["record"], tensors


def broadcast_record(ranks: ProcessRank, record: object = None) -> Any:
    """Return the record of rank 0 on every rank."""
    if not ranks.several:
        return record
    text = _text(record) if ranks.leads else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(text)])
    dist.broadcast(length, 0)
    if not ranks.leads:
        text = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return json.loads(text.numpy().tobytes())


def gather_rows(ranks: ProcessRank, rows: Sequence[Any]) -> list[Any]:
    """Return the rows of all ranks on rank 0, in the order of the items that :meth:`ProcessRank.share` dealt out."""
    if not ranks.leads:
        outbox = Outbox()
        outbox.send(list(rows))
        outbox.flush()
        return list(rows)
    parts = [list(rows), *(receive(rank)[0] for rank in range(1, ranks.size))]
    return [parts[i % ranks.size][i // ranks.size] for i in range(sum(map(len, parts)))]


def everywhere(ranks: ProcessRank, holds: bool) -> bool:
    """Whether a condition holds on every rank."""
    if not ranks.several:
        return holds
    least = torch.tensor([int(holds)])
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool(least)


def broadcast_model(ranks: ProcessRank, model: nn.Module) -> None:
    """Set the parameters and buffers of a network to those of rank 0, in place."""
    broadcast_tensors(ranks, [*model.parameters(), *model.buffers()])


def broadcast_tensors(ranks: ProcessRank, tensors: Sequence[Tensor]) -> None:
    """Set tensors to those of rank 0, in place."""
    if not ranks.several:
        return
    with torch.no_grad():
        for tensor in tensors:
            here = tensor.detach().cpu().contiguous()
            if here.numel():
                dist.broadcast(as_bytes(here), 0)
            if not ranks.leads:
                tensor.copy_(here)


def broadcast_file(ranks: ProcessRank, path: Path, folder: Path) -> Path:
    """Return a file of rank 0 on every rank: the file itself on rank 0, a copy elsewhere; it need not exist."""
    if not ranks.several:
        return path
    left = broadcast_record(ranks, path.stat().st_size if ranks.leads and path.is_file() else -1)
    target = path if ranks.leads else folder / path.name
    if left < 0:
        return target
    with target.open("rb" if ranks.leads else "wb") as file:
        while left:
            size = min(left, PENDING)
            part = torch.frombuffer(bytearray(file.read(size) if ranks.leads else size), dtype=torch.uint8)
            dist.broadcast(part, 0)
            if not ranks.leads:
                file.write(part.numpy().data)
            left -= size
    return target


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of the bytes of a tensor.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    plain = tensor.detach().cpu().contiguous()
    return zlib.crc32(as_bytes(plain).numpy().data) if plain.numel() else 0


def _text(record: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as bytes."""
    return tensor.reshape(-1).view(torch.uint8)


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
            _sum_gradients(
                [parameter for parameter in parameters if parameter.requires_grad],
                self.ranks.size if self.by_rows else 1,
            )
        if self.by_rows:
            return loss
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / (self.ranks.size if self.fsdp else 1)

    def decide(self, holds: bool) -> bool:
        """Return the decision of rank 0."""
        return bool(broadcast_record(self.ranks, holds))

    def check_same(self, what: str, data: object) -> None:
        """Raise ResourceError on every rank unless all have the same data, such as a list of tensors."""
        if not self.ranks.several:
            return
        parts = data if isinstance(data, list) else [data]
        digest = zlib.crc32(repr([checksum(part) if isinstance(part, Tensor) else part for part in parts]).encode())
        if not everywhere(self.ranks, broadcast_record(self.ranks, digest) == digest):
            raise ResourceError(
                f"the processes have computed different {what} from the same data, as different kinds of CPU may; "
                "start them on machines of one kind, with the same number of threads and version of torch"
            )

    def values(self, function: Callable[[T], float], items: Sequence[T]) -> list[float]:
        """Return the value of each item, on all ranks; each rank computes its share."""
        size, last = self.ranks.size, len(items) - 1
        # All ranks call the function equally often: a sharded network runs on all of them at once.
        computed = [function(items[min(first + self.ranks.rank, last)]) for first in range(0, len(items), size)]
        if size == 1:
            return computed
        here = torch.tensor(computed, dtype=torch.float64)
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
    there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    if len(there):
        dist.all_reduce(there, dist.ReduceOp.MAX)
    parameters = [parameter for parameter, holds in zip(parameters, there.tolist(), strict=True) if holds]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bucket: list[Tensor] = []
    for i, parameter in enumerate(parameters):
        assert parameter.grad is not None
        bucket.append(parameter.grad)
        following = parameters[i + 1] if i + 1 < len(parameters) else None
        if following is None or following.dtype != parameter.dtype or sum(grad.nbytes for grad in bucket) > BUCKET:
            joined = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(joined)
            if divisor > 1:
                joined /= divisor
            for grad, part in zip(bucket, joined.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))
            bucket = []
