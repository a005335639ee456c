"""GOLD-NAS-like: what goes when, under which pressure, to the target and no further."""

import pytest
import torch

from regrow import trace
from regrow.candidates import candidates_in
from regrow.data import streams
from regrow.learner import Stand
from regrow.methods.search.gold_nas import GoldNas, Settings
from regrow.nets import bench201
from regrow.nets.bench201 import Bench201
from regrow.nets.cells import Cells, supernet
from regrow.nets.small import small
from regrow.surgery.parametrize import parametrize
from regrow.tasks import Examples, Task
from regrow.training.learning import Schedule, changed, learn

CONFIG = supernet((1, 8, 8), 10, width=4, cells=2, nodes=2, stride=1, heads=(1,))
SCHEDULE = Schedule(epochs=6, batch_size=50, lr=0.02)


@pytest.fixture(scope="module")
def task():
    base = streams.fewer(streams.digits_task(), 100, 40)
    return Task("digits", base.train, base.test, base.classes)


@pytest.fixture(scope="module")
def axes():
    return trace(Cells(CONFIG), torch.zeros(2, 1, 8, 8))


def network():
    torch.manual_seed(0)
    return Cells(CONFIG)


def learner(**more):
    return GoldNas(settings=Settings(**{"target": 3000.0, "stages": (1,), "warm": 1, **more}))


def begun(axes, task, epoch=3, **more):
    own, at = learner(**more), Stand(network(), axes, task, epoch=epoch, epochs=6, steps=2)
    own.begin(at)
    return own, at


@pytest.mark.slow
def test_what_hardly_counts_goes_at_once_and_of_the_rest_the_lowest(task, axes):
    own, at = begun(axes, task, target=100.0, each=2, low=0.01, high=0.05)
    alpha, first, second = own.tensors["alpha"].values, own.gates.node == 0, own.gates.node == 1
    one, two = first.nonzero()[:, 0], second.nonzero()[:, 0]
    alpha[one[:3]] = torch.tensor([-9.0, -8.0, -7.0])  # shares far below 0.01
    alpha[two[:3]] = torch.tensor([-0.8, -0.7, -0.6])  # 0.035 and a little more: of these the two lowest
    plan = own.plan(at)
    assert {*plan.drop} == {own.gates.ops[i] for i in (*one[:3].tolist(), *two[:2].tolist())}
    own, at = begun(axes, task, target=100.0, each=1000)
    plan = own.plan(at)  # 1 / 14 of the first node's operations each, 1 / 21 of the second's
    assert plan.drop and not {*plan.drop} & {own.gates.ops[i] for i in one.tolist()}


@pytest.mark.slow
def test_what_a_tight_target_needs_stays_however_little_it_counts(task, axes):
    own, at = begun(axes, task, target=700.0, each=2, low=0.01, high=0.05)
    cheap = own.gates.prices() <= 1
    own.tensors["alpha"].values[cheap] = -9.0
    plan = own.plan(at)
    assert plan.drop and not all(path in plan.drop for path, one in zip(own.gates.ops, cheap, strict=True) if one)
    changed(at, own, plan)
    pressed = own.values["lambda"]
    assert own.plan(at) is None and own.values["lambda"] > pressed, "what is needed does not count as gone"
    while plan := own.final(at):
        changed(at, own, plan)
    assert own.size() <= 700


def test_what_must_stay_takes_no_turn_of_what_may_go(task, axes):
    own, at = begun(axes, task, target=100.0, each=2, low=0.0, high=1.0)
    ops = own.gates.ops
    second = [i for i, path in enumerate(ops) if path.startswith("cells.0.") and path.endswith("_1")]
    left = own.now.ops.clone()
    left[second[1:]] = 0.0
    changed(at, own, own.without(at, left))  # one operation alone reads the second input of the first cell
    own.tensors["alpha"].values.data[second[0]] = -6.0  # and counts least of all
    plan = own.plan(at)
    assert len(plan.drop) == 2 and ops[second[0]] not in plan.drop


def test_operations_that_are_decided_together_count_as_one(task):
    net = Bench201(bench201.supernet((1, 8, 8), 10, width=4, cells=1, stride=1))
    own = GoldNas(settings=Settings(target=100.0, warm=1, each=2, high=1.0))
    at = Stand(net, trace(net, torch.zeros(2, 1, 8, 8)), task, epoch=3, epochs=6)
    own.begin(at)
    own.tensors["alpha"].values.copy_(torch.randn(len(own.gates.ops), generator=torch.Generator().manual_seed(0)))
    plan = own.plan(at)
    assert len(plan.drop) == 2 * 3  # in each of three cells
    assert len({own.gates.tied[own.gates.ops.index(path)].item() for path in plan.drop}) == 2
    assert own.values["lambda"] == 0.0 and own.values["step"] == 1e-5  # two went, as many as there were to


