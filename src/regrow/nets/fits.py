"""Check that a network fits into memory before its weights are allocated."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from regrow.core.limits import check_memory

COPIES = 3
"""How many numbers a search holds per weight: the weight, its gradient and its momentum."""
OPERATION_BYTES = 15_000
"""Bytes of the Python modules of one operation, without weights (measured on networks of 784 to 19,712 operations)."""


def check_fits(make: Callable[[], nn.Module], what: str) -> None:
    """Raise ResourceError unless a network's weights fit into memory; builds it without allocating them.

    Args:
        make: Function that builds the network.
        what: The name of the network, for messages.

    Raises:
        ResourceError: If there is not enough memory; says how much is needed and how much there is.
    """
    with torch.device("meta"):
        net = make()
    tensors = {id(one): one for one in (*net.parameters(), *net.buffers())}.values()
    needed = sum(one.numel() * one.element_size() for one in tensors)
    check_memory(needed, what, "take a smaller network")


def check_space_fits(config: Mapping[str, object], what: str) -> None:
    """Raise ResourceError unless the super-network of a search space fits into memory, by its configuration.

    Only the weights of the operations and the modules that hold them are counted, which is less than the search will
    need.

    Args:
        config: What ``supernet`` of ``cells``, ``mobile`` or ``bench201`` returns.
        what: The name of the network, for messages.

    Raises:
        ResourceError: If there is not enough memory; says how much is needed and how much there is.
    """
    sizes = _of_blocks if "blocks" in config else _of_edges if "edges" in config else _of_cells
    needed = sum(4 * COPIES * size + OPERATION_BYTES for size in sizes(config))
    check_memory(needed, what, "take a smaller width, or fewer cells, nodes or blocks")


def _of_cells(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the number of weights of each operation, as ``cell_operations.operation`` builds it."""
    for cell in config["cells"]:
        widths = [*cell["inputs"], *(node["width"] for node in cell["nodes"])]
        for node in cell["nodes"]:
            for name, source, mid in node["ops"]:
                before, after = widths[source], node["width"]
                match name[:3]:
                    case "sep":
                        yield int(name[3]) ** 2 * (before + mid) + mid * (before + after)
                    case "dil":
                        yield int(name[3]) ** 2 * before + before * after
                    case _:
                        yield before * after if name == "skip" and cell["reduce"] and source < 2 else 0


def _of_blocks(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the number of weights of each operation, as ``mobile.block`` builds it."""
    before = config["stem"][-1]
    for block in config["blocks"]:
        for name, mid in block["ops"]:
            yield 0 if name == "skip" else mid * (before + block["width"] + int(name[2]) ** 2)
        before = block["width"]


def _of_edges(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the number of weights of each operation, as ``bench201.operation`` builds it."""
    for stage in range(3):
        for names in config["cells"] * config["edges"]:
            for name in names:
                convolved = name.startswith("nor_conv")
                yield (config["width"] << stage) ** 2 * int(name[-1]) ** 2 if convolved else 0
