"""Search by trials: what is proposed, how it is decided, and what a trial leaves behind."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import regrow
from methods.search.searches import start
from regrow import Candidates, trace
from regrow.allocation.proposals import choose_proposal, propose_removals
from regrow.core.tasks import Examples, Task
from regrow.methods.search import trials
from regrow.methods.search.trials import Settings, build, measure_saliency, try_masks
from regrow.training.learner import Context
from regrow.training.schedule import Schedule

ALL = ("operations", "filters", "weights")


def branches():
    """A network with two branches, of which the second hardly matters."""
    torch.manual_seed(0)
    ops = {name: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for name in "ab"}
    net = nn.Sequential(Candidates(ops))
    with torch.no_grad():
        net[0].ops["b"][2].weight *= 1e-3
        net[0].ops["b"][2].bias *= 0
        net[0].ops["a"][2].weight[:, :4] *= 1e-3
    return net


@pytest.fixture
def began():
    """The search of that network, its state, and the context."""
    net = branches()
    inputs = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    labels = net(inputs).argmax(1)
    task = Task("task", Examples(inputs[:64], labels[:64]), Examples(inputs[64:], labels[64:]), (0, 1, 2))
    search = build(Settings(target=80.0, measure="nonzero", levels=ALL, augment=False))
    context = Context(net, trace(net, inputs[:2]), task, epoch=2, epochs=4, steps=4)
    context = replace(context, make_optimizer=Schedule(lr=0.1).make_optimizer)
    return search, start(search, context), context


def test_saliency_of_a_gate_is_that_of_a_change_of_the_gate(began):
    search, state, context = began
    found = measure_saliency(search, state, context)
    first, second = found.operations.tolist()
    assert first > 100 * second
    assert found.filters[:4].max() < found.filters[4:8].min()
    # The Fisher information of classes is the second derivative of the KL divergence from the network itself.
    scale, net = context.model[0].scale, context.model
    inputs = context.task.train.inputs
    before = net(inputs).log_softmax(-1).detach()

    def divergence(gate):
        with torch.no_grad():
            scale[0] = gate
            after = net(inputs).log_softmax(-1)
            scale[0] = 1.0
        return float((before.exp() * (before - after)).sum(-1).mean())

    expected = (divergence(1.1) + divergence(0.9)) / 2 / 0.1**2
    assert first == pytest.approx(expected, rel=0.5)  # labels are drawn


def test_proposals_save_the_same_and_start_with_what_matters_least(began):
    search, state, context = began
    masks = search.masks(state, context)
    whole = search.size(state, context)
    proposals = propose_removals(state.layout, masks, measure_saliency(search, state, context), ALL, whole - 20, 0.0)
    size = state.layout.levels.size
    costs = {name: float(size(one.ops, one.filters, one.weights)) for name, one in proposals.items()}
    assert [*proposals] == [*ALL]
    assert proposals["operations"].ops.tolist() == [1.0, 0.0]
    assert costs["operations"] < whole - 20  # an operation is larger than what was asked for
    assert all(costs["operations"] - 20 < cost <= costs["operations"] for cost in costs.values())
    exact = propose_removals(state.layout, masks, measure_saliency(search, state, context), ALL, whole - 20, whole - 20)
    assert [*exact] == ["filters", "weights"]  # without an operation, nothing is below what must be left


def test_a_trial_leaves_everything_as_it_was(began):
    search, state, context = began
    masks = search.masks(state, context)
    before, drawn = copy.deepcopy(context.model.state_dict()), torch.get_rng_state()
    losses = try_masks(search, state, context, replace(masks, ops=torch.tensor([1.0, 0.0])))
    assert len(losses) == 4 and torch.equal(losses, try_masks(search, state, context, replace(masks, ops=masks.ops)))
    worse = replace(masks, op_scale=torch.tensor([0.0, 1.0]))
    assert float(try_masks(search, state, context, worse).mean()) > float(losses.mean())
    assert all(torch.equal(value, before[name]) for name, value in context.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn) and all(p.grad is None for p in context.model.parameters())


def test_the_coarsest_within_a_standard_error_is_chosen():
    same = torch.tensor([1.0, 2.0, 3.0, 4.0])
    noise = torch.tensor([0.1, -0.1, 0.1, -0.09])
    assert choose_proposal({"operations": same + noise, "filters": same}) == "operations"
    assert choose_proposal({"operations": same + 0.5, "filters": same, "weights": same}) == "filters"


def test_too_few_epochs_are_refused():
    with pytest.raises(ValueError, match="leave none after"):
        build(Settings(warm=0.9)).check_epochs(4)
    for wrong in ({"levels": ()}, {"levels": ("weights",)}, {"decide": "never"}, {"trial_steps": -1}):
        with pytest.raises(ValueError):
            Settings(**wrong)


class Branches(nn.Module):
    """Two branches on halves of the input."""

    def __init__(self, units):
        super().__init__()
        ops = {str(i): nn.Sequential(nn.Linear(6, units), nn.ReLU(), nn.Linear(units, 3)) for i in range(2)}
        self.sum = Candidates(ops, range(2))

    def forward(self, x):
        return self.sum(*x.split(6, 1))


@pytest.mark.parametrize("method", ["trials", "mgas"])
@pytest.mark.parametrize("redundant", ["operations", "filters"])
def test_what_is_redundant_goes(method, redundant):
    torch.manual_seed(3)
    teacher, inputs = Branches(24 if redundant == "operations" else 4), torch.randn(1200, 12)
    with torch.no_grad():
        if redundant == "operations":
            teacher.sum.scale[1] = 0.0
        outputs = teacher(inputs)
        labels = ((outputs - outputs.mean(0)) / outputs.std(0)).argmax(1)
    target = "params=50.5%" if redundant == "operations" else "params=40%"  # a branch, or 40 % of all units
    net = Branches(24)
    result = regrow.search(net, (inputs, labels), target=target, method=method, epochs=16, lr=0.05, batch_size=32)
    dropped = [path for plan in result.plans for path in plan.drop]
    assert dropped == (["sum.ops.1"] if redundant == "operations" else [])
    assert result.target - 10 < result.size <= result.target and result.score > 0.8  # a unit has ten parameters


def test_the_method_is_listed():
    assert trials.CITATION and "trials" in regrow.methods.SEARCHERS
