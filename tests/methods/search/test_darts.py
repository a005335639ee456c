"""DARTS: which half moves what, two edges per node, the target."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.search.searches import (
    compute_loss,
    count_left,
    draw,
    ended,
    finalize,
    replace_parameters,
    start,
    train,
    write,
)
from regrow import trace
from regrow.allocation.darts import Edges, partial_channels
from regrow.core.candidates import candidates_in
from regrow.core.tasks import Examples, Task
from regrow.methods.search.darts import Settings, build, choose_operations, weigh_operations
from regrow.nets.cells import Cells, operation, supernet
from regrow.nets.vision import small
from regrow.surgery.gate import parametrize
from regrow.training.continual import TaskSchedule, learn
from regrow.training.learner import Context, Event, Step

OPERATIONS = ("skip", "sep3", "max")
CONFIG = supernet((1, 8, 8), 10, width=4, cells=2, nodes=2, stride=1, heads=(0,), operations=OPERATIONS)
SCHEDULE = TaskSchedule(epochs=3, batch_size=25, lr=0.02)


@pytest.fixture(scope="module")
def axes():
    return trace(Cells(CONFIG), torch.zeros(2, 1, 8, 8))


def network():
    torch.manual_seed(0)
    return Cells(CONFIG)


def search_with(**more):
    return build(Settings(**{"target": 1e4, "stages": (0, 1), **more}))


@pytest.fixture(scope="module")
def run(task, axes):
    search = search_with()
    net = network()
    fitted = learn(net, axes, [task], search.learner, SCHEDULE)
    return search, fitted.axes, net, fitted.state.learner


def end(run, task, target):
    """The network that a search to a target leaves, and its state."""
    search, axes, net, state = run
    net, state = copy.deepcopy((net, state))
    search = search_with(target=target)
    return search, *finalize(search, state, ended(net, axes, task, SCHEDULE))


def lies_in(examples, part):
    """Which examples are in a part."""
    return (examples.inputs[:, None] == part.inputs[None]).flatten(2).all(2).any(1)


@pytest.mark.slow
def test_one_half_moves_alpha_alone_and_the_other_weights_alone(task, axes):
    halves = {"weights": [], "alpha": []}

    def one_step(of):
        search, net = search_with(augment=False), network()

        def note(state, context, step):
            halves["weights"].append(step.batch)
            halves["alpha"].append(step.second)
            return search.learner.project(state, context, step)

        learner = replace(search.learner, project=note)
        state = learn(net, axes, [of], learner, TaskSchedule(epochs=1, batch_size=50, lr=0.1)).state
        return state.learner.alpha.values.detach(), net.state_dict()

    def otherwise(rows):
        labels = torch.where(rows, (task.train.labels + 3) % 10, task.train.labels)
        inputs = torch.where(rows[:, None, None, None], task.train.inputs.flip(-1) + 1, task.train.inputs)
        return Task("other", Examples(inputs, labels), task.test, task.classes)

    alpha, state = one_step(task)
    (own,), (second,) = halves["weights"], halves["alpha"]
    mine, held = lies_in(task.train, own), lies_in(task.train, second)
    assert torch.equal(mine, ~held) and int(held.sum()) == 50
    other_alpha, same_state = one_step(otherwise(held))
    assert not torch.equal(alpha, other_alpha)
    assert all(torch.equal(value, same_state[name]) for name, value in state.items())  # running statistics too
    same_alpha, other_state = one_step(otherwise(mine))
    assert torch.equal(alpha, same_alpha)
    assert not torch.equal(state["stem.0.weight"], other_state["stem.0.weight"])
    watched = Task("other", task.train, Examples(task.test.inputs + 1, task.test.labels), task.classes)
    seen_alpha, seen_state = one_step(watched)
    assert torch.equal(alpha, seen_alpha)
    assert all(torch.equal(value, seen_state[name]) for name, value in state.items())


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_the_gradient_of_alpha_and_beta_is_that_of_the_held_out_loss(name, task, axes):
    more = {"edges": True, "partial": 2} if name == "beta" else {}
    search = search_with(augment=False, decay=0.0, **more)
    context = Context(network(), axes, task)
    state = start(search, context)
    context.model.double()
    held = Examples(task.train.inputs[:40].double(), task.train.labels[:40])
    for one in (state.alpha, state.beta or state.alpha):
        one.values = one.values.double().detach().requires_grad_()
    learned = getattr(state, name)
    search.learner.project(state, context, Step(0, held, held))
    assert all(p.grad is None for p in context.model.parameters())
    way, eps, losses = draw(len(learned.values), 1).double(), 1e-6, []
    found, middle = learned.values.grad, learned.values.detach()
    for sign in (1, -1):
        learned.values = middle + sign * eps * way
        with parametrize(context.model, replace_parameters(search, state, context)):
            losses.append(compute_loss(search, state, context, held).value.item())
    assert float(found @ way) == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-5)


def test_an_edge_shares_one_with_none_and_cells_of_a_kind_share_alpha():
    net = Cells(supernet((1, 8, 8), 10, width=4, cells=4, nodes=2, operations=OPERATIONS))
    own, shared = Edges.of(net, {}), Edges.of(net, net.alike())
    assert own.entries == 2 * shared.entries == 4 * 5 * (len(OPERATIONS) + 1)
    alpha = torch.randn(shared.entries, generator=torch.Generator().manual_seed(0))
    share = shared.share(alpha)
    none = alpha[shared.table[:, 0]].exp() / alpha[shared.table].exp().sum(1)
    assert torch.allclose(none.index_add(0, shared.edge, share), torch.ones(len(none)))
    cells = share.view(4, -1)  # the second and the third reduce
    assert torch.equal(cells[0], cells[3]) and torch.equal(cells[1], cells[2])
    assert not torch.equal(cells[0], cells[1])


def test_edges_into_a_node_share_one_and_scale_their_operations(task, axes):
    search = search_with(edges=True)
    state = start(search, Context(network(), axes, task))
    edges, plain = state.edges, Edges.share
    assert edges.betas == len(edges.table) == 2 * (2 + 3)
    alpha, beta = draw(edges.entries), draw(edges.betas, 1).requires_grad_()
    state = replace(state, alpha=replace(state.alpha, values=alpha), beta=replace(state.beta, values=beta))
    share = weigh_operations(state)
    for node in range(4):
        here = edges.node == node
        weight = beta[edges.beta[here]].softmax(0)
        for edge, own_weight in zip(here.nonzero()[:, 0], weight, strict=True):
            ops = edges.edge == edge
            assert torch.allclose(share[ops], plain(edges, alpha)[ops] * own_weight)
    share[edges.edge == 0].sum().backward()
    assert beta.grad[0] > 0 > beta.grad[1] and bool((beta.grad[2:] == 0).all())  # its node's other edge pays
    net = Cells(supernet((1, 8, 8), 10, width=4, cells=4, nodes=2, operations=OPERATIONS))
    assert Edges.of(net, {}).betas == 2 * Edges.of(net, net.alike()).betas == 4 * (2 + 3)
    state.beta.values = torch.where(torch.arange(10) == 3, 9.0, 0.0)  # an edge of the second node
    assert int((choose_operations(state) & (edges.edge == 3)).sum()) == 1


def test_alpha_and_beta_wait_until_weights_are_warm(task, axes):
    seen, search = [], search_with(edges=True, warm=0.5)

    def watch(state, context, boundary):
        if boundary.event == Event.EPOCH_END:
            seen.append([one.values.detach().clone() for one in (state.alpha, state.beta)])
        return search.learner.boundary(state, context, boundary)

    schedule = TaskSchedule(epochs=4, batch_size=25, lr=0.02)
    learn(network(), axes, [task], replace(search.learner, boundary=watch), schedule)
    for first, second, third in zip(*seen[:3], strict=True):
        assert torch.equal(first, second) and not torch.equal(second, third)
    with pytest.raises(ValueError, match=r"warm must be at least 0 and below 1, got 1\.0"):
        Settings(warm=1.0)


def test_two_edges_into_a_node_stay_with_their_best_operation(run, task):
    _, context, state = end(run, task, 1e4)
    share = dict(zip(state.layout.ops, state.edges.share(state.alpha.values.detach()).tolist(), strict=True))
    model = run[2]
    for path, paths in candidates_in(model).items():
        sources = dict(zip(paths, model.get_submodule(path).sources, strict=True))
        left = [one for one in paths if one in context.axes.branches]
        assert len({sources[one] for one in left}) == len(left) == 2
        for one in left:
            assert share[one] == max(share[other] for other in paths if sources[other] == sources[one])
        out = [other for other in paths if sources[other] not in {sources[one] for one in left}]
        assert max((share[other] for other in out), default=0.0) <= min(share[one] for one in left)
    assert all(set(one) & set(context.axes.branches) for one in context.model.needed())


@pytest.mark.slow
def test_the_target_is_met_by_the_same_share_of_every_width_and_only_if_it_must(run, task):
    search, context, state = end(run, task, 1e4)
    whole_size, widths = count_left(context, 1), {key: axis.size for key, axis in context.axes.axes.items()}
    assert search.summary(state) == {"discretised": whole_size, "below": True} and state.saved.filters == 0
    assert all(axis.size == axis.next_id for axis in context.axes.axes.values())
    for share in (0.9, 0.7):
        search, context, state = end(run, task, share * whole_size)
        assert 0.85 * share * whole_size < count_left(context, 1) <= share * whole_size
        assert search.summary(state) == {"discretised": whole_size, "below": False}
        lost = {widths[axis.key] - axis.size for axis in context.axes.units() if axis.size < 6}
        assert lost <= {0, 1, 2} and len(lost) <= 2
    with pytest.raises(ValueError, match="cannot be reached"):
        end(run, task, 50.0)


def test_what_is_left_answers_as_its_masks_did(run, task):
    search, context, state = end(run, task, 1e4)
    with torch.no_grad(), parametrize(context.model, replace_parameters(search, state, context)):
        masked = context.logits(task.test.inputs)
    write(search, state, context)
    assert torch.equal(context.model.upto(task.test.inputs, 1), masked)


def test_partial_channels_are_narrower_operations_beside_what_goes_by():
    torch.manual_seed(0)
    config = supernet((1, 8, 8), 10, width=8, cells=2, nodes=1, stride=1, operations=("sep3", "dil3", "avg"))
    net = Cells(config).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for cell, width, step in ((net.cells[0], 8, 1), (net.cells[1], 16, 2)):  # the second halves the picture
        node, few = cell.nodes[0], width // 4
        given = [torch.randn(2, width, 8, 8) for _ in range(2)]
        total = torch.zeros(2, few, 8 // step, 8 // step)
        for (key, op), source in zip(node.ops.items(), node.sources, strict=True):
            same = operation(key.partition("_")[0], few, few, step).eval()
            state = {
                n: v[:few, :few] if v.dim() == 4 else v[:few] if v.dim() else v for n, v in op.state_dict().items()
            }
            same.load_state_dict(state)
            total = total + same(given[source][:, :few])
        rest = sum(w * x[:, few:] for w, x in zip((0.3, 0.7), given, strict=True))
        if step == 2:
            rest = sum(w * F.max_pool2d(x[:, few:], 2) for w, x in zip((0.3, 0.7), given, strict=True))
        handles = partial_channels(cell, 4, lambda: [torch.tensor([0.3, 0.7])])
        found = node(*given)
        assert torch.allclose(found, F.channel_shuffle(torch.cat([total, rest], 1), 4), atol=1e-6)
        plain = [handle.remove() for handle in handles] and node(*given)
        assert not torch.allclose(found, plain, atol=0.1)
    with pytest.raises(ValueError, match="take a divisor"):
        partial_channels(net, 16, list)


def test_with_partial_channels_what_is_left_is_whole_and_answers_as_its_masks_did(task, axes):
    search, net = search_with(edges=True, partial=2), network()
    context, state = train(search, net, axes, task, SCHEDULE)
    context, state = finalize(search, state.learner, context)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())
    with torch.no_grad(), parametrize(net, replace_parameters(search, state, context)):
        masked = context.logits(task.test.inputs)
    write(search, state, context)
    assert torch.equal(net.upto(task.test.inputs, 1), masked)


def test_a_collapse_to_skips_is_told(run, task):
    search, _, _, state = run
    state = copy.deepcopy(state)
    masks = search.masks(state, ended(run[2], run[1], task, SCHEDULE), None, False)
    assert state.history[-1]["skips"] == search.shares(state, masks)["skips"] < 1
    for i, path in enumerate(state.layout.ops):
        if ".skip_" in path:
            state.alpha.values.data[state.edges.table[state.edges.edge[i], state.edges.column[i]]] = 9.0
    assert search.shares(state, masks)["skips"] == 1.0


def test_a_network_without_candidates_is_refused(task):
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    context = Context(net, trace(net, torch.zeros(2, 1, 8, 8)), task)
    with pytest.raises(ValueError, match="no candidates"):
        start(build(Settings(target=1e3)), context)
    with pytest.raises(ValueError, match="none"):
        start(build(Settings(target=1e3, shared=True)), context)
    with pytest.raises(ValueError, match="none"):
        start(build(Settings(target=1e3, partial=4)), context)
    with pytest.raises(ValueError, match="at least 1"):
        Settings(partial=0)
