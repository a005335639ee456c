"""Records (JSON) and tensors between ranks, in a fixed order; nothing is pickled."""

import json
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regrow.distributed.ranks import ProcessRank

PENDING = 2**28
"""The most bytes that wait to be sent; a rank that is further ahead waits."""


class Outbox:
    """Sends messages to rank 0 while the next ones are computed; they arrive in order."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Any, Tensor]] = deque()
        self.bytes = 0

    def send(self, record: object, tensors: Sequence[Tensor] = ()) -> None:
        """Send a record and tensors to rank 0."""
        for part in _encode(record, tensors):
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
    tensors = []
    for dtype, shape in message["tensors"]:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensor.numel():
            dist.recv(_as_bytes(tensor), rank)
        tensors.append(tensor)
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
    if not ranks.leads or not ranks.several:
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
                dist.broadcast(_as_bytes(here), 0)
            if not ranks.leads:
                tensor.copy_(here)


def broadcast_file(ranks: ProcessRank, path: Path, place: Path) -> Path:
    """Return a file of rank 0 on every rank: the file itself on rank 0, a copy elsewhere; it need not exist."""
    if not ranks.several:
        return path
    left = broadcast_record(ranks, path.stat().st_size if ranks.leads and path.is_file() else -1)
    target = path if ranks.leads else place / path.name
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
    own = tensor.detach().cpu().contiguous()
    return zlib.crc32(_as_bytes(own).numpy().data) if own.numel() else 0


def _encode(record: object, tensors: Sequence[Tensor]) -> list[Tensor]:
    plain = [one.contiguous() for one in tensors]
    kinds = [[str(one.dtype).removeprefix("torch."), list(one.shape)] for one in plain]
    text = _text({"record": record, "tensors": kinds})
    return [torch.tensor([len(text)]), text, *(_as_bytes(one) for one in plain if one.numel())]


def _text(record: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
