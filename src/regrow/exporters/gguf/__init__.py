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
from regrow.exporters import CheckError, ExportError, Written
from regrow.exporters.gguf.network import NORMS, PARTS, Decoder, describe_decoder, query_scale
from regrow.exporters.gguf.tokens import Vocabulary, vocabulary, write_vocabulary
from regrow.nets.language import ATTENTION, MLP, DecoderLayer
from regrow.nets.loaded import needs
from regrow.store.atomic import atomic_write, check_output

__all__ = ["write"]
Floats: TypeAlias = NDArray[np.float32]
Encoded: TypeAlias = NDArray[np.float32 | np.float16 | np.uint8]

TYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16", "q8_0": "Q8_0", "q6_k": "Q6_K"}  # dtype → GGUF type
BLOCK = {"Q8_0": 32, "Q6_K": 256}  # GGUF type → what the row length must be a multiple of
FALLBACK = {"Q6_K": "Q8_0", "Q8_0": "F16"}  # GGUF type → the one that is used if the row length does not fit
_SUPER, _PART = 256, 16
_STEPS = np.linspace(29.5, 35.5, 9, dtype=np.float32)
_CHUNK, _Q6_CHUNK = 1 << 22, 1 << 20  # numbers that are checked, or quantised, at a time


@dataclass(frozen=True)
class Piece:
    """A tensor of the file: its name and type in GGUF, its shape as in torch, and a function that reads it."""

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Tensor]

    def floats(self) -> Floats:
        """Return its numbers as a float32 array."""
        return np.ascontiguousarray(self.read().detach().to("cpu", torch.float32).numpy())


