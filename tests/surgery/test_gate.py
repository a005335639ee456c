"""A gated network is the network that the cut would leave."""

from copy import deepcopy

import pytest
import torch

import regrow
from hand import lm
from regrow.allocation.ranked import rank
from regrow.core.budget import Budget
from regrow.core.plan import Plan
from regrow.core.scores import Evidence, Need
from regrow.core.sources import Batch, Source
from regrow.scoring.collect import collect
from regrow.scoring.compensate import means
from regrow.scoring.metrics import random
from regrow.surgery.gate import gate_inputs


@pytest.mark.parametrize("compensated", [False, True])
def test_gates_of_zero_and_one_are_the_cut(compensated: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=2, head_dim=4, **sizes)).double().eval()
    ids = torch.randint(0, 40, (2, 9))
    axes = regrow.trace(model, ids, use_cache=False)
    source = Source("x", [Batch((ids,), {"use_cache": False}, torch.roll(ids, -1, 1))])
    pooled = Evidence(collect(model, axes, [source], {Need.ACTIVATIONS})).pooled()
    kept = rank(axes, random(axes, seed=3), Budget(0.7))
    assert sum(len(keep) < axes[key].size for key, keep in kept.items()) > 2
    ones = {key: torch.zeros(axes[key].size, dtype=torch.float64) for key in kept}
    gates = {key: zeros.index_fill(0, torch.tensor(kept[key]), 1.0) for key, zeros in ones.items()}
    fills = {name: m.mean for name, m in pooled.moments.items()} if compensated else {}
    plan = Plan.keeping(axes, kept, means=means(model, axes, kept, pooled) if compensated else {})
    cut, _ = regrow.apply(deepcopy(model), axes, plan)
    with torch.no_grad():
        dense = model(ids).logits
        with gate_inputs(model, axes, gates, fills):
            masked = model(ids).logits
        assert float((masked - cut(ids).logits).abs().max()) < 1e-9 * float(masked.abs().max())
        assert not torch.allclose(masked, dense, atol=1e-3)
        assert torch.equal(model(ids).logits, dense), "nothing is left behind"


def test_gradients_reach_the_gates() -> None:
    model, axes = lm()
    ids = torch.randint(0, 11, (2, 7))
    (before,) = model(ids)
    key = "decoder.blocks.0.gate.weight:0"
    gate = torch.ones(axes[key].size, requires_grad=True)
    with gate_inputs(model, axes, {key: gate}):
        (out,) = model(ids)
    assert torch.equal(out, before)
    out.sum().backward()
    assert gate.grad is not None and bool((gate.grad != 0).any())
