"""Keep what blocks returned for each batch until its last reader: in memory, or in files."""

import shutil
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.core.errors import InputError
from regrow.store.tensor_file import as_bytes
from regrow.streaming.checkpoint import TensorPlace, read_tensor


class BlockResults:
    """The results of blocks by block and batch.

    Args:
        folder: Where they are kept, one file per tensor in a folder of their own; ``None``: in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = None if folder is None else Path(mkdtemp(prefix="results-", dir=folder))
        self.names = count()
        self.values: dict[tuple[int, int], Any] = {}
        self.versions: dict[tuple[int, int], list[int]] = {}

    def put(self, block: int, batch: int, value: Any) -> None:
        """Keep the result of a block for a batch."""
        self.values[block, batch] = result = tree_map_only(Tensor, self._kept, value)
        self.versions[block, batch] = _versions(result)

    def get(self, block: int, batch: int) -> Any:
        """Return a result; once it is dropped, one of the same form without numbers."""
        value = self.values[block, batch]
        before = self.versions.get((block, batch))  # none once it is dropped
        if before is not None and before != _versions(value):
            raise InputError(
                f"the result of block {block + 1} is changed in place before its last use; load the model in memory "
                "(leave out --memory)"
            )
        return tree_map_only(TensorPlace, read_tensor, value)

    def drop(self, block: int, batch: int) -> None:
        """Release the numbers of a result that no later block reads."""
        value = self.values[block, batch]
        self.versions.pop((block, batch), None)
        self.values[block, batch] = tree_map_only(Tensor | TensorPlace, _without_numbers, value)
        for one in tree_leaves(value):
            if isinstance(one, TensorPlace):
                one.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Release all results."""
        for key in self.values:
            self.drop(*key)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "BlockResults":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _kept(self, tensor: Tensor) -> Tensor | TensorPlace:
        if self.folder is None:
            return tensor.detach()
        path = self.folder / f"result-{next(self.names)}"
        with path.open("wb", buffering=0) as file:
            view = memoryview(as_bytes(tensor).numpy().data)
            while view:
                view = view[file.write(view) :]
        return TensorPlace(path, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)


def _versions(value: Any) -> list[int]:
    """Return how often each tensor in memory was changed in place; those made in inference mode are not counted."""
    held = [one for one in tree_leaves(value) if isinstance(one, Tensor)]
    return [0 if one.is_inference() else one._version for one in held]


def _without_numbers(value: Tensor | TensorPlace) -> Tensor:
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
