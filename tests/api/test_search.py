"""Search from Python: any network, data and loss, targets that are met, weights that are kept, a file to resume."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regrow
from regrow.core.objectives import CLASSIFICATION
from regrow.core.tasks import Examples
from regrow.evaluation import dense
from regrow.evaluation.continual import mean_score
from regrow.surgery import UndoStore


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3))


def images(n=90):
    """Images whose class is the brightest of three columns."""
    inputs = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return inputs, inputs[..., :6].unflatten(-1, (3, 2)).mean((1, 2, 4)).argmax(-1)


def test_a_network_of_ones_own_is_searched_with_a_loader_to_its_multiply_accumulates():
    inputs, labels = images()
    net, before = network(), dense(network(), inputs[:1])["macs"]
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=16, shuffle=True)
    given = {"epochs": 4, "batch_size": 16, "lr": 0.05}
    result = regrow.search(net, loader, target="macs=60%", validation=(inputs, labels), **given)
    assert result.model is net and not net.training
    assert dense(net, inputs[:1])["macs"] == result.size <= result.target == 0.6 * before and result.before == before
    assert sum(result.saved.values()) == before - result.size
    assert result.score == mean_score(net, Examples(inputs, labels), CLASSIFICATION)
    again, undo = network(), UndoStore()  # plans may restore units
    axes = regrow.trace(again, inputs[:2])
    for plan in result.plans:
        again, axes = regrow.apply(again, axes, plan, undo=undo)
    assert {key: axis.size for key, axis in axes.axes.items()} == {k: a.size for k, a in result.axes.axes.items()}
    assert "macs (target" in str(result) and "validation accuracy" in result._repr_html_()
    assert [row["epoch"] for row in result.rows] == [1, 2, 3, 4]


def test_a_regression_with_a_loss_of_ones_own_is_searched():
    inputs = torch.randn(120, 6)
    data = [({"x": part}, part[:, :2].sum(1, keepdim=True)) for part in inputs.split(30)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))

        def forward(self, x):
            return self.body(x)

    result = regrow.search(Net(), data, smaller=0.5, loss=nn.HuberLoss(), epochs=4, lr=0.05)
    assert result.size == sum(p.numel() for p in result.model.parameters()) <= result.target
    assert result.metric == "negative loss" and -2 < result.score < 0


@pytest.mark.parametrize("target", ["params=70%", "bytes=70%", "ms=90%"])
def test_weights_are_kept_without_training(target):
    net = network()
    first = {name: value.clone() for name, value in net.state_dict().items()}
    method = {"method": "blind", "settings": {"what": "filters"}, "epochs": 0}
    result = regrow.search(net, images(), target=target, **method)
    assert result.size <= result.target and 0 < net[0].out_channels <= 8
    assert sum(p.numel() for p in net.parameters()) < sum(value.numel() for value in first.values())
    rows = {tuple(row.flatten().tolist()) for row in first["0.weight"]}
    assert {tuple(row.flatten().tolist()) for row in net[0].weight} <= rows


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give one of target= and smaller=, got neither"),
        ({"target": "params=1k", "smaller": 0.5}, "target=params=1k and smaller=0.5"),
        ({"smaller": 0.5, "method": "mgs"}, "did you mean 'mgas'"),
        ({"smaller": 0.5, "epochs": 2}, "no epoch to learn masks in"),
        ({"target": "params=9M"}, "not below what the whole space has"),
        ({"smaller": 0.5, "method": "gold_nas"}, "has no candidates"),
    ],
)
def test_mistakes_name_the_remedy(given, words):
    with pytest.raises(ValueError, match=words):
        regrow.search(network(), images(), **given)
