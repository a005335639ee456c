"""The best of the checked states is remembered; training goes on within an epoch where it stopped."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from regrow.core.axes.axis import AxisTensor
from regrow.core.sources import Batch
from regrow.training.fit import FitOptions, fit
from regrow.training.hooks import AxisTensors, EarlyStopping, restore_best, with_early_stopping
from regrow.training.learner import Context, Learner, Loss, Step
from regrow.training.schedule import NO_AXES, Schedule, source_phase
from regrow.training.state import TrainState


def batches(step: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    return [Batch((torch.randn(4, 3, generator=generator),)) for _ in range(2)]


def loss(tensors: AxisTensors, context: Context, step: Step) -> Loss:
    own = (tensors["shift"].values.double() - 1).square().sum()
    return Loss((context.model(*step.batch.args) - 2).square().mean() + own)


@dataclass(frozen=True)
class Run:
    """A network and what has been seen of its training."""

    model: nn.Linear
    steps: list[int]
    saved: list[TrainState[EarlyStopping]]


def start() -> Run:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    return Run(model, [], [])


def train(run: Run, held_out: list[float], stop: int = 0) -> TrainState[EarlyStopping]:
    """Train for epochs of 2, 1 and 3 steps; the checks give these losses. Ctrl-C may be pressed after a step."""
    state = run.saved[-1] if run.saved else None
    shift = AxisTensor(torch.zeros(2, dtype=torch.float64), (2,), lr=0.5)
    left = iter(held_out[len(state.learner.history) if state else 0 :])
    learner = with_early_stopping(
        Learner[AxisTensors]({"shift": shift}, loss=loss, boundary=lambda own, context, boundary: own, scheduled=True),
        lambda tensors, context: next(left),
    )

    def progress(done: int, total: int, what: str) -> None:
        assert total == 6 and what.startswith("training, loss ")
        run.steps.append(done)
        if done == stop:
            raise KeyboardInterrupt

    schedule = Schedule("adamw", 0.1, decay="cosine", warm_up=0.2, clip=1.0)
    return fit(
        run.model, NO_AXES, [source_phase("training", (2, 1, 3), batches)], learner, schedule,
        state=state,
        options=FitOptions(checkpoint=lambda now, context: run.saved.append(now), seconds=1e9, progress=progress),
    ).state  # fmt: skip


@pytest.mark.parametrize(("held_out", "best"), [([4.0, 3.0, 1.0, 2.0], 3), ([1.0, 1.0, 2.0, 3.0], 0)])
def test_the_best_of_the_checked_states_is_restored(held_out: list[float], best: int) -> None:
    run, first = start(), start().model
    state = train(run, held_out)
    assert [check.step for check in state.learner.history] == [0, 2, 3, 6]
    assert state.learner.best_check.step == best and list(state.learner.best) == ["weight"]
    last = run.model.weight.detach().clone()
    restore_best(run.model, state.learner)
    assert not torch.equal(run.model.weight, last) and torch.equal(run.model.bias, first.bias)
    assert torch.equal(run.model.weight, first.weight) is (best == 0)


@pytest.mark.parametrize("stop", range(1, 7))
def test_training_goes_on_within_an_epoch(stop: int) -> None:
    held_out, whole, run = [4.0, 3.0, 1.0, 2.0], start(), start()
    wanted = train(whole, held_out)
    with pytest.raises(KeyboardInterrupt):
        train(run, held_out, stop)
    place = {1: (0, 1), 2: (0, 2), 3: (1, 1), 4: (2, 1), 5: (2, 2), 6: (2, 3)}
    assert (run.saved[-1].epoch, run.saved[-1].step) == place[stop]
    state = train(run, held_out)
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert torch.equal(run.model.weight, whole.model.weight)
    assert state.learner.history == wanted.learner.history
    shifts = [one.learner.tensors["shift"].values for one in (state, wanted)]
    assert torch.equal(*shifts) and float(shifts[0].detach().min()) > 0
