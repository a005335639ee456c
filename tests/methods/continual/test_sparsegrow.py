"""SparseGrow, reconstructed: the acceptance checks of the reconstruction, on real digits and small networks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from regrow.core.tasks import Task
from regrow.data.streams import load_digits, permuted_tasks, split_by_classes
from regrow.methods import LEARNERS
from regrow.methods.continual.sparsegrow import Settings, build
from regrow.nets.vision import small
from regrow.protection.guards import build_guards
from regrow.surgery.gate import parametrize
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.learner import PLAIN, Boundary, Context, Event, Learner, Step, task_loss
from regrow.training.state import TrainState

SCHEDULE = TaskSchedule(epochs=4, batch_size=64, lr=0.05)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return permuted_tasks(load_digits(), 3)


def begun(tasks: list[Task], spec: str = "mlp:24-16") -> tuple[nn.Module, Any]:
    model, _ = small(spec, tasks[0].train.inputs.shape[1:], 10)
    return model, trace(model, tasks[0].train.inputs[:2])


def learned(tasks: list[Task], settings: Settings, spec: str = "mlp:24-16", **schedule: Any) -> Any:
    model, axes = begun(tasks, spec)
    fitted = learn(model, axes, tasks, build(settings), replace(SCHEDULE, **schedule))
    return model, fitted.axes, fitted.state.learner, fitted.state


def observe(learner: Learner[Any], event: Event, look: Any) -> Learner[Any]:
    """The learner, and a look at its state and the network right after one kind of event."""

    def boundary(state: Any, context: Context, now: Boundary) -> Any:
        state = learner.boundary(state, context, now)
        if now.event == event:
            look(state, context, now.plan)
        return state

    return replace(learner, boundary=boundary)


def continued(state: TrainState[Any]) -> TrainState[Any]:
    """The state for a call with one task more."""
    return replace(state, before=(0.1, 0.1))


@pytest.mark.parametrize("spec", ["mlp:24-16", "resnet:8-2"])
def test_growth_changes_no_answer(tasks: list[Task], spec: str) -> None:
    """1: at every growth accuracies and logits stay what they were, to rounding."""
    _, axes, _, course = learned(tasks[:2], Settings(gate="hard", cap=2.0), spec)
    assert len(course.events) == 2 and all(event["grown"] for event in course.events)
    for event in course.events:
        assert event["shock"] == 0 and event["logits_moved"] <= 1e-5
    assert all(axis.size > 8 for axis in axes.units() if axis.key in course.events[0]["grown"])


def test_a_network_with_group_norms_grows_by_whole_groups(tasks: list[Task]) -> None:
    """1, where norms rest on the input alone: logits stay, and every hidden axis has a group more."""
    model, _, _, course = learned(tasks[:2], Settings(multiple=1, cap=2.0), "resnet-gn:8-2", epochs=2)
    (event,) = course.events
    assert event["task"] == 1 and event["shock"] == 0 and event["logits_moved"] <= 1e-5
    assert event["grown"] == {"3.conv1.weight:0/2": 1, "4.conv1.weight:0/2": 1}
    assert model[3].bn1.num_groups == 5 and model[3].conv1.out_channels == 10


def freeze_parameters(state: Any, context: Context, step: Step) -> Any:
    """No parameter is trained after the first task; running statistics are updated."""
    for parameter in context.parameters().values() if context.number else ():
        parameter.grad = None
    return state


@pytest.mark.parametrize("spec", ["resnet:8-2", "resnet-gn:8-2"])
def test_without_running_statistics_frozen_answers_stay(tasks: list[Task], spec: str) -> None:
    """When nothing learns any more, a BatchNorm still forgets through its statistics; a GroupNorm has none."""
    model, axes = begun(tasks, spec)
    learner, state, said = replace(PLAIN, project=freeze_parameters), None, []
    for n in (1, 2):
        fitted = learn(
            model, axes, tasks[:n], learner, replace(SCHEDULE, epochs=1), state=continued(state) if state else None
        )
        axes, state = fitted.axes, fitted.state
        with torch.no_grad():
            said.append(model.eval()(tasks[0].test.inputs))
    assert torch.equal(*said) == (spec == "resnet-gn:8-2")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_owned_never_moves(tasks: list[Task], optimizer: str, precision: str) -> None:
    """2: bit for bit, under momentum, weight decay and mixed precision, through a later task with growth."""
    model, axes = begun(tasks)
    learner = build(Settings(gate="hard"))
    schedule = replace(SCHEDULE, optimizer=optimizer, weight_decay=0.05, lr=0.01, precision=precision)
    fitted = learn(model, axes, tasks[:1], learner, schedule)
    owned_then = fitted.state.learner.owned
    then = {n: (p.detach().clone(), owned_then[n].values.clone()) for n, p in model.named_parameters()}
    learn(model, fitted.axes, tasks[:2], learner, schedule, state=continued(fitted.state))
    moved = 0
    for name, parameter in model.named_parameters():
        old, owned = then[name]
        now = parameter[tuple(slice(n) for n in old.shape)]  # newborn units lie behind the others
        assert torch.equal(now[owned], old[owned]), name
        moved += int((now[~owned] != old[~owned]).sum())
    assert moved > 0


@pytest.mark.parametrize("gate", ["kronecker", "hard"])
@pytest.mark.parametrize("spec", ["mlp:100-100", "resnet:8-2"])
def test_newborn_units_learn(tasks: list[Task], spec: str, gate: str) -> None:
    """3: ten steps after growth fewer than 5 % of newborn units are without a gradient, over all examples."""
    dead: list[float] = []
    settings = Settings(gate=gate, late_phase=0.5, cap=4.0, width=0.25, multiple=1)
    learner, grown, since = build(settings), dict[str, int](), 0

    def grew(state: Any, context: Context, plan: Any) -> None:
        nonlocal since
        since = 0
        grown.update({key: change.grow for key, change in plan.changes.items()})

    def project(state: Any, context: Context, step: Step) -> Any:
        nonlocal since
        state = learner.project(state, context, step)
        since += bool(grown)
        if since == 11:
            made, batch = {key: context.parameters()[key.partition(":")[0]] for key in grown}, context.task.train
            loss = torch.nn.functional.cross_entropy(context.logits(batch.inputs), batch.labels)
            for key, pull in zip(made, torch.autograd.grad(loss, [*made.values()]), strict=True):
                none = pull[-grown[key] :].flatten(1).abs().sum(1) == 0
                dead.append(float(none.double().mean()))
        return state

    model, axes = begun(tasks, spec)
    watched = replace(observe(learner, Event.PLAN_APPLIED, grew), project=project)
    learn(model, axes, tasks[:2], watched, replace(SCHEDULE, epochs=2))
    assert len(dead) >= 2 and max(dead) < 0.05


@pytest.mark.parametrize("directions", ["data", "projected", "random"])
def test_newborn_units_are_partly_zero(tasks: list[Task], directions: str) -> None:
    """They read half of their inputs, also when they are turned away from what old tasks read; nothing reads them."""
    seen: list[Any] = []

    def look(state: Any, context: Context, plan: Any) -> None:
        for key, change in plan.changes.items():
            name, layers = key.partition(":")[0], [*context.weights]
            reads, read = (context.parameters()[one] for one in (name, layers[layers.index(name) + 1]))
            part = reads[-change.grow :, : reads.shape[1] - change.grow * (name != layers[0])]
            seen.append((float((part != 0).double().mean()), bool(read[:, -change.grow :].any())))

    model, axes = begun(tasks)
    learner = observe(build(Settings(directions=directions, grow="always")), Event.PLAN_APPLIED, look)
    learn(model, axes, tasks[:2], learner, SCHEDULE)
    assert len(seen) >= 2
    for share, read in seen:
        assert share == pytest.approx(0.5, abs=0.1) and not read


@pytest.mark.parametrize("mode", ["dst", "adaptcl"])
def test_the_loss_moves_thresholds_where_it_should(tasks: list[Task], mode: str) -> None:
    """4: from the loss alone ``dst`` thresholds get a gradient and ``adaptcl`` ones none; a weight at 0 always does."""
    model, axes = begun(tasks)
    learner, context = build(Settings(threshold=mode, alpha=0.0)), Context(model, axes, tasks[0])
    state = learner.boundary(learner.state, context, Boundary(Event.TASK_START))
    thresholds = [one.values.requires_grad_() for one in state.threshold.values()]
    weights = context.parameters()
    last = context.weights[-1]
    with torch.no_grad():
        weights[last][:, 0] = 0.0
    with parametrize(model, learner.parametrize(state, context).values):
        task_loss(state, context, Step(0, next(tasks[0].train.batches(64)))).value.backward()
    moved = [t.grad is not None and bool(t.grad.any()) for t in thresholds]
    assert all(moved) if mode == "dst" else not any(moved)
    gradient = weights[last].grad
    assert gradient is not None and bool(gradient[:, 0].any())


def test_adaptcl_keeps_what_its_thresholds_predict(tasks: list[Task]) -> None:
    """5: where weights hardly move, 1 − t·√fan_in of a Kaiming-uniform layer is kept."""
    model, _, state, _ = learned(
        tasks[:1], Settings(threshold="adaptcl", grow="never", alpha=1e-3, lr=0.005), "mlp:1000-400", lr=1e-7, epochs=30
    )
    rates = {}
    for name, one in state.owned.items():
        if (weight := model.get_parameter(name)).dim() > 1:
            rates[name] = float(one.values.double().mean()), weight.shape[1]
    t = _threshold_after(30 * -(-len(tasks[0].train) // 64), 0.005, 1e-3)
    for name, (kept, fan_in) in rates.items():
        predicted, many = 1 - t * fan_in**0.5, model.get_parameter(name).numel()
        drawn = 3 * (predicted * (1 - predicted) / many) ** 0.5  # of so many weights
        assert kept == pytest.approx(predicted, abs=max(0.005, drawn)), name


def _threshold_after(steps: int, lr: float, alpha: float) -> float:
    """SGD with Nesterov momentum 0.9 on α·exp(−t)."""
    t = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([t], lr=lr, momentum=0.9, nesterov=True)
    for _ in range(steps):
        optimizer.zero_grad()
        (alpha * torch.exp(-t)).backward()
        optimizer.step()
    return float(t.detach())


def test_with_everything_off_it_is_plain_training(tasks: list[Task]) -> None:
    """6: no growth, no gate, thresholds held at 0: SGD, bit for bit."""
    plain, axes = begun(tasks)
    learn(plain, axes, tasks[:2], PLAIN, SCHEDULE)
    off = Settings(grow="never", gate="none", alpha=0.0, lr=1e-30)
    for settings in (off, replace(off, threshold="none")):
        model, *_ = learned(tasks[:2], settings)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_without_growth_it_is_adaptcl(tasks: list[Task]) -> None:
    """6: hard gate, thresholds of whole layers moved by the penalty alone: AdaptCL, written down here, bit for bit."""
    model, *_ = learned(tasks[:2], Settings(grow="never", gate="hard", threshold="adaptcl", alpha=1e-3))
    plain, axes = begun(tasks)
    parameters = dict(plain.named_parameters())
    weights = {name: p for name, p in parameters.items() if p.dim() > 1}
    owned = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for number, task in enumerate(tasks[:2]):
        context = Context(plain, axes, task, number)
        levels = {name: torch.zeros((), requires_grad=True) for name in weights}
        groups = [{"params": [*parameters.values()]}, {"params": [*levels.values()], "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
        held = {name: p.detach().clone() for name, p in parameters.items()}

        def cut() -> None:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.mul_((weight.abs() >= levels[name]) | owned[name])  # noqa: B023

        for epoch in range(4):
            for batch in task.train.batches(64, seed=context.generator(epoch).initial_seed()):
                optimizer.zero_grad()
                cut()
                loss = torch.nn.functional.cross_entropy(plain(batch.inputs), batch.labels)
                for level in levels.values():
                    loss = loss + 1e-3 * torch.exp(-level)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(torch.where(owned[name], held[name], parameter))
        cut()
        for name, parameter in parameters.items():
            owned[name] |= parameter != 0 if name in weights else torch.ones_like(owned[name])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_classes_to_come_stay_free() -> None:
    """In a class-incremental sequence a task does not own the rows of classes that it has not seen."""
    parts = split_by_classes(load_digits(), 5)
    _, _, state, _ = learned(parts[:2], Settings(grow="never"), scenario="class", epochs=2)
    owned = state.owned["5.weight"].values
    assert bool(owned[:4].any()) and not bool(owned[4:].any())


def test_outputs_of_classes_to_come_stay_free_when_it_grows() -> None:
    """Newborn hidden units count as used; rows of classes that nobody has learned do not."""
    parts = split_by_classes(load_digits(), 5)
    _, _, state, _ = learned(parts[:2], Settings(grow="always"), scenario="class", epochs=2)
    head, hidden = (state.factors[f"{name}.weight outputs"].values.diagonal() for name in ("5", "1"))
    assert bool((head[:4] > 0).all()) and not bool(head[4:].any()) and bool((hidden > 0).all())


def test_newborn_units_press_no_threshold_of_a_whole_layer(tasks: list[Task]) -> None:
    """The penalty alone moves it, and it is pressed as hard after growth as without."""

    pressed: list[list[float]] = []

    def look(state: Any, context: Context, plan: Any) -> None:
        if context.epoch == context.epochs - 1:
            pressed.append([float(one.values.detach()) for one in state.threshold.values()])

    for grow in ("always", "never"):
        model, axes = begun(tasks)
        learner = observe(build(Settings(grow=grow, threshold="adaptcl")), Event.EPOCH_END, look)
        learn(model, axes, tasks[:1], learner, SCHEDULE)
    assert pressed[0] == pressed[1] and min(pressed[0]) > 0


@pytest.mark.parametrize("gate", ["hard", "none"])
def test_gates_protect(tasks: list[Task], gate: str) -> None:
    model, axes = begun(tasks)
    learner = build(Settings(grow="never", gate=gate, alpha=5e-3))
    fitted = learn(model, axes, tasks[:1], learner, SCHEDULE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fitted = learn(model, fitted.axes, tasks[:2], learner, SCHEDULE, state=continued(fitted.state))
    moved = {name: int((p != before[name]).sum()) for name, p in model.named_parameters()}
    assert moved["1.weight"] > 0
    assert (moved["1.bias"] > 0) == (gate == "none")


def test_what_old_tasks_read_moves_little(tasks: list[Task]) -> None:
    """The Kronecker gate: a later task forgets less than plain training does, and newborn units are silent at first."""
    lost = {}
    for gate in ("kronecker", "none"):
        *_, course = learned(tasks[:2], Settings(gate=gate, threshold="none"), epochs=6)
        lost[gate] = course.rows[0][0] - course.rows[1][0]
        assert gate == "none" or [event["task"] for event in course.events] == [1], "all is free in the first task"
        if gate == "kronecker":
            free, owned = course.sizes[1]["free"], course.sizes[1]["owned"]
            assert all(0 < share < 1 for share in free.values()) and free.keys() == owned.keys()
    assert lost["kronecker"] < lost["none"] / 2


def test_hidden_units_that_were_silent_are_held_and_outputs_are_not(tasks: list[Task]) -> None:
    """The gate looks at old weights alone: a unit that answered nothing there would wake on what old tasks read."""
    model, axes, state, _ = learned(tasks[:1], Settings(grow="never"))
    context = Context(model, axes, tasks[1], number=1)
    held = {}
    for name in ("1.weight", "5.weight"):
        used = state.factors[f"{name} outputs"].values
        used[3], used[:, 3] = 0.0, 0.0
        read = state.factors[f"{name} inputs"].values
        change = torch.zeros(len(used), len(read) + 1)
        change[3, :-1] = read[read.diagonal().argmax()]  # a direction that was read
        through = []
        for damping in (0.0, 0.1):
            guard = build_guards(state.factors, context, state.anchor, damping)[name]
            through.append(guard.to_entries(guard.to_directions(change) / (1 + 15 * guard.curvature)))
        assert torch.allclose(through[0], change, atol=1e-4)
        held[name] = float(through[1].norm() / change.norm())
    assert held["1.weight"] < 0.5 and held["5.weight"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("spec", "loud"), [("resnet-gn:8-2", True), ("resnet:8-2", False), ("mlp:24-16", False)])
def test_what_reads_newborn_units_is_held_where_a_norm_makes_them_loud(
    tasks: list[Task], spec: str, loud: bool
) -> None:
    """A GroupNorm rescales them on old inputs; else they are silent there, and what reads them is free."""
    open_: list[float] = []

    def look(state: Any, context: Context, plan: Any) -> None:
        for key, change in plan.changes.items():
            into = next(slot for slot in context.axes[key].consumers() if slot.name in state.guards)
            step = torch.zeros_like(context.parameters()[into.name])
            step[:, -change.grow :] = 1.0  # of the first axis that grew: its newborn units lie last
            flat = torch.cat([step.flatten(1), torch.zeros(len(step), 1)], 1)
            guard = state.guards[into.name]
            open_.append(float((guard.to_directions(flat) / (1 + 80 * guard.curvature)).norm() / flat.norm()))

    model, axes = begun(tasks, spec)
    learner = observe(build(Settings(multiple=1, strength=80.0, group_norm_damping=1.0)), Event.PLAN_APPLIED, look)
    learn(model, axes, tasks[:2], learner, replace(SCHEDULE, epochs=2))
    assert open_ and (max(open_) < 0.7 if loud else min(open_) > 0.95)


@pytest.mark.parametrize("directions", ["data", "projected", "random"])
def test_newborn_units_are_silent_on_old_tasks(tasks: list[Task], directions: str) -> None:
    """At birth they answer what is new, and hardly what is old."""
    model, axes = begun(tasks)
    settings = Settings(directions=directions, late_phase=1.0, width=1.0, cap=9.0, density=1.0, strength=100.0)
    seen: dict[str, Any] = {}

    def look(state: Any, context: Context, plan: Any) -> None:
        layer = context.model.get_submodule("1")
        with torch.no_grad():
            seen["old"], seen["new"] = (
                layer(task.train.inputs.flatten(1))[:, 24:].std(0).mean() for task in (tasks[0], tasks[1])
            )

    learn(model, axes, tasks[:2], observe(build(settings), Event.PLAN_APPLIED, look), SCHEDULE)
    ratio = float(seen["old"] / seen["new"])
    assert ratio > 0.8 if directions == "random" else ratio < 0.6


def test_a_memory_goes_along(tasks: list[Task]) -> None:
    """With examples kept, less is lost than without, and the memory holds as many as it was given room for."""
    lost = {}
    for memory in (0, 200):
        settings = Settings(gate="none", grow="never", memory=memory)
        _, _, state, course = learned(tasks[:2], settings)
        lost[memory] = course.rows[0][0] - course.rows[1][0]
    assert lost[200] < lost[0]
    assert state.rows["inputs"].values.shape[0] == 200 and state.seen == 2 * len(tasks[0].train)


@pytest.mark.parametrize("scenario", ["class", "domain"])
@pytest.mark.parametrize("memory", [0, 50])
@pytest.mark.parametrize("relief", [0.01, 1.0])
def test_a_memory_relieves_the_gate_where_classes_come(scenario: str, memory: int, relief: float) -> None:
    """Then the output layer moves freely, the others more than without; in no other case anything is changed."""
    parts = split_by_classes(load_digits(), 5, relabel=scenario == "domain")[:2]
    seen: dict[str, Any] = {}

    def look(state: Any, context: Context, plan: Any) -> None:
        seen.update(state.free)

    for strength in (20.0, 20.0 * relief):
        seen.clear()
        model, axes = begun(parts)
        given = Settings(grow="never", memory=memory, strength_factor=1.0 if strength == 20.0 * relief else relief)
        learner = observe(build(replace(given, strength=strength)), Event.TASK_START, look)
        learn(model, axes, parts, learner, replace(SCHEDULE, epochs=1, scenario=scenario))
        if strength == 20.0:
            first = dict(seen)
    lifted = bool(memory) and scenario == "class" and relief < 1
    assert ("5.weight" in first) != lifted and {"1.weight", "3.weight"} <= first.keys()
    same = first["1.weight"] == pytest.approx(seen["1.weight"], abs=1e-12)
    assert same == (lifted or relief == 1), "the first task is the same for all, and with it what the gate knows"


@pytest.mark.parametrize("method", ["replay", "sparsegrow"])
@pytest.mark.parametrize("own", [True, False])
def test_examples_at_hand_push_old_classes_down_only_where_asked(method: str, own: bool) -> None:
    """Without a memory's examples in the batch, ER-ACE gives the rows of old classes no gradient."""
    parts = split_by_classes(load_digits(), 5)
    model, axes = begun(parts)
    learner = LEARNERS[method].create(method, {"asymmetric_loss": own, "memory": 50})
    classes = torch.tensor([c < 4 for c in range(10)])
    context = Context(model, axes, parts[1], number=0, classes=classes)
    state = learner.boundary(learner.state, context, Boundary(Event.TASK_START))
    learner.loss(state, context, Step(0, next(parts[1].train.batches(32)))).value.backward()
    gradient = context.parameters()["5.weight"].grad
    assert gradient is not None and bool(gradient[2:4].any()) and not bool(gradient[4:].any())
    assert bool(gradient[:2].any()) != own


def test_a_wrong_setting_is_told() -> None:
    with pytest.raises(ValueError, match="gate must be one of kronecker, hard, none, got 'tight'"):
        Settings(gate="tight")
    with pytest.raises(ValueError, match="late_phase must be 0 to 1, got 2"):
        Settings(late_phase=2)
