"""Named tensors with a JSON header in one safetensors file: written atomically, checked by digest."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from regrow.core.sources import to_host
from regrow.distributed.parallel import whole
from regrow.store.atomic import atomic_write
from regrow.store.convert import check_format
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.tensor_file import TensorFile, as_bytes

_RESERVED = frozenset({"format", "names", "sha256"})


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object], kind: str, *, writes: bool = True
) -> None:
    """Write named tensors and a JSON header to one file atomically."""
    if taken := _RESERVED & header.keys():
        raise ValueError(f"the header may not set {', '.join(sorted(taken))}")
    names = list(tensors)
    # The file format restricts names: tensors are numbered.
    here = {f"t{i}": one.detach() for i, one in enumerate(to_host(list(tensors.values())))}
    hasher = hashlib.sha256()
    for name in sorted(here):
        add_to_digest(hasher, (name, whole(here[name])))
    record = {"format": kind, **header, "names": names, "sha256": hasher.hexdigest()}
    if not writes:
        for name in sorted(here):
            whole(here[name])
        return
    entries = {name: (one.dtype, tuple(one.shape)) for name, one in here.items()}
    with (
        atomic_write(path) as temporary,
        TensorFile(temporary, entries, {"regrow": json.dumps(record)}) as file,
    ):
        for name in sorted(here):
            file.write(name, whole(here[name]))


def read_header(path: Path, *kinds: str) -> dict[str, Any]:
    """Read the header of a file written by :func:`write_tensors`, without its tensors."""
    with _telling(path), safe_open(path, framework="pt") as content:
        return _header(content, kinds)


def open_checkpoint(path: Path, key: str, *kinds: str) -> dict[str, Any]:
    """Return the header of an interrupted stage's checkpoint; a file of another stage or key is deleted."""
    with explain_os_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    try:
        header = read_header(path, *kinds)
    except StoreError:
        header = {}
    if header.get("key") == key:
        return header
    path.unlink(missing_ok=True)
    return {}


def read_tensors(path: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file written by :func:`write_tensors`, and check its digest.

    Returns:
        The header, and name → tensor, each in its own storage.
    """
    with _telling(path):
        with safe_open(path, framework="pt") as content:
            header = _header(content, kinds)
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
        if digest(tensors) != header["sha256"]:
            raise ValueError("its numbers do not have the recorded SHA-256")
        names = header["names"]
        if len(names) != len(tensors):
            raise ValueError(f"it names {len(names)} tensors and holds {len(tensors)}")
        return header, {name: tensors[f"t{i}"] for i, name in enumerate(names)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, independent of their order."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        add_to_digest(hasher, (name, tensors[name]))
    return hasher.hexdigest()


def add_to_digest(hasher: Any, value: Any) -> None:
    """Feed a value into a digest unambiguously: with its type, shape or length."""
    match value:
        case Tensor():
            hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
            hasher.update(as_bytes(value).numpy().data)
        case Mapping():
            add_to_digest(hasher, sorted(value.items()))
        case str() | bytes():
            hasher.update(repr(value).encode())
        case Iterable():
            parts = list(value)
            hasher.update(f"{len(parts)}(".encode())
            for part in parts:
                add_to_digest(hasher, part)
        case _:
            hasher.update(f"{value!r};".encode())


def _header(content: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    header = json.loads((content.metadata() or {}).get("regrow", "null"))
    if not isinstance(header, dict) or header.get("format") not in kinds:
        check_format(header, kinds[0], "it")
    names = header.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) != len(names):
        raise ValueError("its names of tensors are damaged")
    if not isinstance(header.get("sha256"), str):
        raise ValueError("it has no SHA-256")
    return header


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Turn every error of reading a file into one line with a remedy."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StoreError(f"{path} cannot be used ({' '.join(str(error).split())[:200]}); restore it") from None
