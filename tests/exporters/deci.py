"""llama.cpp's graphs ``llama`` and ``deci`` in float64, from a GGUF file alone: an independent reading of one.

Where llama.cpp does something odd (deci forgets the attention of a layer without an MLP, and takes the size of a head
from the first layer), so does this.
"""

from pathlib import Path

import gguf
import torch
from torch import Tensor


class File:
    """A GGUF file, read."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.said = {name: field.contents() for name, field in reader.fields.items()}
        self.architecture = self.said["general.architecture"]
        self.kinds = {one.name: one.tensor_type.name for one in reader.tensors}
        self.tensors = {
            one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy()).double()
            for one in reader.tensors
        }

    def number(self, name: str):
        """What the file says of its network."""
        return self.said[f"{self.architecture}.{name}"]

    def per_layer(self, name: str) -> list[int]:
        """The same for every layer; only deci takes a list."""
        value, layers = self.number(name), self.number("block_count")
        assert isinstance(value, int) or self.architecture == "deci"
        values = [value] * layers if isinstance(value, int) else value
        assert len(values) == layers
        return values

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A matrix and, where there is one, its bias."""
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def normed(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm; the file's ε is a float32."""
        epsilon = self.number("attention.layer_norm_rms_epsilon")
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * self.tensors[f"{name}.weight"]


def rotated(file: File, x: Tensor) -> Tensor:
    """Neighbouring channels turned by their position, (tokens, heads, channels)."""
    dim = file.number("rope.dimension_count")
    assert dim == x.shape[-1]
    frequencies = file.number("rope.freq_base") ** (-torch.arange(0, dim, 2).double() / dim)
    if "rope_freqs.weight" in file.tensors:
        frequencies = frequencies / file.tensors["rope_freqs.weight"]
    angles = torch.arange(len(x)).double()[:, None, None] * frequencies
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


def attention(file: File, i: int, x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """What the attention of a layer adds."""
    first = file.per_layer("attention.head_count")[0]
    assert first > 0, "llama.cpp reads the size of a head from the first layer"
    dim = file.number("attention.key_length")
    q, k, v = (file.linear(f"blk.{i}.attn_{part}", x).unflatten(-1, (-1, dim)) for part in "qkv")
    assert q.shape[1] == heads and k.shape[1] == v.shape[1] == kv_heads
    q, k = rotated(file, q), rotated(file, k)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return file.linear(f"blk.{i}.attn_output", torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))


def logits(path: Path, ids: Tensor) -> Tensor:
    """What the network in a file says after each token.

    Args:
        path: A GGUF file.
        ids: Tokens, (tokens,).

    Returns:
        Logits, (tokens, vocabulary).
    """
    file = File(path)
    x = file.tensors["token_embd.weight"][ids]
    counts = (file.per_layer(key) for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"))
    for i, (heads, kv_heads, width) in enumerate(zip(*counts, strict=True)):
        y = x + attention(file, i, file.normed(f"blk.{i}.attn_norm", x), heads, kv_heads) if heads else x
        if width == 0:
            continue
        inner = file.normed(f"blk.{i}.ffn_norm", y)
        gate = torch.nn.functional.silu(file.linear(f"blk.{i}.ffn_gate", inner))
        assert gate.shape[-1] == width
        x = y + file.linear(f"blk.{i}.ffn_down", gate * file.linear(f"blk.{i}.ffn_up", inner))
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    return file.normed("output_norm", x) @ file.tensors[head].T
