"""Copies of blocks give their input unchanged: inserted, saved, replayed, and taken out again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laws
from regrow import Plan, UndoStore, apply, grow, load, save, trace, verify
from regrow.allocation.widening import plan_insertions
from regrow.core.amounts import Increase
from regrow.core.axes import AxisGraph
from regrow.core.plan import PlanError
from regrow.store import StoreError
from regrow.store.ledger import read_plan, replay
from regrow.store.shapes import content_digest
from regrow.surgery.insert import make_rename
from regrow.tracing.stacks import find_stacks


class Residual(nn.Module):
    """A residual block of convolutions that ends in a rectifier, or in something else."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.two, self.last_norm = nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        return self.last(x + self.last_norm(self.two(self.norm(self.one(x)).relu())))


def convolutional(last: Callable[[], nn.Module] = nn.ReLU) -> tuple[nn.Module, Tensor]:
    """A residual network with three blocks, whose statistics and weights matter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Sequential(*(Residual(last()) for _ in range(3))))
    net.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    assert tensor is not None
                    tensor.normal_(1, 0.3)
    return net.eval(), torch.randn(2, 3, 5, 5)


def language(**more: Any) -> tuple[nn.Module, Tensor]:
    """A small decoder with a layer type for each layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=3, **sizes, **more))
    return net.eval(), torch.randint(32, (2, 6))


NETS = {"convolutional": convolutional, "language": language}


def logits(net: nn.Module, x: Tensor) -> Tensor:
    """The network's output, without a cache."""
    result = net(x) if isinstance(net, nn.Sequential) else net(x, use_cache=False).logits
    assert isinstance(result, Tensor)
    return result


def planned(net: nn.Module, axes: AxisGraph, many: int = 2) -> Plan:
    """A plan that inserts blocks, as it comes back from a file."""
    plan = Plan(insert=plan_insertions(find_stacks(net, axes), {"*": Increase(many)}))
    return read_plan(json.loads(plan.to_json()))


@pytest.mark.parametrize("name", NETS)
def test_inserted_blocks_change_no_output_and_learn(name: str) -> None:
    net, x = NETS[name]()
    before = logits(net, x)
    trained = logits(net.train(), x) if name == "language" else None
    axes = trace(net.eval(), x)
    plan = planned(net, axes)
    assert verify(net, axes, plan).max_abs_diff == 0
    old = {id(one) for one in net.parameters()}
    net, axes = apply(net, axes, plan)
    assert torch.equal(logits(net, x), before)
    if trained is not None:
        assert torch.equal(logits(net.train(), x), trained)
    new = [one for one in net.parameters() if id(one) not in old]
    logits(net.train(), x).square().sum().backward()
    assert new and any(bool(one.grad.any()) for one in new if one.grad is not None and not bool(one.any()))
    assert axes.sizes() == trace(net.eval(), x).sizes()


@pytest.mark.parametrize("name", NETS)
def test_insertions_are_saved_replayed_and_undone(name: str, tmp_path: Path) -> None:
    net, x = NETS[name]()
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    axes, undo = trace(net, x), UndoStore()
    cut = next(axis for axis in axes.units() if axis.key.count("2.") and axis.size > 2)
    first = Plan.keeping(axes, {cut.key: range(2)})
    net, axes = apply(net, axes, first, undo=undo)
    plan = planned(net, axes)
    net, axes = apply(net, axes, plan, undo=undo)
    save(net, tmp_path / "saved", example=x)
    built = (lambda: NETS[name]()[0]) if name == "convolutional" else None
    again = load(tmp_path / "saved", model=built)
    assert torch.equal(logits(again, x), logits(net, x)) and again.state_dict().keys() == net.state_dict().keys()
    fresh, _ = NETS[name]()
    fresh, found = replay(fresh, trace(fresh, x), [first, plan])
    assert found.sizes() == axes.sizes()
    assert {axis.key: axis.ids for axis in found} == {axis.key: axis.ids for axis in axes}
    net, axes = apply(net, axes, Plan.restoring(axes, undo.restorable), undo=undo)
    rename, restored = make_rename(net, plan), net.state_dict()
    assert all(torch.equal(restored[rename(key)], value) for key, value in weights.items())


def test_copies_grow_with_their_blocks() -> None:
    net, x = language()
    before = logits(net, x)
    net, plan = grow(net, mlp=8, blocks=1, example=x)
    assert {layer.mlp.up_proj.out_features for layer in net.model.layers} == {32}
    assert (net.config.num_hidden_layers, len(net.model.layers)) == (4, 4)
    assert [layer.self_attn.layer_idx for layer in net.model.layers] == [0, 1, 2, 3]
    torch.testing.assert_close(logits(net, x), before, rtol=0, atol=0)
    assert plan.insert and plan.changes


