"""Attention that can be cut computes what ``nn.MultiheadAttention`` does, and its heads are free."""

import copy

import pytest
import torch
from torch import nn

from regrow import Plan, apply, trace, verify
from regrow.nets import replace_attention


def random(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
    return module.double().eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per head", "padding", "both"])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}])
def test_it_computes_the_same(batch_first: bool, masks: str, sizes: dict[str, int]) -> None:
    old = random(nn.MultiheadAttention(12, 3, batch_first=batch_first, **sizes))
    new = replace_attention(copy.deepcopy(old))
    shape = (2, 4) if batch_first else (4, 2)
    x = [torch.randn(*shape, n, dtype=torch.float64) for n in (12, sizes.get("kdim", 12), sizes.get("vdim", 12))]
    upper = torch.ones(4, 4, dtype=torch.bool).triu(1)
    more = {
        "none": {},
        "bool": {"attn_mask": upper},
        "float": {"attn_mask": torch.randn(4, 4, dtype=torch.float64)},
        "per head": {"attn_mask": torch.randn(6, 4, 4, dtype=torch.float64)},
        "padding": {"key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True]])},
        "both": {"attn_mask": upper, "key_padding_mask": torch.tensor([[False] * 4, [False, False, False, True]])},
    }[masks]
    for need in (True, False):
        expected, weights = old(*x, need_weights=need, **more)
        found, own = new(*x, need_weights=need, **more)
        assert torch.allclose(found, expected, atol=1e-12)
        assert (own is None) == (weights is None)
        assert own is None or torch.allclose(own, weights, atol=1e-12)


def test_one_sequence_without_a_batch() -> None:
    old = random(nn.MultiheadAttention(12, 3))
    x = torch.randn(4, 12, dtype=torch.float64)
    found, weights = replace_attention(copy.deepcopy(old))(x, x, x)
    assert torch.allclose(found, old(x, x, x)[0], atol=1e-12)
    assert weights.shape == (4, 4)


def test_extra_keys_stay_as_they_are() -> None:
    old = nn.MultiheadAttention(12, 3, add_bias_kv=True)
    assert replace_attention(old) is old


def test_heads_and_their_widths_are_cut_in_an_encoder() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    model, x = replace_attention(random(nn.TransformerEncoder(layer, 2))), torch.randn(2, 5, 12, dtype=torch.float64)
    axes = trace(model, x)
    name = "layers.0.self_attn"
    heads = next(a for a in axes.free() if a.size == 3 and any(s.name.startswith(name) for s in a.slots))
    widths = [a for a in axes.free() if a.size == 4 and any(s.name.startswith(name) for s in a.slots)]
    assert len(widths) == 2  # of queries with keys, and of values
    plan = Plan.keeping(axes, {heads.key: [0, 2], **{axis.key: [0, 3] for axis in widths}})
    assert verify(model, axes, plan).ok
    apply(model, axes, plan)
    attention = model.layers[0].self_attn
    assert (attention.num_heads, attention.head_dim, attention.v_head_dim) == (2, 2, 2)
    assert attention.q_proj.weight.shape == (4, 12)


def test_a_causal_hint_without_a_mask_is_refused_as_by_torch() -> None:
    """It used to be ignored, so that each position saw the later ones."""
    old = random(nn.MultiheadAttention(12, 3, batch_first=True))
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    for module, error in ((old, RuntimeError), (replace_attention(copy.deepcopy(old)), ValueError)):
        with pytest.raises(error, match="attn_mask"):
            module(x, x, x, is_causal=True, need_weights=False)
