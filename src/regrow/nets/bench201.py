"""The networks of NAS-Bench-201: a cell of four nodes, repeated; the super-network or a single topology.

Dong and Yang (arXiv 2001.00326): a stem, three stages of cells with the width doubled and height and width halved
between them by a residual block, and a linear classifier. All cells have the same topology: one of five operations on
each of six edges.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.candidates import Candidates
from regrow.nets.loaded import ModelError
from regrow.nets.staged import MOST, check_sizes, explain_description

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""The operations, by their names in NAS-Bench-201."""

EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""The edges as (from node, to node), in the order of NAS-Bench-201's notation."""


class Nothing(nn.Module):
    """The operation ``none``: returns zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros in the shape of the input."""
        return torch.zeros_like(x)


class ReluConvNorm(nn.Sequential):
    """relu → convolution → BatchNorm."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1) -> None:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        super().__init__(nn.ReLU(), conv, nn.BatchNorm2d(after))


def operation(name: str, width: int) -> nn.Module:
    """Build one of ``OPERATIONS``, from ``width`` channels to ``width`` channels."""
    match name:
        case "none":
            return Nothing()
        case "skip_connect":
            return nn.Identity()
        case "avg_pool_3x3":
            return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return ReluConvNorm(width, width, int(name[-1]))


class Bench201Cell(nn.Module):
    """A cell of four nodes: each sums the operations on its edges from earlier nodes; the last is the output.

    Args:
        width: Channels of every node.
        edges: The operations on each of ``EDGES``. A search decides the same edge of all cells together, and keeps one
            operation.
    """

    def __init__(self, width: int, edges: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.edges = nn.ModuleDict(
            {
                f"{a}{b}": Candidates({name: operation(name, width) for name in ops}, tied=f"{a}{b}", single=True)
                for (a, b), ops in zip(EDGES, edges, strict=True)
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` → the same shape."""
        values = [x]
        for node in range(1, 4):
            total: Tensor = self.edges[f"0{node}"](x)
            for a in range(1, node):
                total = total + self.edges[f"{a}{node}"](values[a])
            values.append(total)
        return values[-1]


class Reduction(nn.Module):
    """A residual block that doubles the channels and halves height and width."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ReluConvNorm(before, after, 3, 2), ReluConvNorm(after, after, 3))
        # Rounded up as the strided convolution does, where the picture is odd.
        self.short = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(before, after, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` → ``[N, 2 C, H / 2, W / 2]``."""
        result: Tensor = self.short(x) + self.body(x)
        return result


class Bench201(nn.Module):
    """A network with the macro-structure of NAS-Bench-201.

    Args:
        config: ``shape`` of an input ``[C, H, W]``, ``classes``, ``width`` of the first stage, ``cells`` per stage,
            ``stride`` of the stem, and ``edges``: the operations on each of ``EDGES``.

    Raises:
        ModelError: If the configuration is invalid.
    """

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        self.config = plan = check_description(config)
        width, parts = plan["width"], list[nn.Module]()
        self.stem = nn.Sequential(
            nn.Conv2d(plan["shape"][0], width, 3, plan["stride"], 1, bias=False), nn.BatchNorm2d(width)
        )
        for stage in range(3):
            if stage:
                parts.append(Reduction(width, 2 * width))
                width *= 2
            parts += [Bench201Cell(width, plan["edges"]) for _ in range(plan["cells"])]
        self.parts = nn.Sequential(*parts)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, plan["classes"])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``[N, classes]``."""
        x = F.relu(self.norm(self.parts(self.stem(x))))
        result: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return result


def supernet(shape: Sequence[int], classes: int, *, width: int = 16, cells: int = 5, stride: int = 1) -> dict[str, Any]:
    """Return the configuration of the super-network: every operation on every edge; defaults as in the paper.

    Args:
        shape: The shape of an input, ``[C, H, W]``.
        classes: The number of logits.
        width: Channels of the first stage.
        cells: Cells per stage.
        stride: The stride of the stem.
    """
    edges = [[*OPERATIONS] for _ in EDGES]
    return {"shape": [*shape], "classes": classes, "width": width, "cells": cells, "stride": stride, "edges": edges}


def describe(config: Mapping[str, object], gone: Container[str]) -> dict[str, Any]:
    """Return the configuration of the network that a search left.

    Args:
        config: The configuration that the network was built from.
        gone: Paths of the operations that were dropped, the same in all cells.
    """
    whole = check_description(config)
    edges = [
        [name for name in ops if f"parts.0.edges.{a}{b}.ops.{name}" not in gone]
        for (a, b), ops in zip(EDGES, whole["edges"], strict=True)
    ]
    return {**whole, "edges": edges}


def check_description(config: Mapping[str, object]) -> dict[str, Any]:
    """Return a configuration of :class:`Bench201`, or raise ModelError if it is invalid; builds nothing."""
    data: Any = config
    with explain_description("NAS-Bench-201"):
        shape, edges = data["shape"], data["edges"]
        sizes = [*shape, data["classes"], data["width"], data["cells"], data["stride"]]
        right = len(shape) == 3 and len(edges) == len(EDGES)
        right = right and all(type(ops) is list and 0 < len(ops) == len({*ops}) for ops in edges)
        right = right and all(name in OPERATIONS for ops in edges for name in ops)
    check_sizes("NAS-Bench-201", sizes)
    if data["cells"] > 64 or data["width"] > MOST // 4:
        raise ModelError(f"at most 64 cells per stage and {MOST // 4} channels; got {data['cells']}-{data['width']}")
    if not right:
        raise ModelError(f"each of its {len(EDGES)} edges has one or more of {', '.join(OPERATIONS)}, each once")
    return data
