"""``shapes.json``: how a saved network differs from the network that its architecture alone would build."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
import torch

from regrow.core.axes.operations import Placeholder
from regrow.core.change import Insertion
from regrow.core.errors import InputError
from regrow.core.limits import parse_json
from regrow.nets import Origin
from regrow.store.convert import check_fields, check_format, convert
from regrow.store.errors import StoreError
from regrow.store.schemas import Count, Digest, Int64, Shape
from regrow.store.tensors import DTYPE_NAMES, dtype_name

FORMAT = "regrow-shapes/2"
# The dtypes that can be stored, by name.
DTYPES: Mapping[str, torch.dtype] = {dtype_name(dtype): dtype for dtype in DTYPE_NAMES}

SIZE_LIMIT = 2**31  # sizes in module attributes are smaller
SHAPES = "shapes.json"  # name of the record in a model folder
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][\w-]*\.safetensors\Z")]
AttributeName = Annotated[str, msgspec.Meta(pattern="^[^:]*:[^:]*$")]  # module:attribute
DType = Annotated[str, msgspec.Meta(pattern=f"^({'|'.join(DTYPES)})$")]

# The values of module attributes that are recorded: sizes, and constants such as epsilons.
Number = Int64 | float | Annotated[tuple[Int64, ...], msgspec.Meta(max_length=64)]


class TensorKind(StrEnum):
    """Where a module holds a stored tensor."""

    PARAMETER = "parameter"
    BUFFER = "buffer"  # in the state dict
    DERIVED = "derived"  # a buffer that the state dict leaves out (persistent=False)
    ATTRIBUTE = "attribute"  # a plain attribute, such as self.scale = torch.ones(2)

    @property
    def carried(self) -> bool:
        """Whether such tensors are in ``model.safetensors``, for other tools, and not in ``buffers.safetensors``."""
        return self in (TensorKind.PARAMETER, TensorKind.BUFFER)


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The record of one stored tensor: dtype, shape, kind, and its shape in a newly built network if that differs."""

    dtype: DType  # such as "float32"
    shape: Shape
    kind: TensorKind = TensorKind.PARAMETER
    trains: bool = True  # whether a parameter requires gradients
    was: Shape | None = None  # its shape in a newly built network, if it differs
    added: bool = False  # whether a newly built network has no such tensor, such as a bias that compensates for a cut
    sha256: Digest | Literal[""] = ""  # empty until its bytes are written

    @property
    def bytes(self) -> int:
        """The size of its numbers in bytes, in the stored dtype."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The size of a safetensors file in bytes, and the SHA-256 of its header; each tensor has a digest of its own."""

    bytes: Count = 0  # of the whole file
    header: Digest | Literal[""] = ""
    sha256: str = ""  # of the whole file, which earlier versions wrote; it is not compared


class ProbeRecord(FileRecord, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The record of ``probe.st``, or the reason why there is none."""

    reason: str = ""  # empty if there is one


@dataclass(frozen=True)
class Shapes:
    """The record of a saved network: how to build its architecture, and every difference from it."""

    origin: Origin  # how to build the architecture
    tensors: Mapping[str, StoredTensor]  # tied tensors under their first name alone
    attributes: Mapping[AttributeName, Number] = field(default_factory=dict)  # numbers that differ, by place
    ties: Mapping[str, str] = field(default_factory=dict)  # further name of a tied tensor → its first name
    dropped: tuple[str, ...] = ()  # tensors that a newly built network has and this one lacks
    # Whether a newly built network was there to compare with; if not, everything is listed, without a ``was``.
    compared: bool = True
    files: Mapping[FileName, FileRecord] = field(default_factory=dict)  # the files of weights
    versions: Mapping[str, str] = field(default_factory=dict)  # package → version that wrote them
    # Path of a module that was dropped whole → its placeholder. Tensors of such modules are not listed.
    placeholders: Mapping[str, Placeholder] = field(default_factory=dict)
    probe: ProbeRecord = field(default_factory=ProbeRecord)
    # Path of a stack of blocks → the insertions into it, in order, which come before anything is dropped.
    inserted: Mapping[str, tuple[Insertion, ...]] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Return the record as the JSON data of ``shapes.json``, without its digest."""
        parts = {
            "versions": self.versions,
            "compared": self.compared,
            "files": self.files,
            "probe": self.probe,
            "attributes": self.attributes,
            "ties": self.ties,
            "dropped": self.dropped,
            "stands": self.placeholders,
            "tensors": self.tensors,
            "inserted": self.inserted,
        }
        origin = json.loads(json.dumps(self.origin.record(), sort_keys=True))
        return {"format": FORMAT, "origin": origin, **msgspec.to_builtins(parts)}

    def to_json(self) -> str:
        """Return the record as the text of ``shapes.json``, one line per entry, with the digest of its content."""
        data = self.to_data()
        data["sha256"] = content_digest(data)
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {_to_lines(value)}" for key, value in data.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, *, check: bool = True) -> "Shapes":
        """Return the record in a ``shapes.json``, or raise StoreError if invalid; ``check``: compare its digest too."""
        try:
            data = parse_json(text, "it")
        except InputError as error:
            raise StoreError(str(error)) from None
        check_format(data, FORMAT, "it", "save the model again")
        assert isinstance(data, dict)
        placeholders = convert(data.get("stands"), dict[str, Placeholder], "stands")
        shapes = replace(convert(data, Shapes), placeholders=placeholders)
        if check and data.get("sha256") != content_digest(data):
            raise StoreError("it does not have the SHA-256 that it names: it is damaged or was changed; copy it again")
        shapes._check_insertions()
        check_fields({key: value for key, value in data.items() if key != "sha256"}, shapes.to_data())
        return shapes

    def _check_insertions(self) -> None:
        """Raise StoreError unless the recorded insertions are valid, and no more than there are tensors."""
        copies = sum(len(insertion.copies) for insertions in self.inserted.values() for insertion in insertions)
        if copies > len(self.tensors):
            raise StoreError(f"inserted: {copies} blocks, but only {len(self.tensors)} tensors are stored; restore it")
        try:
            for path, insertions in self.inserted.items():
                for insertion in insertions:
                    insertion.check(path)
        except ValueError as error:
            raise StoreError(f"inserted: {error}; restore it") from None


def content_digest(data: Any) -> str:
    """Return the SHA-256, in hexadecimal, of a mapping as JSON, whatever its order, without the entry ``sha256``.

    >>> content_digest({"b": 1, "a": 2}) == content_digest({"a": 2, "b": 1, "sha256": "…"})
    True
    """
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _to_lines(value: Any) -> str:
    """Return a value as JSON text, a mapping with one line per entry."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"
