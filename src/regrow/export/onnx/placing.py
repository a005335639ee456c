"""Where an ONNX file goes, and large weights beside it: the file leads to its own weights at every moment."""

import contextlib
import os
import re
from itertools import count
from pathlib import Path
from typing import Any

from regrow.store.atomic import leftovers, sync
from regrow.store.locks import LockedError, lock


def place_file(path: Path, stage: Path, out: Path) -> int:
    """Give a file, and the weights beside it where there are any, their places.

    Weights take a name that no file has; then the new file replaces the old one, and the weights that the old one led
    to go. Nothing else is replaced or deleted.

    Args:
        path: The new file; large weights lie in ``NAME.data`` beside it.
        stage: The temporary folder that holds it. Until all is done, it holds the weights that may be deleted too.
        out: Its place.

    Returns:
        The bytes of file and weights together.
    """
    weights, old = path.with_name(f"{path.name}.data"), _weights_of(out)
    size = 0
    if weights.exists():
        size = weights.stat().st_size
        names = (f"{out.name}.{n}.data" if n else f"{out.name}.data" for n in count())
        taken = next(name for name in names if not os.path.lexists(out.with_name(name)))
        if taken != weights.name:
            _rename_weights(path, taken)
        sync(weights)
        _link(weights, out.with_name(taken))
        sync(out.parent)
    for number, one in enumerate(old):
        with contextlib.suppress(OSError):
            os.link(one, stage / f"old-{number}.data", follow_symlinks=False)
    sync(path)
    size += path.stat().st_size
    path.replace(out)
    sync(out.parent)
    for one in old:
        one.unlink(missing_ok=True)
    return size


def clear_abandoned(out: Path) -> None:
    """Delete weights that a killed process left beside an ONNX file: its temporary folder holds the same files."""
    for stage in leftovers(out):
        with contextlib.suppress(LockedError, OSError), lock(stage) as owner:
            left = [one for one in stage.rglob("*.data") if one.is_file() and not one.is_symlink()]
            led = _weights_of(out) if left and owner.sure else []
            for one in out.parent.iterdir() if left and owner.sure else ():
                if _is_weights(one.name, out) and one not in led and any(one.samefile(other) for other in left):
                    one.unlink()


def _is_weights(name: str, out: Path) -> bool:
    """Whether a file beside an ONNX file has a name that :func:`place_file` gives to its weights."""
    return re.fullmatch(rf"{re.escape(out.name)}(\.\d+)?\.data", name) is not None


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; its only one where the file system has no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        source.replace(target)


def _weights_of(out: Path) -> list[Path]:
    """The files of weights beside an ONNX file that it leads to; none if it is none, or is not there."""
    import onnx

    found: set[str] = set()
    with contextlib.suppress(Exception):  # whatever else the file is, it is replaced
        for tensor in onnx.load(out, load_external_data=False).graph.initializer:
            found |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return [out.with_name(name) for name in sorted(found) if _is_weights(name, out)]


def _rename_weights(path: Path, name: str) -> None:
    """Have an ONNX file lead to its weights under another name."""
    import onnx

    model: Any = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(model, path)
