"""Keep what blocks returned for each batch until its last reader: in memory, or in files."""

from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.store.tensor_file import as_bytes
from regrow.streaming.checkpoint import TensorPlace, read_tensor


class BlockResults:
    """The results of blocks by block and batch.

    Args:
        folder: Where they are kept, one file per tensor; ``None``: in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.names = folder, count()
        self.values: dict[tuple[int, int], Any] = {}

    def put(self, block: int, batch: int, value: Any) -> None:
        """Keep the result of a block for a batch.

        Args:
            block: The number of the block.
            batch: The number of the batch.
            value: The result: a tensor, or a structure of tensors.
        """
        self.values[block, batch] = tree_map_only(Tensor, self._kept, value)

    def get(self, block: int, batch: int) -> Any:
        """Return a result; once it is dropped, one of the same form without numbers.

        Args:
            block: The number of the block.
            batch: The number of the batch.
        """
        return tree_map_only(TensorPlace, read_tensor, self.values[block, batch])

    def drop(self, block: int, batch: int) -> None:
        """Release the numbers of a result that no later block reads.

        Args:
            block: The number of the block.
            batch: The number of the batch.
        """
        value = self.values[block, batch]
        self.values[block, batch] = tree_map_only(Tensor | TensorPlace, _without_numbers, value)
        for one in tree_leaves(value):
            if isinstance(one, TensorPlace):
                one.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Release all results."""
        for key in self.values:
            self.drop(*key)

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


def _without_numbers(value: Tensor | TensorPlace) -> Tensor:
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
