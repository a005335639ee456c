"""Export to torchvision: weights as a plain ``state_dict``, and a short file that builds the network."""

import importlib
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from regrow import store
from regrow.core.progress import Progress, silent
from regrow.exporters.staging import staging_folder
from regrow.exporters.written import CheckError, ExportError, Written
from regrow.nets import Origin
from regrow.nets.vision import example_of, unweighted_arguments
from regrow.store import portable
from regrow.store.atomic import write_text

ROUNDING = 1e-4
"""The allowed output difference, relative to the largest output: memory layout can change rounding."""
FILES = ("load_regrow.py", "reshape_regrow.py")


def write(model: nn.Module, out: Path, *, dtype: str = "", progress: Progress = silent) -> Written:
    """Write a folder whose ``load_regrow.load()`` builds the network without regrow, and compare it.

    Args:
        model: A torchvision network, pruned or widened in any way.
        out: The folder: new, empty, or of an earlier export.
        dtype: Must be empty: weights are stored as they are.
        progress: Called with (steps done, steps in all, description).

    Returns:
        What was written; ``checked`` compares the outputs of the built network with those of ``model``.

    Raises:
        ExportError: If torchvision alone could not build the network, or the outputs differ.
        StoreError: If the disk is full, or the folder holds other files.
    """
    origin = getattr(model, "origin", None)
    if not isinstance(origin, Origin) or origin.kind != "torchvision":
        raise ExportError("this is no torchvision network; export it to onnx")
    if dtype:
        raise ExportError(f"weights are stored as they are; --dtype {dtype} is for other formats")
    with staging_folder(out) as folder:
        progress(0, 2, "writing the folder")
        store.write_model(model, folder, origin=origin)
        record = portable.record(model, store.read_shapes(folder))
        if record is None:
            raise ExportError(
                f"{origin.name} has modules that torchvision has not (attention that was opened); export it to onnx"
            )
        settings = unweighted_arguments(origin.reference) | dict(origin.config)
        made = {"builder": origin.reference, "settings": settings, "regrow": record}
        write_text(folder / "network.json", json.dumps(made, indent=1) + "\n")
        for name in FILES:
            write_text(folder / name, portable.code(name))
        progress(1, 2, "building it with torchvision")
        difference = _tried(model, folder, origin.reference)
        progress(2, 2, "building it with torchvision")
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    return Written(out, size, {"max_abs_diff": difference}, ("load it with load_regrow.load() of the folder",))


@torch.no_grad()
def _tried(model: nn.Module, folder: Path, name: str) -> float:
    """Build the network with the files just written and return the largest output difference to ``model``.

    Raises:
        ExportError: If they differ.
    """
    modules, places, written = [file.removesuffix(".py") for file in FILES], [*sys.path], sys.dont_write_bytecode
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}  # of another export
    sys.path.insert(0, str(folder.resolve()))
    sys.dont_write_bytecode = True  # the folder is not finished
    try:
        again = importlib.import_module(modules[0]).load()
    finally:
        sys.path[:], sys.dont_write_bytecode = places, written
        for module in modules:
            sys.modules.pop(module, None)
        sys.modules.update(before)
    example = example_of(name, model)
    said, says = (
        [leaf for leaf in tree_leaves(net(*example.args, **example.kwargs)) if isinstance(leaf, torch.Tensor)]
        for net in (model, again)
    )
    difference = max((float((a - b).abs().max()) for a, b in zip(said, says, strict=True) if a.numel()), default=0.0)
    if difference > ROUNDING * max((float(a.abs().max()) for a in said if a.numel()), default=0.0):
        raise CheckError(f"{folder}: what torchvision builds answers otherwise, by {difference:.3g}; please report it")
    return difference
