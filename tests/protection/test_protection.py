"""Factors, guards and growth under protection: their laws, on real digits and small networks."""

from dataclasses import replace
from math import isqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import choose_objective
from regrow.core.tasks import Examples, Task
from regrow.data.streams import load_digits, permuted_tasks, sample_task, split_by_classes
from regrow.methods import LEARNERS
from regrow.methods.continual import sparsegrow
from regrow.nets.vision import small
from regrow.protection import learner as protection_learner
from regrow.protection.factors import measure_factors, read_inputs, read_surrogates
from regrow.protection.growth import estimate_moments
from regrow.protection.guards import apply_guards, build_guards
from regrow.protection.low_rank import compress_factors, expand_factors
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import Fitted
from regrow.training.hooks import copy_parameters
from regrow.training.learner import Context

SCHEDULE = TaskSchedule(epochs=2, batch_size=64, lr=0.05)
TASKS = permuted_tasks(load_digits(), 2)


def learned(
    method: str,
    spec: str = "mlp:24-16",
    tasks: list[Task] = TASKS,
    schedule: TaskSchedule = SCHEDULE,
    **settings: Any,
) -> Fitted[Any]:
    model, _ = small(spec, tasks[0].train.inputs.shape[1:], 10)
    learner = LEARNERS[method].create(method, settings)
    return learn(model, trace(model, tasks[0].train.inputs[:2]), tasks, learner, schedule)


