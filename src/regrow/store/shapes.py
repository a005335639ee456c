"""``shapes.json``: how a saved network differs from the network that its architecture alone would build."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch

from regrow.core.axes.operations import Placeholder
from regrow.core.change import BlockCopy, Insertion
from regrow.core.errors import InputError
from regrow.core.limits import parse_json
from regrow.nets import Origin
from regrow.store import schemas
from regrow.store.convert import check_format, convert
from regrow.store.errors import StoreError
from regrow.store.schemas import InsertionJson, PlaceholderJson

FORMAT = "regrow-shapes/2"
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
SHAPES = "shapes.json"
FILE_NAME = re.compile(r"[A-Za-z0-9][\w-]*\.safetensors")

Number = int | float | tuple[int, ...]
"""The values of module attributes that are recorded: sizes, and constants such as epsilons."""


class Kind(StrEnum):
    """The kind of a stored tensor.

    A parameter, a buffer, a derived buffer (one that the state dict leaves out), or a plain attribute of a module.
    """

    PARAMETER = "parameter"
    BUFFER = "buffer"
    DERIVED = "derived"
    ATTRIBUTE = "attribute"

    @property
    def carried(self) -> bool:
        """Whether it is in ``model.safetensors``, which other tools read; otherwise in ``buffers.safetensors``."""
        return self in (Kind.PARAMETER, Kind.BUFFER)


@dataclass(frozen=True)
class Stored:
    """The record of one stored tensor.

    Args:
        dtype: Its dtype by name.
        shape: Its shape.
        kind: Whether it is a parameter, a buffer, a derived buffer or a plain attribute.
        trains: Whether it requires gradients.
        was: Its shape in a newly built network, if it differs; ``None`` if it is the same.
        added: Whether a newly built network has no such tensor (a bias that compensates for dropped units).
        sha256: The digest of its bytes; empty until they are written.
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
        """The size of its data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class File:
    """The recorded size and digests of a file.

    Args:
        bytes: Its size in bytes.
        sha256: The SHA-256 of its contents.
        header: The SHA-256 of the header of a safetensors file (names, dtypes, shapes and offsets of its tensors), by
            which it is checked without reading all of it; empty for other files.
    """

    bytes: int
    sha256: str
    header: str = ""


@dataclass(frozen=True)
class Probe:
    """The file with an input and the network's output for it, or the reason why there is none.

    Args:
        file: The size and SHA-256 of ``probe.st``.
        reason: Why there is no probe; empty if there is one.
    """

    file: File | None = None
    reason: str = ""


@dataclass(frozen=True)
class Shapes:
    """The record of a saved network: how to build its architecture, and every difference from it.

    Args:
        origin: How to build the architecture it came from.
        tensors: Name → record of the tensor; tied tensors under their first name alone.
        attributes: ``module:attribute`` → the number that it holds, if a newly built network holds another.
        ties: Further name of a tied tensor → its first name.
        dropped: Tensors that a newly built network has and this one lacks.
        placeholders: Path of a module that was dropped whole → its placeholder. Tensors of such modules are not listed.
        inserted: Path of a stack of blocks → the insertions into it, in order, which come before anything is dropped.
        probe: The stored input and output.
        compared: Whether a newly built network was there to compare with. If not, everything is listed, and no tensor
            has a ``was``.
        files: File name → size and digest of each file with tensors.
        versions: The versions of packages when it was saved; informative.
    """

    origin: Origin
    tensors: Mapping[str, Stored]
    attributes: Mapping[str, Number] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    compared: bool = True
    files: Mapping[str, File] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    placeholders: Mapping[str, Placeholder] = field(default_factory=dict)
    probe: Probe = Probe()
    inserted: Mapping[str, tuple[Insertion, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as JSON text, one line per entry, with the digest of its content."""
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
            "stands": {path: asdict(placeholder) for path, placeholder in self.placeholders.items()},
            "tensors": {name: _tensor_to_json(stored) for name, stored in self.tensors.items()},
            "inserted": {path: [asdict(row) for row in rows] for path, rows in self.inserted.items()},
        }
        data["sha256"] = content_digest(data)
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in data.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, *, check: bool = True) -> "Shapes":
        """Parse and validate a record, which may come from anybody."""
        try:
            data: Any = parse_json(text, "it")
        except InputError as error:
            raise StoreError(str(error)) from None
        check_format(data, FORMAT, "it", "save the model again")
        record = convert(data, schemas.ShapesJson)
        if check and record.sha256 != content_digest(data):
            raise StoreError("it does not have the SHA-256 that it names: it is damaged or was changed; copy it again")
        copies = sum(len(insertion.copies) for insertions in record.inserted.values() for insertion in insertions)
        if copies > len(record.tensors):
            raise StoreError(
                f"inserted: {copies} blocks, but only {len(record.tensors)} tensors are stored; restore it"
            )
        for place in record.attributes:
            if place.count(":") != 1:
                raise StoreError(f"attribute {place!r:.80} is not named module:attribute; restore it")
        origin, probe = record.origin, Probe()
        if "reason" in record.probe:
            probe = Probe(reason=convert(record.probe, schemas.NoProbe, "probe").reason)
        else:
            stored = convert(record.probe, schemas.StoredFile, "probe")
            probe = Probe(File(stored.bytes, stored.sha256, stored.header))
        return cls(
            Origin(origin.kind, origin.reference, origin.config, origin.name),
            {name: _tensor(name, stored) for name, stored in record.tensors.items()},
            record.attributes,
            record.ties,
            tuple(record.dropped),
            record.compared,
            {name: _file(name, stored) for name, stored in record.files.items()},
            record.versions,
            {path: _placeholder(path, placeholder) for path, placeholder in record.stands.items()},
            probe,
            {path: tuple(_insertion(path, row) for row in rows) for path, rows in record.inserted.items()},
        )


def content_digest(data: Mapping[str, object]) -> str:
    """Return the SHA-256 of a record's JSON with sorted keys and no spaces, leaving out ``sha256`` itself.

    >>> content_digest({"b": 1, "a": 2}) == content_digest({"a": 2, "b": 1, "sha256": "…"})
    True
    """
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _tensor_to_json(stored: Stored) -> dict[str, Any]:
    """Return a tensor's record as JSON data, without default values."""
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


def _tensor(name: str, record: schemas.StoredTensor) -> Stored:
    if record.dtype not in DTYPES:
        raise StoreError(f"tensor {name!r} has the dtype {record.dtype!r:.80}; known dtypes: {', '.join(DTYPES)}")
    kind = Kind(record.kind)
    return Stored(record.dtype, record.shape, kind, record.trains, record.was, record.added, record.sha256)


def _placeholder(path: str, record: PlaceholderJson) -> Placeholder:
    try:
        return Placeholder(record.gives, record.takes, record.of, record.at)
    except ValueError as error:
        raise StoreError(f"stands: {path}: {error}; restore it") from None


def _insertion(path: str, record: InsertionJson) -> Insertion:
    copies = (BlockCopy(copy.position, copy.of, tuple(copy.zeros)) for copy in record.copies)
    try:
        insertion = Insertion(record.size, tuple(copies))
        insertion.check(path)
    except ValueError as error:
        raise StoreError(f"inserted: {error}; restore it") from None
    return insertion


def _file(name: str, record: schemas.StoredFile) -> File:
    if not FILE_NAME.fullmatch(name):
        raise StoreError(f"{name!r:.80} is no name of a safetensors file in this folder; restore it")
    return File(record.bytes, record.sha256, record.header)
