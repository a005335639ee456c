"""Statistics of BatchNorms are measured again after a cut, by ``prune`` alone and as far as the data reach them."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow.data import Half
from regrow.data.vision import digits
from regrow.training import tune

TRAIN, TEST = (digits(n=n, size=8, seed=0, half=half) for n, half in ((900, Half.CALIBRATION), (500, Half.EVALUATION)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    width = 1
    for after, stride in ((16, 1), (32, 2), (32, 1), (32, 2)):
        layers += [nn.Conv2d(width, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        width = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    net = network()
    regrow.finetune(net, [TRAIN], epochs=8, lr=0.05)
    return net.eval()


def statistics(net: nn.Module) -> list[Tensor]:
    return [x.clone() for layer in tune.find_batch_norms(net) for x in (layer.running_mean, layer.running_var)]


def accuracy(net: nn.Module) -> float:
    return regrow.evaluate(net, [TEST])[TEST.name].score


@pytest.mark.parametrize("method", ["flap", "magnitude", "fisher"])
def test_a_pruned_network_keeps_its_accuracy(trained: nn.Sequential, method: str) -> None:
    net, _ = regrow.prune(copy.deepcopy(trained), [TRAIN], method=method, target="macs=50%")
    assert accuracy(trained) > 0.95 and accuracy(net) > 0.8
    found = statistics(net)
    tune.recalibrate(net, [TRAIN])
    assert all(map(torch.equal, statistics(net), found))


def test_without_data_one_warning_says_so(trained: nn.Sequential) -> None:
    net = copy.deepcopy(trained)
    with pytest.warns(UserWarning, match="4 BatchNorm layers are those of the uncut network") as seen:
        regrow.prune(net, method="magnitude", keep=0.7, example=torch.randn(2, 1, 8, 8))
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regrow.prune(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
            method="magnitude",
            keep=0.7,
            example=torch.ones(1, 4),
        )


def test_apply_and_grow_leave_the_statistics(trained: nn.Sequential) -> None:
    net, x = copy.deepcopy(trained), torch.randn(2, 1, 8, 8)
    before = statistics(net)
    regrow.grow(net, axis={"0.weight:0": 2, "3.weight:0": 2}, example=x)
    old = [now[: len(was)] for now, was in zip(statistics(net), before, strict=True)]
    assert all(map(torch.equal, old, before))
    net = copy.deepcopy(trained)
    axes = regrow.trace(net, x)
    regrow.apply(net, axes, regrow.Plan.keeping(axes, {"0.weight:0": range(8)}))
    assert torch.equal(net[1].running_mean, before[0][:8]) and torch.equal(net[4].running_var, before[3])


def test_a_searched_network_has_the_statistics_of_its_data() -> None:
    inputs, labels = torch.cat([one.args[0] for one in TRAIN])[:256], torch.cat([one.labels for one in TRAIN])[:256]
    call: dict[str, Any] = {"target": "macs=60%", "epochs": 3, "batch_size": 256}
    found = regrow.search(network(), (inputs, labels), validation=(inputs, labels), **call)
    before = statistics(found.model)
    tune.recalibrate(found.model, [[regrow.Batch((inputs,))]])
    assert all(map(torch.allclose, statistics(found.model), before))


class Partly(nn.Module):
    """BatchNorm of rows, and one that runs in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)
        self.aside = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = self.norm(self.aside(x) if self.training else x)
        return self.down(x.relu())


@pytest.mark.parametrize("size", [1, 8, 33])
def test_layers_that_the_data_do_not_reach_keep_what_they_have(size: int) -> None:
    torch.manual_seed(0)
    net, x = Partly().eval(), torch.randn(66 if size == 33 else 33, 4) + 3
    net.aside.running_mean.fill_(5.0)
    net.norm.running_mean.fill_(5.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        regrow.prune(net, x, keep=0.5, batch_size=size)
    assert bool((net.aside.running_mean == 5).all()) and net.norm.num_features == 8
    measured = bool((net.norm.running_mean != 5).all())
    assert measured == (size > 1) == (not any("do not reach them" in str(one.message) for one in seen))
    assert bool(net.norm.running_var.isfinite().all())