def factors_of(net: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    examples = Examples(inputs, torch.zeros(len(inputs), dtype=torch.long))
    return measure_factors(net, [examples], torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    """An LSTM with a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(5, 6, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs)[0][:, -1])


def test_a_convolution_in_one_dimension_has_the_factors_of_one_in_two() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    deep = nn.Sequential(nn.Conv2d(2, 3, (1, 3), (1, 2), (0, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    deep.load_state_dict({name: value.view(deep.get_parameter(name).shape) for name, value in flat.named_parameters()})
    inputs = torch.randn(9, 2, 8)
    one, two = factors_of(flat, inputs), factors_of(deep, inputs.unsqueeze(2))
    assert one.keys() == two.keys() and "0.weight outputs" in one
    for key, value in one.items():
        torch.testing.assert_close(value, two[key])


@pytest.mark.parametrize(
    ("net", "shape", "with_layer"),
    [
        (Recurrent(), (7, 5), {"body.weight_ih_l0", "body.weight_hh_l0_reverse", "head.weight"}),
        (
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)),
            (4, 4, 4),
            {"3.weight"},
        ),
        (
            nn.Sequential(nn.Conv1d(4, 2, 3, padding="same"), nn.Flatten(), nn.Linear(10, 3)),
            (4, 5),
            {"0.weight", "2.weight"},
        ),
    ],
)
def test_every_parameter_has_factors_or_a_diagonal(
    net: nn.Module, shape: tuple[int, ...], with_layer: set[str]
) -> None:
    factors = factors_of(net, torch.randn(6, *shape))
    layers = {key.removesuffix(" outputs") for key in factors if key.endswith(" outputs")}
    assert with_layer <= layers
    for name, parameter in net.named_parameters():
        bias_of_layer = name.endswith("bias") and name.removesuffix("bias") + "weight" in layers
        assert name in layers or f"{name} diagonal" in factors or bias_of_layer, name
        if f"{name} diagonal" in factors:
            assert factors[f"{name} diagonal"].shape == parameter.shape


class Odd(nn.Module):
    """A frozen layer, one whose result is not used, and one that is called by names of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused, self.named = nn.Linear(4, 5).requires_grad_(False), nn.Linear(4, 2), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        self.unused(inputs)
        hidden = self.frozen(inputs)
        return nn.functional.linear(input=hidden, weight=self.named.weight, bias=self.named.bias)


def test_layers_without_gradients_have_no_factors() -> None:
    factors = factors_of(Odd(), torch.randn(6, 4))
    assert factors.keys() == {"named.weight inputs", "named.weight outputs"}


def test_the_factors_of_one_layer_are_its_fisher_information() -> None:
    """With one example, A ⊗ B is the Fisher matrix of the weights for the drawn label, up to a factor."""
    net = nn.Sequential(nn.Linear(3, 4))
    inputs = torch.randn(1, 3)
    factors = factors_of(net, inputs)
    chances = net(inputs).softmax(-1)[0]
    label = torch.multinomial(chances.detach(), 1, generator=torch.Generator().manual_seed(0))
    gradient = torch.autograd.grad(net(inputs).log_softmax(-1)[0, label].sum(), net[0].weight)[0].flatten()
    fisher = torch.outer(gradient, gradient)
    found = torch.kron(factors["0.weight outputs"], factors["0.weight inputs"][:-1, :-1])
    torch.testing.assert_close(found / found.trace(), fisher / fisher.trace(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "off"), [("laplace", {"gate": 0.0}), ("ncl", {"pull": 0.0}), ("ewc", {})])
@pytest.mark.parametrize("spec", ["mlp:24-16", "resnet-gn:8-2"])
def test_without_strength_it_is_plain_training_and_with_much_nothing_moves(
    method: str, off: dict[str, float], spec: str
) -> None:
    plain, free = learned("naive", spec), learned(method, spec, strength=0.0, **off)
    for one, other in zip(plain.model.parameters(), free.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    held, first = learned(method, spec, strength=1e9), learned("naive", spec, TASKS[:1])
    lost = held.state.rows[0][0] - held.state.rows[1][0]
    assert abs(lost) < 0.02 and abs(held.state.rows[0][0] - first.state.rows[0][0]) < 0.02


def test_a_proximal_step_solves_its_penalty() -> None:
    """pull = η s: the result minimises ½‖W − now‖² + η s/2 Δᵀ (A ⊗ B) Δ around the anchor."""
    fitted = learned("laplace", tasks=TASKS[:1])
    state, context = fitted.state.learner, Context(fitted.model, fitted.axes, TASKS[1], number=1)
    name = "3.weight"
    guard = build_guards(state.factors, context, state.anchor, 0.1)[name]
    layer = fitted.model.get_submodule("3")
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)))
    now = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    apply_guards({name: guard}, fitted.model, pull=0.3)
    after = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    bias = state.factors[f"{name} bias"].values
    a = torch.cat(
        [torch.cat([state.factors[f"{name} inputs"].values, bias[None]]), torch.cat([bias, bias.new_ones(1)])[:, None]],
        1,
    )
    b = state.factors[f"{name} outputs"].values + 0.1 * torch.eye(len(now))
    gradient = (after - now) + 0.3 * b @ (after - guard.anchor) @ a
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_guards_of_large_layers_round_what_moved_but_do_not_add_that_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors in bfloat16: after forty applications the error is still that of a single product."""
    results, n = [], 600
    random = torch.Generator().manual_seed(0)
    inputs, steps = torch.randn(2000, n, generator=random), torch.randn(40, 8, n, generator=random)
    for precision in ("float32", "bfloat16"):
        monkeypatch.setattr("regrow.protection.guards.choose_precision", lambda model, precision=precision: precision)
        net = nn.Sequential(nn.Linear(n, 8))
        with torch.no_grad():
            net[0].weight.zero_()
        context = Context(net, trace(net, inputs[:2]), replace(TASKS[1], train=Examples(inputs, inputs)), number=1)
        factors = {"0.weight inputs": inputs.T @ inputs / 2000, "0.weight outputs": torch.eye(8)}
        factors |= {"0.weight bias": torch.zeros(n)}
        factors = {key: AxisTensor(values, tuple(values.shape)) for key, values in factors.items()}
        guards = build_guards(factors, context, copy_parameters(context), 0.0)
        assert guards["0.weight"].inputs is not None and guards["0.weight"].inputs.dtype == getattr(torch, precision)
        for step in steps:
            with torch.no_grad():
                net[0].weight.add_(step)
            apply_guards(guards, net, gate=1.0, pull=0.01)
        results.append(net[0].weight.detach())
    assert 1e-4 < (results[0] - results[1]).norm() / results[0].norm() < 5e-3


@pytest.mark.parametrize("how", [{}, {"weight_decay": 0.01}, {"optimizer": "adamw", "lr": 0.005}])
def test_gpm_changes_no_answer_to_the_inputs_of_its_basis(how: dict[str, Any]) -> None:
    """A layer's outputs stay on inputs in the span of its basis, with the bias, whatever is learned next."""
    schedule = replace(SCHEDULE, **how)
    first, both = learned("gpm", tasks=TASKS[:1], schedule=schedule), learned("gpm", schedule=schedule)
    columns = first.state.learner.columns("1.weight")
    before, after = (
        torch.cat([fitted.model.get_parameter("1.weight"), fitted.model.get_parameter("1.bias")[:, None]], 1).detach()
        for fitted in (first, both)
    )
    assert float((after - before).norm()) > 1e-2
    torch.testing.assert_close(after @ columns, before @ columns, atol=1e-5, rtol=0)
    found = both.state.learner.columns("1.weight")
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1]), atol=1e-4, rtol=0)
    assert found.shape[1] > columns.shape[1]


