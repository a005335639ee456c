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
from regrow.nets.staged import MAX_SIZE, build_stem, check_sizes, explain_description

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")  # as NAS-Bench-201 calls them
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # (from node, to node), in the order of its notation


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
    """A cell of four nodes: each sums the operations on its edges from earlier nodes; the last is the output."""

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
        return self.short(x) + self.body(x)


class Bench201(nn.Module):
    """A network with the macro-structure of NAS-Bench-201.

    ``config`` holds ``shape`` of an input ``[C, H, W]``, ``classes``, ``width`` of the first stage, ``cells`` per
    stage, ``stride`` of the stem, and ``edges``: the operations on each of ``EDGES``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        check_description(config)
        self.config = config
        width = config["width"]
        self.stem, self.parts = build_stem(config, width), nn.Sequential()
        for stage in range(3):
            if stage:
                self.parts.append(Reduction(width, 2 * width))
                width *= 2
            self.parts.extend(Bench201Cell(width, config["edges"]) for _ in range(config["cells"]))
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, config["classes"])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``[N, classes]``."""
        x = F.relu(self.norm(self.parts(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def supernet(shape: Sequence[int], classes: int, *, width: int = 16, cells: int = 5, stride: int = 1) -> dict[str, Any]:
    """Return the configuration of the super-network: every operation on every edge; defaults as in the paper."""
    edges = [[*OPERATIONS] for _ in EDGES]
    return {"shape": [*shape], "classes": classes, "width": width, "cells": cells, "stride": stride, "edges": edges}


def describe(config: Mapping[str, Any], gone: Container[str]) -> dict[str, Any]:
    """Return the configuration of the network that a search left, without the operations at the paths ``gone``."""
    check_description(config)
    edges = [
        [name for name in ops if f"parts.0.edges.{a}{b}.ops.{name}" not in gone]
        for (a, b), ops in zip(EDGES, config["edges"], strict=True)
    ]
    return {**config, "edges": edges}


def check_description(config: Mapping[str, Any]) -> None:
    """Raise ModelError unless a configuration of :class:`Bench201` is valid; builds nothing."""
    with explain_description("NAS-Bench-201"):
        shape, edges, cells, width = (config[key] for key in ("shape", "edges", "cells", "width"))
        check_sizes("NAS-Bench-201", [*shape, config["classes"], width, cells, config["stride"]])
        if cells > 64 or width > MAX_SIZE // 4:
            raise ModelError(f"at most 64 cells per stage and {MAX_SIZE // 4} channels; got {cells}-{width}")
        choices = all(type(ops) is list and 0 < len(ops) == len({*ops} & {*OPERATIONS}) for ops in edges)
        if len(shape) != 3 or len(edges) != len(EDGES) or not choices:
            raise ModelError(f"each of its {len(EDGES)} edges has one or more of {', '.join(OPERATIONS)}, each once")
