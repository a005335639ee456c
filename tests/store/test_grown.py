"""Networks that were cut, grew and got units back: saved, loaded in a fresh process, and replayed from the ledger."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laws
from regrow import Fill, Plan, UndoStore, apply, trace
from regrow.core.axes import AxisGraph
from regrow.store import StoreError, save
from regrow.store.ledger import replay
from regrow.store.run_folder import RunFolder
from store.fresh import answers, answers_in_a_fresh_process, assert_same, origin
from zoo import ZOO

NETS = ("conv_residual", "llama_tied")


def changed(name: str, folder: RunFolder) -> tuple[nn.Module, AxisGraph, UndoStore]:
    """Cut, grow, restore a part: each plan in the ledger, each cut in the undo store."""
    model = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    axes, undo = trace(model, *args, **kwargs), UndoStore()

    def step(plan: Plan) -> None:
        nonlocal axes
        _, axes = apply(model, axes, plan, undo=undo)
        folder.ledger.append(plan)

    step(laws.random_plan(axes, torch.Generator().manual_seed(1), floor=2))
    step(laws.joint_growing_plan(axes, "zero_out"))
    wide = max(axes.units(), key=lambda axis: axis.size)
    step(Plan.growing(axes, {wide.key: 3}, Fill("split", seed=4)))
    key = next(key for key, ids in undo.restorable.items() if axes[key] in axes.units())
    step(Plan.restoring(axes, {key: undo.restorable[key][:1]}))
    folder.write_undo_store(undo)
    return model, axes, undo


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each network with its axes, its undo store, its run folder, and its answers in a fresh process."""
    place = tmp_path_factory.mktemp("grown")
    folders = {name: RunFolder.create(place / name, verb="grow", settings={"model": name}) for name in NETS}
    results = {name: changed(name, folder) for name, folder in folders.items()}
    for name, (model, _, _) in results.items():
        save(model, folders[name].path, origin=origin(name, model))
    fresh = answers_in_a_fresh_process({name: folder.path for name, folder in folders.items()}, place)
    return {name: (*results[name], folders[name], fresh[name]) for name in NETS}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_fresh_process_says_the_same_and_the_ledger_gives_the_same_shapes(name: str, grown: dict[str, Any]) -> None:
    model, axes, undo, folder, in_a_fresh_process = grown[name]
    assert_same(in_a_fresh_process, answers(model, name))
    fresh = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    plans = folder.ledger.plans()
    assert len(plans) == 4 and any(change.recalled for change in plans[-1].changes.values())
    again, left = replay(fresh, trace(fresh, *args, **kwargs), plans)
    laws.same_network(again, model)
    laws.same_axes(left, axes)
    whole = [
        apply(deepcopy(model), axes, Plan.restoring(axes, rest.restorable), undo=rest)[0]
        for rest in (undo, folder.read_undo_store())
    ]
    laws.same_network(*whole)


def test_an_undo_store_on_the_disk_is_whole_or_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", verb="grow", settings={})
    assert folder.read_undo_store() == UndoStore()
    changed("conv_residual", folder)
    again = folder.read_undo_store()
    path = folder.path / "undo_store.safetensors"
    assert again.restorable and not [p for p in folder.path.iterdir() if "partial" in p.name]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"recorded SHA-256.*restore the file"):
        folder.read_undo_store()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="restore the file"):
        folder.read_undo_store()
