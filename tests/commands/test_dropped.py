"""Networks without some of their branches: saved, loaded in a fresh process without tracing, and replayed."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import laws
from commands.test_grown import NETS, a_fresh_process_says_the_same, said
from regrow import Plan, UndoStore, apply, load, trace, with_branches
from regrow.axes import AxisGraph
from regrow.commands import RunFolder, StoreError, replay, save
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


@pytest.mark.parametrize("name", NETS)
def test_a_fresh_process_says_the_same_and_the_ledger_gives_the_same_shapes(name: str, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", verb="drop", settings={"model": name})
    model, axes = changed(name, folder)
    save(model, folder.path, origin=NETS[name](model))
    a_fresh_process_says_the_same(model, name, folder.path, tmp_path)
    answers = said(model, name)
    fresh = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    again, left = replay(fresh, trace(fresh, *args, **kwargs), folder.ledger.plans())
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in laws.tensors(model).items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in laws.tensors(again).items()} == shapes
    laws.same_axes(left, axes)
    assert not any("mlp" in key and "layers.0" in key for key in shapes), "what is dropped is not stored"
    if NETS[name](model):
        save(load(folder.path), tmp_path / "again")
        once_more = said(load(tmp_path / "again"), name)
        assert all(torch.equal(one, answer) for one, answer in zip(once_more, answers, strict=True))


@pytest.mark.parametrize(
    ("stands", "why"),
    [
        ({"block": {"gives": "all", "takes": 0}}, "stands.* is .*; restore it"),
        ({"block": {"gives": "zero", "takes": 0}, "block.0": {"gives": "zero", "takes": 0}}, "no module 'block.0'"),
        ({"blick": {"gives": "zero", "takes": 0}}, "no module 'blick' to drop"),
        ({"": {"gives": "zero", "takes": 0}}, "no module '' to drop"),
        ({}, "that is not stored"),
        ([1], "stands.* is .*; restore it"),
    ],
)
def test_a_damaged_record_of_what_stands_there_is_refused(stands: object, why: str, tmp_path: Path) -> None:
    model = ZOO["conv_residual"].build()
    args, _ = ZOO["conv_residual"].example()
    axes = with_branches(model, trace(model, *args))
    apply(model, axes, Plan.dropping(axes, ["block"]))
    path = save(model, tmp_path / "model") / "shapes.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    path.write_text(json.dumps(record | {"stands": stands}))
    with pytest.raises(StoreError, match=why):
        load(tmp_path / "model", model=ZOO["conv_residual"].build)
