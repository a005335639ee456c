"""What a streamed network needs from files: its stored weights, read one after another, and results of its blocks."""

import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.core.errors import InputError
from regrow.nets.load import count_nonfinite
from regrow.store.errors import StoreError
from regrow.store.state import named_tensors
from regrow.store.tensors import as_bytes
from regrow.store.weights import digest_tensor
from regrow.streaming.checkpoint import BufferPool, Checkpoint, TensorPlace, read_tensor


class StoredWeights:
    """The parameters and saved buffers of a network, read from a checkpoint in the network's dtype.

    A tied tensor has several names; it is stored under one of them. ``name`` is the network's in messages; ``digests``:
    name → SHA-256, compared when a tensor is first read. Raises InputError unless the checkpoint has the names and
    shapes of the model.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: nn.Module, name: str, digests: Mapping[str, str] | None = None
    ) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.unchecked, self.finite = dict(digests or {}), set[str]()  # digests to compare; names of finite tensors
        # Name → tensor of the model, which may have no numbers; name → first name; first name → stored name.
        self.like = {key: held.tensor for key, held in named_tensors(model).items() if held.kind.carried}
        groups: dict[int, list[str]] = {}
        for key, tensor in self.like.items():
            groups.setdefault(id(tensor), []).append(key)
        self.first = {key: names[0] for names in groups.values() for key in names}
        self.stored: dict[str, str] = {}
        places = checkpoint.places
        for names in groups.values():
            stored = next((key for key in names if key in places), None)
            if stored is None:
                raise self._mismatch(f"lacks {names[0]!r}")
            self.stored[names[0]] = stored
            place, wanted = places[stored], self.like[stored]
            if place.shape != tuple(wanted.shape) or place.dtype.is_floating_point != wanted.is_floating_point():
                raise self._mismatch(f"holds {stored!r} as {place.dtype} {list(place.shape)}")
        if surplus := next((key for key in places if key not in self.like), None):
            raise self._mismatch(f"holds {surplus!r}")

    def _mismatch(self, what: str) -> InputError:
        """Return the error for a checkpoint unlike the model; ``what``: the difference in words, like ``lacks 'x'``."""
        return InputError(
            f"{self.name}: its checkpoint {what}, unlike the model; a checkpoint whose names are converted is not read "
            "block by block: load it in memory (leave out --memory)"
        )

    def read(self, key: str, pool: BufferPool | None = None) -> Tensor:
        """Return the tensor named ``key`` on the CPU, in the network's dtype; it is checked when it is first read.

        ``pool``: gives the memory; ``None``: it is new. Raises StoreError for another digest, and InputError for a
        parameter with NaN or infinity.
        """
        stored = self.stored[self.first[key]]
        tensor = self.checkpoint.read(stored, pool)
        if (expected := self.unchecked.get(stored)) and digest_tensor(tensor) != expected:
            raise StoreError(
                f"{self.checkpoint.places[stored].file}: {stored!r} does not have the recorded SHA-256: it is damaged "
                "or was changed; copy it again"
            )
        self.unchecked.pop(stored, None)
        tensor = tensor.to(self.like[key].dtype)
        if isinstance(self.like[key], nn.Parameter) and stored not in self.finite:
            if bad := count_nonfinite(tensor):
                raise InputError(
                    f"{self.name}: {bad} entries of {stored!r} are NaN or infinite; use an undamaged checkpoint"
                )
            self.finite.add(stored)
        return tensor

    __getitem__ = read

    def __contains__(self, key: object) -> bool:
        return key in self.like

    @property
    def is_cast(self) -> bool:
        """Whether some tensor has another dtype in the files than in the network."""
        return any(place.dtype != self.like[key].dtype for key, place in self.places())

    def places(self) -> Iterator[tuple[str, TensorPlace]]:
        """Yield (name, place in the files) of every tensor, under its first name."""
        for key, stored in self.stored.items():
            yield key, self.checkpoint.places[stored]

    def parameters(self) -> "StoredParameters":
        """Return name → parameter, without buffers, as a mapping that reads each when it is asked for."""
        return StoredParameters(self)

    def bytes_of(self, key: str) -> int:
        """Return how many bytes a tensor takes in memory, in the network's dtype."""
        return self.like[key].nbytes

    def is_aligned(self, key: str) -> bool:
        """Whether a tensor begins at a cache line when it is read."""
        stored, like = self.stored[self.first[key]], self.like[key]
        place = self.checkpoint.places[stored]
        # A tensor that is converted to another dtype lies in memory of its own.
        return place.start % 64 == 0 or place.dtype != like.dtype or stored in self.checkpoint.aligned

    def sums(self) -> list[float]:
        """Return what :func:`regrow.store.statistics.parameter_sums` does, reading only the entries that are summed."""
        keys = (key for key in self.stored if isinstance(self.like[key], nn.Parameter))
        parts = (self.checkpoint.read(self.stored[key], first=4096).to(self.like[key].dtype) for key in keys)
        return [float(part.float().double().sum()) for part in parts]


