"""Networks that were cut, grew and got units back: saved, loaded in a fresh process, and replayed from the ledger."""

from typing import Any

import pytest
import torch
from torch import nn

import laws
from regrow import Fill, Plan, UndoStore, apply, trace
from regrow.core.axes import AxisGraph
from regrow.store import save
from regrow.store.ledger import replay
from regrow.store.run_folder import RunFolder
from store.fresh import answers, answers_in_a_fresh_process, assert_same, origin
from zoo import ZOO

NETS = ("conv_residual", "llama_tied")


def changed(name: str, folder: RunFolder) -> tuple[nn.Module, AxisGraph]:
    """Cut, grow, restore a part: each plan in the ledger."""
    model = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    axes, undo = trace(model, *args, **kwargs), UndoStore()

    def step(plan: Plan) -> None:
        nonlocal axes
        _, axes = apply(model, axes, plan, undo=undo)
        folder.ledger.append(plan)

    step(laws.random_plan(axes, torch.Generator().manual_seed(1), floor=2, marks=laws.UNFOLDED))
    wider = laws.joint_growing_plan(axes, "zero_out").changes
    step(Plan({key: change for key, change in wider.items() if axes[key].mark in laws.UNFOLDED}))
    wide = max(axes.units(), key=lambda axis: axis.size)
    step(Plan.growing(axes, {wide.key: 3}, Fill("split", seed=4)))
    key = next(key for key, ids in undo.restorable.items() if axes[key] in axes.units())
    step(Plan.restoring(axes, {key: undo.restorable[key][:1]}))
    return model, axes


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each network with its axes, its run folder, and its answers in a fresh process."""
    place = tmp_path_factory.mktemp("grown")
    folders = {name: RunFolder.create(place / name, verb="grow", settings={"model": name}) for name in NETS}
    results = {name: changed(name, folder) for name, folder in folders.items()}
    for name, (model, _) in results.items():
        save(model, folders[name].path, origin=origin(name, model))
    fresh = answers_in_a_fresh_process({name: folder.path for name, folder in folders.items()}, place)
    return {name: (*results[name], folders[name], fresh[name]) for name in NETS}


@pytest.mark.parametrize("name", NETS)
def test_a_fresh_process_says_the_same_and_the_ledger_gives_the_same_shapes(name: str, grown: dict[str, Any]) -> None:
    model, axes, folder, in_a_fresh_process = grown[name]
    assert_same(in_a_fresh_process, answers(model, name))
    fresh = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    plans = folder.ledger.plans()
    assert len(plans) == 4 and any(change.restore for change in plans[-1].changes.values())
    again, left = replay(fresh, trace(fresh, *args, **kwargs), plans)
    laws.same_network(again, model)
    laws.same_axes(left, axes)
