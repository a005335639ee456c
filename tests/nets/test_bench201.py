"""NAS-Bench-201's networks: published sizes, notation, one topology for all cells, descriptions that are none."""

import copy

import pytest
import torch
from torch import nn

from regrow.core.candidates import Candidates, candidates_in, tied_in
from regrow.nets.bench201 import (
    EDGES,
    OPERATIONS,
    Bench201,
    check_description,
    supernet,
)
from regrow.nets.load import build
from regrow.nets.loaded import ModelError, Origin
from regrow.surgery.gate import parametrize
from zoo import randomise

MIXED = ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3", "none", "nor_conv_3x3")


def single(edges, **sizes):
    return supernet((3, 32, 32), 10, **sizes) | {"edges": [[name] for name in edges]}


def test_a_topology_alone_answers_as_in_the_super_network():
    config = supernet((3, 8, 8), 4, width=4, cells=2)
    net, x = randomise(Bench201(config)).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    alone = Bench201(config | {"edges": [[name] for name in MIXED]}).double().eval()
    state = {name: value for name, value in net.state_dict().items() if name in alone.state_dict()}
    scales = {}
    for path in candidates_in(net):
        at = OPERATIONS.index(MIXED[EDGES.index((int(path[-2]), int(path[-1])))])
        own = net.get_parameter(f"{path}.scale").detach()
        state[f"{path}.scale"] = own[at : at + 1]
        scales[f"{path}.scale"] = own * nn.functional.one_hot(torch.tensor(at), 5)
    alone.load_state_dict(state)
    with torch.no_grad(), parametrize(net, scales):
        masked = net(x)
    torch.testing.assert_close(alone(x), masked, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(masked, net(x))


def test_edges_that_reach_no_output_do_not_matter():
    """In our order of edges: with nothing from 1 and 2 to 3, only 0-3 is left."""
    x = torch.randn(2, 3, 8, 8)
    base = ["nor_conv_3x3", "skip_connect", "avg_pool_3x3", "skip_connect", "none", "none"]
    net = Bench201(supernet((3, 8, 8), 4, width=4, cells=1) | {"edges": [[name] for name in base]}).eval()
    before = net(x)
    for edge, matters in (("01", False), ("02", False), ("12", False), ("03", True)):
        other = copy.deepcopy(net)
        for path, module in other.named_modules():
            if path.endswith(f"edges.{edge}"):
                nn.init.constant_(module.scale, -3.0)
        assert torch.equal(other(x), before) is not matters


def test_every_cell_decides_with_the_first():
    net = Bench201(supernet((3, 8, 8), 4, width=4, cells=2))
    tied = tied_in(net)
    assert len(tied) == 5 * 30 and {to.partition(".edges")[0] for to in tied.values()} == {"parts.0"}
    assert all(path.partition(".edges")[2] == to.partition(".edges")[2] for path, to in tied.items())
    odd = nn.Sequential(*(Candidates({name: nn.Identity()}, tied="one") for name in "ab"))
    with pytest.raises(ValueError, match="tied by 'one'"):
        tied_in(odd)


def test_odd_pictures_and_no_path_at_all():
    net = Bench201(single(["none"] * 6, width=4, cells=1, stride=2)).eval()
    assert net(torch.randn(2, 3, 28, 28)).shape == (2, 10)  # 14, 7, 4
    assert torch.equal(net(torch.randn(1, 3, 9, 9)), net(torch.randn(1, 3, 9, 9)))


def test_it_is_built_again_from_its_origin():
    config = single(MIXED, width=4, cells=1)
    again = build(Origin.from_json(Origin("bench201", "bench201", config).to_json()))
    assert again.state_dict().keys() == Bench201(config).state_dict().keys()


GOOD = supernet((3, 8, 8), 4, width=4, cells=1)


@pytest.mark.parametrize(
    "config",
    [
        GOOD | {"width": 10**9},
        GOOD | {"width": 5000},
        GOOD | {"cells": 65},
        GOOD | {"cells": True},
        GOOD | {"classes": "ten"},
        GOOD | {"stride": 0},
        GOOD | {"shape": [3, 8]},
        GOOD | {"edges": GOOD["edges"][:5]},
        GOOD | {"edges": [[]] * 6},
        GOOD | {"edges": [["exec"]] * 6},
        GOOD | {"edges": [["none", "none"]] * 6},
        GOOD | {"edges": ["none"] * 6},
        GOOD | {"edges": [[["none"]]] * 6},
        {"shape": [3, 8, 8]},
    ],
)
def test_what_is_no_description_is_refused(config):
    with pytest.raises(ModelError):
        check_description(config)
    with pytest.raises(ModelError):
        build(Origin("bench201", "bench201", config))
