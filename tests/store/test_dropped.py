"""Networks without some of their branches: saved, loaded in a fresh process without tracing, and replayed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laws
from regrow import Plan, UndoStore, apply, load, trace, with_branches
from regrow.core.axes import AxisGraph
from regrow.store import StoreError, save
from regrow.store.ledger import replay
from regrow.store.run_folder import RunFolder
from regrow.store.shapes import content_digest
from store.fresh import answers, answers_in_a_fresh_process, assert_same, origin
from zoo import ZOO

BRANCHES = {"conv_residual": ["block"], "llama_tied": ["model.layers.0.mlp", "model.layers.1.self_attn"]}


def changed(name: str, folder: RunFolder) -> tuple[nn.Module, AxisGraph]:
    """Cut, drop and cut at once, drop, bring back: each plan in the ledger."""
    model = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    axes, undo = with_branches(model, trace(model, *args, **kwargs)), UndoStore()

    def step(plan: Plan) -> None:
        nonlocal axes
        _, axes = apply(model, axes, plan, undo=undo)
        folder.ledger.append(plan)

    step(laws.random_plan(axes, torch.Generator().manual_seed(1), floor=2))
    first, *others = BRANCHES[name]
    stays = axes.without([axes.branches[first]])
    keep = laws.random_plan(stays, torch.Generator().manual_seed(2), floor=2).changes
    step(Plan.dropping(axes, [first], keep={key: change.keep for key, change in keep.items() if not change.idle}))
    if others:
        step(Plan.dropping(axes, others))
        step(Plan(back=(others[0],)))
        step(Plan.dropping(axes, others))
    return model, axes


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each network with its axes, its run folder, and its answers in a fresh process."""
    place = tmp_path_factory.mktemp("dropped")
    folders = {name: RunFolder.create(place / name, verb="drop", settings={"model": name}) for name in BRANCHES}
    results = {name: changed(name, folder) for name, folder in folders.items()}
    for name, (model, _) in results.items():
        save(model, folders[name].path, origin=origin(name, model))
    fresh = answers_in_a_fresh_process({name: folder.path for name, folder in folders.items()}, place)
    return {name: (*results[name], folders[name], fresh[name]) for name in BRANCHES}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_fresh_process_says_the_same_and_the_ledger_gives_the_same_shapes(
    name: str, dropped: dict[str, Any], tmp_path: Path
) -> None:
    model, axes, folder, in_a_fresh_process = dropped[name]
    assert_same(in_a_fresh_process, answers(model, name))
    fresh = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    again, left = replay(fresh, trace(fresh, *args, **kwargs), folder.ledger.plans())
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in laws.tensors(model).items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in laws.tensors(again).items()} == shapes
    laws.same_axes(left, axes)
    assert not any("mlp" in key and "layers.0" in key for key in shapes), "what is dropped is not stored"
    if origin(name, model):
        save(load(folder.path), tmp_path / "again")
        assert_same(answers(load(tmp_path / "again"), name), answers(model, name))


ZERO = {"gives": "zero", "takes": 0, "of": 0, "at": 0}


@pytest.mark.parametrize(
    ("stands", "why"),
    [
        ({"block": ZERO | {"gives": "all"}}, "stands: Invalid enum value 'all' .*; restore it"),
        ({"block": ZERO, "block.0": ZERO}, "no module 'block.0'"),
        ({"blick": ZERO}, "no module 'blick' to drop"),
        ({"": ZERO}, "no module '' to drop"),
        ({}, "disagree about the tensor 'block.0.weight'"),
        ([1], "stands: Expected `object`, got `array`; restore it"),
    ],
)
def test_a_damaged_record_of_what_stands_there_is_refused(stands: object, why: str, tmp_path: Path) -> None:
    model = ZOO["conv_residual"].build()
    args, _ = ZOO["conv_residual"].example()
    axes = with_branches(model, trace(model, *args))
    apply(model, axes, Plan.dropping(axes, ["block"]))
    path = save(model, tmp_path / "model") / "shapes.json"
    record = json.loads(path.read_text())
    record["stands"] = stands
    path.write_text(json.dumps(record | {"sha256": content_digest(record)}))
    with pytest.raises(StoreError, match=why):
        load(tmp_path / "model", model=ZOO["conv_residual"].build)
