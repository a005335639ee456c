"""Export to GGUF, for llama.cpp and its tools: architecture ``llama`` if all layers are alike, else ``deci``.

llama.cpp's ``llama`` graph knows one number of heads and one feed-forward width for all layers. Its ``deci`` graph,
made for networks found by architecture search, reads both per layer and adds biases where a file has them, as a pruned
network needs. Both rotate neighbouring pairs of channels, where transformers rotates i with i + d/2, so rows of queries
and keys are permuted. Rotary frequencies become factors on the usual ones (``rope_freqs``), and an attention scale that
is not 1/√d is multiplied into the queries.

Layers that the ``deci`` graph would compute wrongly are rewritten: a layer with attention but no MLP (the graph ignores
its attention) gets an MLP of zeros, a first layer without attention gets a head of zeros, and a layer without either is
left out.
"""

import errno
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow.core.progress import Progress, silent
from regrow.exporters import CheckError, ExportError, ExportResult, Results
from regrow.exporters.gguf.llama_cpp import NORMS, PARTS, Decoder, describe_decoder, describe_tokenizer, query_scale
from regrow.nets.language import ATTENTION_LAYERS, MLP_LAYERS, DecoderLayer
from regrow.nets.loaded import missing_package
from regrow.store.atomic import atomic_write, check_output

__all__ = ["write"]
Read = Callable[[Tensor], Tensor]  # a tensor of the network → its numbers
Floats: TypeAlias = NDArray[np.float32]
Encoded: TypeAlias = NDArray[np.float32 | np.float16 | np.uint8]

BLOCK = 32  # numbers of a row that are quantised together
# Quantised type → the lowest and highest multiple of a block's step; where 0 is the lowest, of the block's least number
LEVELS = {"Q8_0": (-127, 127), "Q5_1": (0, 31), "Q5_0": (-16, 15), "Q4_1": (0, 15), "Q4_0": (-8, 7)}
TYPES = {type.lower(): type for type in ("F32", "BF16", "F16", *LEVELS)}  # dtype → GGUF type
WIDER = "F16"  # the type of matrices whose row length does not fit
HEADS = {"Q4_0": "Q5_0", "Q4_1": "Q5_0"}  # type of matrices → of the head, and an embedding tied to it, if another
_CHUNK = 1 << 22  # numbers that are checked at a time: 16 MB in float32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: its name and type in GGUF, its shape as in torch, and a function that reads it."""

    name: str
    shape: tuple[int, ...]
    type: str  # a value of TYPES
    read: Callable[[], Tensor]  # returns the numbers, with rows in llama.cpp's order

    def read_floats(self) -> Floats:
        """Read the tensor as a float32 array of its shape."""
        return np.ascontiguousarray(self.read().detach().to("cpu", torch.float32).numpy())


