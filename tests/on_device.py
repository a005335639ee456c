"""Every function on the pretend accelerator: no tensor on another device, and the results of the CPU."""

import copy
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import regrow
from pretend import counting, pretending
from regrow.core.errors import ResourceError
from regrow.core.objectives import CLASSIFICATION
from regrow.core.scores import Need
from regrow.data.batch_forms import ReadOptions
from regrow.data.batches import to_sources
from regrow.jobs import learn, search
from regrow.jobs.recording import Invocation
from regrow.jobs.search_inputs import make_schedule, read_search_data
from regrow.methods import LEARNERS, METHODS, RECOVERIES, SEARCHERS
from regrow.nets import devices
from regrow.nets.devices import choose_device
from regrow.scoring.collect import collect
from regrow.settings.learn import Settings as LearnSettings
from regrow.settings.search import Settings as SearchSettings
from regrow.surgery import UndoStore
from regrow.training import continual
from regrow.training.continual import learn as learn_tasks
from regrow.training.fit import FitOptions, fit
from regrow.training.state import TrainState, axis_tensors

DRAW = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(64, 1, 8, 8, generator=DRAW), torch.arange(64) % 10
DATA = (IMAGES, LABELS)
TASKS = [((IMAGES, LABELS % 2), (IMAGES[:16], LABELS[:16] % 2))] * 2
SETTINGS = {
    "mgas": {"warm": 1, "every": 1, "levels": ("operations", "filters")},
    "gprune": {"steps": 4, "every": 2, "shards": 2},
    "replay": {"memory": 40, "logit_weight": 0.5, "asymmetric_loss": True},
    "sparsegrow": {"multiple": 1, "late_phase": 0.5, "memory": 40},
    "lora": {"passes": 1, "checks": 1, "windows": 1},
    "distil": {"passes": 1, "checks": 1, "windows": 1},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.hidden, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture
def device():
    with pretending() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield device


def same(one, other):
    """Whether two networks have the same parameters, bit for bit."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x.cpu(), y.cpu()) for (a, x), (b, y) in pairs)


def same_files(folder):
    """Whether two runs, ``cpu`` and ``acc``, wrote the same tensors, bit for bit."""
    files = [path.relative_to(folder / "cpu") for path in (folder / "cpu").rglob("*.safetensors")]
    assert files
    pairs = [(load_file(folder / "cpu" / file), load_file(folder / "acc" / file)) for file in files]
    return all(one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one) for one, other in pairs)


def cut(model):
    """The network, a copy that is cut, and the plan of the cut."""
    dense = copy.deepcopy(model)
    small, plan = regrow.prune(model, DATA, method="flap", keep=0.6, batch_size=16)
    return dense, small, plan


@pytest.mark.parametrize("method", METHODS)
def test_prune(device, method):
    nets = [
        regrow.prune(Net().to(place), DATA, method=method, keep=0.6, settings=SETTINGS.get(method), batch_size=8)[0]
        for place in ("cpu", device)
    ]
    assert next(nets[1].parameters()).device == device
    assert same(*nets)


@pytest.mark.parametrize("by", RECOVERIES)
def test_recover(device, by):
    nets = []
    for place in ("cpu", device):
        dense, small, plan = cut(Net().eval().to(place))
        regrow.recover(small, dense, plan, DATA, by=by, settings=SETTINGS.get(by), batch_size=8)
        nets.append(small)
    assert same(*nets)


@contextmanager
def counted(steps):
    """Append how often the host waits inside."""
    with counting() as waits:
        yield
    steps.append(sum(waits.values()))


@pytest.mark.parametrize("method", LEARNERS)
def test_learn(device, method, monkeypatch):
    steps = []

    def counting_fit(*args, options, **more):
        return fit(*args, options=replace(options, around=lambda state, context, step: counted(steps)), **more)

    monkeypatch.setattr(continual, "fit", counting_fit)
    nets = [
        regrow.learn(
            Net().to(place),
            TASKS,
            method=method,
            settings=SETTINGS.get(method),
            epochs=2,
            batch_size=16,
            scenario="task",
        ).model
        for place in ("cpu", device)
    ]
    assert same(*nets)
    assert max(steps) <= 2


@pytest.mark.parametrize("fill", ["zero_out", "split"])
def test_grow(device, fill):
    nets = [
        regrow.grow(Net().to(place), channels="+25%", fill=fill, example=IMAGES[:1])[0] for place in ("cpu", device)
    ]
    assert same(*nets)


@pytest.mark.parametrize("need", [Need.ACTIVATIONS, Need.GRADIENTS, Need.FISHER])
def test_measuring_waits_once_per_shard(device, need):
    dense = Net().eval().to(device)
    axes, sources = regrow.trace(dense, IMAGES[:1].to(device)), to_sources(DATA, ReadOptions(8))
    with counting() as waits:
        collect(dense, axes, sources, [need], shards=4)
    assert sum(waits.values()) == 4, waits


def test_verify_apply_and_evaluate(device):
    dense, small, plan = cut(Net().eval().to(device))
    axes = regrow.trace(dense, IMAGES[:1].to(device))
    with counting() as waits:
        assert regrow.verify(dense, axes, plan).ok
        assert sum(waits.values()) <= 10, waits
        waits.clear()
        regrow.apply(copy.deepcopy(dense), axes, plan)
        assert sum(waits.values()) <= 10, waits
    cpu = regrow.evaluate(copy.deepcopy(small).cpu(), DATA)
    assert regrow.evaluate(small, DATA) == cpu


@pytest.mark.parametrize("home", ["cpu", "device"])
def test_batches_on_another_device_follow_the_network(device, home):
    place, other = ("cpu", device) if home == "cpu" else (device, "cpu")
    batches = list(zip(IMAGES.split(8), LABELS.split(8), strict=True))
    there = [(images.to(other), labels.to(other)) for images, labels in batches]
    calls = (
        lambda net, data: regrow.prune(net, data, keep=0.6)[0],
        lambda net, data: regrow.grow(net, channels="+25%", data=data, steps=2)[0],
        lambda net, data: regrow.finetune(net, data),
        lambda net, data: regrow.learn(net, [data], method="naive", epochs=1).model,
    )
    assert regrow.evaluate(Net().to(place), there) == regrow.evaluate(Net().to(place), batches)
    for call in calls:
        assert same(*(call(Net().to(place), data) for data in (there, batches)))


def test_learn_command(device, tmp_path):
    settings = LearnSettings(("permuted:digits:2",), "mlp:16", epochs=1, train=80, test=40)
    for place in ("cpu", "acc"):
        learn.learn_named(replace(settings, device=place), Invocation(tmp_path / place))
    assert same_files(tmp_path)


@pytest.mark.parametrize("method", SEARCHERS)
def test_search(device, method):
    steps, around = [], lambda state, context, step: counted(steps)
    quick = {"train": 16, "test": 20, "batch_size": 8, "epochs": 2, "stages": 1}
    quick |= {"method_settings": SETTINGS.get(method, {}), "cutout": 0, "retrain": 0}
    states = []
    for place in ("cpu", "acc"):
        settings = SearchSettings("cells:2-1-1", "digits", target="params=60%", method=method, device=place, **quick)
        parts, where = read_search_data(settings), choose_device(place)
        model = search.build_space(settings, parts.search)[0].to(where)
        axes = regrow.trace(model, parts.search.train.take(torch.arange(2)).inputs.to(where))
        found = search.build_search(settings, model, axes)
        schedule = make_schedule(settings, CLASSIFICATION, settings.epochs)
        state = TrainState(found.learner.state)
        fitted = learn_tasks(
            model,
            axes,
            [parts.search],
            found.learner,
            schedule,
            state=state,
            options=FitOptions(undo=UndoStore(), around=around),
        )
        states.append({f"{name} alpha": one.values for name, one in axis_tensors(fitted.state.learner).items()})
        states[-1] |= fitted.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name].cpu(), states[1][name].cpu()) for name in states[0])
    assert max(steps) <= 2


@pytest.mark.parametrize("method", ["mgas", "trials"])
def test_search_of_a_regression(device, method):
    net, data = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)), (IMAGES[:, 0, 0], IMAGES[:, 0, 1, :1])
    found = regrow.search(net, data, smaller=0.5, method=method, epochs=6, batch_size=16, device="acc")
    assert found.size <= found.target


def test_a_missing_device_is_refused_before_anything_is_read(tmp_path):
    for run in (
        lambda: learn.learn_named(LearnSettings(("nowhere",), device="cuda:7"), Invocation(tmp_path / "out")),
        lambda: search.search_named(
            SearchSettings("cells:2-1-1", "nowhere", target="params=50%", device="cuda:7"), Invocation(tmp_path / "out")
        ),
    ):
        with pytest.raises(ResourceError, match=r"cuda:7 is not available; this machine has .*; use --device cpu"):
            run()


def test_auto_takes_the_best_device(monkeypatch):
    for there, best in ((["cpu"], "cpu"), (["cpu", "mps"], "cpu"), (["cpu", "cuda:0", "mps"], "cuda")):
        monkeypatch.setattr(devices, "list_devices", lambda there=there: there)
        assert choose_device("auto").type == best


def test_a_device_by_name(device):
    small, _ = regrow.prune(Net(), DATA, method="magnitude", keep=0.6, device="acc")
    assert next(small.parameters()).device == device
    with pytest.raises(ResourceError, match="cuda:7 is not available"):
        regrow.prune(Net(), DATA, keep=0.5, device="cuda:7")


def test_the_pretend_accelerator_refuses_mixed_devices(device):
    net = nn.Linear(2, 2).to(device)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        net(torch.ones(1, 2))
    with counting() as waits:
        assert float(net(torch.zeros(1, 2, device=device)).detach().sum()) == pytest.approx(float(net.bias.sum()))
    assert sum(waits.values()) == 2
