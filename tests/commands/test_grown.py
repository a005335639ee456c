"""Networks that were cut, grew and got units back: saved, loaded in a fresh process, and replayed from the ledger."""

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import laws
from regrow import Fill, Plan, UndoStore, apply, trace
from regrow.axes import AxisGraph
from regrow.commands import RunFolder, StoreError, replay, save
from regrow.nets import Origin
from regrow.nets.language import origin_of
from zoo import ZOO

TESTS = Path(__file__).parents[1]
NETS: dict[str, Callable[[nn.Module], Origin | None]] = {
    "conv_residual": lambda _: None,
    "llama_tied": lambda model: origin_of(model, "llama_tied"),
}


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
    folder.keep(undo)
    return model, axes, undo


def said(model: nn.Module, name: str) -> list[Tensor]:
    args, kwargs = ZOO[name].example()
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def a_fresh_process_says_the_same(model: nn.Module, name: str, folder: Path, tmp_path: Path) -> None:
    """A saved network, loaded by another process, answers bit for bit what this one does."""
    loading = "load(sys.argv[1])" if NETS[name](model) else f"load(sys.argv[1], model=ZOO[{name!r}].build)"
    code = (
        "import sys, pathlib, torch; from safetensors.torch import save_file; from zoo import ZOO\n"
        "from regrow import load; from commands.test_grown import said\n"
        f"torch.manual_seed(99); model = {loading}\n"
        f"save_file({{str(i): x.contiguous() for i, x in enumerate(said(model, {name!r}))}}, sys.argv[2])"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    out = tmp_path / "said.safetensors"
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), str(out)]
    subprocess.run(command, env=environment, check=True, timeout=240)
    answers = said(model, name)
    assert len(load_file(out)) == len(answers) > 0
    assert all(torch.equal(load_file(out)[str(i)], answer) for i, answer in enumerate(answers))


@pytest.mark.parametrize("name", NETS)
def test_a_fresh_process_says_the_same_and_the_ledger_gives_the_same_shapes(name: str, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", verb="grow", settings={"model": name})
    model, axes, undo = changed(name, folder)
    save(model, folder.path, origin=NETS[name](model))
    a_fresh_process_says_the_same(model, name, folder.path, tmp_path)
    fresh = ZOO[name].build()
    args, kwargs = ZOO[name].example()
    plans = folder.ledger.plans()
    assert len(plans) == 4 and any(change.recalled for change in plans[-1].changes.values())
    again, left = replay(fresh, trace(fresh, *args, **kwargs), plans)
    laws.same_network(again, model)
    laws.same_axes(left, axes)
    whole = [
        apply(deepcopy(model), axes, Plan.restoring(axes, rest.restorable), undo=rest)[0]
        for rest in (undo, folder.undo_store())
    ]
    laws.same_network(*whole)


def test_an_undo_store_on_the_disk_is_whole_or_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", verb="grow", settings={})
    assert folder.undo_store() == UndoStore()
    changed("conv_residual", folder)
    again = folder.undo_store()
    path = folder.path / "attic.safetensors"
    assert again.restorable and not [p for p in folder.path.iterdir() if "partial" in p.name]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"recorded SHA-256.*restore the file"):
        folder.undo_store()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="restore the file"):
        folder.undo_store()
