"""What is told of a growth: the new entries' part of the gradient, and when the loss was back."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regrow.core.axes import AxisGraph
from regrow.core.plan import Fill, Plan
from regrow.data.streams import digits_task, permuted_tasks, split
from regrow.jobs import learn as learning_run
from regrow.jobs.learn import Settings, run
from regrow.jobs.recording import Invocation
from regrow.methods import LEARNERS
from regrow.nets.vision import small
from regrow.store.run_folder import RunFolder
from regrow.surgery import apply
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.learner import PLAIN, Context, Learner, Loss, Step, task_loss
from regrow.training.state import TrainState


@dataclass
class Watched:
    """What was seen of plain training that widens the network once."""

    losses: list[float] = field(default_factory=list)
    first: dict[str, Tensor] = field(default_factory=dict)
    since: int = -1


def widen_once(context: Context, rule: str = "zero_out") -> Plan | None:
    if context.epoch != 1 or context.applied:
        return None
    key = next(axis.key for axis in context.axes.units())
    return Plan.growing(context.axes, {key: 6}, Fill(rule, seed=1))


def growing(watched: Watched, rule: str = "zero_out") -> Learner[Any]:
    """Plain training that widens once, and looks at its gradients and losses."""

    def plan(state: Any, context: Context) -> tuple[Plan | None, Any]:
        if found := widen_once(context, rule):
            watched.since = len(watched.losses)
        return found, state

    def loss(state: Any, context: Context, step: Step) -> Loss:
        found = task_loss(state, context, step)
        watched.losses.append(found.value.item())
        return found

    def project(state: Any, context: Context, step: Step) -> Any:
        if watched.since >= 0 and not watched.first:
            gradients = {name: p.grad for name, p in context.parameters().items()}
            watched.first = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
        return state

    return replace(PLAIN, plan=plan, loss=loss, project=project)


def grown(rule: str = "zero_out", lr: float = 0.05) -> tuple[Watched, TrainState[Any]]:
    task = permuted_tasks(digits_task(), 1)
    model, _ = small("mlp:12-8", (1, 8, 8), 10)
    watched, axes = Watched(), trace(model, task[0].train.inputs[:2])
    fitted = learn(model, axes, task, growing(watched, rule), TaskSchedule(epochs=3, lr=lr))
    return watched, fitted.state


@pytest.mark.parametrize("rule", ["zero_out", "split"])
def test_newborn_entries_have_the_part_of_the_gradient_that_is_told(rule: str) -> None:
    """6 new units of the first layer: 6 rows, 6 biases, 6 columns behind them."""
    learner, course = grown(rule)
    (event,) = course.events
    first = learner.first
    new = [first["1.weight"][12:], first["1.bias"][12:], first["3.weight"][:, 12:]]
    parts, whole = (sum(float(g.double().square().sum()) for g in some) for some in (new, first.values()))
    assert event["newborn_gradient"] == pytest.approx(parts / whole, rel=1e-12) and 0 < parts < whole
    assert event["newborn_entries"] == (6 * 64 + 6 + 8 * 6) / event["parameters"]
    if rule == "zero_out":
        assert not first["1.weight"][12:].any(), "nothing reads new units yet"


@pytest.mark.parametrize("lr", [0.05, 1e-5])
def test_steps_until_the_loss_is_back(lr: float) -> None:
    """Counted again from the losses themselves; at a rate that does not learn they may not come back."""
    learner, course = grown(lr=lr)
    (event,) = course.events
    smooth, before, back = learner.losses[0], None, None
    for i, loss in enumerate(learner.losses[1:], 1):
        if i == learner.since:
            before = smooth
        smooth = 0.9 * smooth + 0.1 * loss
        if before is not None and back is None and smooth <= before:
            back = i + 1 - learner.since
    assert event["loss_before"] == pytest.approx(before) and event["recovery_steps"] == back
    assert event["steps_watched"] == (back or len(learner.losses) - learner.since)


def test_what_is_told_changes_no_step() -> None:
    """The same as steps written out by hand, growth included, bit for bit."""
    task = permuted_tasks(digits_task(), 1)[0]
    learner, schedule = growing(Watched()), TaskSchedule(epochs=2, lr=0.05)
    nets: list[Any] = [small("mlp:12-8", (1, 8, 8), 10)[0] for _ in range(2)]
    axes: AxisGraph = trace(nets[0], task.train.inputs[:2])
    learn(nets[0], axes, [task], learner, schedule)
    optimizer = torch.optim.SGD(nets[1].parameters(), lr=0.05, momentum=0.9, nesterov=True)
    context = Context(nets[1], axes, task, epochs=2)
    nets[1].train()
    for epoch in range(2):
        if plan := widen_once(replace(context, epoch=epoch)):
            apply(nets[1], axes, plan, optimizers=[optimizer])
        for batch in task.train.batches(64, seed=context.generator(epoch).initial_seed()):
            optimizer.zero_grad()
            task_loss(None, context, Step(0, batch)).value.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))


@pytest.mark.parametrize("young", [10.0, 1e7])
def test_watching_goes_on_after_a_stop(young: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after growth; under a penalty that only new units have, the loss never comes back."""
    given: dict[str, Any] = {"late_phase": 0.75, "new_unit_penalty": young}
    settings = Settings(("permuted:digits:2",), model="mlp:16-16", epochs=4, train=200, test=80, method_settings=given)
    run(settings, Invocation(tmp_path / "whole"))
    write, seen = learning_run.write_checkpoint, []

    def stopping(path: Path, model: Any, state: TrainState[Any], **more: Any) -> None:
        write(path, model, state, **more)
        seen.append(len(state.events))
        if len(seen) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning_run, "write_checkpoint", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(settings, Invocation(tmp_path / "killed"))
    assert seen[-1] == 1, "past its growth"
    monkeypatch.undo()
    run(settings, Invocation(tmp_path / "killed"))
    rows = [RunFolder.open(tmp_path / name).metrics() for name in ("whole", "killed")]
    told = [[{k: v for k, v in r.items() if k != "time"} for r in some if r["what"] == "growth"] for some in rows]
    assert len(told[0]) == 1 and told[0] == told[1]
    if young > 1e6:
        assert told[0][0]["recovery_steps"] is None and told[0][0]["steps_watched"] == 3 * 4
    else:
        assert told[0][0]["recovery_steps"] > 0


def test_earlier_tasks_are_probed_among_their_own_classes() -> None:
    """Where a task is told, accuracy around a growth is that of the matrix, not of the classes of the current task."""
    tasks = split(digits_task(), 5)[:2]
    model, _ = small("mlp:24-16", (1, 8, 8), 10)
    learner = LEARNERS["sparsegrow"].made("sparsegrow", {"grow": "always"})
    schedule = TaskSchedule(scenario="task", epochs=4, batch_size=32, lr=0.05)
    state = learn(model, trace(model, tasks[0].train.inputs[:2]), tasks, learner, schedule).state
    event = next(event for event in state.events if event["task"] == 1)
    assert event["accuracy_before"][0] == pytest.approx(state.rows[0][0], abs=0.05) and state.rows[0][0] > 0.9
