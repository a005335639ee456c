"""Networks of cells in a DARTS-like search space, built from a configuration: super-network or search result.

A cell reads the outputs of the two cells before it. Each of its nodes sums any number of operations on the inputs and
earlier nodes, and the cell's output concatenates its nodes. Every cell has its own parameters and wiring.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.candidates import Candidates
from regrow.nets import staged
from regrow.nets.loaded import ModelError
from regrow.nets.staged import StagedNetwork, norm_widths

OPERATIONS = ("skip", "sep3", "sep5", "dil3", "dil5", "avg", "max")  # in the order of the genotypes in MGAS's code
MOST_CELLS, MOST_NODES = 64, 16


class Pointwise(nn.Sequential):
    """ReLU → average pooling, if the stride is 2 → 1 × 1 convolution to ``after`` channels → BatchNorm."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__(nn.ReLU())
        if stride == 2:
            self.append(nn.AvgPool2d(2, ceil_mode=True))
        self.extend([nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)])


class Depthwise(nn.Sequential):
    """ReLU → depthwise convolution on ``before`` channels → 1 × 1 convolution to ``after`` channels → BatchNorm."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, dilation: int) -> None:
        pad = dilation * (kernel - 1) // 2
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(before, before, kernel, stride, pad, dilation, groups=before, bias=False),
            nn.Conv2d(before, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )


def build_operation(name: str, before: int, after: int, stride: int, mid: int = 0) -> nn.Module:
    """Build one of ``OPERATIONS`` from ``before`` to ``after`` channels; ModelError if it cannot change their number.

    Pools, and ``skip`` with stride 1, cannot. ``stride``: 2 halves height and width. ``mid``: the channels between the
    two convolutions of a ``sep``; 0: as many as ``before``.
    """
    kernel = int(name[-1]) if name[-1].isdigit() else 3
    if name.startswith("sep"):
        mid = mid or before
        return nn.Sequential(Depthwise(before, mid, kernel, stride, 1), Depthwise(mid, after, kernel, 1, 1))
    if name.startswith("dil"):
        return Depthwise(before, after, kernel, stride, 2)
    if name == "skip" and stride == 2:
        return Pointwise(before, after, 2)
    if before != after:
        raise ModelError(f"{name} cannot lead from {before} channels to {after}; only sep and dil can")
    if name == "skip":
        return nn.Identity()
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False) if name == "avg" else nn.MaxPool2d(3, stride, 1)


class Cell(nn.Module):
    """A cell of two inputs and some nodes; its output concatenates the nodes along channels.

    ``before``: the channels of both inputs; ``shrinks``: for each, whether it is pooled to half its height and width,
    since these are twice those of the other. ``plan`` holds ``reduce`` (whether the cell halves height and width),
    ``inputs`` (their widths inside the cell) and ``nodes``: for each its ``width`` and ``ops``, a list of ``[name,
    source, mid]``, as of :func:`build_operation`. Sources 0 and 1 are the inputs, 2 is the first node.
    """

    def __init__(self, before: Sequence[int], shrinks: Sequence[bool], plan: Mapping[str, Any]) -> None:
        super().__init__()
        widths = list(plan["inputs"])
        forms = zip(before, widths, shrinks, strict=True)
        self.inputs = nn.ModuleList(Pointwise(old, new, 2 if shrink else 1) for old, new, shrink in forms)
        self.nodes = nn.ModuleList()
        for node in plan["nodes"]:
            ops = {}
            for name, source, mid in node["ops"]:
                stride = 2 if plan["reduce"] and source < 2 else 1
                ops[f"{name}_{source}"] = build_operation(name, widths[source], node["width"], stride, mid)
            self.nodes.append(Candidates(ops, [source for _, source, _ in node["ops"]]))
            widths.append(node["width"])
        self.width = sum(widths[2:])

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Outputs of the last two cells, the older first → ``[N, width, H, W]``; H and W are halved if it reduces."""
        values = [self.inputs[0](first), self.inputs[1](second)]
        for node in self.nodes:
            values.append(node(*values))
        return torch.cat(values[2:], 1)


