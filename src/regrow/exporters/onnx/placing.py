"""Move an ONNX file and its external weights into place, so that the file always refers to its own weights."""

import contextlib
import os
import re
from itertools import count
from pathlib import Path
from typing import Any

from regrow.store.atomic import LockedError, leftovers, lock, sync


def place_file(path: Path, stage: Path, out: Path) -> int:
    """Move a new ONNX file, and the weights beside it if any, into place atomically.

    The weights get an unused name; then the new file replaces the old one, and the weights of the old one are deleted.
    Nothing else is replaced or deleted.

    Args:
        path: The new file; large weights are in ``NAME.data`` beside it.
        stage: The temporary folder that holds it. Until the end it also holds links to the weights that are deleted.
        out: The path to move it to.

    Returns:
        The size of file and weights together, in bytes.
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
    """Delete weights that a killed process left beside an ONNX file, recognised by its temporary folder.

    Args:
        out: The ONNX file.
    """
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
    """Hard-link a file to a second name; move it there if the file system has no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        source.replace(target)


def _weights_of(out: Path) -> list[Path]:
    """Return the external weight files that an ONNX file refers to; none if it does not exist."""
    import onnx

    found: set[str] = set()
    with contextlib.suppress(Exception):  # whatever else the file is, it is replaced
        for tensor in onnx.load(out, load_external_data=False).graph.initializer:
            found |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return [out.with_name(name) for name in sorted(found) if _is_weights(name, out)]


def _rename_weights(path: Path, name: str) -> None:
    """Make an ONNX file refer to its external weights by another name."""
    import onnx

    model: Any = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(model, path)
