"""GOLD-NAS-like: what goes when, under which pressure, to the target and no further."""

from dataclasses import replace

import pytest
import torch

from methods.search.searches import change, compute_loss, draw, finalize, replace_parameters, size, start, train, write
from regrow import trace
from regrow.core.candidates import candidate_paths
from regrow.core.tasks import Examples
from regrow.methods.search.commit import plan_drop
from regrow.methods.search.gold_nas import Settings, build
from regrow.nets.cells import Cells, supernet_config
from regrow.nets.vision import small
from regrow.surgery.gate import parametrize
from regrow.training.continual import TaskSchedule
from regrow.training.learner import Context
from topology import topology

CONFIG = supernet_config((1, 8, 8), 10, width=4, cells=2, nodes=2, stride=1, heads=(1,))
SCHEDULE = TaskSchedule(epochs=6, batch_size=50, lr=0.02)


@pytest.fixture(scope="module")
def axes():
    return trace(Cells(CONFIG), torch.zeros(2, 1, 8, 8))


def network():
    torch.manual_seed(0)
    return Cells(CONFIG)


def search_with(**more):
    return build(Settings(**{"target": 3000.0, "stages": (1,), "warm": 1, **more}))


def begun(axes, task, epoch=3, **more):
    search, context = search_with(**more), Context(network(), axes, task, epoch=epoch, epochs=6, steps=2)
    return search, start(search, context), context


def plan(search, state, context):
    """What is dropped before this epoch, and the state after that was decided."""
    return search.learner.plan(state, replace(context, plans_applied=0))


def test_what_hardly_counts_goes_at_once_and_of_the_rest_the_lowest(task, axes):
    search, state, context = begun(axes, task, target=100.0, drops_per_epoch=2, drop_below=0.01, keep_above=0.05)
    alpha, first, second = state.alpha.values, state.layout.node == 0, state.layout.node == 1
    one, two = first.nonzero()[:, 0], second.nonzero()[:, 0]
    alpha[one[:3]] = torch.tensor([-9.0, -8.0, -7.0])  # shares far below 0.01
    alpha[two[:3]] = torch.tensor([-0.8, -0.7, -0.6])  # 0.035 and a little more: of these the two lowest
    first_plan, _ = plan(search, state, context)
    assert {*first_plan.drop} == {state.layout.ops[i] for i in (*one[:3].tolist(), *two[:2].tolist())}
    search, state, context = begun(axes, task, target=100.0, drops_per_epoch=1000)
    second_plan, _ = plan(search, state, context)  # 1 / 14 of the first node's operations each, 1 / 21 of the second's
    assert second_plan.drop and not {*second_plan.drop} & {state.layout.ops[i] for i in one.tolist()}


def test_what_a_tight_target_needs_stays_however_little_it_counts(task, axes):
    search, state, context = begun(axes, task, target=700.0, drops_per_epoch=2, drop_below=0.01, keep_above=0.05)
    cheap = state.layout.prices() <= 1
    state.alpha.values[cheap] = -9.0
    drop, state = plan(search, state, context)
    assert drop.drop and not all(path in drop.drop for path, one in zip(state.layout.ops, cheap, strict=True) if one)
    context, state = change(search, state, context, drop)
    pressed = state.penalty
    none, state = plan(search, state, context)
    assert none is None and state.penalty > pressed, "what is needed does not count as gone"
    context, state = finalize(search, state, context)
    assert size(search, state, context) <= 700


def test_what_must_stay_takes_no_turn_of_what_may_go(task, axes):
    search, state, context = begun(axes, task, target=100.0, drops_per_epoch=2, drop_below=0.0, keep_above=1.0)
    ops = state.layout.ops
    second = [i for i, path in enumerate(ops) if path.startswith("cells.0.") and path.endswith("_1")]
    left = search.masks(state, context, None, False).ops.clone()
    left[second[1:]] = 0.0
    drop, state = plan_drop(search, state, context, left)
    context, state = change(
        search, state, context, drop
    )  # one operation alone reads the second input of the first cell
    state.alpha.values.data[second[0]] = -6.0  # and counts least of all
    drop, _ = plan(search, state, context)
    assert len(drop.drop) == 2 and ops[second[0]] not in drop.drop


def test_operations_that_are_decided_together_count_as_one(task):
    net = topology()
    search = build(Settings(target=100.0, warm=1, drops_per_epoch=2, keep_above=1.0))
    context = Context(net, trace(net, torch.zeros(2, 1, 8, 8)), task, epoch=3, epochs=6)
    state = start(search, context)
    ops, tied = state.layout.ops, state.layout.tied
    state.alpha.values.copy_(draw(len(ops)))
    drop, state = plan(search, state, context)
    assert len(drop.drop) == 2 * 3  # in each of three cells
    assert len({tied[ops.index(path)].item() for path in drop.drop}) == 2
    assert state.penalty == 0.0 and state.penalty_step == 1e-5  # two went, as many as there were to