def write(
    model: nn.Module,
    out: str | Path,
    *,
    dtype: str = "f16",
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Write a GGUF file atomically, read every tensor back, and compare it with the network.

    ``dtype``: of matrices, a key of ``TYPES``; ``weights``: name → parameter, if the network has none of their numbers.
    Only one tensor at a time is held in float32. Norms and biases are stored in float32, the head of a file in 4 bits
    in Q5_0, matrices whose rows are no whole blocks in F16. Raise ExportError if llama.cpp cannot run the network,
    CheckError if the file differs from it; ``out`` then stays as it was.
    """
    try:
        import gguf
    except ImportError:
        raise ExportError(str(missing_package("export", "gguf"))) from None
    out = Path(out)
    target = check_output(out, (".gguf",))  # before any work
    decoder = describe_decoder(model)
    vocabulary, notes = describe_tokenizer(getattr(model, "tokenizer", None), rows=len(decoder.embedding))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def read(tensor: Tensor) -> Tensor:
        """Return the numbers of a tensor of the network: a parameter's from ``weights``, if given."""
        return weights[names[id(tensor)]] if weights is not None and id(tensor) in names else tensor.detach()

    entries = list(_list_tensors(decoder, TYPES[dtype], read))
    with atomic_write(target) as temporary:
        _write_file(gguf, temporary, decoder, vocabulary, entries, progress)
        checked = _check_file(gguf, temporary, decoder, entries, progress)
    notes = [*decoder.notes, *notes, *_explain_types(entries, TYPES[dtype])]
    return ExportResult(out, out.stat().st_size, checked, tuple(notes))


def _list_tensors(decoder: Decoder, type: str, read: Read) -> Iterator[GgufTensor]:
    """Yield every tensor of the file, in order; ``type``: of matrices; ``read``: tensor of the network → numbers."""
    width, embedding, head = len(decoder.norm), decoder.embedding, decoder.head

    def matrix(name: str, shape: Sequence[int], values: Callable[[], Tensor], type: str = type) -> GgufTensor:
        """Describe a matrix, of ``type`` if its rows fit."""
        fits = type not in LEVELS or shape[1] % BLOCK == 0
        return GgufTensor(f"{name}.weight", tuple(shape), type if fits else WIDER, values)

    def plain(name: str, values: Tensor) -> GgufTensor:
        """Describe a tensor of the network that is stored in float32."""
        return GgufTensor(name, tuple(values.shape), "F32", lambda: read(values))

    head_type = HEADS.get(type, type)
    yield matrix("token_embd", embedding.shape, lambda: read(embedding), head_type if head is embedding else type)
    if decoder.factors is not None:
        yield plain("rope_freqs.weight", decoder.factors)
    for i, layer in enumerate(decoder.layers):
        sizes = (layer.heads * decoder.head_dim, layer.width)
        for norm, size, parts in zip(NORMS, sizes, (ATTENTION_LAYERS, MLP_LAYERS), strict=True):
            if not size:
                continue
            present = parts[0] in layer.linear  # else zeros are written
            gain = getattr(layer.module, norm).weight if present else torch.ones(width)
            yield plain(f"blk.{i}.{NORMS[norm]}.weight", gain)
            for path in parts:
                name = f"blk.{i}.{PARTS[path]}"
                if present:
                    linear = layer.linear[path]
                    permuted = partial(_read_permuted, decoder, layer, path, read)
                    yield matrix(name, linear.weight.shape, partial(permuted, linear.weight))
                    if (bias := linear.bias) is not None:
                        yield GgufTensor(f"{name}.bias", tuple(bias.shape), "F32", partial(permuted, bias))
                else:
                    shape = (width, size) if path.endswith(("o_proj", "down_proj")) else (size, width)
                    yield matrix(name, shape, partial(torch.zeros, shape))
    yield plain("output_norm.weight", decoder.norm)
    if head is not embedding:
        yield matrix("output", head.shape, lambda: read(head), head_type)


def _read_permuted(decoder: Decoder, layer: DecoderLayer, path: str, read: Read, tensor: Tensor) -> Tensor:
    """Return a weight or bias with its rows in llama.cpp's order: pair i of a query or key head is rows 2i, 2i + 1.

    ``path``: of its linear layer in ``layer``; query weights are also multiplied by :func:`query_scale`; others than
    queries and keys keep their order. ``read``: tensor of the network → numbers.
    """
    rows = read(tensor)
    rows = rows.float() if rows.dim() == 1 else rows  # biases are stored so
    if path == ATTENTION_LAYERS[0] and (scale := query_scale(layer, decoder.scale)) != 1:
        rows = rows.float() * scale
    heads = {ATTENTION_LAYERS[0]: layer.heads, ATTENTION_LAYERS[1]: layer.kv_heads}.get(path)  # others are not rotated
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else rows


def _write_file(
    gguf: Any,
    path: Path,
    decoder: Decoder,
    vocabulary: Mapping[str, Any],
    entries: Sequence[GgufTensor],
    progress: Progress,
) -> None:
    """Write metadata, ``vocabulary`` and each tensor; raise ExportError if a number exceeds the range of its type."""
    (main, _), *_ = Counter(entry.type for entry in entries if len(entry.shape) == 2).most_common(1)
    with closing(gguf.GGUFWriter(path, decoder.architecture)) as writer:
        writer.add_type("model")
        writer.add_name("".join(sign for sign in Path(decoder.name).name[:100] if sign.isprintable()))
        writer.add_file_type(int(gguf.LlamaFileType[f"{'ALL' if main == 'F32' else 'MOSTLY'}_{main}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(len(decoder.layers))
        writer.add_context_length(decoder.context)
        writer.add_embedding_length(len(decoder.norm))
        writer.add_vocab_size(len(decoder.embedding))
        for key, number in _count_units(decoder).items():
            getattr(writer, f"add_{key}")(number)
        writer.add_layer_norm_rms_eps(decoder.epsilon)
        writer.add_rope_freq_base(decoder.base)
        for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
            add(decoder.head_dim)
        for key, value in vocabulary.items():
            getattr(writer, f"add_{key}")(value)
        for entry in entries:
            stored = gguf.GGMLQuantizationType[entry.type]
            block, size = gguf.GGML_QUANT_SIZES[stored]
            count = math.prod(entry.shape) // block * size
            # A type other than bytes tells the writer that the shape counts numbers.
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), count, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, entry in enumerate(entries):
            progress(i, 2 * len(entries), f"writing {entry.name}")
            values = encode(entry.read_floats(), entry.type, gguf)
            if values.dtype != np.uint8 and not np.isfinite(values).all():
                raise ExportError(f"{entry.name} holds numbers that {entry.type} does not reach; write f32 or bf16")
            writer.write_tensor_data(values)


def _count_units(decoder: Decoder) -> dict[str, int | list[int]]:
    """Return GGUF's key → heads or MLP width: one number for ``llama``, a list with one per layer for ``deci``."""
    per_layer = {
        "head_count": [layer.heads for layer in decoder.layers],
        "head_count_kv": [layer.kv_heads for layer in decoder.layers],
        "feed_forward_length": [layer.width for layer in decoder.layers],
    }
    return {key: values[0] if decoder.architecture == "llama" else values for key, values in per_layer.items()}


def _check_file(gguf: Any, path: Path, decoder: Decoder, entries: Sequence[GgufTensor], progress: Progress) -> Results:
    """Read a file back and compare it with ``entries``; return what was compared → result, or raise ExportError."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:  # buffered writes may fail without a word on a full disk
        problem = f"the file cannot be read back ({error}); the disk may be full: free some space, and write it again"
        raise ExportError(problem) from OSError(errno.EIO, os.strerror(errno.EIO))  # which gives the exit code
    for key, number in _count_units(decoder).items():
        field = f"attention.{key}" if key.startswith("head") else key
        if (stored := reader.get_field(f"{decoder.architecture}.{field}").contents()) != number:
            raise CheckError(f"the file says {key} = {stored}, the network has {number}; write it again")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if tensors.keys() != {entry.name for entry in entries}:
        raise ExportError("the file holds other tensors than were written; write it again")
    worst, squares, squared_errors = 0.0, 0.0, 0.0
    for i, entry in enumerate(entries):
        progress(len(entries) + i, 2 * len(entries), f"checking {entry.name}")  # the first half was writing
        tensor = tensors[entry.name]
        if tuple(tensor.shape[::-1]) != entry.shape or tensor.tensor_type.name != entry.type:
            raise ExportError(f"{entry.name} is {tensor.shape[::-1]} in {tensor.tensor_type.name}; write it again")
        rows = entry.read_floats().reshape(-1, entry.shape[-1])
        data = tensor.data.reshape(len(rows), -1)
        step = max(1, _CHUNK // rows.shape[-1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            back = gguf.quants.dequantize(np.ascontiguousarray(data[start : start + step]), tensor.tensor_type)
            difference = np.abs(part - back)
            limit = allowed_error(part, entry.type)
            wrong = back != _round_to(part, entry.type) if limit is None else ~(difference <= limit)
            if wrong.any():
                raise CheckError(f"{entry.name} is off by up to {difference.max():.3g} in the file; write it again")
            worst = max(worst, float(difference.max(initial=0)))
            squared_errors += float(np.square(difference).sum())
            squares += float(np.square(part).sum())
        # What was read of a mapped file counts as resident memory.
        with suppress(AttributeError, OSError, ValueError):  # no such advice on this system, or no mapping
            reader.data._mmap.madvise(mmap.MADV_DONTNEED)
    progress(2 * len(entries), 2 * len(entries), "checked")
    return {
        "architecture": decoder.architecture,
        "tensors": len(entries),
        "max_abs_diff": worst,
        "relative_rms": math.sqrt(squared_errors / squares) if squares else 0.0,
    }


def _round_to(values: Floats, type: str) -> Floats:
    """Return numbers rounded by torch to a GGUF type (F32, F16 or BF16), as float32."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return torch.from_numpy(values).to(dtypes[type]).float().numpy()


def _explain_types(entries: Sequence[GgufTensor], type: str) -> list[str]:
    """Return notes for the user on matrices that are stored in another type than ``type``, the requested one."""
    counts = Counter(entry.type for entry in entries if len(entry.shape) == 2 and entry.type != type)
    reasons = {
        WIDER: f"their rows are no multiple of {BLOCK}; widths pruned with --round {BLOCK} are",
        HEADS.get(type): "the head, and an embedding tied to it, lose too much in fewer bits",
    }
    return [f"{counts[wide]} of the matrices in {wide}: {reasons[wide]}" for wide in counts]


def encode(values: Floats, type: str, gguf: ModuleType) -> Encoded:
    """Return numbers in a GGUF type: F32 and F16 as floats, other types as the bytes of each row; ``gguf``: module."""
    with np.errstate(over="ignore"):
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type])


def allowed_error(values: Floats, type: str) -> Floats | None:
    """Return the largest allowed quantisation error of each number; ``None``: the type must round exactly.

    Each block of 32 numbers has a base b (its least number in Q4_1 and Q5_1, else 0) and a step s, such that the number
    e farthest from b lies on the grid b + q·s of the type's whole numbers q (``LEVELS``). A number x may be off by its
    distance to that grid, and by what rounding s and b to float16 adds: min over q of |x - b - q·s| + (|e - b| + |b|) ·
    (2⁻¹¹ + 2⁻²⁰) + (1 + max |q|) · 2⁻²⁵, where 2⁻²⁰ is for float32 and 2⁻²⁵ for subnormal float16.
    """
    if type not in LEVELS:
        return None
    low, high = LEVELS[type]
    blocks = values.reshape(-1, BLOCK)
    base = blocks.min(-1, keepdims=True) if low == 0 else np.zeros((1, 1), np.float32)
    above = blocks - base
    farthest = np.take_along_axis(above, np.abs(above).argmax(-1, keepdims=True), -1)
    step = farthest / (low or high)
    nearest = np.rint(np.divide(above, step, out=np.zeros_like(above), where=step != 0)).clip(low, high) * step
    scales = (np.abs(farthest) + np.abs(base)) * (2**-11 + 2**-20) + (1 + max(-low, high)) * 2.0**-25
    return (np.abs(above - nearest) + scales).reshape(values.shape)
