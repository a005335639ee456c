"""Training after a growth: the new parameters alone, or all."""

import pytest
import torch
from torch import nn

import regrow
from regrow.training.tune import find_added_entries


def network() -> nn.Module:
    """Residual blocks with BatchNorm, and a classifier."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Linear(6, 5), nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.norm(self.two(self.one(x).relu())))

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(Block(), Block()), nn.Linear(6, 3))


@pytest.mark.parametrize("train", ["new", "all"])
def test_what_was_there_is_trained_only_if_asked(train: str) -> None:
    net, x, y = network().eval(), torch.randn(64, 4), torch.randint(3, (64,))
    old = {name: value.clone() for name, value in net.state_dict().items()}
    axes = regrow.trace(net, x)
    key = next(axis.key for axis in axes.units() if axis.key.startswith("2.0.one"))
    grow = {"axis": {key: 3}, "blocks": 1}
    before = nn.functional.cross_entropy(net(x), y)
    net, plan = regrow.grow(net, data=(x, y), steps=30, lr=0.03, train=train, axes=axes, batch_size=16, **grow)
    assert nn.functional.cross_entropy(net(x), y) < before
    new = find_added_entries(net, axes, plan)
    assert new["2.2.one.weight"].all() and new["2.0.one.weight"].sum() == 3 * 6 and "0.weight" not in new
    now = net.state_dict()  # new units and blocks come last
    changed = [name for name, one in old.items() if not torch.equal(now[name][tuple(map(slice, one.shape))], one)]
    assert bool(changed) == (train == "all")
    assert all(one.requires_grad and one.grad is None for one in net.parameters())


def test_training_needs_data_and_steps() -> None:
    net, x = network(), torch.randn(2, 4)
    for words in ({"steps": 3}, {"data": (x, torch.tensor([0, 1]))}):
        with pytest.raises(ValueError, match="training takes data="):
            regrow.grow(net, blocks=1, example=x, **words)
