"""A search space that does not fit into memory is refused by its description, before it is built."""

import pytest

from regrow.core import limits
from regrow.core.candidates import Candidates
from regrow.core.errors import ResourceError
from regrow.nets import cells, mobile
from regrow.nets.loaded import ModelError
from regrow.nets.staged import OPERATION_BYTES, check_space_fits

SPACES = {
    "cells": (cells.Cells, cells.supernet_config((3, 8, 8), 4, width=6, cells=3, nodes=2)),
    "mobile": (mobile.Mobile, mobile.supernet_config((3, 32, 32), 4, width=8, blocks=2)),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_weights_of_all_operations_are_counted(name, monkeypatch):
    kind, config = SPACES[name]
    net = kind(config)
    operations = sum(len(part.ops) for part in net.modules() if isinstance(part, Candidates))
    needed = 12 * sum(parameter.numel() for parameter in net.parameters()) + OPERATION_BYTES * operations
    monkeypatch.setattr(limits, "available_memory", lambda: needed)
    check_space_fits(kind, config, "a search")
    for least, built in ((needed - 1, True), (OPERATION_BYTES * operations - 1, False)):
        monkeypatch.setattr(limits, "available_memory", lambda least=least: least)
        with pytest.raises(ResourceError, match=r"a search needs [\d.]+ [KM]iB of memory, and .*take a smaller"):
            check_space_fits(kind if built else None, config, "a search")


@pytest.mark.parametrize(("many", "nodes"), [(99, 99), (64, 17), (65, 1), (0, 3)])
def test_too_many_cells_are_refused_before_they_are_described(many, nodes):
    with pytest.raises(ModelError, match=f"1 to 64 cells of 1 to 16 nodes, got {many} and {nodes}; write it as"):
        cells.supernet_config((3, 8, 8), 4, cells=many, nodes=nodes)