class Cells(StagedNetwork):
    """A network of cells: a stem, cells, and linear classifiers behind the last cell and the end of each stage.

    ``config`` holds ``shape`` of an input ``[C, H, W]``, ``classes``, ``stem`` (channels), ``stride`` of the stem,
    ``cells`` (the ``plan`` of each :class:`Cell`), and ``heads``: ascending indices of the cells that a classifier
    follows.
    """

    parts_name = "cells"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        check_description(config)
        self.stem = staged.build_stem(config, config["stem"])
        self.cells, self.heads = nn.ModuleList(), nn.ModuleDict()
        widths, scales = [config["stem"]] * 2, [0, 0]  # of the last two outputs; how often each was halved
        for i, plan in enumerate(config["cells"]):
            level = max(scales)
            cell = Cell(widths, [scale < level for scale in scales], plan)
            self.cells.append(cell)
            widths, scales = [widths[1], cell.width], [scales[1], level + plan["reduce"]]
            if i in config["heads"]:
                self.heads[str(i)] = nn.Linear(cell.width, config["classes"])

    def classify(self, head: nn.Module, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of a classifier for the output of the cell that it follows."""
        return head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def required_groups(self) -> list[tuple[str, ...]]:
        """Return groups of operations (paths), of each of which one must stay: of a node, and of an input's readers."""
        readers: dict[tuple[str, int], list[str]] = {}  # cell, source → operations that read it
        for path, node in self.named_modules():
            for key, source in zip(node.ops, node.sources, strict=True) if isinstance(node, Candidates) else ():
                readers.setdefault((path.partition(".nodes.")[0], source), []).append(f"{path}.ops.{key}")
        return super().required_groups() + [tuple(paths) for (_, source), paths in readers.items() if source < 2]


def supernet_config(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 8,
    cells: int = 6,
    nodes: int = 3,
    stride: int = 2,
    heads: Sequence[int] = (),
    operations: Sequence[str] = OPERATIONS,
) -> dict[str, Any]:
    """Return the super-network's configuration for :class:`Cells`: every operation from every source to every node.

    ``shape``: of an input, ``[C, H, W]``; ``width``: the channels of a node in the first cell. They double where height
    and width are halved, after a third and two thirds of the cells. ``nodes``: their number per cell; ``stride``: of
    the stem; ``heads``: indices of cells that a classifier follows, since a stage of the search ends there. The last
    cell has one anyway. Raises ModelError unless there are 1 to 64 cells of 1 to 16 nodes.
    """
    if not 0 < cells <= MOST_CELLS or not 0 < nodes <= MOST_NODES:
        sizes = f"1 to {MOST_CELLS} cells of 1 to {MOST_NODES} nodes, got {cells} and {nodes}"
        raise ModelError(f"a space of cells has {sizes}; write it as cells:WIDTH-CELLS-NODES, for example cells:8-6-3")
    reductions = {cells // 3, 2 * cells // 3} - {0}
    stem, plans = 3 * width, list[dict[str, Any]]()
    for i in range(cells):
        width *= 2 if i in reductions else 1
        edges = [[[op, source, width] for source in range(2 + n) for op in operations] for n in range(nodes)]
        node_plans = [{"width": width, "ops": ops} for ops in edges]
        plans.append({"reduce": i in reductions, "inputs": [width, width], "nodes": node_plans})
    config = {"shape": [*shape], "classes": classes, "stem": stem, "stride": stride, "cells": plans}
    return {**config, "heads": sorted({*heads, cells - 1})}


def thin_config(config: Mapping[str, Any], before: int, share: float) -> dict[str, Any]:
    """Return a configuration with a fraction ``share`` of the operations in its first ``before`` cells.

    As after a stage of a search: each kind of operation keeps this fraction, rounded up and spread evenly over a
    cell. Each node keeps at least one operation. ``config`` is not changed.

    >>> config = thin_config(supernet_config((3, 8, 8), 2, cells=2, nodes=1), before=1, share=0.3)
    >>> [len(cell["nodes"][0]["ops"]) for cell in config["cells"]]
    [5, 14]
    """
    cells = list(config["cells"])
    for i, cell in enumerate(cells[:before]):
        ops = [(name, j, n) for j, node in enumerate(cell["nodes"]) for n, (name, _, _) in enumerate(node["ops"])]
        ops.sort(key=lambda op: OPERATIONS.index(op[0]))
        kept = {op[1:] for k, op in enumerate(ops) if staged.is_spread(k, share)}
        kept |= {(j, 0) for j in range(len(cell["nodes"])) if not any(at == j for at, _ in kept)}
        nodes = [
            {**node, "ops": [op for n, op in enumerate(node["ops"]) if (j, n) in kept]}
            for j, node in enumerate(cell["nodes"])
        ]
        cells[i] = {**cell, "nodes": nodes}
    return {**config, "cells": cells}


def describe_result(net: Cells, config: Mapping[str, Any], gone: Container[str]) -> dict[str, Any]:
    """Return the configuration that builds the cut network ``net`` anew, in its present widths.

    ``config``: the super-network's; ``gone``: the paths of the operations that were dropped from it. The result has the
    last classifier alone.
    """
    cells = list[dict[str, Any]]()
    for i, plan in enumerate(config["cells"]):
        widths = [norm_widths(net.get_submodule(f"cells.{i}.inputs.{k}"))[-1] for k in range(2)]
        nodes: list[dict[str, Any]] = []
        for j, node in enumerate(plan["nodes"]):
            ops, outputs = list[list[str | int]](), list[int]()
            for name, source, mid in node["ops"]:
                path = f"cells.{i}.nodes.{j}.ops.{name}_{source}"
                if path not in gone:
                    norms = norm_widths(net.get_submodule(path))
                    ops.append([name, source, norms[0] if name.startswith("sep") else mid])
                    outputs.append(norms[-1] if norms else widths[source])  # without a norm, the width is that read
            nodes.append({"width": outputs[0], "ops": ops})
            widths.append(outputs[0])
        cells.append({"reduce": plan["reduce"], "inputs": widths[:2], "nodes": nodes})
    return {**config, "stem": norm_widths(net.stem)[0], "cells": cells, "heads": [len(cells) - 1]}


def check_description(config: Mapping[str, Any]) -> None:
    """Raise ModelError unless ``config`` is one that :class:`Cells` can be built from; builds nothing."""
    with staged.explain_description("cells"):
        cells = config["cells"]
        sizes = [*config["shape"], config["classes"], config["stem"], config["stride"]]
        valid = 0 < len(cells) <= MOST_CELLS and staged.heads_fit(config, len(cells))
        for cell in cells:
            nodes = cell["nodes"]
            sizes += [*cell["inputs"], *(node["width"] for node in nodes)]
            valid &= 0 < len(nodes) <= MOST_NODES and len(cell["inputs"]) == 2 and type(cell["reduce"]) is bool
            for sources, node in enumerate(nodes, start=2):  # a node reads the two inputs and the nodes before it
                sizes += [mid for _, _, mid in node["ops"]]
                valid &= bool(node["ops"]) and all(
                    name in OPERATIONS and type(source) is int and 0 <= source < sources
                    for name, source, _ in node["ops"]
                )
        staged.check_sizes("cells", sizes)
        if not valid:
            raise ModelError("not the description of a network of cells: see regrow.nets.cells.Cells for what it holds")