def test_gpm_that_keeps_everything_has_orthonormal_directions() -> None:
    found = learned("gpm", energy=1.0, first_energy=1.0).state.learner.columns("1.weight")
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1]), atol=1e-4, rtol=0)


def test_gpm_in_bfloat16_keeps_its_answers_to_a_part_of_what_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded directions let 1 % of a task's change into the span of the basis, at most."""
    monkeypatch.setattr("regrow.protection.guards.LARGE", 60)
    monkeypatch.setattr("regrow.methods.continual.gpm.choose_precision", lambda model: "bfloat16")
    first, both = learned("gpm", tasks=TASKS[:1]), learned("gpm")
    columns = first.state.learner.columns("1.weight")
    before, after = (
        torch.cat([fitted.model.get_parameter("1.weight"), fitted.model.get_parameter("1.bias")[:, None]], 1).detach()
        for fitted in (first, both)
    )
    moved = after - before
    assert 1e-5 < float((moved @ columns).norm() / moved.norm()) < 0.01


@pytest.mark.parametrize("directions", ["data", "projected", "random"])
def test_growth_under_laplace_changes_no_answer(directions: str) -> None:
    fitted = learned("laplace", grow="start", directions=directions, width=0.5, cap=3.0)
    (event,) = fitted.state.events
    assert event["shock"] == 0 and event["logits_moved"] < 1e-5
    assert fitted.model.get_parameter("1.weight").shape[0] == 36
    learner = fitted.state.learner
    assert learner.anchor["1.weight"].values.shape[0] == 36
    if directions == "data":  # what new units give on old inputs counts in the layers behind them
        assert bool(learner.factors["3.weight inputs"].values.diagonal()[24:].all())


