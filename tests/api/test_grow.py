"""``regrow.grow(blocks=)``: the outputs stay, or the network does."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import regrow
from api.stacks import DEPTH, STACKS, WIDTH, Block, Stack
from regrow.core.errors import RefusedError

EXAMPLES = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (3, 1)]
BUILD: dict[str, Callable[[], nn.Module]] = {stack.name: stack.build for stack in STACKS}


def answers(net: nn.Module, x: Tensor) -> list[Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        made = net.eval()(x)
    leaves = tree_leaves(vars(made) if isinstance(made, SimpleNamespace) else made)
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def alike(ours: list[Any], theirs: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor):
            return bool(a == b)
        return a.shape == b.shape and torch.allclose(
            a.double(), b.double(), rtol=0, atol=1e-6 * float(a.abs().double().median())
        )

    return len(ours) == len(theirs) and all(map(same, ours, theirs))


def describe(net: nn.Module) -> list[Any]:
    """What a network consists of: modules and tensors themselves, values of tensors, and attributes."""
    told: list[Any] = []
    for path, module in net.named_modules():
        told.append((path, id(module), list(module._modules)))
        told += [(path, name, id(x), x.tolist()) for name, x in [*module._parameters.items(), *module._buffers.items()]]
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | str | tuple)}
        told.append((path, plain, repr(getattr(module, "config", None))))
    return told


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.name)
def test_outputs_stay_or_the_stack_is_refused_and_the_network_is_as_it_was(stack: Stack) -> None:
    net = stack.build()
    before = [answers(net, x) for x in EXAMPLES]
    told = describe(net)
    try:
        regrow.grow(net, blocks=2, example=EXAMPLES[0])
    except ValueError as error:
        assert not stack.fits and "\n" not in str(error)
        assert "stack 'blocks'" in str(error) or "no stack" in str(error)
        assert describe(net) == told
    else:
        assert len(net.get_submodule("blocks")) == DEPTH + 2
    assert all(alike(answers(net, x), y) for x, y in zip(EXAMPLES, before, strict=True))


def test_one_of_several_stacks_is_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.first:
                x = block(x)
            for block in self.second:
                x = block(x) / len(self.second)
            return x

    net = Two().eval()
    with pytest.raises(RefusedError, match=r"^stack 'second' cannot get further blocks"):
        regrow.grow(net, blocks=1, example=EXAMPLES[0])
    before = answers(net, EXAMPLES[0])
    grown, _ = regrow.grow(net, blocks={"first": 1}, example=EXAMPLES[0])
    assert len(grown.first) == 3 and alike(answers(grown, EXAMPLES[0]), before)


def test_a_network_that_no_copy_shows_is_restored_after_the_growth() -> None:
    net = BUILD["plain"]()
    net.register_forward_hook(lambda module, given, made: made * len(net.get_submodule("blocks")))  # not the copy's
    before, told = answers(net, EXAMPLES[0]), describe(net)
    with pytest.raises(ValueError, match=r"changes the outputs by"):
        regrow.grow(net, blocks=1, example=EXAMPLES[0])
    assert describe(net) == told and alike(answers(net, EXAMPLES[0]), before)


def test_the_state_of_random_generators_stays() -> None:
    net = BUILD["noisy"]()
    torch.manual_seed(7)
    random.seed(7)
    state, plain = torch.get_rng_state(), random.getstate()
    regrow.grow(net, blocks=1, example=EXAMPLES[0])
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == plain


def test_renormalised_embeddings_of_a_refused_network_are_as_they_were() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, WIDTH, max_norm=0.5)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for block in self.blocks:
                x = 0.5 * block(x)
            return x

    net, ids = Tokens().eval(), torch.arange(6).view(2, 3)
    axes = regrow.trace(net, ids)
    before = net.table.weight.detach().clone()
    with pytest.raises(RefusedError, match="stack 'blocks'"):
        regrow.grow(net, blocks=1, axes=axes)
    assert torch.equal(net.table.weight, before)
