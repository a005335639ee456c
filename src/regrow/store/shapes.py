"""``shapes.json``: everything about a changed network that its architecture alone does not say, as plain data."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch

from regrow.branches import Stand
from regrow.nets import ModelError, Origin
from regrow.store.errors import StoreError

FORMAT = "regrow-shapes/1"
DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}
"""The dtypes that can be stored, by name."""

MOST = 2**31
PROBE = "probe.st"
DIGEST = re.compile(r"([0-9a-f]{64})?")
FILE_NAME = re.compile(r"[A-Za-z0-9][\w-]*\.safetensors")

Number = int | float | tuple[int, ...]
"""What an attribute of a module can hold."""


class Kind(StrEnum):
    """What a stored tensor is.

    A parameter, a buffer, a buffer that a model's own state dict leaves out, or a plain attribute of a module.
    """

    PARAMETER = "parameter"
    BUFFER = "buffer"
    DERIVED = "derived"
    ATTRIBUTE = "attribute"

    @property
    def carried(self) -> bool:
        """Whether it is in ``model.safetensors``, the file that others read; else in ``buffers.safetensors``."""
        return self in (Kind.PARAMETER, Kind.BUFFER)


@dataclass(frozen=True)
class Stored:
    """One tensor.

    Args:
        dtype: Its dtype by name.
        shape: Its shape.
        kind: What it is.
        trains: Whether it asks for gradients.
        was: Its shape in a freshly built model, where that is another one; ``None`` if it is the same.
        added: Whether a freshly built model has no such tensor (a bias that compensates for dropped units).
        sha256: Of its bytes; empty in folders of version 0.1.
    """

    dtype: str
    shape: tuple[int, ...]
    kind: Kind = Kind.PARAMETER
    trains: bool = True
    was: tuple[int, ...] | None = None
    added: bool = False
    sha256: str = ""

    @property
    def bytes(self) -> int:
        """How long its numbers are."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class File:
    """How long a file must be, its SHA-256, and that of its header alone (empty in folders of version 0.1)."""

    bytes: int
    sha256: str
    header: str = ""


@dataclass(frozen=True)
class Probe:
    """The file with an input and what the network answers to it, or the reason why there is none.

    Args:
        file: How long ``probe.st`` must be, and its SHA-256.
        reason: Why there is none; empty if there is one, and in folders of version 0.1.
    """

    file: File | None = None
    reason: str = ""


