"""Checkpoints and ledgers of networks with learned masks, on networks without their weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laws
from regrow.core.axes import AxisGraph
from regrow.data.streams import load_digits, permuted_tasks, sample_task
from regrow.methods.continual import sparsegrow
from regrow.methods.search import mgas
from regrow.nets.vision import small
from regrow.store.ledger import Ledger, replay
from regrow.surgery import UndoStore
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions, Fitted
from regrow.training.learner import Learner
from regrow.training.state import axis_tensors, read_checkpoint, write_checkpoint

SHAPE, SPECS = (1, 8, 8), {"sparsegrow": "mlp:24-16", "mgas": "resnet:4-2"}
MASKS = {"sparsegrow": "owned ", "mgas": "zeros "}


def network(method: str) -> nn.Module:
    return small(SPECS[method], SHAPE, 10)[0]


def learned(method: str) -> tuple[AxisGraph, Learner[Any], UndoStore | None, Fitted[Any]]:
    """A network whose masks were learned and whose shape has changed, and the axes that it had at first."""
    model = network(method)
    axes, task = trace(model, torch.zeros(2, *SHAPE)), sample_task(load_digits(), 100, 40)
    learner: Learner[Any]
    if method == "mgas":
        target = 0.4 * sum(p.numel() for p in model.parameters())
        learner = mgas.build(mgas.Settings(target=target, warm=1, every=1)).learner
        tasks, schedule = [task], TaskSchedule(epochs=6, batch_size=25)
    else:
        learner = sparsegrow.build(sparsegrow.Settings(multiple=1, grow="always"))
        tasks, schedule = permuted_tasks(task, 2), TaskSchedule(epochs=4, batch_size=25, lr=0.05)
    undo = UndoStore() if learner.restores else None
    return axes, learner, undo, learn(model, axes, tasks, learner, schedule, options=FitOptions(undo=undo))


@pytest.mark.parametrize("method", SPECS)
def test_shapes_and_masks_are_restored_on_an_empty_network(method: str, tmp_path: Path) -> None:
    first, learner, undo, fitted = learned(method)
    ledger = Ledger(tmp_path / "ledger.json")
    for plan in fitted.state.plans:
        ledger.append(plan)
    hollow = network(method).to("meta")
    again, axes = replay(hollow, trace(hollow, torch.zeros(2, *SHAPE, device="meta")), ledger.plans())
    wanted = fitted.model.state_dict()
    assert {name: one.shape for name, one in again.state_dict().items()} == {n: one.shape for n, one in wanted.items()}
    assert {name: one.shape for name, one in network(method).state_dict().items()} != {
        name: one.shape for name, one in wanted.items()
    }
    laws.same_axes(axes, fitted.axes)

    write_checkpoint(tmp_path / "checkpoint", fitted.model, fitted.state, undo=undo)
    empty = network(method)
    with torch.no_grad():
        for tensor in empty.state_dict().values():
            tensor.zero_()
    model, axes, state = read_checkpoint(
        tmp_path / "checkpoint", empty, first, learner.state, undo=None if undo is None else UndoStore()
    )
    laws.same_axes(axes, fitted.axes)
    laws.same_network(model.eval(), fitted.model.eval())
    masks, before = axis_tensors(state.learner), axis_tensors(fitted.state.learner)
    assert masks.keys() == before.keys()
    assert all(torch.equal(one.values, before[name].values) for name, one in masks.items())
    flags = torch.cat([one.values.flatten() for name, one in masks.items() if name.startswith(MASKS[method])])
    assert flags.dtype == torch.bool and 0 < int(flags.sum()) < len(flags), "some entries are masked, and some are not"