class StoredParameters(Mapping[str, Tensor]):
    """Mapping of name → parameter of stored weights, read at each access, into memory of garbage-collected ones."""

    def __init__(self, weights: StoredWeights) -> None:
        self.weights, self.buffers = weights, BufferPool()
        self.names = {key: None for key, tensor in weights.like.items() if isinstance(tensor, nn.Parameter)}

    def __getitem__(self, key: str) -> Tensor:
        """Read a parameter; no other tensor has its memory while it is in use."""
        return self.weights.read(key, self.buffers)

    def __contains__(self, key: object) -> bool:
        return key in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class ReadAhead:
    """Reads stored weights before they are needed, in a thread, into memory of those that were garbage-collected."""

    def __init__(self, weights: StoredWeights) -> None:
        self.weights, self.buffers = weights, BufferPool()
        self.pool = ThreadPoolExecutor(1, "regrow-read")
        self.started: dict[str, Future[Tensor]] = {}

    def start(self, names: Collection[str]) -> None:
        """Start to read the tensors ``names``, which are taken next, and return at once; forget other started ones."""
        for name in self.started.keys() - names:
            self.started.pop(name).cancel()
        for name in names:
            if name not in self.started:
                self.started[name] = self.pool.submit(self.weights.read, name, self.buffers)

    def take(self, name: str) -> Tensor:
        """Return a tensor: wait for it if it was started, else read it now; raise the error of reading it."""
        started = self.started.pop(name, None)
        return self.weights.read(name, self.buffers) if started is None else started.result()

    def release(self) -> None:
        """Give free memory back to the system, unless the next tensors are read into it."""
        if not self.started:
            self.buffers.clear()


class BlockResults:
    """What blocks returned for each batch, in memory (``folder`` ``None``) or in a new folder within ``folder``.

    After :meth:`drop` only the form of a result is kept; leaving the context deletes all.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = None if folder is None else Path(mkdtemp(prefix="results-", dir=folder))
        self.numbers = count()  # of files
        self.values: dict[tuple[int, int], Any] = {}
        self.versions: dict[tuple[int, int], list[int]] = {}

    def put(self, block: int, batch: int, value: Any) -> None:
        """Keep the result of a block for a batch, detached; both are given by index."""
        self.values[block, batch] = result = tree_map_only(Tensor, self._store, value)
        self.versions[block, batch] = _versions(result)

    def get(self, block: int, batch: int) -> Any:
        """Return a result; once it is dropped, one of the same form without numbers.

        Raises InputError if it was changed in place.
        """
        value = self.values[block, batch]
        before = self.versions.get((block, batch))  # none once it is dropped
        if before is not None and before != _versions(value):
            raise InputError(
                f"the result of block {block + 1} is changed in place before its last use; load the model in memory "
                "(leave out --memory)"
            )
        return tree_map_only(TensorPlace, read_tensor, value)

    def drop(self, block: int, batch: int) -> None:
        """Release the numbers of a result that no later block reads; its form is kept."""
        self.versions.pop((block, batch), None)
        self.values[block, batch] = tree_map_only(Tensor | TensorPlace, _drop_numbers, self.values[block, batch])

    def __enter__(self) -> "BlockResults":
        return self

    def __exit__(self, *error: object) -> None:
        self.values.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _store(self, tensor: Tensor) -> Tensor | TensorPlace:
        """Return a tensor as it is kept: itself, or its place in a file that is written here."""
        if self.folder is None:
            return tensor.detach()
        path = self.folder / f"result-{next(self.numbers)}"
        as_bytes(tensor).numpy().tofile(path)
        return TensorPlace(path, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)


def _versions(value: Any) -> list[int]:
    """Return how often each tensor in memory was changed in place; 0 for those made in inference mode."""
    held = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [0 if tensor.is_inference() else tensor._version for tensor in held]


def _drop_numbers(value: Tensor | TensorPlace) -> Tensor:
    """Return a tensor on the meta device of the form of a result; if that is in a file, delete it."""
    if isinstance(value, TensorPlace):
        value.file.unlink(missing_ok=True)
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
