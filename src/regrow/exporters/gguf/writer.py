"""Write GGUF for llama.cpp: architecture ``llama`` if all layers are alike, else ``deci``.

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
from regrow.exporters.gguf.network import NORMS, PARTS, Decoder, GgufLayer, describe_decoder, parts_present
from regrow.exporters.gguf.quants import BLOCK, KINDS, Floats, allowed_error, encode, kind_for
from regrow.exporters.gguf.tokens import Vocabulary, vocabulary, write_vocabulary
from regrow.exporters.written import CheckError, ExportError, Written
from regrow.nets.blocks import ATTENTION, MLP
from regrow.nets.loaded import needs
from regrow.store.atomic import atomic_write, check_output
from regrow.store.errors import StoreError

_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q6_K": "MOSTLY_Q6_K",
}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Piece:
    """A tensor to be written to the file.

    Args:
        name: Its name in GGUF.
        shape: Its shape as in torch.
        kind: GGUF's name of the type in which it is stored.
        values: Function that returns its numbers.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    values: Callable[[], Tensor]

    def floats(self) -> Floats:
        """Return its numbers as a float32 array."""
        return np.ascontiguousarray(self.values().detach().to("cpu", torch.float32).numpy())


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

    Args:
        model: A Llama-like decoder of any widths, with its tokenizer as ``model.tokenizer`` (as :func:`regrow.load`
            returns it); without one llama.cpp only takes token ids.
        out: The file to make, or the ``.gguf`` file to replace.
        dtype: The type of matrices: ``f32``, ``bf16``, ``f16``, ``q8_0`` or ``q6_k``.
        weights: Name → parameter, where the network has none of their numbers; ``None``: they are in the network.
        progress: Called with (steps done, steps in all, description).

    Returns:
        The file, its architecture, and the largest difference between a stored number and the network's.

    Raises:
        ExportError: If llama.cpp would compute something else, or the file cannot be written or differs from the
            network.
    """
    gguf, out = _package(), Path(out)
    if dtype not in KINDS:
        raise ExportError(f"dtype={dtype!r} is no type that is written here; known are {', '.join(KINDS)}")
    if out.is_dir():
        raise ExportError(f"{out} is a folder; give the name of the file to write, such as {out / 'model.gguf'}")
    _place(out)
    decoder = describe_decoder(model)
    words = vocabulary(getattr(model, "tokenizer", None), rows=len(decoder.embedding))
    names = {id(one): name for name, one in model.named_parameters()}

    def read(tensor: Tensor) -> Tensor:
        return weights[names[id(tensor)]] if weights is not None and id(tensor) in names else tensor.detach()

    pieces = list(_pieces(decoder, KINDS[dtype], read))
    try:
        with atomic_write(_place(out)) as temporary:
            _put(gguf, temporary, decoder, words, pieces, progress)
            checked = _checked(gguf, temporary, decoder, pieces, progress)
    except StoreError as error:
        raise ExportError(str(error)) from None
    notes = (*decoder.notes, *words.notes, *_fallen(decoder, pieces, KINDS[dtype]))
    return Written(out, out.stat().st_size, checked, notes)


def _place(out: Path) -> Path:
    try:
        return check_output(out, (".gguf",))
    except StoreError as error:
        raise ExportError(str(error)) from error


def _pieces(decoder: Decoder, kind: str, read: Callable[[Tensor], Tensor]) -> Iterator[Piece]:
    """Yield every tensor of the file, in order; ``read`` returns the numbers of one of the network."""
    width, embedding = len(decoder.norm), decoder.embedding

    def matrix(name: str, shape: tuple[int, ...], values: Callable[[], Tensor]) -> Piece:
        return Piece(f"{name}.weight", shape, kind_for(kind, shape[1]), values)

    def plain(name: str, values: Tensor) -> Piece:
        return Piece(name, tuple(values.shape), "F32", lambda: read(values))

    def turned(turn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        return turn(read(tensor))

    yield matrix("token_embd", tuple(embedding.shape), lambda: read(embedding))
    if decoder.factors is not None:
        yield plain("rope_freqs.weight", decoder.factors)
    for i, one in enumerate(decoder.layers):
        for norm, there, parts in zip(NORMS, parts_present(one), (ATTENTION, MLP), strict=True):
            if not there and not (one.heads if parts is ATTENTION else one.width):
                continue
            gain = getattr(one.module, norm).weight if there else torch.ones(width)
            yield plain(f"blk.{i}.{NORMS[norm]}.weight", gain)
            for path in parts:
                name = f"blk.{i}.{PARTS[path]}"
                if not there:
                    inner = decoder.head_dim if parts is ATTENTION else one.width
                    shape = (width, inner) if path.endswith(("o_proj", "down_proj")) else (inner, width)
                    yield matrix(name, shape, partial(torch.zeros, shape))
                    continue
                linear, turn = one.block.linear[path], _turned(one, path)
                yield matrix(name, tuple(linear.weight.shape), partial(turned, turn, linear.weight))
                if (bias := linear.bias) is not None:
                    yield Piece(f"{name}.bias", tuple(bias.shape), "F32", partial(turned, turn, bias))
    yield plain("output_norm.weight", decoder.norm)
    if decoder.head is not embedding:
        yield matrix("output", tuple(decoder.head.shape), lambda: read(decoder.head))


def _turned(layer: GgufLayer, path: str) -> Callable[[Tensor], Tensor]:
    """Return the function that permutes rows for llama.cpp: pair i of a query or key head becomes rows 2i, 2i + 1."""
    heads = {"self_attn.q_proj": layer.heads, "self_attn.k_proj": layer.kv_heads}.get(path, 0)
    scale = layer.scale if path == "self_attn.q_proj" else 1.0

    def turn(rows: Tensor) -> Tensor:
        rows = rows.float() if rows.dim() == 1 else rows  # biases are stored so
        if abs(scale - 1) > 1e-6:
            rows = rows.float() * scale
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else rows

    return turn


def _put(
    gguf: Any,
    path: Path,
    decoder: Decoder,
    words: Vocabulary,
    pieces: Sequence[Piece],
    progress: Progress,
) -> None:
    """Write the file: its metadata, then tensor after tensor."""
    with closing(gguf.GGUFWriter(path, decoder.architecture)) as writer:
        _tell(gguf, writer, decoder, Counter(one.kind for one in pieces if len(one.shape) == 2).most_common(1)[0][0])
        write_vocabulary(words, writer)
        kinds = gguf.GGMLQuantizationType
        for one in pieces:
            block, size = gguf.GGML_QUANT_SIZES[kinds[one.kind]]
            count = math.prod(one.shape) // block * size
            # A type other than bytes tells the writer that the shape counts numbers.
            writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), count, kinds[one.kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, one in enumerate(pieces):
            progress(i, 2 * len(pieces), f"writing {one.name}")
            values = encode(one.floats(), one.kind, gguf)
            if values.dtype != np.uint8 and not np.isfinite(values).all():
                raise ExportError(f"{one.name} holds numbers that {one.kind} does not reach; write f32 or bf16")
            writer.write_tensor_data(values)


def _tell(gguf: Any, writer: Any, decoder: Decoder, kind: str) -> None:
    """Write the metadata of the network and the main number type."""
    writer.add_type("model")
    writer.add_name("".join(sign for sign in Path(decoder.name).name[:100] if sign.isprintable()))
    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[kind]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(decoder.layers))
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(len(decoder.norm))
    writer.add_vocab_size(len(decoder.embedding))
    for key, values in _counts(decoder).items():
        getattr(writer, f"add_{key}")(values)
    writer.add_layer_norm_rms_eps(decoder.epsilon)
    writer.add_rope_freq_base(decoder.base)
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(decoder.head_dim)


def _counts(decoder: Decoder) -> dict[str, int | list[int]]:
    """Return what may differ between layers: one number for ``llama``, a list per layer for ``deci``."""
    every = {
        "head_count": [one.heads for one in decoder.layers],
        "head_count_kv": [one.kv_heads for one in decoder.layers],
        "feed_forward_length": [one.width for one in decoder.layers],
    }
    return {key: values[0] if decoder.architecture == "llama" else values for key, values in every.items()}


def _checked(
    gguf: Any, path: Path, decoder: Decoder, pieces: Sequence[Piece], progress: Progress
) -> Mapping[str, float | int | str]:
    """Read a file back and compare it, tensor by tensor, with the network.

    Raises:
        ExportError: If anything is missing, or differs by more than its type allows.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:  # buffered writes may fail without a word on a full disk
        why = f"the file cannot be read back ({error}); the disk may be full: free some space, and write it again"
        raise ExportError(why) from OSError(errno.EIO, os.strerror(errno.EIO))
    for key, values in _counts(decoder).items():
        place = f"attention.{key}" if key.startswith("head") else key
        if (said := reader.get_field(f"{decoder.architecture}.{place}").contents()) != values:
            raise CheckError(f"the file says {key} = {said}, the network has {values}; write it again")
    stored = {one.name: one for one in reader.tensors}
    if stored.keys() != {one.name for one in pieces}:
        raise ExportError("the file holds other tensors than were written; write it again")
    worst, total, off = 0.0, 0.0, 0.0
    for i, piece in enumerate(pieces):
        progress(len(pieces) + i, 2 * len(pieces), f"checking {piece.name}")
        here = stored[piece.name]
        if tuple(here.shape[::-1]) != piece.shape or here.tensor_type.name != piece.kind:
            raise ExportError(f"{piece.name} is {here.shape[::-1]} in {here.tensor_type.name}; write it again")
        rows = piece.floats().reshape(-1, piece.shape[-1])
        data = here.data.reshape(len(rows), -1)
        for start in range(0, len(rows), step := max(1, _CHUNK // rows.shape[-1])):
            part = rows[start : start + step]
            back = gguf.quants.dequantize(np.ascontiguousarray(data[start : start + step]), here.tensor_type)
            difference = np.abs(part - back)
            limit = allowed_error(part, piece.kind)
            wrong = back != _rounded(part, piece.kind) if limit is None else difference > limit
            if wrong.any():
                raise CheckError(f"{piece.name} is off by up to {difference.max():.3g} in the file; write it again")
            worst = max(worst, float(difference.max(initial=0)))
            off, total = off + float(np.square(difference).sum()), total + float(np.square(part).sum())
        _release_pages(reader)
    progress(2 * len(pieces), 2 * len(pieces), "checked")
    return {
        "architecture": decoder.architecture,
        "tensors": len(pieces),
        "max_abs_diff": worst,
        "relative_rms": math.sqrt(off / total) if total else 0.0,
    }


def _release_pages(reader: Any) -> None:
    """Give back the pages of a mapped file that were read, which count as resident memory."""
    with suppress(AttributeError, OSError, ValueError):  # no such advice on this system, or no mapping
        reader.data._mmap.madvise(mmap.MADV_DONTNEED)


def _rounded(values: Floats, kind: str) -> Floats:
    """Return numbers as torch rounds them to a floating-point type."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return torch.from_numpy(values).to(types[kind]).float().numpy()


def _fallen(decoder: Decoder, pieces: Sequence[Piece], kind: str) -> Iterator[str]:
    """Yield a note on matrices that are stored in another type than requested."""
    matrices = [one for one in pieces if len(one.shape) == 2]
    fallen = [one for one in matrices if one.kind != kind]
    if not fallen:
        return
    rows, own = sorted({one.shape[1] for one in fallen}), len(decoder.norm)
    lengths = ", ".join(map(str, rows[:4])) + (", …" if len(rows) > 4 else "")
    kinds = " or ".join(sorted({one.kind for one in fallen}))
    note = f"{len(fallen)} of {len(matrices)} matrices are {kinds}: their rows ({lengths} numbers) are no multiple of "
    note += f"{BLOCK[kind]}; widths pruned with --round {BLOCK[kind]} are"
    yield f"{note}, but the network's own width, {own}, is not" if own in rows else note


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError(str(needs("export", "gguf"))) from None
    return gguf