@pytest.mark.parametrize("spec", ["mlp:24-16", "resnet-gn:8-2"])
def test_compressed_factors_keep_to_their_bytes_and_the_diagonal(spec: str) -> None:
    """The more bytes, the smaller the error; enough bytes change nothing."""
    whole = learned("laplace", spec).state.learner.factors
    full, errors = sum(factor.values.nbytes for factor in whole.values()), []
    for limit in (full // 4, full // 2, full):
        kept = compress_factors(whole, limit)
        again = expand_factors(kept)
        assert sum(factor.values.nbytes for factor in kept.values()) <= limit and [*again] == [*whole]
        for key, factor in whole.items():
            assert again[key].dims == factor.dims
            if len(factor.dims) > 1 and factor.dims[: len(factor.dims) // 2] * 2 == factor.dims:
                side = isqrt(factor.values.numel())
                found, right = (one[key].values.reshape(side, side).diagonal() for one in (again, whole))
                torch.testing.assert_close(found, right, rtol=0.01, atol=1e-6)  # bfloat16
        errors.append(sum(float((again[key].values - whole[key].values).norm()) for key in whole))
    assert errors[0] > errors[1] > errors[2] == 0


def test_surrogate_inputs_have_the_moments_of_earlier_tasks() -> None:
    fitted = learned("laplace", tasks=TASKS[:1])
    context, kept = Context(fitted.model, fitted.axes, TASKS[1], number=1), fitted.state.learner.factors
    found = read_surrogates(kept, context, 20_000, torch.Generator().manual_seed(0))
    moments = {name: rows.T @ rows / len(rows) for name, rows in found.items()}
    first = kept["1.weight inputs"].values
    assert float((moments["1.weight"][:-1, :-1] - first).norm() / first.norm()) < 0.05
    behind = moments["3.weight"].diagonal()[:-1].sum() / kept["3.weight inputs"].values.diagonal().sum()
    assert 0.8 < float(behind) < 1.25
    rows = read_inputs(fitted.model, TASKS[0].train.take(torch.arange(5)), ["1.weight"])["1.weight"]
    torch.testing.assert_close(rows[:, :-1], TASKS[0].train.inputs[:5].flatten(1))


def test_networks_that_normalise_their_inputs_have_no_surrogates() -> None:
    """The first layer's moments are not those of the network's inputs there."""
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    axes, learner = trace(net, TASKS[0].train.inputs[:2]), LEARNERS["laplace"].create("laplace", {})
    fitted = learn(net, axes, TASKS[:1], learner, SCHEDULE)
    context = Context(fitted.model, fitted.axes, TASKS[1], number=1)
    assert read_surrogates(fitted.state.learner.factors, context, 100, torch.Generator().manual_seed(0)) == {}


@pytest.mark.parametrize("method", ["laplace", "sparsegrow"])
def test_new_units_have_weights_where_most_inputs_are_equal(method: str) -> None:
    """On a black ground, most patches that a convolution reads are the same."""
    tasks = [replace(task, train=on_black(task.train), test=on_black(task.test)) for task in TASKS]
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 121, 10))
    when = {"grow": "start"} if method == "laplace" else {"grow": "always", "multiple": 1}
    learner = LEARNERS[method].create(method, {"width": 1.0, "cap": 4.0, **when})
    fitted = learn(net, trace(net, tasks[0].train.inputs[:2]), tasks, learner, SCHEDULE)
    weight = fitted.model.get_parameter("0.weight")
    assert len(weight) == 16 and bool(weight[8:].flatten(1).any(1).all())


def on_black(examples: Examples) -> Examples:
    return Examples(nn.functional.pad(examples.inputs.view(-1, 1, 8, 8), (8, 8, 8, 8)), examples.labels)


