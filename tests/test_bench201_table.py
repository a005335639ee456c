"""The recipe that looks topologies up: their order of edges, nothing but records unpickled, ranks among peers."""

import importlib.util
import io
import os
import pickle
import sys
import types
from pathlib import Path

import pytest

from regrow import store
from regrow.nets.bench201 import Bench201, architecture_string, count_cost, read, supernet, topologies
from regrow.nets.loaded import Origin

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
    every = [ops for ops in topologies() if {*ops} <= {"nor_conv_3x3", "skip_connect"}]
    accuracy = {
        architecture_string(ops): 80.0 + ops.count("nor_conv_3x3") + ops.index("nor_conv_3x3") / 10 for ops in every[1:]
    }
    accuracy |= {architecture_string(["skip_connect"] * 6): 50.0}
    table = recipe.Table(accuracy)
    one = [ops for ops in every if ops.count("nor_conv_3x3") == 1]
    best = architecture_string(max(one, key=lambda ops: accuracy[architecture_string(ops)]))
    told = table.look(best, 3)
    assert told["peers"] == 1 + 6 and told["convolutions 3 x 3 that fit"] == 1
    assert told["percentile"] == pytest.approx(100 * 6.5 / 7, abs=0.01)
    assert told["rank"] == 1 + sum(value > accuracy[best] for value in accuracy.values())
    assert told["params"] == count_cost(read(best))["params"]
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
