"""The recipe that looks topologies up: their order of edges, nothing but records unpickled, ranks among peers."""

import importlib.util
import io
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from regrow import store
from regrow.core.candidates import Candidates
from regrow.nets.bench201 import Bench201, supernet
from regrow.nets.loaded import Origin

MIXED = ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3", "none", "nor_conv_3x3")
PATH = Path(__file__).parents[1] / "recipes" / "bench201_table.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("bench201_table", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench201_table"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench201_table"]


def pickled(value):
    return io.BytesIO(pickle.dumps(value))


def test_their_records_are_read_in_our_order_of_edges(recipe, monkeypatch):
    theirs = types.ModuleType("analognasbench.data")

    class Architecture:
        def __init__(self, accuracy):
            self.baseline_accuracy = accuracy

    Architecture.__module__, Architecture.__qualname__ = "analognasbench.data", "Architecture"
    theirs.Architecture = Architecture
    monkeypatch.setitem(sys.modules, "analognasbench", types.ModuleType("analognasbench"))
    monkeypatch.setitem(sys.modules, "analognasbench.data", theirs)
    file = pickled({(0, 1, 2, 3, 4, 0): Architecture(90.5)})
    # 0-1 skip, 0-2 none, 0-3 conv 3 x 3, 1-2 conv 1 x 1, 1-3 pool, 2-3 skip
    want = "|skip_connect~0|+|none~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|skip_connect~2|"
    assert recipe.converted(file) == {want: 90.5}


@pytest.mark.parametrize("value", [os.system, {"a": Path("x")}])
def test_a_pickle_of_anything_else_is_refused(recipe, value):
    with pytest.raises(pickle.UnpicklingError, match="no place"):
        recipe.converted(pickled(value))


def test_a_topology_is_ranked_among_those_of_at_most_its_size(recipe):
    every = [ops for ops in recipe.topologies() if {*ops} <= {"nor_conv_3x3", "skip_connect"}]
    accuracy = {
        recipe.architecture_string(ops): 80.0 + ops.count("nor_conv_3x3") + ops.index("nor_conv_3x3") / 10
        for ops in every[1:]
    }
    accuracy |= {recipe.architecture_string(["skip_connect"] * 6): 50.0}
    table = recipe.Table(accuracy)
    one = [ops for ops in every if ops.count("nor_conv_3x3") == 1]
    best = recipe.architecture_string(max(one, key=lambda ops: accuracy[recipe.architecture_string(ops)]))
    told = table.look(best, 3)
    assert told["peers"] == 1 + 6 and told["convolutions 3 x 3 that fit"] == 1
    assert told["percentile"] == pytest.approx(100 * 6.5 / 7, abs=0.01)
    assert told["rank"] == 1 + sum(value > accuracy[best] for value in accuracy.values())
    assert told["params"] == recipe.count_cost(recipe.read(best))["params"]
    assert told["as many and skips, mean"] == pytest.approx(81.25) == told["as many of them, mean"]


def test_the_best_of_some_draws_is_what_drawing_gives(recipe):
    values = [1.0, 2.0, 5.0, 9.0]
    pairs = [max(a, b) for a in values for b in values]
    assert recipe.best_of(values, 2) == pytest.approx(sum(pairs) / len(pairs))


def test_the_topology_of_a_folder_is_read(recipe, tmp_path):
    config = supernet((1, 8, 8), 10, width=4, cells=1)
    alone = config | {"edges": [["none"], ["skip_connect"], ["nor_conv_1x1"], ["none"], ["none"], ["avg_pool_3x3"]]}
    for name, one in (("alone", alone), ("whole", config)):
        store.save(Bench201(one), tmp_path / name, origin=Origin("bench201", "bench201", one))
    text = "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|none~0|none~1|avg_pool_3x3~2|"
    assert recipe.topology(str(tmp_path / "alone")) == text
    with pytest.raises(ValueError, match="no single topology"):
        recipe.topology(str(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("edges", "params", "macs"),
    [
        (["nor_conv_3x3"] * 6, 1_531_546, 220_119_680),  # as published: 1.531546 M and 220.12 M
        (["skip_connect"] * 6, 73_306, 7_783_040),  # 0.073306 M and 7.78 M
    ],
)
def test_sizes_are_the_published_ones(recipe, edges, params, macs):
    assert recipe.count_cost(edges) == {"params": params, "macs": macs}


@pytest.mark.parametrize("edges", [MIXED, MIXED[::-1]])
def test_counted_is_what_the_network_has(recipe, edges):
    net = Bench201(supernet((3, 32, 32), 10, width=6, cells=2) | {"edges": [[name] for name in edges]})
    scales = sum(one.scale.numel() for one in net.modules() if isinstance(one, Candidates))
    told = recipe.count_cost(edges, width=6, cells=2)
    assert sum(p.numel() for p in net.parameters()) - scales == told["params"]
    done = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, _, out: done.append(m.weight.numel() * (out[0, 0].numel() if out.dim() == 4 else 1))
            )
    net(torch.randn(1, 3, 32, 32))
    assert sum(done) == told["macs"]


def test_the_notation_names_each_topology_once(recipe):
    every = recipe.topologies()
    assert len({*map(recipe.architecture_string, every)}) == 15_625 and all(
        recipe.read(recipe.architecture_string(one)) == one for one in every[::97]
    )
    text = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|nor_conv_1x1~0|avg_pool_3x3~1|none~2|"
    assert recipe.read(text) == ("nor_conv_3x3", "none", "skip_connect", "nor_conv_1x1", "avg_pool_3x3", "none")
    for bad in ("", text[:-1], text.replace("~2", "~1"), text.replace("none~0", "exec~0"), text * 9):
        with pytest.raises(ValueError, match="not a topology"):
            recipe.read(bad)
