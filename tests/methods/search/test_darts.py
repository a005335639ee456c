"""DARTS: which half moves what, two edges per node, the target."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regrow import trace
from regrow.allocation.edges import Edges
from regrow.allocation.partial import partial_channels
from regrow.candidates import Candidates, candidates_in
from regrow.data import streams
from regrow.learner import Stand
from regrow.methods.search.darts import Darts, Settings
from regrow.nets.cells import Cells, operation, supernet
from regrow.nets.small import small
from regrow.surgery.parametrize import parametrize
from regrow.tasks import Examples, Task
from regrow.training.learning import Schedule, changed, learn

OPERATIONS = ("skip", "sep3", "max")
CONFIG = supernet((1, 8, 8), 10, width=4, cells=2, nodes=2, stride=1, heads=(0,), operations=OPERATIONS)
SCHEDULE = Schedule(epochs=3, batch_size=25, lr=0.02)


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
    return Darts(settings=Settings(**{"target": 1e4, "stages": (0, 1), **more}))


@pytest.fixture(scope="module")
def run(task, axes):
    own, net = learner(), network()
    here, course = learn(net, axes, [task], own, SCHEDULE)
    return Stand(net, here, task, 0, SCHEDULE.epochs, SCHEDULE.epochs), own, course


def ended(run, target):
    """The network that a search to a target leaves, and its learner."""
    at, own, _ = copy.deepcopy(run)
    own.most = target
    while plan := own.final(at):
        changed(at, own, plan)
    return at, own


def size(at):
    """Parameters up to the last classifier, without the scales of what is gone."""
    gone = sum(len(node.ops) for node in at.model.modules() if isinstance(node, Candidates)) - len(at.axes.branches)
    return sum(p.numel() for n, p in at.model.named_parameters() if at.model.within(n, 1)) - gone


def lies_in(examples, part):
    """Which examples are in a part."""
    return (examples.inputs[:, None] == part.inputs[None]).flatten(2).all(2).any(1)


@pytest.mark.slow
def test_one_half_moves_alpha_alone_and_the_other_weights_alone(task, axes):
    def one_step(of):
        own, net = learner(augment=False), network()
        learn(net, axes, [of], own, Schedule(epochs=1, batch_size=50, lr=0.1))
        return own.tensors["alpha"].values.detach(), net.state_dict()

    def otherwise(rows):
        labels = torch.where(rows, (task.train.labels + 3) % 10, task.train.labels)
        inputs = torch.where(rows[:, None, None, None], task.train.inputs.flip(-1) + 1, task.train.inputs)
        return Task("other", Examples(inputs, labels), task.test, task.classes)

    own = learner()
    mine = lies_in(task.train, own.examples(Stand(network(), axes, task)))
    held = lies_in(task.train, own.held)
    assert torch.equal(mine, ~held) and int(held.sum()) == 50
    alpha, state = one_step(task)
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
    at, own = Stand(network().double(), axes, task), learner(augment=False, decay=0.0, **more)
    held = Examples(task.train.inputs[:40].double(), task.train.labels[:40])
    own.begin(at)
    for one in (own.tensors["alpha"], own.tensors.get("beta", own.tensors["alpha"])):
        one.values = one.values.double().detach().requires_grad_()
    alpha = own.tensors[name]
    own.held, own.batches = held, [torch.arange(40)]
    own.gate(at)
    assert all(p.grad is None for p in at.model.parameters())
    way, eps, losses = torch.randn(len(alpha.values), generator=torch.Generator().manual_seed(1)).double(), 1e-6, []
    found, middle = alpha.values.grad, alpha.values.detach()
    for sign in (1, -1):
        alpha.values = middle + sign * eps * way
        with parametrize(at.model, own.standing(at)):
            losses.append(own.loss(at, held).item())
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
    at, own = Stand(network(), axes, task), learner(edges=True)
    own.begin(at)
    edges, plain = own.edges, Edges.share
    assert edges.betas == len(edges.table) == 2 * (2 + 3)
    alpha = torch.randn(edges.entries, generator=torch.Generator().manual_seed(0))
    beta = torch.randn(edges.betas, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own.tensors["alpha"].values, own.tensors["beta"].values = alpha, beta
    for node in range(4):
        here = edges.node == node
        weight = beta[edges.beta[here]].softmax(0)
        for edge, own_weight in zip(here.nonzero()[:, 0], weight, strict=True):
            ops = edges.edge == edge
            assert torch.allclose(own.share()[ops], plain(edges, alpha)[ops] * own_weight)
    own.share()[edges.edge == 0].sum().backward()
    assert beta.grad[0] > 0 > beta.grad[1] and bool((beta.grad[2:] == 0).all())  # its node's other edge pays
    net = Cells(supernet((1, 8, 8), 10, width=4, cells=4, nodes=2, operations=OPERATIONS))
    assert Edges.of(net, {}).betas == 2 * Edges.of(net, net.alike()).betas == 4 * (2 + 3)
    own.tensors["beta"].values = torch.where(torch.arange(10) == 3, 9.0, 0.0)  # an edge of the second node
    kept = own.choice() & (edges.edge == 3)
    assert int(kept.sum()) == 1


def test_alpha_and_beta_wait_until_weights_are_warm(task, axes):
    seen = []

    class Watched(Darts):
        def passed(self, at):
            super().passed(at)
            seen.append([self.tensors[name].values.detach().clone() for name in ("alpha", "beta")])

    own = Watched(settings=Settings(target=1e4, stages=(0, 1), edges=True, warm=0.5))
    learn(network(), axes, [task], own, Schedule(epochs=4, batch_size=25, lr=0.02))
    for first, second, third in zip(*seen[:3], strict=True):
        assert torch.equal(first, second) and not torch.equal(second, third)
    with pytest.raises(ValueError, match="share of the epochs"):
        Settings(warm=1.0)


def test_two_edges_into_a_node_stay_with_their_best_operation(run):
    at, own = ended(run, 1e4)
    share = dict(zip(own.gates.ops, own.edges.share(own.tensors["alpha"].values.detach()).tolist(), strict=True))
    for path, paths in candidates_in(run[0].model).items():
        sources = dict(zip(paths, run[0].model.get_submodule(path).sources, strict=True))
        left = [one for one in paths if one in at.axes.branches]
        assert len({sources[one] for one in left}) == len(left) == 2
        for one in left:
            assert share[one] == max(share[other] for other in paths if sources[other] == sources[one])
        out = [other for other in paths if sources[other] not in {sources[one] for one in left}]
        assert max((share[other] for other in out), default=0.0) <= min(share[one] for one in left)
    assert all(set(one) & set(at.axes.branches) for one in at.model.needed())


@pytest.mark.slow
def test_the_target_is_met_by_the_same_share_of_every_width_and_only_if_it_must(run):
    at, own = ended(run, 1e4)
    whole_size, widths = size(at), {key: axis.size for key, axis in at.axes.axes.items()}
    assert (
        own.account(at).items() >= {"discretised": whole_size, "below": True, "asked": 1e4}.items()
        and own.values["saved"]["filters"] == 0
    )
    assert all(axis.size == axis.born for axis in at.axes.axes.values())
    for share in (0.9, 0.7):
        at, own = ended(run, share * whole_size)
        assert 0.85 * share * whole_size < size(at) <= share * whole_size
        assert own.account(at).items() >= {"discretised": whole_size, "below": False}.items()
        lost = {widths[axis.key] - axis.size for axis in at.axes.units() if axis.size < 6}
        assert lost <= {0, 1, 2} and len(lost) <= 2
    with pytest.raises(ValueError, match="cannot be reached"):
        ended(run, 50.0)


def test_what_is_left_answers_as_its_masks_did(run, task):
    at, own = ended(run, 1e4)
    with torch.no_grad(), parametrize(at.model, own.answering(at, 0)):
        masked = own.asked(at, task.test.inputs)
    own.baked(at)
    assert torch.equal(at.model.upto(task.test.inputs, 1), masked)


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
    own, net = learner(edges=True, partial=2), network()
    here, _ = learn(net, axes, [task], own, SCHEDULE)
    at = Stand(net, here, task, 0, SCHEDULE.epochs, SCHEDULE.epochs)
    while plan := own.final(at):
        changed(at, own, plan)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())
    with torch.no_grad(), parametrize(net, own.answering(at, 0)):
        masked = own.asked(at, task.test.inputs)
    own.baked(at)
    assert torch.equal(net.upto(task.test.inputs, 1), masked)


def test_a_collapse_to_skips_is_told(run):
    own = copy.deepcopy(run[1])
    assert own.values["history"][-1]["skips"] == own.kept()["skips"] < 1
    for i, path in enumerate(own.gates.ops):
        if ".skip_" in path:
            own.tensors["alpha"].values.data[own.edges.table[own.edges.edge[i], own.edges.column[i]]] = 9.0
    assert own.kept()["skips"] == 1.0


def test_a_network_without_candidates_is_refused(task):
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    at = Stand(net, trace(net, torch.zeros(2, 1, 8, 8)), task)
    with pytest.raises(ValueError, match="no candidates"):
        Darts(settings=Settings(target=1e3)).begin(at)
    with pytest.raises(ValueError, match="none"):
        Darts(settings=Settings(target=1e3, shared=True)).begin(at)
    with pytest.raises(ValueError, match="none"):
        Darts(settings=Settings(target=1e3, partial=4)).begin(at)
    with pytest.raises(ValueError, match="at least 1"):
        Settings(partial=0)
