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
from regrow.surgery.gate import parametrize


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
        ({"smaller": 0.5, "settings": {"target": 5000.0}}, "target=5000.0: it follows from --target"),
        ({"smaller": 0.5, "settings": {"measure": "macs"}}, "measure=macs: it follows from --target"),
    ],
)
def test_mistakes_name_the_remedy(given, words):
    with pytest.raises(ValueError, match=words):
        regrow.search(network(), images(), **given)


class Several(nn.Module):
    """Six candidates of 281 to 1,601 parameters; or two of which one is chosen; or three, the same in five places."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        perceptrons = {f"o{i}": self.perceptron(8 * i) for i in range(1, 7)}
        given = {
            "sum": lambda: regrow.Candidates(perceptrons),
            "one": lambda: regrow.Candidates({"small": self.perceptron(4), "big": nn.Linear(16, 16)}, single=True),
            "tied": lambda: regrow.Candidates(
                {"x": nn.Linear(16, 16), "y": self.perceptron(16), "z": nn.ReLU()}, tied="t"
            ),
        }[kind]
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)
        self.places = nn.ModuleList(given() for _ in range(5 if kind == "tied" else 1))

    @staticmethod
    def perceptron(width):
        return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16))

    def forward(self, x):
        x = self.first(x).relu()
        for place in self.places:
            x = place(x)
        return self.last(x)


def rows_of(n=80):
    """Rows whose class is the sign of the first number."""
    inputs = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return inputs, (inputs[:, 0] > 0).long()


def test_smaller_operations_return_where_the_next_does_not_fit():
    result = regrow.search(Several("sum"), rows_of(), target="params=50%", method="blind", epochs=0)
    assert 0.98 * result.target < result.size <= result.target


def test_operations_go_where_zeroed_weights_do_not_reach_the_target():
    result = regrow.search(Several("sum"), rows_of(), target="nonzero=2%", epochs=3)
    assert result.size <= result.target and result.saved["filters"] + result.saved["operations"] > 0


@pytest.mark.parametrize("method", ["trials", "mgas"])
def test_the_chosen_candidate_is_one_that_meets_the_target(method):
    own = {"settings": {"levels": ("operations",)}}
    result = regrow.search(Several("one"), rows_of(), target="params=60%", method=method, epochs=4, **own)
    assert result.size <= result.target and [path for plan in result.plans for path in plan.drop] == [
        "places.0.ops.big"
    ]


def test_darts_chooses_operations_with_which_the_target_can_be_met():
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.last = nn.Linear(6, 2)
            self.place = regrow.Candidates({"big": nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "none": nn.Identity()})

        def forward(self, x):
            return self.last(self.place(x))

    inputs = rows_of()[0]
    data = inputs, (inputs[:, 0].abs() > 0.7).long()
    result = regrow.search(Choice(), data, target="params=40%", method="darts", epochs=10, lr=0.1)
    assert result.size <= result.target and "place.ops.big" in result.plans[0].drop


def test_tied_candidates_are_chosen_together_by_darts():
    result = regrow.search(Several("tied"), rows_of(), target="params=60%", method="darts", epochs=3, lr=0.3)
    dropped = sorted(path for plan in result.plans for path in plan.drop)
    left = [name for name in "xyz" if f"places.0.ops.{name}" not in dropped]
    assert dropped == sorted(f"places.{i}.ops.{name}" for i in range(5) for name in "xyz" if name not in left)


def test_a_resumed_search_returns_the_rows_of_all_epochs(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    given = {"target": "params=50%", "method": "trials", "epochs": 4, "out": tmp_path / "run"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("regrow.jobs.search.extract_network", stop)
        regrow.search(Several("sum"), rows_of(), **given)
    assert [row["epoch"] for row in regrow.search(Several("sum"), rows_of(), **given).rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("what", ["filters", "operations"])
def test_random_baselines_only_remove(what):
    net = Several("sum")
    before = {name: value.clone() for name, value in net.named_parameters()}
    regrow.search(net, rows_of(), target="params=50%", method="blind", settings={"what": what}, epochs=0)
    values = {name: {0.0, *before[name].flatten().tolist()} for name, _ in net.named_parameters()}  # 0: dropped
    assert all({*value.flatten().tolist()} <= values[name] for name, value in net.named_parameters())


class Tied(nn.Module):
    """A language model whose head is its embedding; every position has a label."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down, self.head = nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(32, 16), None
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.down(self.up(x).relu()))


def tokens(n=60):
    inputs = torch.randint(40, (n, 5), generator=torch.Generator().manual_seed(0))
    return inputs, inputs.roll(1, 1)


def test_macs_of_tied_and_recurrent_weights_count():
    result = regrow.search(Tied(), tokens(), target="macs=75%", method="trials", epochs=4)
    assert result.before == dense(Tied(), tokens()[0][:1])["macs"]
    assert result.size == dense(result.model, tokens()[0][:1])["macs"] <= result.target < result.before

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = nn.LSTM(6, 24, batch_first=True), nn.Linear(24, 2)

        def forward(self, x):
            return self.last(self.body(x[:, None].expand(-1, 4, -1))[0][:, -1])

    found = regrow.search(Recurrent(), rows_of(), target="macs=50%", method="trials", epochs=4)
    assert 0.9 * found.target < found.size <= found.target


def test_a_tied_weight_is_replaced_in_all_places():
    net = Tied()
    with parametrize(net, {"embed.weight": torch.zeros(40, 16)}):
        assert not net(tokens()[0]).any()
    assert net(tokens()[0]).any()


def test_outputs_of_any_form_are_searched_with_a_loss_of_ones_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.scale = nn.Linear(6, 32), nn.Linear(32, 1), nn.Linear(32, 1)

        def forward(self, x):
            hidden = self.body(x).relu()
            return {"mean": self.mean(hidden), "scale": self.scale(hidden)}

    def loss(output, labels):
        return nn.functional.gaussian_nll_loss(output["mean"], labels, nn.functional.softplus(output["scale"]) + 0.1)

    inputs = torch.randn(80, 6)
    for method in ("mgas", "trials"):
        data = (inputs, inputs[:, :1] * 2)
        assert regrow.search(Two(), data, smaller=0.5, loss=loss, epochs=6, method=method).score < 0


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"0.weight is bfloat16, and a search trains in float32; convert"):
        regrow.search(network().bfloat16(), images(), target="macs=60%")
