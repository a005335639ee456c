"""Open a network for streaming: its architecture without numbers, its axes, and its stored weights."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.limits import expanded
from regrow.core.process_memory import set_mmap_threshold
from regrow.nets import Loaded, ModelError
from regrow.nets.files import check_config, check_regular_files
from regrow.nets.language import load_skeleton, replacing_parameters
from regrow.nets.loaded import guess_example, text_example
from regrow.nets.packaged import PACKAGED, packaged_folder
from regrow.store.building import build_checked
from regrow.store.errors import StoreError
from regrow.store.models import attach_origin, read_shapes
from regrow.store.portable import read_tokenizer
from regrow.store.probe import FILE, check_probe
from regrow.store.replacing import read_whole
from regrow.store.shapes import DTYPES, SHAPES, Shapes, TensorKind
from regrow.store.state import restore
from regrow.store.weights import check_file, read_weights, require_file
from regrow.streaming.checkpoint import Checkpoint, TensorPlace, read_places
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.weights import StoredWeights
from regrow.tracing import trace
from regrow.tracing.meta_copy import parameter_faker

# How many compiled kernels oneDNN keeps: those of a block. It would keep 1024, and each width of a cut network has
# its own.
CACHED_KERNELS = 32


# Pieces of memory from the first size on are mapped: freed, they go back to the system, as weights do. Of smaller
# pieces, as of activations, the C library keeps up to the second size when they are freed: it would give them back
# after every operation, and fresh memory costs several times what most operations do. Between blocks it gives back
# all.
MAPPED_BYTES, KEPT_BYTES = 2**25, 2**26


def limit_caches() -> None:
    """Let oneDNN keep few compiled kernels, and the C library little freed memory, in this process.

    The first has no effect once a kernel was compiled, or where the user has set the environment variable.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(CACHED_KERNELS))
    set_mmap_threshold(MAPPED_BYTES, KEPT_BYTES)


@dataclass(frozen=True, eq=False)
class OpenedNetwork:
    """A network whose weights are in files, traced without them."""

    loaded: Loaded  # the network without numbers, its tokenizer, an example input and its origin
    axes: AxisGraph
    weights: StoredWeights
    probe: Path | None = None  # the file with its recorded output, if it is of a saved model that has one

    def network(self, folder: Path | None = None) -> StreamedNetwork:
        """Return the network, to be run one block at a time; ``folder``: for results of blocks; ``None``: in memory."""
        graph = self.axes.recording.blocks if self.axes.recording is not None else ()
        return StreamedNetwork(self.loaded.model, self.weights, graph, folder)

    def check_output(self) -> None:
        """Raise StoreError unless the network gives the output that was recorded when it was saved, if one was."""
        if self.probe is None:
            return
        stored = {place.dtype for place in self.weights.checkpoint.places.values()}
        with self.network().on_demand() as running:
            check_probe(running, self.probe, stored=stored, cast=self.weights.is_cast)


def open_network(name: str, dtype: torch.dtype | None = None) -> OpenedNetwork:
    """Open a transformers folder, a packaged model or a saved one without its weights, and trace it.

    ``name``: the folder, or that of a packaged model; ``dtype``: as for :func:`regrow.nets.load`. Raises InputError if
    it cannot be read block by block, and StoreError for damaged files.
    """
    folder = packaged_folder(name, lambda done, total, what: None) if name in PACKAGED else expanded(Path(name))
    if not folder.is_dir():
        raise InputError(
            f"{name} is not read block by block: only transformers folders and runs of such models are; leave out "
            "--memory, to load it whole"
        )
    if (folder / SHAPES).exists():
        return read_whole(folder, lambda: _open_saved(folder, name, dtype))
    _check_names_no_weights(folder, name)
    checkpoint, mode = Checkpoint.open(folder), FakeTensorMode(allow_non_fake_inputs=True)
    stored = next((place.dtype for place in checkpoint.places.values() if place.dtype.is_floating_point), torch.float32)
    loaded = load_skeleton(folder, name=name, dtype=dtype, stored=stored, empty=parameter_faker(mode))
    loaded = replace(loaded, files=checkpoint.files)
    return OpenedNetwork(loaded, _trace_loaded(loaded), StoredWeights(checkpoint, loaded.model, name))


def _open_saved(folder: Path, name: str, dtype: torch.dtype | None) -> OpenedNetwork:
    """Open a model that regrow saved (``name`` in errors); tensors begin at cache lines, as copies in memory do."""
    loaded, shapes = load_saved_skeleton(folder, FakeTensorMode(allow_non_fake_inputs=True), dtype)
    places: dict[str, TensorPlace] = {}
    for file in shapes.files:
        in_file = read_places(require_file(folder, file))
        places |= {key: place for key, place in in_file.items() if shapes.tensors[key].kind.carried}
    digests = {key: shapes.tensors[key].sha256 for key in places}
    weights = StoredWeights(Checkpoint(places, places), loaded.model, name, digests)
    loaded = replace(loaded, files=weights.checkpoint.files)
    probe = None
    if shapes.probe.header:
        probe = require_file(folder, FILE)
        check_file(probe, shapes.probe)
    return OpenedNetwork(loaded, _trace_loaded(loaded), weights, probe)


def _trace_loaded(loaded: Loaded) -> AxisGraph:
    """Return the axes of a loaded network, traced on its example input."""
    return trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)


def _check_names_no_weights(folder: Path, name: str) -> None:
    """Raise InputError if config.json in a folder names a weight file, which transformers would read instead."""
    path = folder / "config.json"
    file = check_config(path, name).get("transformers_weights") if path.exists() else None
    if file is not None:
        raise InputError(
            f"{name}: config.json names other weights (transformers_weights = {file!r:.60}), which are not read block "
            "by block; load it in memory (leave out --memory)"
        )


def load_saved_skeleton(folder: Path, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> tuple[Loaded, Shapes]:
    """Return the model of a folder that regrow wrote, with fake parameters (made in ``mode``), and its ``shapes.json``.

    ``dtype``: of floating-point tensors; ``None``: the stored one. Buffers have their numbers. Neither the digests of
    parameters nor the recorded output are compared. Raises StoreError unless it is a transformers model.
    """
    shapes = read_shapes(folder)
    if shapes.origin.kind != "transformers":
        raise StoreError(f"{folder} holds no transformers model; leave out --memory, to load it whole")
    check_regular_files(folder)
    with replacing_parameters(parameter_faker(mode)):
        net = build_checked(folder, shapes, None, dtype)
    tensors = read_weights(folder, shapes, kinds=[kind for kind in TensorKind if kind is not TensorKind.PARAMETER])
    for name, stored in shapes.tensors.items():
        if stored.kind is TensorKind.PARAMETER:
            with mode:
                tensors[name] = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        if dtype is not None and stored.kind is not TensorKind.DERIVED and tensors[name].is_floating_point():
            tensors[name] = tensors[name].to(dtype)
    restore(net, shapes, tensors)
    tokenizer = read_tokenizer(folder)
    example = guess_example(net) if tokenizer is None else text_example(net, len(tokenizer))
    if example is None:
        raise ModelError(f"{folder}: the model does not say what input it takes; leave out --memory")
    attach_origin(net, shapes.origin, tokenizer)
    return Loaded(net.eval(), tokenizer, example, replace(shapes.origin, name=folder.name)), shapes
