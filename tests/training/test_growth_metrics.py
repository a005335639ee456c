"""What is told of a growth, and that telling it changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.core.axes import AxisGraph
from regrow.core.plan import Fill, Plan
from regrow.data.streams import load_digits, permuted_tasks, split_by_classes
from regrow.jobs import learn as learning_run
from regrow.jobs.learn import Settings, learn_named
from regrow.jobs.recording import Invocation
from regrow.methods import LEARNERS
from regrow.nets.vision import small
from regrow.store.run_folder import RunFolder
from regrow.surgery import apply
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.learner import PLAIN, Context, Step, task_loss
from regrow.training.state import TrainState


def widen_once(context: Context, rule: str = "zero_out") -> Plan | None:
    if context.epoch != 1 or context.plans_applied:
        return None
    key = next(axis.key for axis in context.axes.units())
    return Plan.growing(context.axes, {key: 6}, Fill(rule, seed=1))


def test_what_is_told_changes_no_step() -> None:
    """The same as steps written out by hand, growth included, bit for bit."""
    task = permuted_tasks(load_digits(), 1)[0]
    learner = replace(PLAIN, plan=lambda state, context: (widen_once(context), state))
    schedule = TaskSchedule(epochs=2, lr=0.05)
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


def test_a_growth_is_told_once_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"late_phase": 0.75}
    settings = Settings(
        ("permuted:digits:2",),
        model="mlp:16-16",
        epochs=4,
        train=200,
        test=80,
        method="sparsegrow",
        method_settings=given,
    )
    learn_named(settings, Invocation(tmp_path / "whole"))
    write, seen = learning_run.write_checkpoint, []

    def stopping(path: Path, model: Any, state: TrainState[Any], **more: Any) -> None:
        write(path, model, state, **more)
        seen.append(len(state.events))
        if len(seen) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning_run, "write_checkpoint", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn_named(settings, Invocation(tmp_path / "killed"))
    assert seen[-1] == 1, "past its growth"
    monkeypatch.undo()
    learn_named(settings, Invocation(tmp_path / "killed"))
    rows = [RunFolder.open(tmp_path / name).metrics() for name in ("whole", "killed")]
    told = [[{k: v for k, v in r.items() if k != "time"} for r in some if r["what"] == "growth"] for some in rows]
    assert len(told[0]) == 1 and told[0] == told[1]


def test_earlier_tasks_are_probed_among_their_own_classes() -> None:
    """Where a task is told, accuracy around a growth is that of the matrix, not of the classes of the current task."""
    tasks = split_by_classes(load_digits(), 5)[:2]
    model, _ = small("mlp:24-16", (1, 8, 8), 10)
    learner = LEARNERS["sparsegrow"].create("sparsegrow", {"grow": "always"})
    schedule = TaskSchedule(scenario="task", epochs=4, batch_size=32, lr=0.05)
    state = learn(model, trace(model, tasks[0].train.inputs[:2]), tasks, learner, schedule).state
    event = next(event for event in state.events if event["task"] == 1)
    assert event["accuracy_before"][0] == pytest.approx(state.rows[0][0], abs=0.05) and state.rows[0][0] > 0.9
