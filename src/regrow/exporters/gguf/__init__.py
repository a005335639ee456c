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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow.core.progress import Progress, silent
from regrow.exporters.gguf.network import NORMS, PARTS, Decoder, GgufLayer, describe_decoder
from regrow.exporters.gguf.quants import BLOCK, TYPES, Floats, allowed_error, encode, fitting_type
from regrow.exporters.gguf.tokens import Vocabulary, vocabulary, write_vocabulary
from regrow.exporters.written import CheckError, ExportError, Written
from regrow.nets.language import ATTENTION, MLP
from regrow.nets.loaded import needs
from regrow.store.atomic import atomic_write, check_output

__all__ = ["write"]
_CHUNK = 1 << 22


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
        for norm, present, size, parts in (
            ("input_layernorm", layer.has_attention, layer.heads * decoder.head_dim, ATTENTION),
            ("post_attention_layernorm", layer.has_mlp, layer.width, MLP),
        ):
            if not size:
                continue
            gain = getattr(layer.module, norm).weight if present else torch.ones(width)
            yield plain(f"blk.{i}.{NORMS[norm]}.weight", gain)
            for path in parts:
                name = f"blk.{i}.{PARTS[path]}"
                if present:
                    linear = layer.block.linear[path]
                    yield matrix(name, linear.weight.shape, partial(_permuted, layer, path, read, linear.weight))
                    if (bias := linear.bias) is not None:
                        values = partial(_permuted, layer, path, read, bias)
                        yield Piece(f"{name}.bias", tuple(bias.shape), "F32", values)
                else:
                    shape = (width, size) if path.endswith(("o_proj", "down_proj")) else (size, width)
                    yield matrix(name, shape, partial(torch.zeros, shape))
    yield plain("output_norm.weight", decoder.norm)
    if decoder.head is not embedding:
        yield matrix("output", decoder.head.shape, lambda: read(decoder.head))


def _permuted(layer: GgufLayer, path: str, read: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return a weight or bias with its rows in llama.cpp's order: pair i of a query or key head is rows 2i, 2i + 1."""
    rows = read(tensor)
    rows = rows.float() if rows.dim() == 1 else rows  # biases are stored so
    if path == "self_attn.q_proj" and abs(layer.scale - 1) > 1e-6:
        rows = rows.float() * layer.scale
    heads = {"self_attn.q_proj": layer.heads, "self_attn.k_proj": layer.kv_heads}.get(path, 0)
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
