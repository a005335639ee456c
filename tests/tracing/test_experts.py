"""Mixture of experts: whole experts and their neurons are axes, and a cut of either is exact."""

import copy

import pytest
import torch
from torch import nn

import laws
from regrow import Plan, apply, trace, verify
from regrow.allocation.ranked import rank
from regrow.core.axes import Mark
from regrow.core.budget import Budget
from regrow.core.plan import PlanError
from regrow.surgery.verify import RELATIVE_BOUND, measure_distances
from zoo import GROUPED, SMALL, randomise

EXPERTS = "model.layers.0.mlp.experts"
ROUTER, NEURONS = "model.layers.0.mlp.gate.weight:0", f"{EXPERTS}.gate_up_proj:1"
IDS = torch.tensor([[3, 7, 11, 2, 5, 8, 13], [4, 4, 9, 1, 30, 17, 6]])


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, **GROUPED, num_local_experts=5, num_experts_per_tok=2)
    return randomise(transformers.MixtralForCausalLM(config))


@pytest.fixture(scope="module")
def axes(mixtral: nn.Module):
    return trace(mixtral, input_ids=IDS)


def test_experts_and_neurons_are_found(axes) -> None:
    experts, neurons = axes[ROUTER], axes[NEURONS]
    places = {f"{slot.name}:{slot.dim}" for slot in experts.slots}
    assert places == {f"{EXPERTS}.gate_up_proj:0", f"{EXPERTS}.down_proj:0", "model.layers.0.mlp.gate.weight:0"}
    assert (experts.size, experts.mark, experts.least) == (5, Mark.COMPETED, 2)
    assert (neurons.size, neurons.mark, neurons.multiple) == (56, Mark.NEUTRAL, 4)
    assert {f"{slot.name}:{slot.dim}" for slot in neurons.consumers()} == {f"{EXPERTS}.down_proj:2"}


def test_masked_is_shrunk(mixtral: nn.Module, axes) -> None:
    generator = torch.Generator().manual_seed(0)
    plans = [laws.smallest_plan(axes), *(laws.random_plan(axes, generator) for _ in range(4))]
    assert all(distance <= RELATIVE_BOUND for _, distance in measure_distances(mixtral, axes, plans))


def test_an_expert_goes_and_the_model_runs(mixtral: nn.Module, axes) -> None:
    plan = Plan.keeping(axes, {ROUTER: [0, 2, 3], NEURONS: range(8)})
    assert verify(mixtral, axes, plan).ok
    model, _ = apply(copy.deepcopy(mixtral), axes, plan)
    experts = model.get_submodule(EXPERTS)
    assert (experts.gate_up_proj.shape, experts.num_experts) == ((3, 16, 36), 3)
    assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize(("key", "keep", "reason"), [(ROUTER, [3], "at least 2"), (NEURONS, range(9), "multiple of 4")])
def test_too_few_experts_and_odd_widths_are_refused(axes, key: str, keep, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        Plan.keeping(axes, {key: keep})


def test_budgets_are_met_in_multiples(axes) -> None:
    scores = {NEURONS: torch.rand(56, generator=torch.Generator().manual_seed(0))}
    kept = rank(axes, scores, Budget(0.97))
    assert 0 < len(kept[NEURONS]) < 56 and len(kept[NEURONS]) % 4 == 0