def test_blocks_that_are_no_identity_are_refused_and_nothing_changes() -> None:
    net, x = convolutional(nn.Sigmoid)
    axes = trace(net, x)
    assert find_stacks(net, axes) == {}
    good, _ = convolutional()
    plan = planned(good, trace(good, x))
    keys = list(net.state_dict())
    with pytest.raises(PlanError, match="changes its input"):
        apply(net, axes, plan)
    assert list(net.state_dict()) == keys and len(net[2]) == 3
    good, _ = convolutional()
    optimizer = torch.optim.SGD(good.parameters(), 0.1)
    with pytest.raises(PlanError, match="no optimizer can follow"):
        apply(good, trace(good, x), plan, optimizers=[optimizer])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"positions": [0]}, r"within 1\.\."),
        ({"positions": [2, 2]}, "ascending"),
        ({"positions": [9]}, r"within 1\.\."),
        ({"of": [7]}, "no block 7 to copy"),
        ({"size": 4}, "has 3 modules here, not 4"),
        ({"zeros": [["nothing.weight"]]}, "no parameter 'nothing.weight'"),
        ({"zeros": [[""]]}, "has no name"),
        ({"zeros": [[]]}, "changes its input"),
        ({"path": "9"}, "no nn.Sequential or nn.ModuleList '9'"),
        ({"size": 10**9}, "are inserted into as many|Expected"),
    ],
)
def test_hostile_insertions_are_refused(changes: dict[str, Any], line: str) -> None:
    net, x = convolutional()
    axes = trace(net, x)
    plan = json.loads(planned(net, axes, 1).to_json())
    ((path, insertion),) = plan["insert"].items()
    copy = insertion["copies"][0]
    positions = changes.get("positions", [copy["position"]])
    copies = [
        {
            "position": position,
            "of": changes.get("of", [copy["of"]])[0],
            "zeros": changes.get("zeros", [copy["zeros"]])[0],
        }
        for position in positions
    ]
    plan["insert"] = {changes.get("path", path): {"size": changes.get("size", insertion["size"]), "copies": copies}}
    keys = list(net.state_dict())
    with pytest.raises((PlanError, StoreError), match=line):
        apply(net, axes, read_plan(plan))
    assert list(net.state_dict()) == keys


def test_a_plan_inserts_or_cuts() -> None:
    net, x = convolutional()
    axes = trace(net, x)
    plan = planned(net, axes)
    key = axes.units()[0].key
    with pytest.raises(PlanError, match="one plan inserts blocks, or cuts"):
        Plan(Plan.keeping(axes, {key: range(2)}).changes, insert=plan.insert)


def test_hostile_records_of_insertions_are_refused(tmp_path: Path) -> None:
    net, x = convolutional()
    axes = trace(net, x)
    net, axes = apply(net, axes, planned(net, axes, 1))
    save(net, tmp_path / "saved", example=x)
    path = tmp_path / "saved" / "shapes.json"
    record = json.loads(path.read_text())
    ((place, (insertion,)),) = record["inserted"].items()
    for change, line in (
        ({place: [insertion | {"copies": [insertion["copies"][0] | {"position": 0, "of": 1}]}]}, "within 1"),
        ({place: [insertion | {"size": 9}]}, "has 3 modules here, not 9"),
        ({"nothing": [insertion]}, "no nn.Sequential or nn.ModuleList 'nothing'"),
        ({place: [insertion] * 4000}, "inserted: 4000 blocks, but only"),
        ({}, "no place for the tensor"),
    ):
        changed = record | {"inserted": change}
        path.write_text(json.dumps(changed | {"sha256": content_digest(changed)}))
        with pytest.raises(StoreError, match=line):
            load(tmp_path / "saved", model=lambda: convolutional()[0])


class Averaging(nn.Module):
    """Blocks whose outputs are averaged: a further block changes the mean although it gives its input unchanged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Residual(nn.Identity()) for _ in range(3)))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        states = [x := block(x) for block in self.blocks]
        return self.head((sum(states) / len(states)).mean((2, 3)))


def test_blocks_are_refused_where_the_network_does_more_than_run_them_in_turn() -> None:
    net, x = Averaging().eval(), torch.randn(2, 6, 5, 5)
    axes = trace(net, x)
    with laws.untouched(net), pytest.raises(PlanError, match="does more with its blocks"):
        apply(net, axes, planned(net, axes))
