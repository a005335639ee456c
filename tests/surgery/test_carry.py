"""What hangs on a parameter follows it through a change of shape, or the change is refused."""

import pytest
import torch
from torch import nn

import regrow
from regrow.core.axes import AxisGraph
from regrow.core.plan import Fill, Plan, PlanError
from regrow.surgery.carry import commit, prepare

UNITS = (0, 2, 5)


def network() -> tuple[nn.Module, AxisGraph]:
    """Two convolutions, traced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)).to(memory_format=torch.channels_last)
    return model, regrow.trace(model, torch.randn(1, 4, 8, 8))


def cut(model: nn.Module, axes: AxisGraph) -> None:
    """Half of the units go."""
    regrow.apply(model, axes, Plan.keeping(axes, {"0.weight:0": UNITS}))


def test_gradients_are_cut_as_their_parameters() -> None:
    """They are those of the kept entries."""
    model, axes = network()
    model(torch.randn(1, 4, 8, 8)).sum().backward()
    made, read = (model[i].weight.grad.clone() for i in (0, 2))
    bias = model[2].bias.grad
    cut(model, axes)
    assert torch.equal(model[0].weight.grad, made[list(UNITS)])
    assert torch.equal(model[2].weight.grad, read[:, list(UNITS)])
    assert model[2].bias.grad is bias
    model(torch.randn(1, 4, 8, 8)).sum().backward()


def test_new_entries_have_no_gradient() -> None:
    """It is 0 until the next call of backward."""
    model, axes = network()
    model(torch.randn(1, 4, 8, 8)).sum().backward()
    before = model[0].weight.grad.clone()
    regrow.apply(model, axes, Plan.growing(axes, {"0.weight:0": 2}, Fill()))
    assert torch.equal(model[0].weight.grad[:6], before) and not model[0].weight.grad[6:].any()


def test_attributes_and_memory_format_are_kept() -> None:
    """Of a parameter that changed."""
    model, axes = network()
    model[0].weight.group = "slow"
    cut(model, axes)
    assert model[0].weight.group == "slow"
    assert all(model[i].weight.is_contiguous(memory_format=torch.channels_last) for i in (0, 2))
    assert not model[0].weight.is_contiguous()


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_gradient_hook_is_refused_on_what_would_change_alone(kind: str) -> None:
    """Nothing is changed then."""
    model, axes = network()
    getattr(model[2].bias, kind)(lambda _: None)
    handle = getattr(model[2].weight, kind)(lambda _: None)
    with pytest.raises(PlanError, match=r"^2\.weight has a gradient hook.*remove it"):
        cut(model, axes)
    assert model[0].out_channels == 6 and model[0].weight.shape[0] == 6
    handle.remove()
    cut(model, axes)
    assert model[0].out_channels == 3


def test_inference_mode_is_refused() -> None:
    """Weights made in it could never be trained."""
    model, axes = network()
    with torch.inference_mode(), pytest.raises(PlanError, match="inference mode"):
        cut(model, axes)
    with torch.no_grad():
        cut(model, axes)
    model(torch.randn(1, 4, 8, 8)).sum().backward()


@pytest.mark.parametrize("trains", [True, False])
def test_a_bias_that_compensates_trains_as_the_weight_beside_it(trains: bool) -> None:
    """Whatever the first parameter of the model does."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    axes = regrow.trace(model, torch.randn(2, 4))
    model[0].requires_grad_(not trains)
    model[2].requires_grad_(trains)
    plan = Plan.keeping(axes, {"0.weight:0": range(5)}, means={"2.weight": {5: 0.1, 6: 0.2, 7: 0.3}})
    commit(model, axes, prepare(model, axes, plan))
    assert model[2].bias.requires_grad is trains and model[0].weight.requires_grad is not trains


def test_a_plan_of_a_saved_network_follows_one_that_added_a_bias() -> None:
    """A ledger is replayed on the axes that its plans leave; each plan was made for axes traced anew."""
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3))
    model, x = nn.Sequential(*layers, nn.Linear(3, 2)), torch.randn(2, 4)
    axes = regrow.trace(model, x)
    plan = Plan.keeping(axes, {"0.weight:0": range(5)}, means={"2.weight": {5: 0.1, 6: 0.2, 7: 0.3}})
    model, axes = regrow.apply(model, axes, plan)
    later = Plan.keeping(regrow.trace(model, x), {"2.weight:0": range(4)})
    model, axes = regrow.apply(model, axes, later)
    assert model[2].bias.shape == (4,)
