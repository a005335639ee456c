"""The connection of the processes that share a run, and training of one network by all of them.

Each takes its share of a step's data, and gradients are summed.
The shares are batches, or the examples of each batch (``by_rows``).
Every rank holds the whole network.
"""

import importlib
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

MEETING_TIMEOUT = timedelta(minutes=5)  # how long the processes wait for one another at the start
# How long a rank waits for another one later, such as for one that measures or writes alone.
WORK_TIMEOUT = timedelta(days=7)
# In the RuntimeError that gloo raises for a broken connection: its source file, or the system's words.
_BROKEN = re.compile(r"\[[^\]]*\bgloo/[^\]]*\]|Connection (closed|reset) by peer|Broken pipe")


@contextmanager
def connected(ranks: ProcessRank) -> Iterator[None]:
    """Context manager: connect the processes that torchrun has started; at the end of the block all wait for all.

    ``ranks``: of several processes. Their address is read from MASTER_ADDR and MASTER_PORT. Raises ResourceError if
    they do not meet within ``MEETING_TIMEOUT``, or if one ends early.
    """
    try:
        store, *_ = next(rendezvous("env://", ranks.rank, ranks.size, timeout=MEETING_TIMEOUT))
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(
            f"{ranks} cannot reach the others ({' '.join(str(error).split())[:120]}); start {ranks.size} processes "
            "with torchrun, or with the same MASTER_ADDR and MASTER_PORT"
        ) from error
    # Loaded while a group exists, as torch.export does, it keeps the group, whose threads then run on at exit.
    importlib.import_module("torch.distributed.nn")
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=WORK_TIMEOUT)
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


MESSAGE_BYTES = 2**28  # the most bytes of a file in one message


def send(record: object, tensors: Sequence[Tensor] = ()) -> None:
    """Send a record (JSON data) and CPU tensors from another rank to rank 0; waits until it calls :func:`receive`."""
    tensors = [tensor.contiguous() for tensor in tensors]
    forms = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    text = _encode_json({"record": record, "tensors": forms})
    for part in (torch.tensor([len(text)]), text, *(view_bytes(tensor) for tensor in tensors if tensor.numel())):
        dist.send(part, 0)


def receive(rank: int) -> tuple[Any, list[Tensor]]:
    """Return, on rank 0, the next record and CPU tensors that ``rank`` gives to :func:`send`; waits for them."""
    length = torch.empty(1, dtype=torch.int64)
    dist.recv(length, rank)
    text = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(text, rank)
    message = json.loads(text.numpy().tobytes())
    tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in message["tensors"]]
    for tensor in tensors:
        if tensor.numel():
            dist.recv(view_bytes(tensor), rank)
    return message["record"], tensors


def broadcast_record(ranks: ProcessRank, record: object = None, source: int = 0) -> Any:
    """Return the record (JSON data) of rank ``source`` on every rank, whatever others give; all must call this."""
    if not ranks.several:
        return record
    text = _encode_json(record) if ranks.rank == source else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(text)])
    dist.broadcast(length, source)
    if ranks.rank != source:
        text = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, source)
    return json.loads(text.numpy().tobytes())


