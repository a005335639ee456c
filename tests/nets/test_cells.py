"""Networks of cells: the whole space, what is left of it, and descriptions that are none."""

import copy
import json

import pytest
import torch
from torch import nn

from regrow.core.candidates import Candidates, fold_scales
from regrow.nets import mobile
from regrow.nets.cells import OPERATIONS, Cells, build_operation, describe_result, supernet_config
from regrow.nets.loaded import ModelError
from regrow.nets.mobile import Mobile


def small(**more):
    return supernet_config((3, 16, 16), 5, width=4, cells=3, nodes=2, heads=(0,), **more)


def test_every_operation_keeps_or_halves_the_picture():
    x = torch.randn(2, 4, 8, 8)
    for name in OPERATIONS:
        assert build_operation(name, 4, 4, 1)(x).shape == (2, 4, 8, 8)
        assert build_operation(name, 4, 4, 2)(x).shape == (2, 4, 4, 4)
        assert build_operation(name, 4, 4, 2)(x[..., :7]).shape == (2, 4, 4, 4)


def test_pictures_of_any_size_are_taken():
    for side in (28, 27):
        net = Cells(supernet_config((1, side, side), 5, width=4, cells=3, nodes=1))
        assert net(torch.randn(2, 1, side, side)).shape == (2, 5)


def test_the_classifier_of_a_stage_is_one_answer_of_the_whole():
    net = Cells(small()).eval()
    x = torch.randn(2, 3, 16, 16)
    first, last = net(x)
    assert torch.equal(net.logits_at(x, 0), first)
    assert torch.equal(net.logits_at(x, 2), last)


def test_a_stage_runs_what_lies_within_it_and_nothing_else():
    net = Cells(small())
    net.logits_at(torch.randn(2, 3, 16, 16), 0).sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == net.uses_parameter(name, 0), name


SPACES = (
    (Cells, small()),
    (Mobile, mobile.supernet_config((3, 32, 32), 5, width=4, blocks=1)),
)


@pytest.mark.parametrize(("kind", "config"), SPACES)
def test_scales_are_folded_into_what_an_operation_ends_in(kind, config):
    net = kind(config).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith(("scale", "running_mean", "running_var")):
                value.copy_(torch.rand_like(value) + 0.5)
    x = torch.randn(2, *config["shape"], dtype=torch.double)
    before = net(x)
    fold_scales(net)
    after = net(x)
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    nodes = [one for one in net.modules() if isinstance(one, Candidates)]
    folded = {name.split("_")[0] for node in nodes for name, s in zip(node.ops, node.scale, strict=True) if s == 1}
    kept = {name.split("_")[0] for node in nodes for name, s in zip(node.ops, node.scale, strict=True) if s != 1}
    assert folded and kept <= {"skip", "avg", "max", "none"}, (folded, kept)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Bent(nn.Conv1d):
    def forward(self, x):
        return super().forward(x).tanh()


def test_a_scale_stays_where_a_layer_does_not_say_all():
    """Held twice, inside a module of one's own, of a kind of one's own, or with a hook: answers come first."""
    both, hooked = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)
    hooked.register_forward_hook(lambda module, given, answer: answer + 1)
    ops = {"a": both, "b": nn.Sequential(nn.ReLU(), both), "c": Residual(nn.Conv1d(1, 1, 1)), "d": Bent(1, 1, 1)}
    mixed = Candidates({**ops, "e": hooked, "f": nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 1))}).double()
    scales = [0.5, 2.0, 0.3, 0.7, 1.4, 0.2]
    with torch.no_grad():
        mixed.scale.copy_(torch.tensor(scales))
    x = torch.randn(2, 1, 5, dtype=torch.double)
    before = mixed(x)
    fold_scales(mixed)
    assert torch.allclose(mixed(x), before, rtol=1e-12)
    assert mixed.scale.tolist() == pytest.approx([*scales[:-1], 1.0])


def test_a_description_builds_what_it_describes():
    config = small()
    net = Cells(config)
    again = Cells(json.loads(json.dumps(describe_result(net, config, ()))))
    left = {name: value.shape for name, value in net.state_dict().items() if not name.startswith("heads.0.")}
    assert {name: value.shape for name, value in again.state_dict().items()} == left


def test_each_input_of_a_cell_and_each_node_needs_an_operation():
    found = Cells(small()).required_groups()
    assert len(found) == 3 * 2 + 3 * 2
    assert ("cells.0.nodes.0.ops.skip_0" in one for one in found)


def changed(path, value):
    config = copy.deepcopy(small())
    *way, last = path
    place = config
    for step in way:
        place = place[step]
    place[last] = value
    return config


@pytest.mark.parametrize(
    "config",
    [
        changed(["stem"], -3),
        changed(["stem"], 10**9),
        changed(["classes"], "ten"),
        changed(["cells"], []),
        changed(["cells", 0, "inputs"], [4]),
        changed(["cells", 0, "nodes", 0, "ops"], []),
        changed(["cells", 0, "nodes", 0, "ops", 0], ["exec", 0, 4]),
        changed(["cells", 0, "nodes", 0, "ops", 0], ["skip", 2, 4]),
        changed(["cells", 0, "nodes", 0, "ops", 0], ["skip", -1, 4]),
        changed(["cells", 0, "nodes", 0, "width"], 5),
        changed(["cells", 1, "reduce"], "yes"),
        changed(["heads"], [7]),
        {"shape": [3, 16, 16]},
    ],
)
def test_what_is_no_description_is_refused(config):
    with pytest.raises(ModelError):
        Cells(config)