def test_factors_with_many_unused_inputs_are_compressed() -> None:
    """Eigenvalues in float32 do not converge on them, or are NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 600, generator=generator).relu() * (torch.rand(600, generator=generator) > 0.9)
    factor = AxisTensor(rows.T @ rows / 500, (600, 600))
    again = expand_factors(compress_factors({"w inputs": factor}, factor.values.nbytes / 4))["w inputs"]
    torch.testing.assert_close(again.values, factor.values, rtol=0.02, atol=0.02)


def test_moments_of_inputs_that_are_linear_in_others_are_exact() -> None:
    """Moments of two tasks give those of sums of their inputs, though the rows come from another distribution."""
    old, others = torch.randn(500, 4).double() + 1, 3 * torch.rand(400, 4).double()
    linear, new = torch.tensor([[1.0, 2, 0, -1], [0, 1, 1, 0]]).double(), torch.tensor([False] * 4 + [True] * 2)

    def rows(inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([inputs, inputs @ linear.T, torch.ones(len(inputs), 1)], 1)

    exact = 2 * rows(old).T @ rows(old) / len(old)
    moments = torch.where(torch.cat([new, new[:1]]) | torch.cat([new, new[:1]])[:, None], 0, exact)
    estimate_moments(moments, rows(others), new, tasks=2)
    torch.testing.assert_close(moments, exact, rtol=0.02, atol=0.05)


def test_boundaries_are_detected_where_tasks_change() -> None:
    """Each of three tasks is learned for hundreds of steps: as many boundaries, and no more is lost."""
    tasks, lost = permuted_tasks(load_digits(), 3), {}
    for boundaries in ("known", "detected"):
        model, _ = small("mlp:24-16", tasks[0].train.inputs.shape[1:], 10)
        learner = LEARNERS["laplace"].create("laplace", {"boundaries": boundaries})
        axes = trace(model, tasks[0].train.inputs[:2])
        state = learn(model, axes, tasks, learner, replace(SCHEDULE, epochs=8, batch_size=32)).state
        lost[boundaries] = state.rows[0][0] - state.rows[2][0]
        assert state.learner.tasks == (3 if boundaries == "known" else 2)
    assert lost["detected"] <= lost["known"] + 0.03


@pytest.mark.parametrize(("method", "strength"), [("laplace", 0.5), ("ewc", 100.0), ("sparsegrow", 0.5)])
@pytest.mark.parametrize("size", [64, 192, 600])
def test_pulls_do_not_depend_on_the_steps_of_an_epoch(
    method: str, strength: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulls: list[float] = []

    def note(guards: Any, model: nn.Module, **how: float) -> None:
        pulls.append(how["pull"] if guards else 0.0)

    for module in (protection_learner, sparsegrow):
        monkeypatch.setattr(module, "apply_guards", note)
    schedule = replace(SCHEDULE, batch_size=size)
    learned(method, "mlp:8", schedule=schedule, **{"grow": "never"} if method == "sparsegrow" else {})
    steps = SCHEDULE.epochs * -(-len(TASKS[1].train) // size)
    assert sum(pulls) == pytest.approx(steps * SCHEDULE.lr * strength)


class Unusual(nn.Module):
    """A layer used twice, a bias that is not trained, one of two layers, a position per token, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.last = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 10)
        self.like = nn.Linear(12, 12)
        self.like.bias = self.twice.bias
        self.places, self.scale = nn.Parameter(torch.zeros(1, 8, 12)), nn.Parameter(torch.tensor(1.0))
        self.first.bias.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.twice((self.first(inputs.flatten(1, 2)) + self.places).relu()).relu()
        return self.last(self.like(self.twice(hidden).relu()).relu().mean(1)) * self.scale


@pytest.mark.parametrize("scenario", ["domain", "class"])
@pytest.mark.parametrize("method", ["laplace", "ncl", "ewc", "gpm", "sparsegrow"])
def test_unusual_parameters_are_learned_and_frozen_ones_stay(method: str, scenario: str) -> None:
    net, before = Unusual(), Unusual().first.bias
    tasks = split_by_classes(sample_task(load_digits(), 200, 20), 2)
    learner = LEARNERS[method].create(method, {})
    learn(net, trace(net, tasks[0].train.inputs[:2]), tasks, learner, replace(SCHEDULE, scenario=scenario))
    assert torch.equal(net.first.bias[:12], before) and net.scale.item() != 1


@pytest.mark.parametrize("method", ["laplace", "ncl", "sparsegrow"])
def test_new_classes_leave_examples_to_old_ones(method: str) -> None:
    """Nothing is stored. Guards without damping of the output layer lose all, as plain training does."""
    schedule, tasks = replace(SCHEDULE, scenario="class", epochs=5), split_by_classes(load_digits(), 2)
    old, new = learned(method, tasks=tasks, schedule=schedule).state.rows[1]
    assert old > 0.4 and new > 0.6


