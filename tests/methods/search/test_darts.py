"""DARTS: which half moves what, two edges per node, the target."""

import copy
from dataclasses import replace

import pytest
import torch

from methods.search.searches import (
    compute_loss,
    count_left,
    draw,
    ended,
    finalize,
    replace_parameters,
    start,
    write,
)
from regrow import trace
from regrow.allocation.darts import Edges
from regrow.core.candidates import candidate_paths
from regrow.core.tasks import Examples, Task
from regrow.methods.search.darts import Settings, build
from regrow.nets.cells import Cells, supernet_config
from regrow.nets.vision import small
from regrow.surgery.gate import parametrize
from regrow.training.continual import TaskSchedule, learn
from regrow.training.learner import Context, Step

OPERATIONS = ("skip", "sep3", "max")
CONFIG = supernet_config((1, 8, 8), 10, width=4, cells=2, nodes=2, stride=1, heads=(0,), operations=OPERATIONS)
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


def test_the_gradient_of_alpha_is_that_of_the_held_out_loss(task, axes):
    search = search_with(augment=False, decay=0.0)
    context = Context(network(), axes, task)
    state = start(search, context)
    context.model.double()
    held = Examples(task.train.inputs[:40].double(), task.train.labels[:40])
    learned = state.alpha
    learned.values = learned.values.double().detach().requires_grad_()
    search.learner.project(state, context, Step(0, held, held))
    assert all(p.grad is None for p in context.model.parameters())
    way, eps, losses = draw(len(learned.values), 1).double(), 1e-6, []
    found, middle = learned.values.grad, learned.values.detach()
    for sign in (1, -1):
        learned.values = middle + sign * eps * way
        with parametrize(context.model, replace_parameters(search, state, context)):
            losses.append(compute_loss(search, state, context, held).value.item())
    assert float(found @ way) == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-5)


def test_an_edge_shares_one_with_none():
    net = Cells(supernet_config((1, 8, 8), 10, width=4, cells=4, nodes=2, operations=OPERATIONS))
    edges = Edges.of(net)
    assert edges.entries == 4 * 5 * (len(OPERATIONS) + 1)
    alpha = torch.randn(edges.entries, generator=torch.Generator().manual_seed(0))
    none = alpha[edges.table[:, 0]].exp() / alpha[edges.table].exp().sum(1)
    assert torch.allclose(none.index_add(0, edges.edge, edges.share(alpha)), torch.ones(len(none)))


def test_two_edges_into_a_node_stay_with_their_best_operation(run, task):
    _, context, state = end(run, task, 1e4)
    share = dict(zip(state.layout.ops, state.edges.share(state.alpha.values.detach()).tolist(), strict=True))
    model = run[2]
    for path, paths in candidate_paths(model).items():
        sources = dict(zip(paths, model.get_submodule(path).sources, strict=True))
        left = [one for one in paths if one in context.axes.branches]
        assert len({sources[one] for one in left}) == len(left) == 2
        for one in left:
            assert share[one] == max(share[other] for other in paths if sources[other] == sources[one])
        out = [other for other in paths if sources[other] not in {sources[one] for one in left}]
        assert max((share[other] for other in out), default=0.0) <= min(share[one] for one in left)
    assert all(set(one) & set(context.axes.branches) for one in context.model.required_groups())


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
    assert torch.equal(context.model.logits_at(task.test.inputs, 1), masked)


def test_a_collapse_to_skips_is_told(run, task):
    search, _, _, state = run
    state = copy.deepcopy(state)
    masks = search.masks(state, ended(run[2], run[1], task, SCHEDULE), None, False)
    assert state.history[-1]["skips"] == search.kept_fractions(state, masks)["skips"] < 1
    for i, path in enumerate(state.layout.ops):
        if ".skip_" in path:
            state.alpha.values.data[state.edges.table[state.edges.edge[i], state.edges.column[i]]] = 9.0
    assert search.kept_fractions(state, masks)["skips"] == 1.0


def test_a_network_without_candidates_is_refused(task):
    net = small("resnet:4-2", (1, 8, 8), 10)[0]
    context = Context(net, trace(net, torch.zeros(2, 1, 8, 8)), task)
    with pytest.raises(ValueError, match="no candidates"):
        start(build(Settings(target=1e3)), context)