@dataclass(frozen=True)
class Shapes:
    """The record of a saved network.

    Args:
        origin: How to build the architecture it came from.
        tensors: Name → tensor; tied ones under their first name alone.
        attributes: ``module:attribute`` → the number it holds, where a freshly built model holds another.
        ties: Name → the first name of the same tensor.
        dropped: Tensors that a freshly built model has and this one has not.
        stands: Path of a module that was dropped whole → what stands for it. Its tensors are not spoken of.
        probe: An input, and what the network answers to it.
        compared: Whether a freshly built model was there to compare with. If not, everything is listed, and nothing
            has a ``was``.
        files: The files with the numbers.
        versions: What it was saved with; informative.
    """

    origin: Origin
    tensors: Mapping[str, Stored]
    attributes: Mapping[str, Number] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    compared: bool = True
    files: Mapping[str, File] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    stands: Mapping[str, Stand] = field(default_factory=dict)
    probe: Probe = Probe()

    def to_json(self) -> str:
        """The record as JSON text, one line per entry."""
        data = {
            "format": FORMAT,
            "origin": json.loads(self.origin.to_json()),
            "versions": dict(self.versions),
            "compared": self.compared,
            "files": {name: asdict(file) for name, file in self.files.items()},
            "probe": asdict(self.probe.file) if self.probe.file else {"reason": self.probe.reason},
            "attributes": dict(self.attributes),
            "ties": dict(self.ties),
            "dropped": list(self.dropped),
            "stands": {path: stand.to_data() for path, stand in self.stands.items()},
            "tensors": {name: _written(stored) for name, stored in self.tensors.items()},
        }
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in data.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Shapes":
        """Read a record back; every value is checked, since it may come from anybody.

        Raises:
            StoreError: If the text is not such a record; names what is wrong with it.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"not JSON ({str(error)[:80]}); restore it") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StoreError(f"not of the format {FORMAT!r}; save the model again with this version of regrow")
        parts = {key: _part(data, key, dict) for key in ("tensors", "attributes", "ties", "files", "origin")}
        dropped = _part(data, "dropped", list)
        if not all(isinstance(name, str) for name in [*dropped, *parts["ties"].values()]):
            raise StoreError("'ties' and 'dropped' hold names of tensors; restore the file")
        try:
            origin = Origin.from_json(json.dumps(parts["origin"]))
        except ModelError as error:
            raise StoreError(str(error)) from None
        try:
            stands = {path: Stand.from_data(value) for path, value in dict(data.get("stands", {})).items()}
        except (TypeError, ValueError) as error:
            raise StoreError(f"'stands' is damaged ({error}); restore the file") from None
        versions = data.get("versions")
        return cls(
            origin,
            {name: _tensor(name, value) for name, value in parts["tensors"].items()},
            {place: _attribute(place, value) for place, value in parts["attributes"].items()},
            parts["ties"],
            tuple(dropped),
            data.get("compared") is not False,
            {name: _file(name, value) for name, value in parts["files"].items()},
            {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
            stands,
            _probe(data.get("probe", {"reason": ""})),
        )


def _written(stored: Stored) -> dict[str, Any]:
    """Only what is out of the ordinary is said."""
    data: dict[str, Any] = {"dtype": stored.dtype, "shape": list(stored.shape)}
    if stored.kind is not Kind.PARAMETER:
        data["kind"] = str(stored.kind)
    elif not stored.trains:
        data["trains"] = False
    if stored.was is not None:
        data["was"] = list(stored.was)
    if stored.added:
        data["added"] = True
    if stored.sha256:
        data["sha256"] = stored.sha256
    return data


def _lines(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"


def _part(data: dict[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        raise StoreError(f"{key!r} is missing or not a JSON {'object' if kind is dict else 'list'}; restore the file")
    return value


def _tensor(name: str, value: Any) -> Stored:
    if not isinstance(value, dict):
        raise StoreError(f"tensor {name!r} is not described; restore the file")
    dtype, kind, was = value.get("dtype"), value.get("kind", "parameter"), value.get("was")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise StoreError(f"tensor {name!r} has the dtype {_short(dtype)}; known dtypes: {', '.join(DTYPES)}")
    if kind not in list(Kind):
        raise StoreError(f"tensor {name!r} is of the kind {_short(kind)}; known kinds: {', '.join(Kind)}")
    trains, added = value.get("trains", True), value.get("added", False)
    if not isinstance(trains, bool) or not isinstance(added, bool):
        raise StoreError(f"tensor {name!r}: 'trains' and 'added' are true or false; restore the file")
    shape = _shape(name, value.get("shape"))
    sha256 = value.get("sha256", "")
    if not isinstance(sha256, str) or not DIGEST.fullmatch(sha256):
        raise StoreError(f"tensor {name!r} has the SHA-256 {_short(sha256)}, which is none; restore the file")
    return Stored(dtype, shape, Kind(kind), trains, None if was is None else _shape(name, was), added, sha256)


def _shape(name: str, value: Any) -> tuple[int, ...]:
    sizes = value if isinstance(value, list) and len(value) <= 16 else [None]
    if not all(type(size) is int and 0 <= size < MOST for size in sizes):
        raise StoreError(f"tensor {name!r} has the shape {_short(value)}; sizes are from 0 to {MOST - 1}")
    return tuple(sizes)


def _attribute(place: str, value: Any) -> Number:
    if place.count(":") == 1:
        if isinstance(value, list) and len(value) <= 64 and all(_whole(part) for part in value):
            return tuple(value)
        if _whole(value) or type(value) is float:
            return value
    raise StoreError(f"attribute {place!r} holds {_short(value)}, not a number or a list of whole numbers; restore it")


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _file(name: str, value: Any) -> File:
    if name != PROBE and not FILE_NAME.fullmatch(name):
        raise StoreError(f"{_short(name)} is no name of a safetensors file in this folder; restore it")
    length, digest = (value.get("bytes"), value.get("sha256")) if isinstance(value, dict) else (None, None)
    if type(length) is not int or not isinstance(digest, str):
        raise StoreError(f"the length and SHA-256 of {name} are missing; restore them")
    header = value.get("header", "")
    return File(length, digest, header if isinstance(header, str) else "")


def _probe(value: Any) -> Probe:
    if isinstance(value, dict) and isinstance(value.get("reason"), str):
        return Probe(reason=value["reason"])
    return Probe(_file(PROBE, value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