@pytest.mark.slow
def test_the_last_operation_of_a_node_stays_and_none_goes_below_the_target(task, axes):
    own, at = begun(axes, task, target=10.0, each=1000, high=1.0)
    changed(at, own, own.plan(at))
    assert all(set(paths) & set(at.axes.branches) for paths in at.model.needed())
    assert not bool(own.gates.open(0, own.now.ops).any())  # each that is left is the last of its node or of its input
    own, at = begun(axes, task, target=6000.0, each=1000, high=1.0)
    whole_size, prices = own.size(), dict(zip(own.gates.ops, own.gates.prices().tolist(), strict=True))
    plan = own.plan(at)
    lost = sum(prices[path] for path in plan.drop)
    changed(at, own, plan)
    assert own.size() == whole_size - lost <= 6000 < own.size() + max(prices.values())
    own.values["lambda"] = 0.3
    assert own.plan(at) is None and own.values["lambda"] == 0.0  # and nothing presses any more


def test_pressure_grows_while_few_go_and_is_halved_when_many_do(task, axes):
    own, at = begun(axes, task, target=100.0, each=3, low=0.0, high=0.0)
    for step in (2e-5, 4e-5, 8e-5):
        before = own.values["lambda"]
        assert own.plan(at) is None
        assert own.values["lambda"] == pytest.approx(before + step)
    own.tensors["alpha"].values[:6] = -12.0
    own.settings = Settings(target=100.0, stages=(1,), warm=1, each=3, low=0.01, high=0.01)
    before = own.values["lambda"]
    assert len(own.plan(at).drop) == 6
    assert own.values["lambda"] == before / 2 and own.values["step"] == 1e-5


@pytest.mark.parametrize("price", [0.0, 1.0])
def test_the_gradient_of_alpha_is_that_of_the_loss_with_its_pressure(price, task, axes):
    own, at = begun(axes, task, augment=False, price=price)
    at.model.double()
    one = own.tensors["alpha"]
    one.values = torch.randn(len(one.values), generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    own.values["lambda"], batch = 0.5, Examples(task.train.inputs[:20].double(), task.train.labels[:20])

    def loss():
        with parametrize(at.model, own.standing(at)):
            return own.loss(at, batch)

    loss().backward()
    found, middle, losses = one.values.grad, one.values.detach(), []
    way, eps = torch.randn(len(middle), generator=torch.Generator().manual_seed(1)).double(), 1e-6
    for sign in (1, -1):
        one.values = middle + sign * eps * way
        losses.append(float(loss().detach()))
    assert float(found @ way) == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-5)
    # The pressure alone, by hand, of the first node.
    own.values["lambda"] = 0.0
    plain = float(loss().detach())
    own.values["lambda"] = 0.5
    share, here, prices = one.values.sigmoid(), own.gates.node, own.gates.prices()
    total = 0.0
    for node in range(int(here.max()) + 1):
        a = share[here == node]
        total += float(((1 + price * prices[here == node] / prices.mean()) * torch.log(1 + len(a) * a / a.sum())).sum())
    assert float(loss().detach()) - plain == pytest.approx(0.5 * total, rel=1e-9)


@pytest.mark.slow
def test_a_search_ends_at_its_target_and_answers_as_its_masks_did(task, axes):
    own, net = learner(), network()
    here, course = learn(net, axes, [task], own, SCHEDULE)
    assert any(event["dropped"] for event in course.events)
    at = Stand(net, here, task, 0, SCHEDULE.epochs, SCHEDULE.epochs)
    while plan := own.final(at):
        changed(at, own, plan)
    assert 0.6 * own.most < own.size() <= own.most
    with torch.no_grad(), parametrize(net, own.answering(at, 0)):
        masked = own.asked(at, task.test.inputs)
    own.baked(at)
    assert torch.equal(net.upto(task.test.inputs, 1), masked)
    assert own.values["saved"]["filters"] == own.values["saved"]["weights"] == 0
    assert {*candidates_in(net)} == {*candidates_in(network())}  # each node is still there


def test_what_says_nothing_is_refused(task, axes):
    with pytest.raises(ValueError, match="low not above high"):
        Settings(low=0.2)
    with pytest.raises(ValueError, match="each is 0 or more"):
        Settings(each=-1)
    with pytest.raises(ValueError, match="clip is a norm"):
        Settings(clip=0.0)
    with pytest.raises(ValueError, match="take --epochs 5 or more"):
        learner(warm=3).check(Stand(network(), axes, task, epochs=4))
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    at = Stand(net, trace(net, torch.zeros(2, 1, 8, 8)), task, epochs=3)
    with pytest.raises(ValueError, match="no candidates: mark some"):
        learner(stages=()).check(at)