def write(
    model: nn.Module,
    out: str | Path,
    *,
    dtype: str = "f16",
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> Written:
    """Write a GGUF file atomically, read every tensor back, and compare it with the network.

    Only one tensor at a time is held in float32. Norms and biases are always stored in float32. Matrices whose row
    length does not fit a type (Q6_K: multiples of 256, Q8_0: of 32) are stored in the next wider one.
    """
    try:
        import gguf
    except ImportError:
        raise ExportError(str(needs("export", "gguf"))) from None
    out = Path(out)
    check_output(out, (".gguf",))
    decoder = describe_decoder(model)
    words = vocabulary(getattr(model, "tokenizer", None), rows=len(decoder.embedding))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def read(tensor: Tensor) -> Tensor:
        return weights[names[id(tensor)]] if weights is not None and id(tensor) in names else tensor.detach()

    pieces = list(_pieces(decoder, TYPES[dtype], read))
    with atomic_write(check_output(out, (".gguf",))) as temporary:
        _write_file(gguf, temporary, decoder, words, pieces, progress)
        checked = _check_file(gguf, temporary, decoder, pieces, progress)
    notes = (*decoder.notes, *words.notes, *_explain_types(decoder, pieces, TYPES[dtype]))
    return Written(out, out.stat().st_size, checked, notes)


def _pieces(decoder: Decoder, type: str, read: Callable[[Tensor], Tensor]) -> Iterator[Piece]:
    """Yield every tensor of the file, in order; ``read`` returns the numbers of a tensor of the network."""
    width, embedding = len(decoder.norm), decoder.embedding

    def matrix(name: str, shape: Sequence[int], values: Callable[[], Tensor]) -> Piece:
        return Piece(f"{name}.weight", tuple(shape), fitting_type(type, shape[1]), values)

    def plain(name: str, values: Tensor) -> Piece:
        return Piece(name, tuple(values.shape), "F32", lambda: read(values))

    yield matrix("token_embd", embedding.shape, lambda: read(embedding))
    if decoder.factors is not None:
        yield plain("rope_freqs.weight", decoder.factors)
    for i, layer in enumerate(decoder.layers):
        for norm, size, parts in zip(
            NORMS, (layer.heads * decoder.head_dim, layer.width), (ATTENTION, MLP), strict=True
        ):
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
                        yield Piece(f"{name}.bias", tuple(bias.shape), "F32", partial(permuted, bias))
                else:
                    shape = (width, size) if path.endswith(("o_proj", "down_proj")) else (size, width)
                    yield matrix(name, shape, partial(torch.zeros, shape))
    yield plain("output_norm.weight", decoder.norm)
    if decoder.head is not embedding:
        yield matrix("output", decoder.head.shape, lambda: read(decoder.head))


def _read_permuted(
    decoder: Decoder, layer: DecoderLayer, path: str, read: Callable[[Tensor], Tensor], tensor: Tensor
) -> Tensor:
    """Return a weight or bias with its rows in llama.cpp's order: pair i of a query or key head is rows 2i, 2i + 1."""
    rows = read(tensor)
    rows = rows.float() if rows.dim() == 1 else rows  # biases are stored so
    if path == ATTENTION[0] and (scale := query_scale(layer, decoder.scale)) != 1:
        rows = rows.float() * scale
    heads = dict(zip(ATTENTION, (layer.heads, layer.kv_heads), strict=False)).get(path, 0)
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else rows


def _write_file(
    gguf: Any, path: Path, decoder: Decoder, words: Vocabulary, pieces: Sequence[Piece], progress: Progress
) -> None:
    """Write the file: its metadata, then tensor after tensor."""
    (main, _), *_ = Counter(piece.type for piece in pieces if len(piece.shape) == 2).most_common(1)
    with closing(gguf.GGUFWriter(path, decoder.architecture)) as writer:
        writer.add_type("model")
        writer.add_name("".join(sign for sign in Path(decoder.name).name[:100] if sign.isprintable()))
        writer.add_file_type(int(gguf.LlamaFileType[f"{'ALL' if main == 'F32' else 'MOSTLY'}_{main}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(len(decoder.layers))
        writer.add_context_length(decoder.context)
        writer.add_embedding_length(len(decoder.norm))
        writer.add_vocab_size(len(decoder.embedding))
        for key, number in _counts(decoder).items():
            getattr(writer, f"add_{key}")(number)
        writer.add_layer_norm_rms_eps(decoder.epsilon)
        writer.add_rope_freq_base(decoder.base)
        for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
            add(decoder.head_dim)
        write_vocabulary(words, writer)
        for piece in pieces:
            stored = gguf.GGMLQuantizationType[piece.type]
            block, size = gguf.GGML_QUANT_SIZES[stored]
            count = math.prod(piece.shape) // block * size
            # A type other than bytes tells the writer that the shape counts numbers.
            writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), count, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, piece in enumerate(pieces):
            progress(i, 2 * len(pieces), f"writing {piece.name}")
            values = encode(piece.floats(), piece.type, gguf)
            if values.dtype != np.uint8 and not np.isfinite(values).all():
                raise ExportError(f"{piece.name} holds numbers that {piece.type} does not reach; write f32 or bf16")
            writer.write_tensor_data(values)


def _counts(decoder: Decoder) -> dict[str, int | list[int]]:
    """Return what may differ between layers: one number for ``llama``, a list per layer for ``deci``."""
    every = {
        "head_count": [layer.heads for layer in decoder.layers],
        "head_count_kv": [layer.kv_heads for layer in decoder.layers],
        "feed_forward_length": [layer.width for layer in decoder.layers],
    }
    return {key: values[0] if decoder.architecture == "llama" else values for key, values in every.items()}


def _check_file(
    gguf: Any, path: Path, decoder: Decoder, pieces: Sequence[Piece], progress: Progress
) -> Mapping[str, float | int | str]:
    """Read a file back and compare it, tensor by tensor, with the network; raise ExportError if it differs."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:  # buffered writes may fail without a word on a full disk
        why = f"the file cannot be read back ({error}); the disk may be full: free some space, and write it again"
        raise ExportError(why) from OSError(errno.EIO, os.strerror(errno.EIO))
    for key, number in _counts(decoder).items():
        field = f"attention.{key}" if key.startswith("head") else key
        if (stored := reader.get_field(f"{decoder.architecture}.{field}").contents()) != number:
            raise CheckError(f"the file says {key} = {stored}, the network has {number}; write it again")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if tensors.keys() != {piece.name for piece in pieces}:
        raise ExportError("the file holds other tensors than were written; write it again")
    worst, total, off = 0.0, 0.0, 0.0
    for i, piece in enumerate(pieces):
        progress(len(pieces) + i, 2 * len(pieces), f"checking {piece.name}")
        tensor = tensors[piece.name]
        if tuple(tensor.shape[::-1]) != piece.shape or tensor.tensor_type.name != piece.type:
            raise ExportError(f"{piece.name} is {tensor.shape[::-1]} in {tensor.tensor_type.name}; write it again")
        rows = piece.floats().reshape(-1, piece.shape[-1])
        data = tensor.data.reshape(len(rows), -1)
        for start in range(0, len(rows), step := max(1, _CHUNK // rows.shape[-1])):
            part = rows[start : start + step]
            back = gguf.quants.dequantize(np.ascontiguousarray(data[start : start + step]), tensor.tensor_type)
            difference = np.abs(part - back)
            limit = allowed_error(part, piece.type)
            wrong = back != _rounded(part, piece.type) if limit is None else difference > limit
            if wrong.any():
                raise CheckError(f"{piece.name} is off by up to {difference.max():.3g} in the file; write it again")
            worst = max(worst, float(difference.max(initial=0)))
            off, total = off + float(np.square(difference).sum()), total + float(np.square(part).sum())
        # What was read of a mapped file counts as resident memory.
        with suppress(AttributeError, OSError, ValueError):  # no such advice on this system, or no mapping
            reader.data._mmap.madvise(mmap.MADV_DONTNEED)
    progress(2 * len(pieces), 2 * len(pieces), "checked")
    return {
        "architecture": decoder.architecture,
        "tensors": len(pieces),
        "max_abs_diff": worst,
        "relative_rms": math.sqrt(off / total) if total else 0.0,
    }


def _rounded(values: Floats, type: str) -> Floats:
    """Return numbers as torch rounds them to a floating-point type."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return torch.from_numpy(values).to(dtypes[type]).float().numpy()


def _explain_types(decoder: Decoder, pieces: Sequence[Piece], type: str) -> Iterator[str]:
    """Yield a note on matrices that are stored in another type than requested."""
    matrices = [piece for piece in pieces if len(piece.shape) == 2]
    wider = [piece for piece in matrices if piece.type != type]
    if not wider:
        return
    rows, width = sorted({piece.shape[1] for piece in wider}), len(decoder.norm)
    lengths = ", ".join(map(str, rows[:4])) + (", …" if len(rows) > 4 else "")
    types = " or ".join(sorted({piece.type for piece in wider}))
    note = f"{len(wider)} of {len(matrices)} matrices are {types}: their rows ({lengths} numbers) are no multiple of "
    note += f"{BLOCK[type]}; widths pruned with --round {BLOCK[type]} are"
    yield f"{note}, but the network's own width, {width}, is not" if width in rows else note


def fitting_type(type: str, row: int) -> str:
    """Return the number type for rows of a length: the requested one, or the next one whose blocks fill the row.

    >>> [fitting_type("Q6_K", row) for row in (512, 576, 1229)]
    ['Q6_K', 'Q8_0', 'F16']
    """
    while row % BLOCK.get(type, 1):
        type = FALLBACK[type]
    return type


def encode(values: Floats, type: str, gguf: ModuleType) -> Encoded:
    """Return a tensor in a GGUF type: float32 or float16, or bytes with the same number of rows."""
    if type != "Q6_K":
        with np.errstate(over="ignore"):
            return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type])
    rows = values.reshape(-1, values.shape[-1])
    out = np.empty((len(rows), values.shape[-1] // _SUPER * 210), np.uint8)
    step = max(1, _Q6_CHUNK // values.shape[-1])
    for start in range(0, len(rows), step):
        blocks = rows[start : start + step].reshape(-1, _SUPER)
        out[start : start + step] = q6_k(blocks).reshape(-1, out.shape[-1])
    return out.reshape(*values.shape[:-1], -1)


def q6_k(blocks: Floats) -> NDArray[np.uint8]:
    """Quantise blocks of 256 numbers to Q6_K, which package ``gguf`` does not write: x ≈ d·s·q.

    A block keeps one d (float16), 16 whole numbers s (8 bits, one for 16 numbers) and 256 whole numbers q (6 bits).

    The scale of 16 numbers is searched among a few, by the squared error weighted with x² (what is large matters more);
    for given whole numbers q the best scale is Σx³q / Σx²q². The 210 bytes of a block are low halves of q, its high
    bits, s, d.
    """
    n = len(blocks)
    parts = np.ascontiguousarray(blocks, np.float32).reshape(n, _SUPER // _PART, _PART)
    scales = _scales(parts)
    widest = np.take_along_axis(scales, np.abs(scales).argmax(-1, keepdims=True), -1)
    d = (widest / -128).astype(np.float16)
    s = np.clip(np.rint(_over(scales, d.astype(np.float32))), -128, 127)
    q = np.clip(np.rint(_over(parts, (d.astype(np.float32) * s)[..., None])), -32, 31).astype(np.int8) + 32
    # A half of 128 numbers is four rows of 32; two rows share a byte for low bits, all four share one for high bits.
    four = q.reshape(n, 2, 4, 32).astype(np.uint8)
    low = four & 15
    low = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    high = np.bitwise_or.reduce((four >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    pieces = (low.reshape(n, -1), high.reshape(n, -1), s.astype(np.int8).view(np.uint8), d.view(np.uint8))
    return np.concatenate(pieces, axis=1)


def _scales(parts: Floats) -> Floats:
    """Return the best scale of each 16 numbers, ``[blocks, 16]``."""
    peak = np.take_along_axis(parts, np.abs(parts).argmax(-1, keepdims=True), -1)
    weights = parts * parts
    best = np.zeros(parts.shape[:-1], np.float32)
    gained = np.full(parts.shape[:-1], -1, np.float32)
    for step in _STEPS:
        # The largest number of the 16 goes to the negative side, which reaches one further.
        q = np.clip(np.rint(_over(parts, peak / -step)), -32, 31)
        cross, square = (weights * parts * q).sum(-1), (weights * q * q).sum(-1)
        scale = _over(cross, square)
        better = cross * scale > gained
        best, gained = np.where(better, scale, best), np.where(better, cross * scale, gained)
    return best


def _over(a: Floats, b: Floats) -> Floats:
    """Divide elementwise; 0 where the divisor is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def allowed_error(values: Floats, type: str) -> Floats | None:
    """Return the largest allowed quantisation error of each number; ``None`` if it must be exact rounding.

    With the largest magnitude m in a block: Q8_0 rounds to steps of m/127, an error of m/254, and its float16 scale
    adds an error of 2⁻¹¹ m; Q6_K has 32 steps, whose scale is itself an integer of 8 bits.
    """
    if type not in BLOCK:
        return None
    size = BLOCK[type]
    largest = np.abs(values.reshape(-1, size)).max(-1, keepdims=True)
    share, least = (1 / 254 + 2**-11, 127 * 2.0**-25) if type == "Q8_0" else (1 / 36, 128 * 32 * 2.0**-25)
    return np.broadcast_to(largest * share + least, (len(largest), size)).reshape(values.shape)
