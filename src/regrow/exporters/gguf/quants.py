"""Number types of GGUF files: which type fits a row length, Q6_K encoding in numpy, and allowed errors.

Package ``gguf`` reads every type and writes F32, F16, BF16 and Q8_0; of the K-quants it writes none. Q6_K keeps, of
each 256 numbers of a row, one number d (float16), 16 whole numbers s (8 bits, one for 16 numbers) and 256 whole numbers
q (6 bits): x ≈ d·s·q.
"""

from types import ModuleType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Encoded: TypeAlias = NDArray[np.float32 | np.float16 | np.uint8]

TYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16", "q8_0": "Q8_0", "q6_k": "Q6_K"}
"""dtype of a matrix in regrow → its name in GGUF."""

BLOCK = {"Q8_0": 32, "Q6_K": 256}
"""GGUF type → what the row length must be a multiple of."""

FALLBACK = {"Q6_K": "Q8_0", "Q8_0": "F16"}
"""GGUF type → the type that is used instead if the row length does not fit."""

_SUPER, _PART = 256, 16
_STEPS = np.linspace(29.5, 35.5, 9, dtype=np.float32)
_CHUNK = 1 << 20


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
    step = max(1, _CHUNK // values.shape[-1])
    for start in range(0, len(rows), step):
        blocks = rows[start : start + step].reshape(-1, _SUPER)
        out[start : start + step] = q6_k(blocks).reshape(-1, out.shape[-1])
    return out.reshape(*values.shape[:-1], -1)


def q6_k(blocks: Floats) -> Bytes:
    """Quantise blocks of 256 numbers to Q6_K.

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