def gather_rows(ranks: ProcessRank, rows: Sequence[Any]) -> list[Any]:
    """Return on every rank the rows (JSON data) of all; all must call this.

    ``rows``: one per item that :meth:`ProcessRank.share` gave this rank; the result has the order of all items.
    """
    parts = [broadcast_record(ranks, list(rows), rank) for rank in range(ranks.size)]
    return [parts[i % ranks.size][i // ranks.size] for i in range(sum(map(len, parts)))]


def everywhere(ranks: ProcessRank, holds: bool) -> bool:
    """Return on every rank whether a condition holds on all of them; all must call this."""
    if not ranks.several:
        return holds
    least = torch.tensor([int(holds)])
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool(least)


def broadcast_tensors(ranks: ProcessRank, tensors: Sequence[Tensor]) -> None:
    """Set tensors, on any device, to those of rank 0 (equal in shapes and dtypes), in place; all must call this."""
    if not ranks.several:
        return
    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.detach().cpu().contiguous()
            if sent.numel():
                dist.broadcast(view_bytes(sent), 0)
            if not ranks.leads:
                tensor.copy_(sent)


def broadcast_file(ranks: ProcessRank, path: Path, folder: Path) -> Path:
    """Copy a file of rank 0 to every other rank, and return its path on this one; all must call this.

    Rank 0 gets ``path`` back; others get the path of a copy of the same name in ``folder``. If rank 0 has no such file,
    they get that path all the same, and nothing is written.
    """
    if not ranks.several:
        return path
    remaining = broadcast_record(ranks, path.stat().st_size if ranks.leads and path.is_file() else -1)
    target = path if ranks.leads else folder / path.name
    if remaining < 0:
        return target
    with target.open("rb" if ranks.leads else "wb") as file:
        while remaining:
            size = min(remaining, MESSAGE_BYTES)
            part = torch.frombuffer(bytearray(file.read(size) if ranks.leads else size), dtype=torch.uint8)
            dist.broadcast(part, 0)
            if not ranks.leads:
                file.write(part.numpy().data)
            remaining -= size
    return target


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, in row-major order; dtype and shape do not count; 0 for an empty one.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    plain = tensor.detach().cpu().contiguous()
    return zlib.crc32(view_bytes(plain).numpy().data) if plain.numel() else 0


def _encode_json(record: object) -> Tensor:
    """Return a record as JSON text in UTF-8, ``[bytes]`` uint8."""
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def view_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor on any device, not a copy, as ``[bytes]`` uint8."""
    return tensor.reshape(-1).view(torch.uint8)


T = TypeVar("T")
BUCKET = 2**25  # the least bytes of gradients that are summed in one message, unless fewer are left


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
        """Return this rank's share of the batches of a step; ``by_rows``: all. ValueError if they cannot be even."""
        if self.by_rows:
            return batches
        if len(batches) % self.ranks.size:
            raise ValueError(
                f"a step takes {len(batches)} batches, which {self.ranks.size} processes cannot share evenly; set "
                f"windows to a multiple of {self.ranks.size}"
            )
        return self.ranks.share(batches)

    def reduce(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Sum the gradients of all ranks, in place, and return the sum of their losses; all must call this.

        ``parameters``: those without ``requires_grad`` are left out; ``loss``: this rank's. With ``by_rows``, gradients
        are averaged, and the loss is returned as it is, since all ranks have the same.
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
        """Raise ResourceError on every rank unless all have the same ``data``; all must call this.

        ``what``: words for the data in the message; ``data``: a list of tensors and other values, or one; tensors are
        compared by checksum, others by ``repr``.
        """
        if not self.ranks.several:
            return
        parts = data if isinstance(data, list) else [data]
        digest = zlib.crc32(repr([checksum(part) if isinstance(part, Tensor) else part for part in parts]).encode())
        same = broadcast_record(self.ranks, digest) == digest
        if not everywhere(self.ranks, same):
            raise ResourceError(
                f"the processes have computed different {what} from the same data, as different kinds of CPU may; "
                "start them on machines of one kind, with the same number of threads and version of torch"
            )

    def values(self, function: Callable[[T], float], items: Sequence[T]) -> list[float]:
        """Return ``function(item)`` of each item, in order, on all ranks; each computes a share, all must call this."""
        size, last = self.ranks.size, len(items) - 1
        # all_gather takes rows of one length: a rank without an item in the last round computes the last one again.
        computed = [function(items[min(first + self.ranks.rank, last)]) for first in range(0, len(items), size)]
        if size == 1:
            return computed
        share = torch.tensor(computed, dtype=torch.float64)
        parts = [torch.empty_like(share) for _ in range(size)]
        dist.all_gather(parts, share)
        return [float(parts[i % size][i // size]) for i in range(len(items))]


ALONE = Parallel()  # training by a single process


def _sum_gradients(parameters: Sequence[Tensor], divisor: int) -> None:
    """Set ``.grad`` of parameters to the sum over ranks, divided by ``divisor``; ``None`` where no rank has one."""
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    if len(present):
        dist.all_reduce(present, dist.ReduceOp.MAX)
    parameters = [parameter for parameter, holds in zip(parameters, present.tolist(), strict=True) if holds]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bucket: list[Tensor] = []
    for i, parameter in enumerate(parameters):
        assert parameter.grad is not None
        bucket.append(parameter.grad)
        following = parameters[i + 1] if i + 1 < len(parameters) else None
        # A message has gradients of one dtype.
        if following is None or following.dtype != parameter.dtype or sum(grad.nbytes for grad in bucket) > BUCKET:
            joined = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(joined)
            if divisor > 1:
                joined /= divisor
            for grad, part in zip(bucket, joined.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))
            bucket = []