def test_inputs_of_a_layer_used_twice_are_a_mean_over_its_calls() -> None:
    net = Unusual()
    moments = factors_of(net, torch.randn(6, 1, 8, 8))["twice.weight inputs"]
    assert float(moments[-1, -1]) == 1 and float(torch.linalg.eigvalsh(moments.double())[0]) > -1e-6


def test_factors_do_not_depend_on_which_dimension_has_the_classes() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = body

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs).movedim(1, -1)

    body = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 3, 1))
    labels = torch.arange(10).view(2, 5) % 3
    labels[0, 0] = -100  # not labelled
    examples = [Examples(torch.randn(2, 2, 5), labels)]
    one, other = (measure_factors(net, examples, torch.Generator().manual_seed(0)) for net in (body, Last()))
    assert len(one) == 4
    for key, value in one.items():
        torch.testing.assert_close(value, other[f"net.{key}"])


def test_a_network_that_begins_with_an_embedding_grows() -> None:
    net = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 2))
    tokens = torch.randint(20, (40, 3))
    tasks = [Task(f"{i}", data := Examples(tokens, (tokens[:, i] > 9).long()), data, (0, 1)) for i in (0, 1)]
    fitted = learn(net, trace(net, tokens[:2]), tasks, LEARNERS["sparsegrow"].create("sparsegrow", {}), SCHEDULE)
    assert len(fitted.model.get_parameter("2.weight")) > 16 and fitted.model.get_parameter("0.weight").shape == (20, 16)


def test_strengths_are_relative_to_the_rate() -> None:
    """The pull of a step is that of its learning rate, so that a decayed rate does not pull harder."""
    model, _ = small("mlp:8", TASKS[0].train.inputs.shape[1:], 10)
    seen: list[float] = []
    learner = LEARNERS["naive"].create("naive", {})

    def note(state: Any, context: Context, step: Any) -> Any:
        seen.append(step.lr)
        return state

    schedule = replace(SCHEDULE, epochs=1, decay="cosine")
    learn(model, trace(model, TASKS[0].train.inputs[:2]), TASKS[:1], replace(learner, after_step=note), schedule)
    assert seen[0] == pytest.approx(0.05) and seen[-1] < 0.01 and seen == sorted(seen, reverse=True)


def test_networks_with_batch_norm_and_unlabelled_examples_are_learned() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    tasks = split_by_classes(sample_task(load_digits(), 200, 20), 2)
    axes = trace(net, tasks[0].train.inputs[:2])
    learn(net, axes, tasks, LEARNERS["sparsegrow"].create("sparsegrow", {}), SCHEDULE)
    labels = tasks[0].train.labels.clone()
    labels[:40] = -100
    part = replace(tasks[0], train=Examples(tasks[0].train.inputs, labels))
    learn(net, trace(net, part.train.inputs[:2]), [part, tasks[1]], LEARNERS["ewc"].create("ewc", {}), SCHEDULE)
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_settings_of_classes_are_refused_elsewhere() -> None:
    net, tasks = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        split_by_classes(sample_task(load_digits(), 100, 20), 2),
    )
    axes = trace(net, tasks[0].train.inputs[:2])
    with pytest.raises(ValueError, match="asymmetric_loss=true is of tasks with classes of their own"):
        learn(net, axes, tasks, LEARNERS["replay"].create("replay", {"asymmetric_loss": True}), SCHEDULE)
    custom = replace(SCHEDULE, scenario="task", objective=choose_objective(nn.CrossEntropyLoss(), None))
    with pytest.raises(ValueError, match="scenario 'task' is of classes, and the objective is custom"):
        learn(net, axes, tasks, LEARNERS["naive"].create("naive", {}), custom)
