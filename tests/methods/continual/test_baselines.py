"""Methods that learn task after task: what each promises of itself."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

import regrow
from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import CLASSIFICATION
from regrow.data.streams import load_digits, permuted_tasks, sample_task, split_by_classes
from regrow.evaluation.continual import mean_score
from regrow.jobs.learn import Settings, learn_named, make_task_specs
from regrow.jobs.recording import Invocation
from regrow.jobs.starting import read_tasks
from regrow.methods import LEARNERS
from regrow.methods.continual.lwf import _compute_teacher_logits
from regrow.methods.continual.wsn import WsnState
from regrow.nets.vision import small
from regrow.store.run_record import convert_settings
from regrow.surgery.gate import parametrize
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, accuracy_matrix, learn
from regrow.training.hooks import add_to_replay_memory
from regrow.training.learner import Boundary, Context, Event, Step, task_loss
from regrow.training.schedule import NO_AXES
from regrow.training.state import axis_tensors


def learned(name: str, given: dict[str, Any], tasks: Any, model: str = "mlp:16", **more: Any) -> tuple[Any, ...]:
    """A network that learned tasks, the state of its learner, and that of its training."""
    net, _ = small(model, (1, 8, 8), 10)
    axes = trace(net, tasks[0].train.inputs[:2])
    learner = LEARNERS[name].create(name, given)
    state = learn(net, axes, tasks, learner, TaskSchedule(**{"epochs": 2, "batch_size": 32, **more})).state
    return net, state.learner, state


TWO = permuted_tasks(sample_task(load_digits(), 200, 80), 2)


@pytest.mark.parametrize("model", ["mlp:16", "resnet:8-2"])
@pytest.mark.parametrize("method", sorted(LEARNERS))
def test_learns_in_mixed_precision(method: str, model: str) -> None:
    """Losses are taken in bfloat16; parameters, gradients and what is remembered stay in float32."""
    given = {"memory": 50} if method == "replay" else {}
    whole, half = (
        learned(method, given, TWO, model, precision=precision, lr=0.05) for precision in ("float32", "bfloat16")
    )
    net, learner, state = half
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.bfloat16 not in {one.values.dtype for one in axis_tensors(learner).values()}
    pairs = list(zip(net.parameters(), whole[0].parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs), "nothing was taken in bfloat16"
    assert abs(accuracy_matrix(state).learning - accuracy_matrix(whole[2]).learning) < 0.1


@pytest.mark.parametrize(("method", "given"), [("packnet", {}), ("wsn", {}), ("naive", {"keep": "network"})])
def test_norms_stay_after_the_first_task(method: str, given: dict[str, Any]) -> None:
    seen = []
    for tasks in (TWO[:1], TWO):
        net, _, _ = learned(method, given, tasks, "resnet:8-2")
        seen.append([m.running_mean for m in net.modules() if isinstance(m, _BatchNorm)])
    assert seen[0] and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("method", ["packnet", "wsn"])
def test_a_named_task_is_answered_as_when_it_was_over(method: str) -> None:
    """Under momentum and weight decay too: what a task uses does not move."""
    _, _, course = learned(method, {"use_task_id": True}, TWO, epochs=8, lr=0.1, weight_decay=0.01)
    assert course.rows[1][0] == course.rows[0][0] > 0.2


def test_answers_of_a_network_that_has_learned_are_held() -> None:
    """DER++ holds what the network answers in late epochs too; plain replay holds each example once."""
    for given, times in (({"logit_weight": 0.5}, 5), ({}, 1)):
        _, learner, _ = learned("replay", {"memory": 50} | given, TWO[:1], epochs=5)
        assert learner.seen == times * 32 * (200 // 32) + times * (200 % 32)


def test_an_output_layer_behind_an_embedding_is_trained_in_every_task() -> None:
    heads, tokens = [], torch.randint(8, (64, 6), generator=torch.Generator().manual_seed(0))
    for n in (1, 2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
        data = (tokens, tokens[:, 0] % 3)
        found = regrow.learn(net, [(data, data)] * n, method="packnet", epochs=2, lr=0.05).model
        heads.append(found.get_submodule("4").weight)
    assert not torch.equal(*heads)


def test_replay_begins_in_the_first_task() -> None:
    """As in the authors' code: ER-ACE begins in the second."""
    for given, steps in (({}, 6), ({"logit_weight": 0.5}, 6), ({"asymmetric_loss": True}, 0)):
        _, learner, _ = learned("replay", {"memory": 50} | given, TWO[:1], scenario="class", epochs=1)
        assert learner.recalled == steps


