"""MGAS: three levels searched together, cut exactly."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.search.searches import (
    change,
    count_left,
    ended,
    finalize,
    replace_parameters,
    size,
    start,
    train,
    write,
)
from regrow import trace
from regrow.allocation.levels import GRANULARITIES, step_mask
from regrow.core.candidates import Candidates
from regrow.core.plan import Plan
from regrow.core.tasks import Examples, Task
from regrow.data import streams
from regrow.methods.search import commit
from regrow.methods.search.commit import plan_restoration, score_cut_filters
from regrow.methods.search.mgas import Settings, build
from regrow.methods.search.space import build_layout, iterate_spans
from regrow.methods.search.thresholds import _differentiate, _move
from regrow.nets.cells import Cells, supernet_config
from regrow.nets.vision import small
from regrow.surgery import UndoStore
from regrow.surgery.gate import parametrize
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions
from regrow.training.learner import PLAIN, Boundary, Context, Event, Step
from regrow.training.schedule import Optimizers
from topology import topology

CONFIG = supernet_config((1, 8, 8), 10, width=4, cells=2, nodes=1, stride=1, heads=(0,))
SCHEDULE = TaskSchedule(epochs=6, batch_size=50, lr=0.02)


@pytest.fixture(scope="module")
def task():
    base = streams.sample_task(streams.load_digits(), 150, 100)
    return Task("digits", base.train, base.test, base.classes)


@pytest.fixture(scope="module")
def axes():
    return axes_of(network)


def network():
    torch.manual_seed(0)
    return Cells(CONFIG)


@cache
def axes_of(build):
    """The axes of the networks that a function builds, which are all alike."""
    return trace(build(), torch.zeros(2, 1, 8, 8))


def search_with(**more):
    given = {"target": 2500.0, "stages": (0, 1), "share": 0.2, "warm": 1, "every": 1, "regrow": 0.5}
    return build(Settings(**{**given, **more}))


def masks_of(search, state, context, learning=False):
    return search.masks(state, context, None, learning)


def test_at_first_nothing_stands_otherwise(task, axes):
    context, search = Context(network().eval(), axes, task, epochs=4), search_with()
    state = start(search, context)
    x = task.test.inputs[:8]
    for stage, last in enumerate((0, 1)):
        state = search.update_layout(replace(state, stage=stage), context)
        plain = context.model.logits_at(x, last)
        with parametrize(context.model, replace_parameters(search, state, context)):
            assert torch.equal(context.logits(x), plain)


@pytest.fixture(scope="module")
def run(task, axes):
    search, net, history = search_with(regrow=1.0), network(), []

    def log(kind, /, **row):
        history.append(row) if kind == "epoch" else None

    undo = UndoStore()
    fitted = learn(net, axes, [task], search.learner, SCHEDULE, options=FitOptions(undo=undo, log=log))
    return search, ended(net, fitted.axes, task, SCHEDULE), fitted.state, history


def test_a_search_commits_regrows_and_ends_at_its_target(run, task):
    search, context, trained, history = run
    context, trained = copy.deepcopy((context, trained))
    assert any(event["dropped"] for event in trained.events)
    assert any(event["back"] for event in trained.events)
    assert {row["stage"] for row in history} == {0, 1}
    context, state = finalize(search, trained.learner, context)
    assert 0.9 * 2500 < size(search, state, context) <= 2500
    x = task.test.inputs[:16]
    with torch.no_grad(), parametrize(context.model, replace_parameters(search, state, context)):
        masked = context.logits(x)
    write(search, state, context)
    assert torch.equal(context.model.logits_at(x, 1), masked)
    left = sum(
        int(p.count_nonzero()) for n, p in context.model.named_parameters() if context.model.uses_parameter(n, 1)
    )
    dropped = sum(len(node.ops) for node in context.model.modules() if hasattr(node, "scale"))
    assert left - (dropped - len(context.axes.branches)) <= 2500


@pytest.mark.parametrize("reprune", [True, False])
def test_what_earlier_stages_kept_is_pruned_again_or_not(task, axes, reprune):
    """Where it is not, no threshold of theirs moves, so nothing of them can fall below one."""
    context, search = Context(network(), axes, task, epochs=4), search_with(reprune=reprune)
    state = replace(start(search, context), stage=1)
    state = search.learner.boundary(state, context, Boundary(Event.RESUME))
    for one in state.thresholds:
        one.values.data.fill_(0.6)
    batch = Examples(task.train.inputs[:20], task.train.labels[:20])
    step = Step(0, batch, replaced=search.learner.parametrize(state, context))
    step = replace(step, aux=search.learner.loss(state, context, step).aux)
    state = search.learner.after_step(state, context, step)
    masks = masks_of(search, state, context)
    found = build_layout(search.space, state.axes, context, 0)
    earlier = found.runs
    least = len(found.needed)
    assert (int(masks.ops[earlier].sum()) > least) is not reprune and int(masks.ops[~earlier].sum()) <= least
    keys = [*state.layout.levels.axes]
    standing = {key: float(masks.filters[base : base + n].mean()) for key, (base, n, _) in iterate_spans(state.layout)}
    first = {state.axes[i] for i in found.axis.unique().tolist()}
    assert first and {*keys} - first
    assert all((standing[key] == 1) is not reprune for key in first) and all(
        standing[key] < 1 for key in {*keys} - first
    )


def test_a_commit_changes_no_answer(run):
    for event in run[2].events:
        if not event["back"]:
            assert event["logits_moved"] < 1e-4, event["epoch"]


def test_every_living_parameter_is_moved_by_one_group_alone(task, axes, monkeypatch):
    register, seen = Optimizers.register, []

    def watched(optimizers, parameters, tensors):
        register(optimizers, parameters, tensors)
        moved = [id(one) for own in optimizers.all for group in own.param_groups for one in group["params"]]
        learned = [id(one.values) for one in tensors.values() if one.lr is not None]
        assert sorted(moved) == sorted([*map(id, parameters.values()), *learned])
        assert all(id(one) in moved for own in optimizers.all for one in own.state)
        seen.append(len(moved))

    monkeypatch.setattr(Optimizers, "register", watched)
    train(search_with(), network(), axes, task, SCHEDULE)
    assert len(set(seen)) > 2


def test_the_pull_at_a_cut_filter_is_the_gradient_of_its_scale(task, axes):
    """Held against a network that was never cut, in which the filter stands at a small scale, and at none."""
    net = network()
    learn(net, axes, [task], PLAIN, TaskSchedule(epochs=8, batch_size=25, lr=0.1))
    search = search_with()
    net = net.double().eval()
    context = Context(net, axes, task, epochs=4, undo=UndoStore())
    whole_context = replace(context, model=copy.deepcopy(net))
    state, other = start(search, context), start(search, whole_context)
    inputs, labels = task.train.inputs.double(), task.train.labels
    lost = {key: [1, size - 1] for key, (_, size, _) in iterate_spans(state.layout) if size > 3}
    keep = {key: [i for i in range(axes[key].size) if i not in ids] for key, ids in lost.items()}
    state.weight_thresholds.values.fill_(0.5)  # of the stage that ends
    found = state.layout.levels  # a third of the weights is gone, but for those of filters that come back
    units = torch.tensor([found.axes[key] + i for key, ids in lost.items() for i in ids])
    theirs = torch.isin(found.reads, units) | torch.isin(found.makes[: len(found.reads)], units)
    gone = (torch.rand(len(theirs), generator=torch.Generator().manual_seed(0)) < 0.3) & ~theirs
    state, other = state.with_zeros(gone), other.with_zeros(gone)
    context, state = change(search, state, context, Plan.keeping(axes, keep))
    answers = context.model(inputs)
    scores = score_cut_filters(search, state, context, lost, Examples(inputs, labels))
    pulls = {(key, one): pull for pull, key, one in scores}
    assert torch.equal(context.model(inputs), answers)  # on a copy alone
    assert len(pulls) == 2 * len(lost) and len({f"{pull:.6f}" for pull in pulls.values()}) > len(lost)

    def loss(scales):
        for key, ids in lost.items():
            for one in ids:
                scale = torch.tensor(scales.get((key, one), 1e-12) / 2, dtype=torch.float64)
                other.kappa[key].values[one] = torch.logit(scale)
        values = replace_parameters(search, other, whole_context)
        with torch.no_grad(), parametrize(whole_context.model, values):
            return float(F.cross_entropy(whole_context.logits(inputs), labels))

    none = loss({})
    for unit in pulls:
        assert abs(loss({unit: 1e-4}) - none) / 1e-4 == pytest.approx(pulls[unit], rel=1e-2, abs=1e-6), unit


def test_filters_come_back_where_the_loss_pulls_most(task, axes, monkeypatch):
    search, seen = search_with(), []
    context = Context(network(), axes, task, epochs=4, steps=3, undo=UndoStore())
    state = start(search, context)
    keys = [key for key, (_, size, _) in iterate_spans(state.layout) if size > 3][:2]
    keep = {key: range(1, axes[key].size - 1) for key in keys}
    context, state = change(search, state, context, Plan.keeping(axes, keep))
    state = replace(state, cut={key: (0, axes[key].size - 1) for key in keys})

    def score(rules, state, context, cut, batch):
        seen.append((cut, len(batch)))
        return [(float(one == 0) + (key == keys[1]), key, one) for key, ids in cut.items() for one in ids]

    monkeypatch.setattr(commit, "score_cut_filters", score)
    plan, _ = plan_restoration(search, 0.3, state, context)
    assert seen == [({key: [*ids] for key, ids in state.cut.items()}, 50)]  # as many examples as a step has
    assert {key: change.restore for key, change in plan.changes.items()} == {keys[1]: (0,)}


@pytest.mark.parametrize("level", ["operations", "filters", "weights"])
def test_one_level_alone_leaves_the_others_whole(task, axes, level):
    target = 4000.0
    search = search_with(levels=(level,), target=target, regrow=0.0)
    context, trained = train(search, network(), axes, task, SCHEDULE)
    context, state = finalize(search, trained.learner, context)
    assert size(search, state, context) <= target
    assert all((getattr(state.saved, other) > 0) == (other == level) for other in GRANULARITIES)
    assert level != "weights" or not trained.events


@pytest.mark.parametrize("target", [500, 800, 1300])
def test_commits_of_operations_alone_keep_what_a_tight_target_needs(task, axes, target):
    """The cheapest choice costs 498. What is delivered has no operation that gives nothing."""
    search = search_with(levels=("operations",), target=target, regrow=0.0)
    context, trained = train(search, network(), axes, task, SCHEDULE)
    context, state = finalize(search, trained.learner, context)
    whole_size = size(search, state, context)
    write(search, state, context)
    scales = torch.cat([node.scale for node in context.model.modules() if isinstance(node, Candidates)])
    assert count_left(context, 1) == whole_size <= target
    assert int(scales.count_nonzero()) == len(context.axes.branches)


def one_topology():
    torch.manual_seed(0)
    return topology()


def ending_with_one():
    return one_topology(), axes_of(one_topology)


def ending_with_several():
    return network(), axes_of(network)


def of_ones_own():
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    return net, trace(net, torch.zeros(2, 1, 8, 8))


def test_filters_and_weights_of_ones_own_network(task):
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    axes = trace(net, torch.zeros(2, 1, 8, 8))
    most = 0.4 * sum(p.numel() for p in net.parameters())
    search = build(Settings(target=most, warm=1, every=1))
    context, trained = train(search, net, axes, task, TaskSchedule(epochs=4, batch_size=50))
    context, state = finalize(search, trained.learner, context)
    write(search, state, context)
    assert 0.98 * most <= sum(int(p.count_nonzero()) for p in net.parameters()) <= most
    assert sum(p.numel() for p in net.parameters()) < most / 0.4


def test_settings_that_say_nothing_are_refused():
    for wrong in (
        {"levels": ("ops",)},
        {"stages": (3, 1)},
        {"lr": -3.0},
        {"clip": 0.0},
    ):
        with pytest.raises(ValueError):
            Settings(**wrong)


def test_candidates_within_candidates_are_refused(task):
    inner = Candidates({"one": nn.Conv2d(4, 4, 1), "same": nn.Identity()})
    outer = Candidates({"deep": nn.Sequential(inner, nn.ReLU()), "same": nn.Identity()})
    net = nn.Sequential(nn.Conv2d(1, 4, 1), outer, nn.Flatten(), nn.Linear(256, 10))
    context = Context(net, trace(net, torch.zeros(2, 1, 8, 8)), task, epochs=4)
    with pytest.raises(ValueError, match=r"1.ops.deep.0.ops.one lies in another, 1.ops.deep: mark candidates on one"):
        search_with(stages=()).check(context)


def test_the_derivative_by_a_mask_is_found_from_that_of_its_importance():
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    outputs, prices = torch.tensor([0.7, -1.3, 0.4]), torch.tensor([0.2, 0.1, 0.3])
    share = logits.sigmoid()
    margin = share - torch.tensor([0.4, 0.5, 0.5])
    mask = step_mask(margin)
    scale = 2 * share * mask
    loss = (outputs * scale).sum()
    (loss + (prices * mask).sum()).backward()
    (expected,) = torch.autograd.grad(
        (outputs * 2 * share.detach() * (each := mask.detach().requires_grad_())).sum(), [each]
    )
    found = _differentiate(logits.detach(), logits.grad, prices, margin.detach(), mask.detach())
    assert mask.tolist() == [1.0, 0.0, 1.0] and torch.allclose(found, expected, atol=1e-6)


def test_a_threshold_rises_where_removal_saves_more_than_it_costs():
    thresholds, index = torch.full((2,), 0.3), torch.tensor([0, 0, 1])
    price, fisher = torch.ones(3), torch.tensor([0.0, 0.0, 9.0])
    _move(thresholds, index, torch.zeros(3), price, fisher, 0.01)
    assert torch.allclose(thresholds, torch.tensor([0.31, 0.3 - 0.01 * 3.5]))
