"""A search space that does not fit into memory is refused by its description, before it is built."""

import pytest

from regrow.core import limits
from regrow.core.candidates import Candidates
from regrow.core.errors import ResourceError
from regrow.nets import bench201, cells, mobile
from regrow.nets.loaded import ModelError
from regrow.nets.staged import OPERATION_BYTES, check_space_fits

SPACES = {
    "cells": (cells.Cells, cells.supernet((3, 8, 8), 4, width=6, cells=3, nodes=2)),
    "mobile": (mobile.Mobile, mobile.supernet((3, 32, 32), 4, width=8, blocks=2)),
    "bench201": (bench201.Bench201, bench201.supernet((3, 8, 8), 4, width=6, cells=2)),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_weights_of_all_operations_are_counted(name, monkeypatch):
    kind, config = SPACES[name]
    built = [op for part in kind(config).modules() if isinstance(part, Candidates) for op in part.ops.values()]
    weights = sum(one.numel() for op in built for one in op.parameters() if one.dim() > 1)
    needed = 12 * weights + OPERATION_BYTES * len(built)
    monkeypatch.setattr(limits, "available_memory", lambda: needed)
    check_space_fits(config, "a search")
    monkeypatch.setattr(limits, "available_memory", lambda: needed - 1)
    with pytest.raises(ResourceError, match=r"a search needs [\d.]+ MiB of memory, and .*take a smaller"):
        check_space_fits(config, "a search")


@pytest.mark.parametrize(("many", "nodes"), [(99, 99), (64, 17), (65, 1), (0, 3)])
def test_too_many_cells_are_refused_before_they_are_described(many, nodes):
    with pytest.raises(ModelError, match=f"1 to 64 cells of 1 to 16 nodes, got {many} and {nodes}; write it as"):
        cells.supernet((3, 8, 8), 4, cells=many, nodes=nodes)