def test_the_last_operation_of_a_node_stays_and_none_goes_below_the_target(task, axes):
    search, state, context = begun(axes, task, target=10.0, drops_per_epoch=1000, keep_above=1.0)
    drop, state = plan(search, state, context)
    context, state = change(search, state, context, drop)
    assert all(set(paths) & set(context.axes.branches) for paths in context.model.required_groups())
    ops = search.masks(state, context, None, False).ops
    assert not bool(state.layout.removable(ops).any())  # each that is left is the last of its node or of its input
    search, state, context = begun(axes, task, target=6000.0, drops_per_epoch=1000, keep_above=1.0)
    whole_size, prices = size(search, state, context), state.layout.prices().tolist()
    prices = dict(zip(state.layout.ops, prices, strict=True))
    drop, state = plan(search, state, context)
    lost = sum(prices[path] for path in drop.drop)
    context, state = change(search, state, context, drop)
    left = size(search, state, context)
    assert left == whole_size - lost <= 6000 < left + max(prices.values())
    none, state = plan(search, replace(state, penalty=0.3), context)
    assert none is None and state.penalty == 0.0  # and nothing presses any more


def test_pressure_grows_while_few_go_and_is_halved_when_many_do(task, axes):
    search, state, context = begun(axes, task, target=100.0, drops_per_epoch=3, drop_below=0.0, keep_above=0.0)
    for step in (2e-5, 4e-5, 8e-5):
        before = state.penalty
        none, state = plan(search, state, context)
        assert none is None
        assert state.penalty == pytest.approx(before + step)
    state.alpha.values[:6] = -12.0
    before = state.penalty
    drop, state = plan(search_with(target=100.0, drops_per_epoch=3, drop_below=0.01, keep_above=0.01), state, context)
    assert len(drop.drop) == 6
    assert state.penalty == before / 2 and state.penalty_step == 1e-5


@pytest.mark.parametrize("price", [0.0, 1.0])
def test_the_gradient_of_alpha_is_that_of_the_loss_with_its_pressure(price, task, axes):
    search, state, context = begun(axes, task, augment=False, cost_weight=price)
    context.model.double()
    one = state.alpha
    one.values = draw(len(one.values)).double().requires_grad_()
    batch = Examples(task.train.inputs[:20].double(), task.train.labels[:20])

    def loss(penalty=0.5):
        now = replace(state, penalty=penalty)
        with parametrize(context.model, search.learner.parametrize(now, context).values):
            return compute_loss(search, now, context, batch).value

    loss().backward()
    found, middle, losses = one.values.grad, one.values.detach(), []
    way, eps = draw(len(middle), 1).double(), 1e-6
    for sign in (1, -1):
        one.values = middle + sign * eps * way
        losses.append(float(loss().detach()))
    assert float(found @ way) == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-5)
    # The pressure alone, by hand, of the first node.
    plain = float(loss(0.0).detach())
    share, here, prices = one.values.sigmoid(), state.layout.node, state.layout.prices()
    total = 0.0
    for node in range(int(here.max()) + 1):
        a = share[here == node]
        total += float(((1 + price * prices[here == node] / prices.mean()) * torch.log(1 + len(a) * a / a.sum())).sum())
    assert float(loss().detach()) - plain == pytest.approx(0.5 * total, rel=1e-9)


def test_a_search_ends_at_its_target_and_answers_as_its_masks_did(task, axes):
    search, net = search_with(), network()
    context, trained = train(search, net, axes, task, SCHEDULE)
    assert any(event["dropped"] for event in trained.events)
    context, state = finalize(search, trained.learner, context)
    assert 0.6 * 3000 < size(search, state, context) <= 3000
    with torch.no_grad(), parametrize(net, replace_parameters(search, state, context)):
        masked = context.logits(task.test.inputs)
    write(search, state, context)
    assert torch.equal(net.logits_at(task.test.inputs, 1), masked)
    assert state.saved.filters == state.saved.weights == 0
    assert {*candidate_paths(net)} == {*candidate_paths(network())}  # each node is still there


def test_what_says_nothing_is_refused(task, axes):
    with pytest.raises(ValueError, match="drop_below must be at most keep_above"):
        Settings(drop_below=0.2)
    with pytest.raises(ValueError, match="drops_per_epoch must be at least 0"):
        Settings(drops_per_epoch=-1)
    with pytest.raises(ValueError, match="clip must be above 0"):
        Settings(clip=0.0)
    with pytest.raises(ValueError, match="use --epochs 5 or more"):
        search_with(warm=3).check(Context(network(), axes, task, epochs=4))
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    context = Context(net, trace(net, torch.zeros(2, 1, 8, 8)), task, epochs=3)
    with pytest.raises(ValueError, match="no candidates: mark some"):
        search_with(stages=()).check(context)
