"""What tracing says a cache of keys and values holds is what transformers' own cache holds."""

from typing import Any

import pytest
import torch
from torch import nn

from hand import lm
from regrow import apply, prune, trace
from regrow.allocation.cost import cost_of
from regrow.allocation.ranked import BudgetError
from regrow.core.amounts import Measure, Target
from regrow.core.axes import Example
from regrow.core.budget import Budget
from regrow.core.plan import Plan
from zoo import ZOO

TOKENS = torch.arange(1, 9)[None]
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def llama(attention: str = "sdpa", **more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **more, attn_implementation=attention)).eval()


def held(model: nn.Module, tokens: int) -> int:
    """Bytes of the cache that transformers fills with so many tokens."""
    with torch.no_grad():
        cache = model((torch.arange(tokens) % 16 + 1)[None], use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_polynomial_is_what_the_cache_holds_before_and_after_a_cut(attention: str, dtype: torch.dtype) -> None:
    model = llama(attention).to(dtype)
    axes = trace(model, TOKENS, use_cache=False)
    budget = Budget(target=Target(Measure.CACHE, 1, 21))
    assert cost_of(axes, budget).total == held(model, 21)
    groups = [axis.key for axis in axes.units() if "self_attn" in axis.key]
    plan = Plan.keeping(axes, {groups[0]: (1,), groups[2]: (0, 2, 3)})
    planned = cost_of(axes, budget)(plan.sizes(axes))
    _, axes = apply(model, axes, plan)
    assert planned == cost_of(axes, budget).total == held(model, 21) == (1 + 4 + 3) * 2 * 4 * dtype.itemsize * 21


@pytest.mark.parametrize("name", ["llama_eager", "llama_single", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"])
def test_every_way_to_make_keys_and_values(name: str) -> None:
    model = ZOO[name].build().eval()
    axes = trace(model, torch.arange(1, 15).view(2, 7), use_cache=False)
    assert cost_of(axes, Budget(target=Target(Measure.CACHE, 1, 9))).total == held(model, 9)


def test_a_cache_of_a_window_holds_less_than_is_counted() -> None:
    model = ZOO["mistral"].build().eval()
    axes = trace(model, torch.arange(1, 15).view(2, 7), use_cache=False)
    window = model.config.sliding_window
    priced_at = [cost_of(axes, Budget(target=Target(Measure.CACHE, 1, n))).total for n in (window - 1, 99)]
    assert priced_at[0] == held(model, 99) < priced_at[1]


def test_a_cache_target_is_met_by_key_value_groups_alone() -> None:
    model, example = llama(), Example((TOKENS,), {"use_cache": False})
    whole = held(model, 100)
    with pytest.raises(BudgetError, match=r"least possible is kv_cache=9600@100, of 38,400 now"):
        prune(model, method="magnitude", target="kv_cache=9K@100", example=example)
    _, plan = prune(
        model,
        method="magnitude",
        target=f"kv_cache={whole * 0.6:.0f}@100",
        example=example,
    )
    assert held(model, 100) <= 0.6 * whole < held(model, 100) + whole / 12
    assert all("self_attn" in key for key in plan.changes)
    assert plan.origin["target"] == "kv_cache=23040@100" and "keep" not in plan.origin


def test_attention_over_other_things_than_tokens_is_no_cache() -> None:
    model, _ = lm()
    assert len(trace(model, TOKENS).caches) == 2
    pictures = ZOO["vit"]
    args, kwargs = pictures.example()
    assert trace(pictures.build(), *args, **kwargs).caches == ()
    assert trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4)).caches == ()


def test_queries_are_cut_with_the_keys_that_are_repeated_for_them() -> None:
    model, by_hand = lm()
    axes = trace(model, TOKENS)
    for key in (f"decoder.blocks.{i}.q.weight:0" for i in range(2)):
        (axis,) = (axis for axis in axes.free() if axis.size == 3 and any(slot.name == key[:-2] for slot in axis.slots))
        layout, expected = (
            {(slot.name, slot.dim, slot.inner) for slot in slots} for slots in (axis.slots, by_hand[key].slots)
        )
        assert layout == expected