def test_lwf_asks_the_network_as_it_was() -> None:
    """Its old running statistics included, which the question does not move; the task may be told."""
    tasks = split_by_classes(load_digits(), 5)[:2]
    _, _, course = learned("lwf", {}, tasks, scenario="task", lr=0.05)
    assert course.rows[1][0] > 0.9
    net, state, _ = learned("lwf", {}, TWO[:1], "resnet:8-2")
    learner = LEARNERS["lwf"].create("lwf", {})
    context = Context(net, trace(net, TWO[0].train.inputs[:2]), TWO[1], number=1)
    state = learner.boundary(state, context, Boundary(Event.TASK_START))
    net.train()
    batch = next(TWO[1].train.batches(32))
    steps = [m.num_batches_tracked.clone() for m in net.modules() if isinstance(m, _BatchNorm)]
    plain = task_loss(state, context, Step(0, batch)).value
    now = [m.num_batches_tracked for m in net.modules() if isinstance(m, _BatchNorm)]
    assert [int(a) - int(b) for a, b in zip(now, steps, strict=True)] == [1] * len(steps)
    before = [v.clone() for v in net.state_dict().values()]
    teacher = _compute_teacher_logits(state, context, batch.inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    with torch.no_grad():
        old = {n: state.old[n].values for n, _ in net.named_parameters()}
        with parametrize(net, old):
            assert not torch.allclose(net(batch.inputs), teacher, atol=1e-3), "batch statistics are other answers"
    assert learner.loss(state, context, Step(0, batch)).value > plain


@pytest.mark.parametrize("method", ["wsn", "packnet"])
def test_what_is_saved_is_what_was_measured(method: str, tmp_path: Any) -> None:
    folder = learn_named(
        Settings(("permuted:digits:2",), "mlp:16", method, epochs=3, train=200, test=80, lr=0.05), Invocation(tmp_path)
    )
    rows = [row for row in folder.metrics() if row["what"] == "matrix"][-1]["matrix"]
    tasks = read_tasks(make_task_specs(convert_settings(folder.read_record()["settings"], Settings)))
    assert [mean_score(regrow.load(folder.path), task.test, CLASSIFICATION) for task in tasks] == rows[-1]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("packnet", {"prune": 1.5}),
        ("wsn", {"share": -1.0}),
        ("replay", {"memory": -5}),
        ("lwf", {"temperature": 0.0}),
        ("ewc", {"strength": -1.0}),
        ("si", {"damping": 0.0}),
        ("sparsegrow", {"every": 0}),
        ("sparsegrow", {"multiple": 0}),
        ("sparsegrow", {"samples": 0}),
        ("sparsegrow", {"strength": -1.0}),
    ],
)
def test_a_setting_that_cannot_be_is_refused(method: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        LEARNERS[method].create(method, given)


def test_synaptic_intelligence_holds_the_weights_that_lowered_the_loss() -> None:
    """The importances, times the squared way, add up to about what the loss fell by."""
    given = {"strength": 0.0, "damping": 1e-3}
    net, state, _ = learned("si", given, TWO[:1], epochs=60, batch_size=200, optimizer="sgd", lr=0.02)
    start, _ = small("mlp:16", (1, 8, 8), 10)
    ways = {name: p.detach() - dict(start.named_parameters())[name].detach() for name, p in net.named_parameters()}
    fall = sum(float((state.weight[name].values * (way.square() + 1e-3)).sum()) for name, way in ways.items())
    examples = TWO[0].train
    with torch.no_grad():
        losses = [float(cross_entropy(m(examples.inputs), examples.labels)) for m in (start, net)]
    assert losses[0] - losses[1] > 0.5 and fall == pytest.approx(losses[0] - losses[1], rel=0.5)


def test_elastic_weight_consolidation_adds_up_the_importance_of_tasks() -> None:
    after = [learned("ewc", {"strength": 0.0, "decay": 1.0}, TWO[:n])[1].factors for n in (1, 2)]
    last = learned("ewc", {"strength": 0.0, "decay": 0.0}, TWO)[1].factors
    for name, total in after[1].items():
        torch.testing.assert_close(total.values, after[0][name].values + last[name].values)


def test_a_replay_memory_is_a_fair_sample_of_all_examples() -> None:
    context = Context(torch.nn.Identity(), NO_AXES, TWO[0], 0, seed=0)
    memory: dict[str, Any] = {}
    for seen in range(0, 2000, 10):
        memory = add_to_replay_memory(memory, seen, context, 100, {"ids": torch.arange(seen, seen + 10).float()})
    assert abs(float(memory["ids"].values.mean()) - 1000) < 250  # four standard deviations; the last 100: 1950


def test_winning_subnetworks_drop_entries_that_raise_the_loss() -> None:
    """Whatever the sign of its score, an entry with a positive gradient of its mask is less likely to be selected."""
    net = torch.nn.Linear(4, 1, bias=False)
    scores = torch.tensor([[-1.0, 1.0, -0.5, 0.5]], requires_grad=True)
    state = WsnState({"weight": AxisTensor(scores, (1, 4), 0.1)})
    context = Context(net, trace(net, torch.ones(2, 4)), TWO[0], number=0)
    masked = LEARNERS["wsn"].create("wsn", {}).parametrize(state, context).values["weight"]
    (masked / net.weight.detach()).sum().backward()
    assert bool(((scores - 0.1 * scores.grad).abs() < scores.abs()).all())


def test_examples_of_several_lengths_are_not_replayed() -> None:
    context = Context(torch.nn.Linear(1, 1), NO_AXES, TWO[0], number=0)
    stored = add_to_replay_memory({}, 0, context, 4, {"inputs": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match="pad all examples to one length"):
        add_to_replay_memory(stored, 2, context, 4, {"inputs": torch.zeros(2, 5)})


def test_joint_training_takes_tokens_and_named_inputs() -> None:
    tokens = torch.randint(9, (20, 5), generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9))
    found = regrow.learn(net, [(tokens, tokens)] * 2, method="naive", settings={"keep": "data"}, epochs=20, lr=0.05)
    assert found.scores.average > 0.5
