"""Blocks that can be dropped, as operations of a search: what scales them, what they cost, and that masked is cut."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from methods.search.searches import start
from regrow import Plan, apply, trace, with_branches
from regrow.allocation.commits import select_removed
from regrow.allocation.cost import Cost
from regrow.core.amounts import Measure
from regrow.core.tasks import Examples, Task
from regrow.jobs.search_inputs import add_blocks
from regrow.methods.search import trials
from regrow.surgery.gate import parametrize
from regrow.training.learner import Context
from zoo import randomise


class Residual(nn.Module):
    """What is given plus a body, rectified."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return (x + self.body(x)).relu()


def convolutions():
    def layer(inputs, width=6):
        return nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width)

    blocks = [Residual(nn.Sequential(*layer(6, 8), nn.ReLU(), *layer(8))) for _ in range(2)]
    return nn.Sequential(*layer(1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=30, num_hidden_layers=2, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config)


INPUTS = {convolutions: lambda: torch.randn(4, 1, 8, 8).double(), llama: lambda: torch.randint(0, 30, (4, 5))}
BLOCKS = {
    convolutions: ["3.body", "4.body"],
    llama: ["model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp"],
}


@cache
def traced(make):
    """A network, its axes, and the space of its blocks."""
    torch.manual_seed(0)
    net, search = randomise(make()).double().eval(), trials.build(trials.Settings())
    axes = add_blocks(search, net, trace(net, INPUTS[make]()))
    return net, axes, search.space.blocks


def began(make, measure=Measure.PARAMETERS):
    """A search of a network by trials, its first state, and its context."""
    net, axes, blocks = copy.deepcopy(traced(make))
    search, inputs = trials.build(trials.Settings(target=1.0, measure=str(measure), augment=False)), INPUTS[make]()
    search.space = replace(search.space, blocks=blocks)
    examples = Examples(inputs, torch.zeros(len(inputs), dtype=torch.long))
    context = Context(net, axes, Task("task", examples, examples, (0, 1, 2)), epochs=2, steps=1)
    return search, start(search, context), context


def compute(net, inputs):
    """The logits of a network."""
    output = net(inputs)
    return getattr(output, "logits", output).detach()


@pytest.mark.parametrize("measure", [Measure.PARAMETERS, Measure.MACS, Measure.BYTES])
@pytest.mark.parametrize("make", [convolutions, llama])
def test_a_masked_block_is_one_that_was_cut_and_costs_nothing(make, measure):
    search, state, context = began(make, measure)
    layout, masks, inputs = state.layout, search.masks(state, context), INPUTS[make]()
    assert [*layout.ops] == BLOCKS[make]
    whole, total = search.size(state, context), Cost(context.axes, measure).total
    masks.ops[1:] = masks.op_scale[1:] = 0.0
    if measure != Measure.MACS:  # those of attention count in full until it goes
        masks.filters[::3] = masks.filter_scale[::3] = 0.0
    with parametrize(context.model, trials.mask_parameters(context, state, masks).values):
        masked = compute(context.model, inputs)
    drop, keep = select_removed(layout, masks, context.axes)
    net, axes = apply(context.model, context.axes, Plan.dropping(context.axes, drop, keep))
    assert drop == BLOCKS[make][1:] and (compute(net, inputs) - masked).abs().max() < 1e-9 * masked.abs().max()
    saved = whole - float(layout.levels.size(masks.ops, masks.filters))
    assert saved == total - Cost(axes, measure).total > 0  # not whole: a file holds no frequencies of rotation
    after = search.update_layout(state, replace(context, model=net, axes=axes)).layout
    assert after.alive.tolist() == [True, *(False for _ in drop)] and len(after.levels.layouts) < len(
        layout.levels.layouts
    )


@pytest.mark.parametrize("make", [convolutions, llama])
def test_blocks_go_one_after_another_as_at_once(make):
    net, whole, _ = copy.deepcopy(traced(make))
    other, axes, paths = copy.deepcopy(net), whole, BLOCKS[make]
    for path in paths:
        net, axes = apply(net, axes, Plan.dropping(axes, [path]))
    other, _ = apply(other, whole, Plan.dropping(whole, paths))
    inputs = INPUTS[make]()
    assert torch.equal(compute(net, inputs), compute(other, inputs))


def test_saliency_of_a_block_is_that_of_its_scale():
    search, state, context = began(convolutions)
    before = trials.measure_saliency(search, state, context).operations
    with torch.no_grad():
        context.model.get_submodule("4.body.4").weight *= 0.1
        context.model.get_submodule("4.body.4").bias *= 0.1
    after = trials.measure_saliency(search, state, context).operations
    assert before.min() > 0 and after[1] < 0.1 * before[1]


class Sides(nn.Module):
    """A sum of parts."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def linear(*after):
    return nn.Sequential(nn.Linear(4, 4), *after)


@pytest.mark.parametrize(
    "net, found",
    [
        (Sides(linear(), linear()), ["parts.0"]),  # one of them stays
        (Residual(linear(nn.RMSNorm(4, elementwise_affine=False))), []),  # a norm undoes a scale
        (Residual(linear(nn.RMSNorm(4))), ["body"]),
        (Residual(nn.Sequential(Residual(linear()), nn.Linear(4, 4))), ["body.0.body"]),  # the innermost
        (Residual(linear(nn.Sigmoid())), []),
    ],
)
def test_which_blocks_are_operations(net, found):
    net = nn.Sequential(nn.Linear(3, 4), net, nn.Linear(4, 2))
    axes = with_branches(net, trace(net, torch.randn(2, 3)))
    assert [path.removeprefix("1.") for path, branch in axes.branches.items() if branch.scales] == found
