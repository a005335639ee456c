"""MGAS: three levels searched together, cut exactly."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regrow import trace
from regrow.candidates import Candidates
from regrow.data import streams
from regrow.learner import Learner, Stand
from regrow.methods.search.mgas import Mgas, Settings
from regrow.methods.search.searcher import LEVELS
from regrow.nets import bench201
from regrow.nets.bench201 import Bench201
from regrow.nets.cells import Cells, supernet
from regrow.nets.small import small
from regrow.plan import Plan
from regrow.surgery.parametrize import parametrize
from regrow.tasks import Examples, Task
from regrow.training.learning import Schedule, changed, learn
from regrow.training.movers import Movers

CONFIG = supernet((1, 8, 8), 10, width=4, cells=2, nodes=1, stride=1, heads=(0,))
SCHEDULE = Schedule(epochs=6, batch_size=50, lr=0.02)


@pytest.fixture(scope="module")
def task():
    base = streams.fewer(streams.digits_task(), 150, 100)
    return Task("digits", base.train, base.test, base.classes)


@pytest.fixture(scope="module")
def axes():
    return trace(Cells(CONFIG), torch.zeros(2, 1, 8, 8))


def network():
    torch.manual_seed(0)
    return Cells(CONFIG)


def learner(**more):
    given = {"target": 2500.0, "stages": (0, 1), "share": 0.2, "warm": 1, "every": 1, "regrow": 0.5}
    return Mgas(settings=Settings(**{**given, **more}))


def searched(task, axes, own, on_epoch=None, schedule=SCHEDULE):
    net = network()
    axes, course = learn(net, axes, [task], own, schedule, on_epoch=on_epoch)
    return Stand(net, axes, task, 0, schedule.epochs, schedule.epochs, -(-len(task.train) // 50)), course


def test_at_first_nothing_stands_otherwise(task, axes):
    at, own = Stand(network().eval(), axes, task, epochs=4), learner()
    own.begin(at)
    x = task.test.inputs[:8]
    for stage, last in enumerate((0, 1)):
        own._start(at, stage)
        plain = at.model.upto(x, last)
        with parametrize(at.model, own.answering(at, 0)):
            assert torch.equal(own.asked(at, x), plain)


@pytest.fixture(scope="module")
def run(task, axes):
    own = learner()
    at, course = searched(task, axes, own)
    return at, own, course


@pytest.mark.slow
def test_a_search_commits_regrows_and_ends_at_its_target(run, task):
    at, own, course = copy.deepcopy(run)
    assert any(event["dropped"] for event in course.events)
    assert any(event["back"] for event in course.events)
    assert {row["stage"] for row in own.values["history"]} == {0, 1}
    while plan := own.final(at):
        changed(at, own, plan)
    assert 0.9 * own.settings.target < own.size() <= own.settings.target
    x = task.test.inputs[:16]
    with torch.no_grad(), parametrize(at.model, own.answering(at, 0)):
        masked = own.asked(at, x)
    own.baked(at)
    assert torch.equal(at.model.upto(x, 1), masked)
    left = sum(int(p.count_nonzero()) for n, p in at.model.named_parameters() if at.model.within(n, 1))
    dropped = sum(len(node.ops) for node in at.model.modules() if hasattr(node, "scale")) - len(at.axes.branches)
    assert left - dropped <= own.settings.target


@pytest.mark.parametrize("reprune", [True, False])
def test_what_earlier_stages_kept_is_pruned_again_or_not(task, axes, reprune):
    """Where it is not, no threshold of theirs moves, so nothing of them can fall below one."""
    at, own = Stand(network(), axes, task, epochs=4), learner(reprune=reprune)
    own.begin(at)
    own._start(at, 1)
    for name in ("ops", "filters", "weights"):
        own.tensors[f"threshold {name}"].values.data.fill_(0.6)
    own.stepped(at)
    masks, found = own.masks(at), own.upto(at, 0)
    earlier = found.runs
    least = len(found.needed)
    assert (int(masks.ops[earlier].sum()) > least) is not reprune and int(masks.ops[~earlier].sum()) <= least
    keys = [*own.gates.levels.axes]
    standing = {key: float(masks.filters[base : base + n].mean()) for key, (base, n, _) in own.spans()}
    first = {own.values["axes"][i] for i in found.axis.unique().tolist()}
    assert first and {*keys} - first
    assert all((standing[key] == 1) is not reprune for key in first) and all(
        standing[key] < 1 for key in {*keys} - first
    )


def test_a_commit_changes_no_answer(run):
    for event in run[2].events:
        if not event["back"]:
            assert event["logits_moved"] < 1e-4, event["epoch"]


@pytest.mark.slow
def test_every_living_parameter_is_moved_by_one_group_alone(task, axes, monkeypatch):
    joined, seen = Movers.join, []

    def watched(movers, at, own):
        joined(movers, at, own)
        moved = [id(one) for mover in movers.optimizers for group in mover.param_groups for one in group["params"]]
        learned = [id(one.values) for one in own.tensors.values() if one.lr is not None]
        assert sorted(moved) == sorted([*map(id, at.parameters().values()), *learned])
        assert all(id(one) in moved for mover in movers.optimizers for one in mover.state)
        seen.append(len(moved))

    monkeypatch.setattr(Movers, "join", watched)
    searched(task, axes, learner())
    assert len(set(seen)) > 2


@pytest.mark.slow
def test_the_pull_at_a_cut_filter_is_the_gradient_of_its_scale(task, axes):
    """Held against a network that was never cut, in which the filter stands at a small scale, and at none."""
    net = network()
    learn(net, axes, [task], Learner(), Schedule(epochs=8, batch_size=25, lr=0.1))
    at, own = Stand(net.double().eval(), axes, task, epochs=4), learner()
    own.begin(at)
    inputs, labels = task.train.inputs.double(), task.train.labels
    other, whole_at = learner(), replace(at, model=copy.deepcopy(at.model))
    other.begin(whole_at)
    lost = {key: [1, size - 1] for key, (_, size, _) in own.spans() if size > 3}
    keep = {key: [i for i in range(axes[key].size) if i not in ids] for key, ids in lost.items()}
    own.tensors["threshold weights"].values.fill_(0.5)  # of the stage that ends
    found = own.gates.levels  # a third of the weights is gone, but for those of filters that come back
    units = torch.tensor([found.axes[key] + i for key, ids in lost.items() for i in ids])
    theirs = torch.isin(found.reads, units) | torch.isin(found.makes[: len(found.reads)], units)
    gone = (torch.rand(len(theirs), generator=torch.Generator().manual_seed(0)) < 0.3) & ~theirs
    for stand, one in ((at, own), (whole_at, other)):
        for name, flags in found.apart(gone).items():
            one.tensors[f"gone {name}"].values.copy_(flags)
        one.settle(stand)
    changed(at, own, Plan.keeping(axes, keep))
    answers = at.model(inputs)
    pulls = {(key, one): pull for pull, key, one in own.pulls(at, lost, Examples(inputs, labels))}
    assert all(torch.equal(a, b) for a, b in zip(at.model(inputs), answers, strict=True))  # on a copy alone
    assert len(pulls) == 2 * len(lost) and len({f"{pull:.6f}" for pull in pulls.values()}) > len(lost)

    def loss(scales):
        for key, ids in lost.items():
            kappa = other.tensors[f"kappa {key}"].values
            for one in ids:
                kappa[one] = torch.logit(torch.tensor(scales.get((key, one), 1e-12) / 2, dtype=torch.float64))
        with torch.no_grad(), parametrize(whole_at.model, other.answering(whole_at, 0)):
            return float(F.cross_entropy(other.asked(whole_at, inputs), labels))

    none = loss({})
    for unit in pulls:
        assert abs(loss({unit: 1e-4}) - none) / 1e-4 == pytest.approx(pulls[unit], rel=1e-2, abs=1e-6), unit


def test_filters_come_back_where_the_loss_pulls_most(task, axes, monkeypatch):
    own = learner(regrow_filters=0.3)
    at, seen = Stand(network(), axes, task, epochs=4, steps=3), []
    own.begin(at)
    keys = [key for key, (_, size, _) in own.spans() if size > 3][:2]
    changed(at, own, Plan.keeping(axes, {key: range(1, axes[key].size - 1) for key in keys}))
    own.values["fallen"] = {key: [0, axes[key].size - 1] for key in keys}
    monkeypatch.setattr(Mgas, "pulls", lambda self, at, lost, batch: seen.append((lost, len(batch))) or told(lost))

    def told(lost):
        return [(float(one == 0) + (key == keys[1]), key, one) for key, ids in lost.items() for one in ids]

    plan = own.restoring(at)
    assert seen == [(own.values["fallen"], 50)]  # as many examples as a step has
    assert {key: change.restore for key, change in plan.changes.items()} == {keys[1]: (0,)}


@pytest.mark.slow
@pytest.mark.parametrize("level", ["operations", "filters", "weights"])
def test_one_level_alone_leaves_the_others_whole(task, axes, level):
    own = learner(levels=(level,), target=5200.0 if level == "operations" else 4000.0, regrow=0.0)
    at, course = searched(task, axes, own)
    while plan := own.final(at):
        changed(at, own, plan)
    assert own.size() <= own.settings.target
    saved = own.values["saved"]
    assert all((saved[other] > 0) == (other == level) for other in saved)
    assert level != "weights" or not course.events


@pytest.mark.slow
@pytest.mark.parametrize("target", [500, 800, 1300])
def test_commits_of_operations_alone_keep_what_a_tight_target_needs(task, axes, target):
    """The cheapest choice costs 498. What is delivered has no operation that gives nothing."""
    own = learner(levels=("operations",), target=target, regrow=0.0)
    at, _ = searched(task, axes, own)
    while plan := own.final(at):
        changed(at, own, plan)
    own.baked(at)
    scales = torch.cat([node.scale for node in at.model.modules() if isinstance(node, Candidates)])
    left = sum(p.numel() for n, p in at.model.named_parameters() if at.model.within(n, 1))
    dropped = sum(len(node.ops) for node in at.model.modules() if hasattr(node, "scale")) - len(at.axes.branches)
    assert left - dropped == own.size() <= target
    assert int(scales.count_nonzero()) == len(at.axes.branches)


@pytest.mark.slow
def test_told_shares_are_kept_to_the_unit(task, axes):
    own = learner(controller="ratios", ratios=(0.6, 0.75, 0.8), stages=(1,), target=9000.0, regrow=0.0)
    at, _ = searched(task, axes, own)
    own.commit(at)
    assert own.kept()["weights"] == pytest.approx(0.8, abs=0.02)
    assert len(at.axes.branches) <= 0.75 * 28


@pytest.mark.slow
def test_the_authors_controller_raises_its_pressure(task, axes):
    own = learner(controller="feedback", levels=("operations",), stages=(1,), regrow=0.0)
    searched(task, axes, own, schedule=Schedule(epochs=4, batch_size=75))
    assert 0 < own.values["lambda"] < 0.01 and own.values["mu"] == 0 and own.spares_bare
    assert own.tensors["threshold filters"].lr == own.tensors["threshold ops"].lr


@pytest.mark.parametrize("controller", ["dual", "feedback"])
def test_pressure_is_towards_few_operations_per_node_and_high_thresholds_where_nothing_else_is(task, axes, controller):
    at, own = Stand(network(), axes, task, epoch=1, epochs=4), learner(controller=controller)
    own.begin(at)
    names = ("alpha", "threshold ops", "threshold filters", "threshold weights")
    alpha, ops, filters, weights = learned = [own.tensors[name].values for name in names]
    generator = torch.Generator().manual_seed(0)
    alpha.data = torch.randn(len(alpha), generator=generator)
    for one in learned:
        one.requires_grad_()
    own.masks(at, learning=True)
    batch, found = Examples(task.train.inputs[:20], task.train.labels[:20]), own.gates
    here, node = found.runs, found.node
    a = alpha.detach().sigmoid()
    n, total = (torch.zeros(len(a)).index_add(0, node, one)[node] for one in (here.float(), a * here))
    more = torch.log1p(n * a / total)[here].sum()
    if controller == "feedback":
        more += sum(
            torch.exp(-one.detach()).sum() for one in (ops[here], filters[found.axis.unique()], weights[:-1][here])
        )

    def loss(press):
        own.values["lambda"] = press
        torch.manual_seed(0)
        return own.loss(at, batch)

    pressed = loss(0.1) - loss(0.0)
    assert float(pressed.detach()) == pytest.approx(0.1 * float(more), rel=1e-3)
    slope, *steep = torch.autograd.grad(pressed, learned)
    raised = [bool((one < -1e-3).any()) for one in steep]
    assert raised == [controller == "feedback"] * 3
    if controller == "dual":  # what stands in the loss twice leaves rounding
        assert all(float(one.abs().max()) < 1e-5 for one in steep)
    for own_node in node[here].unique():
        among = (here & (node == own_node)).nonzero()[:, 0]
        assert float(slope[among[a[among].argmin()]]) > 0 > float(slope[among[a[among].argmax()]])


@pytest.mark.parametrize(("levels", "slow"), [(LEVELS, True), (("filters", "weights"), False)])
def test_thresholds_of_filters_learn_slower_where_operations_are_searched(task, axes, levels, slow):
    own = learner(levels=levels, pace=0.5)
    own.begin(Stand(network(), axes, task, epochs=4, steps=3))
    rate = {name: own.tensors[f"threshold {name}"].lr for name in ("ops", "filters", "weights")}
    assert rate["ops"] == rate["weights"] == (2 if slow else 1) * rate["filters"] > 0


def ending_with_one():
    torch.manual_seed(0)
    net = Bench201(bench201.supernet((1, 8, 8), 10, width=4, cells=1))
    return net, trace(net, torch.zeros(2, 1, 8, 8))


def of_ones_own():
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    return net, trace(net, torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("begun", [ending_with_one, of_ones_own])
def test_thresholds_of_filters_learn_at_the_full_rate_where_no_node_may_keep_several_operations(task, begun):
    own = Mgas(settings=Settings(target=500.0, pace=0.5))
    own.begin(Stand(*begun(), task, epochs=4, steps=3))
    assert own.tensors["threshold filters"].lr == own.tensors["threshold ops"].lr


@pytest.mark.slow
@pytest.mark.parametrize("begun", [ending_with_one, lambda: (network(), trace(network(), torch.zeros(2, 1, 8, 8)))])
def test_nodes_are_thinned_unless_they_end_with_one_operation(task, begun):
    def loss(**more):
        own, at = Mgas(settings=Settings(target=2500.0, warm=0, **more)), Stand(*begun(), task, epochs=4)
        own.begin(at)
        own.values["mu"] = 1.0
        own.masks(at, learning=True)
        torch.manual_seed(0)
        with torch.no_grad():
            found = own.loss(at, Examples(task.train.inputs[:20], task.train.labels[:20]))
        return float(found), own.gates, own.allowed(at)

    (with_both, gates, allowed), (floor, *_), (press, *_), (neither, *_) = (
        loss(**more) for more in ({}, {"press": 0.0}, {"floor": 0.0}, {"press": 0.0, "floor": 0.0})
    )
    if bool(gates.single.all()):
        assert with_both == floor == press == neither
    else:  # all weigh the same
        assert press - neither == pytest.approx(0.05 * math.log(2) * len(gates.ops), rel=1e-3)
        lifted = float((gates.typical() - gates.prices()).clamp_min(0).sum())
        assert floor - neither == pytest.approx(lifted / allowed, rel=1e-3)
        assert with_both - neither == pytest.approx(floor + press - 2 * neither, rel=1e-3)


def test_filters_and_weights_of_ones_own_network(task):
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    axes = trace(net, torch.zeros(2, 1, 8, 8))
    most = 0.4 * sum(p.numel() for p in net.parameters())
    own = Mgas(settings=Settings(target=most, warm=1, every=1))
    axes, _ = learn(net, axes, [task], own, Schedule(epochs=4, batch_size=50))
    at = Stand(net, axes, task, 0, 4, 4)
    while plan := own.final(at):
        changed(at, own, plan)
    own.baked(at)
    assert sum(int(p.count_nonzero()) for p in net.parameters()) <= most
    assert sum(p.numel() for p in net.parameters()) < most / 0.4


def test_settings_that_say_nothing_are_refused():
    for wrong in (
        {"levels": ("ops",)},
        {"controller": "pid"},
        {"stages": (3, 1)},
        {"controller": "ratios"},
        {"lr": -3.0},
        {"clip": 0.0},
        {"floor": -1.0},
        {"floor": 0.5, "controller": "feedback"},
        {"press": 0.1, "controller": "ratios", "ratios": (0.5, 0.5, 0.5)},
        {"pace": -0.5},
    ):
        with pytest.raises(ValueError):
            Settings(**wrong)


def test_what_costs_nothing_is_pressed_on_and_goes_though_it_makes_nothing_smaller(task, axes):
    at, own = Stand(network(), axes, task, epochs=4), learner(floor=0.5)
    own.begin(at)
    thresholds = own.tensors["threshold ops"].values.requires_grad_()
    own.masks(at, learning=True)
    prices, here = own.gates.prices(), own.gates.runs
    floor = torch.stack([0.5 * prices[(own.gates.node == node) & (prices > 1)].mean() for node in own.gates.node])
    assert float(own._lifted().detach()) == pytest.approx(float((floor - prices)[here].clamp_min(0).sum()))
    own._lifted().backward()
    pressed = thresholds.grad < 0  # a higher threshold makes less of it
    assert torch.equal(pressed, here & (prices < floor)) and bool((prices[pressed] <= 1).any())
    thresholds.requires_grad_(False)
    everywhere, own.gates = own.gates, replace(own.gates, single=torch.ones_like(own.gates.single))
    assert float(own._lifted().detach()) == 0  # where one is left at the end anyway
    own.gates = everywhere
    ops = own.gates.ops
    first = {kind: next(i for i, path in enumerate(ops) if path.endswith(f".{kind}_0")) for kind in ("max", "sep5")}
    own.values["start"] = own.values["goal"] = 1e9
    own.tensors["alpha"].values.data[[*first.values()]] = -50.0
    assert [*own.commit(at).drop] == [ops[first["max"]]]  # what costs comes back, as long as it is allowed


def test_candidates_within_candidates_are_refused(task):
    inner = Candidates({"one": nn.Conv2d(4, 4, 1), "same": nn.Identity()})
    outer = Candidates({"deep": nn.Sequential(inner, nn.ReLU()), "same": nn.Identity()})
    net = nn.Sequential(nn.Conv2d(1, 4, 1), outer, nn.Flatten(), nn.Linear(256, 10))
    at = Stand(net, trace(net, torch.zeros(2, 1, 8, 8)), task, epochs=4)
    with pytest.raises(ValueError, match=r"1.ops.deep.0.ops.one lies in another, 1.ops.deep: mark candidates on one"):
        learner(stages=()).check(at)
