"""The connection of the processes that share a run, and training of one network by all of them.

Each takes its share of a step's data, and gradients are summed.
The shares are batches, or the examples of each batch (``by_rows``).
Every rank holds the whole network.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from regrow.core.errors import ResourceError
from regrow.distributed import SINGLE, ProcessRank

MEETING = timedelta(minutes=5)
"""How long the processes wait for one another at the start."""
WORK = timedelta(days=7)
"""How long a rank waits for another one."""
_BROKEN = re.compile(r"\[[^\]]*\bgloo/[^\]]*\]|Connection (closed|reset) by peer|Broken pipe")
"""What gloo says, which raises RuntimeError, of a broken connection: its source file, or the system's words."""


@contextmanager
def connected(ranks: ProcessRank) -> Iterator[None]:
    """Connect the processes that torchrun has started, inside the ``with`` block; they leave it together."""
    try:
        store = next(rendezvous("env://", ranks.rank, ranks.size, timeout=MEETING))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(
            f"{ranks} cannot reach the others ({' '.join(str(error).split())[:120]}); start {ranks.size} processes "
            "with torchrun, or with the same MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=WORK)
        yield
        dist.barrier()
    except RuntimeError as error:
        if not is_broken(error):
            raise
        raise ResourceError(
            f"{ranks} lost the connection to another rank, which has ended; the same command resumes the run"
        ) from error
    dist.destroy_process_group()


def is_broken(error: RuntimeError) -> bool:
    """Whether an error says that the connection to another rank broke."""
    return isinstance(error, dist.DistError) or bool(_BROKEN.search(str(error)))


PART = 2**28
"""The most bytes of a file that are sent in one message."""


def send(record: object, tensors: Sequence[Tensor] = ()) -> None:
    """Send a record and tensors to rank 0, and wait until it receives them."""
    plain = [tensor.contiguous() for tensor in tensors]
    forms = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in plain]
    text = _text({"record": record, "tensors": forms})
    for part in (torch.tensor([len(text)]), text, *(as_bytes(tensor) for tensor in plain if tensor.numel())):
        dist.send(part, 0)


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


def broadcast_record(ranks: ProcessRank, record: object = None, source: int = 0) -> Any:
    """Return the record of one rank on every rank."""
    if not ranks.several:
        return record
    text = _text(record) if ranks.rank == source else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(text)])
    dist.broadcast(length, source)
    if ranks.rank != source:
        text = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, source)
    return json.loads(text.numpy().tobytes())


def gather_rows(ranks: ProcessRank, rows: Sequence[Any]) -> list[Any]:
    """Return the rows of all ranks, in the order of the items that :meth:`ProcessRank.share` dealt out."""
    parts = [broadcast_record(ranks, list(rows), rank) for rank in range(ranks.size)]
    return [parts[i % ranks.size][i // ranks.size] for i in range(sum(map(len, parts)))]


def everywhere(ranks: ProcessRank, holds: bool) -> bool:
    """Whether a condition holds on every rank."""
    if not ranks.several:
        return holds
    least = torch.tensor([int(holds)])
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool(least)


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
            size = min(left, PART)
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
        by_rows: Whether they share the examples of each batch (:func:`regrow.training.shared_rows.share_rows`), so
            that every rank computes the whole loss, instead of the batches of a step.
    """

    ranks: ProcessRank = SINGLE
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

    def reduce(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Sum the gradients of all ranks, in place, and return the mean loss of a step over all batches.

        By rows, gradients are averaged, and the loss is returned as it is, since all ranks have the same.
        """
        if not self.ranks.several:
            return loss
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        _sum_gradients(trained, self.ranks.size if self.by_rows else 1)
        if self.by_rows:
            return loss
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

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
        # Rows of equal length are gathered.
        computed = [function(items[min(first + self.ranks.rank, last)]) for first in range(0, len(items), size)]
        if size == 1:
            return computed
        here = torch.tensor(computed, dtype=torch.float64)
        parts = [torch.empty_like(here) for _ in range(size)]
        dist.all_gather(parts, here)
        return [float(parts[i % size][i // size]) for i in range(len(items))]


ALONE = Parallel()
"""Training by a single process."""


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
