"""A replacement for ``nn.MultiheadAttention`` whose heads can be pruned."""

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value layers, for any number and width of heads.

    It has copies of the weights of ``old``, and its sizes, dropout, order of dimensions and mode.
    Source: Vaswani et al., 2017, section 3.2.2.
    """

    in_proj_bias = None  # torch's encoder layers look here for their fused path, which knows no cut heads
    _qkv_same_embed_dim = False

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        # Heads of values may be cut narrower than those of queries and keys.
        self.num_heads, self.head_dim, self.v_head_dim = old.num_heads, old.head_dim, old.head_dim
        self.batch_first, self.dropout = old.batch_first, old.dropout
        if old.in_proj_weight is not None:
            weights = old.in_proj_weight.chunk(3)
        else:
            weights = (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight)
        biases = (None,) * 3 if old.in_proj_bias is None else old.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_copy_to_linear, weights, biases)
        self.out_proj = _copy_to_linear(old.out_proj.weight, old.out_proj.bias)
        self.train(old.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes and returns what ``nn.MultiheadAttention`` does; ValueError for ``is_causal`` without ``attn_mask``."""
        # is_causal is only a hint for a faster kernel: attn_mask is applied in any case.
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal, and there is no attn_mask; give it")
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self.q_proj(query).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(key).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(value).unflatten(-1, (self.num_heads, self.v_head_dim)).transpose(1, 2)
        mask = _merge_masks(attn_mask, key_padding_mask, self.num_heads, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            scores = scores if mask is None else scores + mask
            weights = F.dropout(scores.softmax(-1), dropout)  # dropout is 0 in eval mode
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if unbatched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights


def replace_attention(model: nn.Module, names: Container[str] | None = None) -> nn.Module:
    """Replace every ``nn.MultiheadAttention`` by :class:`Attention` in place, so that heads can be pruned.

    Modules with extra entries (``add_bias_kv``, ``add_zero_attn``) stay as they are; their heads cannot be pruned.

    Args:
        model: Any network. It computes the same afterwards, up to rounding; the names of its weights change.
        names: The weight names that the network must have afterwards: only modules with such a weight are replaced; all
            if ``None``.

    Returns:
        The same model, or its replacement if the model itself is an ``nn.MultiheadAttention``.

    >>> layer = replace_attention(nn.TransformerEncoderLayer(6, 3, 8, batch_first=True))
    >>> type(layer.self_attn).__name__, layer.self_attn.q_proj.weight.shape
    ('Attention', torch.Size([6, 6]))
    """
    replaced: dict[nn.Module, Attention] = {}  # one that two modules share stays shared
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module not in replaced:
            if type(module) is not nn.MultiheadAttention or module.bias_k is not None or module.add_zero_attn:
                continue
            if names is not None and f"{path}.q_proj.weight".lstrip(".") not in names:
                continue
            replaced[module] = Attention(module)
        if not path:
            return replaced[module]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, replaced[module])
    return model


def _copy_to_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of a weight ``[out, in]`` and a bias ``[out]``; ``None``: without bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return linear


def _merge_masks(attn_mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Return one mask, to be added to scores ``[batch, head, query, key]``: the sum of both; ``None`` without any.

    ``attn_mask``: ``[query, key]`` or ``[batch · heads, query, key]``; ``padding``: ``[batch, key]``. True in a bool
    mask hides a key, and becomes −∞ in ``dtype``; other masks are added as they are.
    """
    total: Tensor | None = None
    for mask, is_padding in ((attn_mask, False), (padding, True)):
        if mask is None:
            continue
        added = mask
        if mask.dtype == torch.bool:
            added = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
        if is_padding:
            added = added.reshape(-1, 1, 1, added.shape[-1])
        elif added.dim() == 3:  # [batch · heads, query, key]
            added = added.reshape(-1, heads, *added.shape[1:])
        total = added if total is None else total + added
    return total
