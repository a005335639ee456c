"""Check model files before loading: that they are complete, of plausible size, and fit into memory."""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from regrow.core.errors import InputError
from regrow.core.limits import MAX_LAYERS, MAX_WIDTH, check_memory, check_regular, read_json
from regrow.nets.errors import ModelError, first_line

_SIZES = re.compile(r"(size|dim|dims|width|widths|heads?|hidden|channels|embd|experts|inner|positions|groups|labels)$")
_READ = frozenset({".json", ".jsonl", ".jinja", ".txt", ".model", ".safetensors"})
_LAYERS = re.compile(r"(layers?|blocks|depths?)$")
_BYTES = {"F64": 8, "F32": 4, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def check_safetensors(file: Path) -> dict[str, int]:
    """Raise ModelError unless a safetensors file is complete; return its number of entries per dtype.

    Args:
        file: The file.

    Returns:
        Dtype, as safetensors names it → how many entries there are.

    Raises:
        ModelError: If the file is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    counts: dict[str, int] = {}
    try:
        check_regular(file)
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (it is no dictionary)
                part = content.get_slice(name)
                if not is_possible(part.get_shape()):
                    raise InputError(f"{file}: {name!r:.60} has the shape {part.get_shape()!s:.60}; download it again")
                counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + prod(part.get_shape())
    except InputError as error:
        raise ModelError(str(error)) from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged ({first_line(error)}); copy or download it again") from None
    return counts


def is_possible(shape: Sequence[int]) -> bool:
    """Whether a tensor can have a shape: an empty one whose other sizes exceed any memory cannot be made.

    >>> is_possible([3, 0]), is_possible([2**59, 2**59, 0])
    (True, False)

    Args:
        shape: Its sizes, none of them negative.
    """
    return prod(max(1, size) for size in shape) < 2**59


def check_files(folder: Path) -> None:
    """Raise ModelError unless the settings, tokenizer and weight files of a folder are regular files in it.

    Args:
        folder: The folder of the model. One in the hub's cache has links to the files of its model beside it.

    Raises:
        ModelError: If one is not; names the first. Opening a FIFO would block forever.
    """
    real = folder.resolve()
    within = [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ:
            try:
                check_regular(path)
            except InputError as error:
                raise ModelError(str(error)) from error
            if path.resolve().parent not in within:
                raise ModelError(f"{path} leads out of the folder; put the file itself there")


def check_weight_names(folder: Path, config: Mapping[str, object], name: str) -> None:
    """Raise ModelError if the configuration or an index of a folder names weights that do not lie in it.

    Args:
        folder: The folder of the model.
        config: Its configuration.
        name: The name of the model, for messages.

    Raises:
        ModelError: Names the file.
    """
    named = config.get("transformers_weights") or ""
    if not isinstance(named, str) or Path(named).name != named:
        raise ModelError(f"{name}: config.json names the weights {named!r:.60}, which is no file beside it; restore it")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        read_shards(index)


def read_shards(index: Path) -> dict[str, str]:
    """Return tensor → the name of the file beside an index that holds it.

    Args:
        index: The index, in JSON.

    Raises:
        ModelError: If it is no such index, or names a file elsewhere.
    """
    try:
        data = read_json(index)
    except InputError as error:
        raise ModelError(str(error)) from None
    named = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(one, str) for one in named.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files; copy or download it again")
    for one in sorted(set(named.values())):
        if Path(one).name != one or not one.endswith(".safetensors"):
            raise ModelError(f"{index} names the file {one!r:.60}, which is no .safetensors file beside it; restore it")
    return named


def check_weights(files: list[Path], name: str, width: int | None) -> None:
    """Raise an error unless weight files are complete and fit into memory.

    Args:
        files: Safetensors files.
        name: The name of the model, for messages.
        width: Bytes per floating-point entry once loaded; as stored if ``None``.

    Raises:
        ModelError: If a file is truncated or damaged.
        ResourceError: If there is not enough memory.
    """
    needed = 0
    for file in files:
        for kind, many in check_safetensors(file).items():
            stored = _BYTES.get(kind, 1)
            needed += many * (width if width and "F" in kind else stored)
    check_memory(needed, f"loading {name}", "take a smaller model, or --dtype bfloat16")


def check_config(path: Path, name: str) -> dict[str, object]:
    """Read a ``config.json`` and raise ModelError unless its sizes are ones that a network can have.

    Args:
        path: The file.
        name: The name of the model, for messages.

    Returns:
        The configuration.

    Raises:
        ModelError: If it is not an object, or a size is too large; names the entry.
    """
    try:
        config = read_json(path)
    except InputError as error:
        raise ModelError(f"{name}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{name}: config.json is a {type(config).__name__}, not an object; restore it")
    for key, value in _entries(config):
        for number in value if isinstance(value, list) else [value]:
            most = MAX_LAYERS if _LAYERS.search(key) else MAX_WIDTH if _SIZES.search(key) else 2**63 - 1
            if type(number) is int and not -most <= number <= most:
                raise ModelError(f"{name}: config.json says {key} = {number:,}, at most {most:,} is built; restore it")
    return config


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield key, value


_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY, _MOST_TENSORS = 8, 9, 2**16


def check_gguf(path: Path, name: str) -> None:
    """Raise ModelError unless the header of a GGUF file is consistent with the file's length.

    Args:
        path: The file.
        name: The name of the model, for messages.

    Raises:
        ModelError: If it is not a GGUF file, or a count or length in it exceeds the file.
        ResourceError: If its weights, as float32, do not fit into memory.
    """
    try:
        check_regular(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{name}: not a GGUF file (its first bytes are not 'GGUF'); download it again")
            needed = _header(file, size)
    except InputError as error:
        raise ModelError(str(error)) from error
    except (struct.error, ValueError, OSError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{name}: truncated or damaged ({first_line(error)}); download it again") from None
    check_memory(needed, f"loading {name} as float32", "take a smaller model")


def _header(file: BinaryIO, size: int) -> int:
    """Parse the header of a GGUF file and return how many bytes its tensors take as float32."""
    version, tensors, pairs = _read(file, "<I"), _read(file, "<Q"), _read(file, "<Q")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, known are 2 and 3")
    if tensors > _MOST_TENSORS or pairs > _MOST_TENSORS:
        raise ValueError(f"its header tells of {tensors:,} tensors and {pairs:,} entries")
    for _ in range(pairs):
        _skip_text(file, size)
        _skip_value(file, _read(file, "<I"), size)
    numbers = 0
    for _ in range(tensors):
        _skip_text(file, size)
        rank = _read(file, "<I")
        if rank > 8:
            raise ValueError(f"a tensor of {rank} dimensions")
        shape = [_read(file, "<Q") for _ in range(rank)]
        if not is_possible(shape):
            raise ValueError(f"a tensor of the shape {shape!s:.60}")
        if (count := prod(shape)) > 64 * size:  # no kind of number takes less than a bit or two
            raise ValueError(f"a tensor of {count:,} numbers in a file of {size:,} bytes")
        numbers += count
        _read(file, "<I")
        if _read(file, "<Q") > size:
            raise ValueError("a tensor that begins behind the end of the file")
    return 4 * numbers


def _read(file: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def _skip(file: BinaryIO, many: int, size: int) -> None:
    if many > size - file.tell():
        raise ValueError(f"an entry of {many:,} bytes in a file of {size:,}")
    file.seek(many, 1)


def _skip_text(file: BinaryIO, size: int) -> None:
    _skip(file, _read(file, "<Q"), size)


def _skip_value(file: BinaryIO, kind: int, size: int, inner: bool = False) -> None:
    if kind == _TEXT:
        _skip_text(file, size)
    elif kind == _ARRAY and not inner:
        of, many = _read(file, "<I"), _read(file, "<Q")
        if many > size:
            raise ValueError(f"a list of {many:,} entries in a file of {size:,} bytes")
        if of in _NUMBERS:
            _skip(file, many * struct.calcsize(_NUMBERS[of]), size)
        else:
            for _ in range(many):
                _skip_value(file, of, size, inner=True)
    elif kind in _NUMBERS:
        _skip(file, struct.calcsize(_NUMBERS[kind]), size)
    else:
        raise ValueError(f"an entry of the unknown kind {kind}")
