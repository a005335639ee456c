"""Open a network for streaming: its architecture without numbers, its axes, and its stored weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from regrow.axes import AxisGraph
from regrow.errors import InputError
from regrow.limits import expanded
from regrow.nets import Loaded
from regrow.nets.files import check_config
from regrow.nets.packaged import PACKAGED, packaged_folder
from regrow.nets.skeleton import load_skeleton
from regrow.store.shapes import SHAPES
from regrow.streaming.checkpoint import Checkpoint
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.weights import StoredWeights
from regrow.tracing import trace
from regrow.tracing.meta_copy import without_numbers


@dataclass(frozen=True, eq=False)
class OpenedNetwork:
    """A network whose weights are in files.

    Args:
        loaded: The network without numbers, its tokenizer, an example input and its origin.
        axes: Its axes.
        weights: Its stored weights.
    """

    loaded: Loaded
    axes: AxisGraph
    weights: StoredWeights

    def network(self, folder: Path | None = None) -> StreamedNetwork:
        """Return the network, to be run one block at a time.

        Args:
            folder: Where results of blocks are kept that memory has no room for; ``None``: in memory.

        Raises:
            InputError: If it has no blocks, or blocks share weights.
        """
        graph = self.axes.recording.blocks if self.axes.recording is not None else ()
        return StreamedNetwork(self.loaded.model, self.weights, graph, folder)


def open_network(name: str, dtype: torch.dtype | None = None) -> OpenedNetwork:
    """Open a transformers folder, or a packaged model, without loading its weights, and trace it.

    Args:
        name: The folder, or the name of a packaged model.
        dtype: The dtype of the weights; as stored if ``None``.

    Raises:
        InputError: If it is no such folder, or its checkpoint has other names than the model.
        StoreError: If a file is damaged.
    """
    folder = packaged_folder(name, lambda done, total, what: None) if name in PACKAGED else expanded(Path(name))
    if not folder.is_dir() or (folder / SHAPES).exists():
        raise InputError(
            f"{name} is not read block by block: only transformers folders are; leave out --memory, to load it whole"
        )
    _check_names_no_weights(folder, name)
    checkpoint, mode = Checkpoint.open(folder), FakeTensorMode(allow_non_fake_inputs=True)

    def empty(parameter: nn.Parameter) -> nn.Parameter:
        made = without_numbers(mode, tuple(parameter.shape), parameter)
        return parameter if isinstance(parameter, FakeTensor) else made  # type: ignore[return-value]

    stored = next((one.dtype for one in checkpoint.places.values() if one.dtype.is_floating_point), torch.float32)
    loaded = load_skeleton(folder, name=name, dtype=dtype, stored=stored, empty=empty)
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    return OpenedNetwork(loaded, axes, StoredWeights(checkpoint, loaded.model, name))


def _check_names_no_weights(folder: Path, name: str) -> None:
    """Raise InputError if the configuration names a weight file of its own, which transformers would read instead."""
    path = folder / "config.json"
    named = check_config(path, name).get("transformers_weights") if path.exists() else None
    if named is not None:
        raise InputError(
            f"{name}: config.json names other weights (transformers_weights = {named!r:.60}), which are not read block "
            "by block; load it in memory (leave out --memory)"
        )
