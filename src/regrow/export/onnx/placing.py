"""Where an ONNX file goes, and large weights beside it: the file leads to its own weights at every moment."""

import contextlib
from pathlib import Path
from typing import Any

from regrow.store.atomic import sync


def placed(path: Path, out: Path) -> int:
    """Give a file, and the weights beside it where there are any, their places.

    Weights take a name that the file in place does not use; then the new file replaces it, and the old weights go.

    Args:
        path: The new file; large weights lie in ``NAME.data`` beside it.
        out: Its place.

    Returns:
        The bytes of file and weights together.
    """
    weights, used = path.with_name(f"{path.name}.data"), _weights_of(out)
    names = [f"{out.name}.data", f"{out.name}.1.data"]
    taken, size = None, 0
    if weights.exists():
        size = weights.stat().st_size
        taken = next(name for name in names if name not in used)
        if taken != weights.name:
            _rename_weights(path, taken)
        sync(weights)
        weights.replace(out.with_name(taken))
        sync(out.parent)
    sync(path)
    size += path.stat().st_size
    path.replace(out)
    sync(out.parent)
    for name in names:
        if name != taken:
            out.with_name(name).unlink(missing_ok=True)
    return size


def _weights_of(out: Path) -> set[str]:
    """The files of weights that an ONNX file leads to; none if it is none, or is not there."""
    import onnx

    found: set[str] = set()
    with contextlib.suppress(Exception):  # whatever else the file is, it is replaced
        for tensor in onnx.load(out, load_external_data=False).graph.initializer:
            found |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return found


def _rename_weights(path: Path, name: str) -> None:
    """Have an ONNX file lead to its weights under another name."""
    import onnx

    model: Any = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(model, path)
