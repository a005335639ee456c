"""Export to torchvision: weights as a plain ``state_dict``, and a short file that builds the network."""

import importlib
import json
import sys
from pathlib import Path

from torch import nn

from regrow import store
from regrow.core.progress import Progress
from regrow.exporters import ExportError, ExportResult, compare_outputs, export_folder, folder_bytes
from regrow.nets import Origin
from regrow.nets.vision import torchvision_example, unweighted_arguments
from regrow.store import portable
from regrow.store.atomic import write_text
from regrow.store.run_folder import WritePage

FILES = ("load_regrow.py", "reshape_regrow.py")


def write(model: nn.Module, out: Path, *, card: WritePage, progress: Progress) -> ExportResult:
    """Write a folder whose ``load_regrow.load()`` builds the network without regrow; build it, and compare outputs.

    ``model``: with a torchvision ``origin``; ``out``, ``card``: as for :func:`export_folder`. Raises ExportError
    if it cannot be rebuilt so, CheckError if outputs differ; ``out`` then stays as it was.
    """
    origin = getattr(model, "origin", None)
    if not isinstance(origin, Origin) or origin.kind != "torchvision":
        raise ExportError("this is no torchvision network; export it to onnx")
    with export_folder(out, card) as folder:
        progress(0, 2, "writing the folder")
        store.write_model(model, folder, origin=origin)
        record = portable.record_changes(model, store.read_shapes(folder))
        if record is None:
            modules = "modules that torchvision has not (opened attention, inserted blocks)"
            raise ExportError(f"{origin.name} has {modules}; export it to onnx")
        settings = unweighted_arguments(origin.reference) | dict(origin.config)
        build = {"builder": origin.reference, "settings": settings, "regrow": record}
        write_text(folder / "network.json", json.dumps(build, indent=1) + "\n")
        for name in FILES:
            write_text(folder / name, portable.read_template(name))
        progress(1, 2, "building it with torchvision")
        example = torchvision_example(origin.reference, model)
        difference = compare_outputs(model, _build(folder), example, f"{folder}: what torchvision builds")
        progress(2, 2, "building it with torchvision")
    note = "load it with load_regrow.load() of the folder"
    return ExportResult(out, folder_bytes(out), {"max_abs_diff": difference}, (note,))


def _build(folder: Path) -> nn.Module:
    """Return what ``load_regrow.load()`` of a folder builds, in this process; ``sys.path`` and modules are restored."""
    names = [file.removesuffix(".py") for file in FILES]
    path, bytecode = [*sys.path], sys.dont_write_bytecode
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}  # of another export
    sys.path.insert(0, str(folder.resolve()))
    sys.dont_write_bytecode = True  # the folder is not finished
    try:
        network: nn.Module = importlib.import_module(names[0]).load()
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    return network
