"""Networks of cells in a DARTS-like search space, built from a configuration: super-network or search result.

A cell reads the outputs of the two cells before it. Each of its nodes sums any number of operations on the inputs and
earlier nodes, and the cell's output concatenates its nodes. Every cell has its own parameters and wiring.
"""

from collections.abc import Container, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.candidates import Candidates, Prefix, candidates_in
from regrow.nets.cell_operations import OPERATIONS, Pointwise, operation
from regrow.nets.errors import ModelError
from regrow.nets.recomputed import again

MOST = 2**14
MOST_CELLS, MOST_NODES = 64, 16


class NodePlan(TypedDict):
    """A node of a cell: its channels, and its operations as (name, source, inner channels)."""

    width: int
    ops: list[list[str | int]]


class CellPlan(TypedDict):
    """A cell: whether it halves height and width, the channels of its two inputs, and its nodes."""

    reduce: bool
    inputs: list[int]
    nodes: list[NodePlan]


class CellsConfig(TypedDict):
    """The configuration of :class:`Cells`, as JSON data.

    Args:
        shape: The shape of an input, ``[C, H, W]``.
        classes: The number of classes.
        stem: The channels of the first convolution.
        stride: Its stride.
        cells: The cells, in order.
        heads: Indices of the cells that a linear classifier (a head) follows: the last one, and those that end a stage.
    """

    shape: list[int]
    classes: int
    stem: int
    stride: int
    cells: list[CellPlan]
    heads: list[int]


def _operations(node: NodePlan) -> list[tuple[str, int, int]]:
    """Return the name, source and inner channels of each operation of a node."""
    return [(str(name), int(source), int(mid)) for name, source, mid in node["ops"]]


class Cell(nn.Module):
    """A cell of two inputs and some nodes; its output concatenates the nodes along channels.

    Args:
        before: Channels of each of the two inputs.
        shrinks: For each input, whether it has twice the height and width of the other and must be downsampled.
        plan: ``reduce``, ``inputs`` (their widths inside the cell) and ``nodes``: for each its ``width`` and ``ops``, a
            list of ``[name, source, mid]``. Sources 0 and 1 are the inputs, 2 is the first node.
    """

    def __init__(self, before: Sequence[int], shrinks: Sequence[bool], plan: CellPlan) -> None:
        super().__init__()
        widths = list(plan["inputs"])
        self.inputs = nn.ModuleList(
            Pointwise(b, w, 2 if s else 1) for b, w, s in zip(before, widths, shrinks, strict=True)
        )
        self.nodes = nn.ModuleList()
        for node in plan["nodes"]:
            ops = {}
            for name, source, mid in _operations(node):
                stride = 2 if plan["reduce"] and source < 2 else 1
                ops[f"{name}_{source}"] = operation(name, widths[source], node["width"], stride, mid)
            self.nodes.append(Candidates(ops, [source for _, source, _ in _operations(node)]))
            widths.append(node["width"])
        self.width = sum(widths[2:])

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Outputs ``[N, C, H, W]`` of the last two cells → ``[N, width, H, W]``, or half the height and width."""
        values = [self.inputs[0](first), self.inputs[1](second)]
        for node in self.nodes:
            values.append(node(*values))
        return torch.cat(values[2:], 1)


class Cells(nn.Module):
    """A network of cells: a stem, cells, and linear classifiers behind the last cell and the end of each stage.

    If ``recomputed`` is set, cells are computed again in the backward pass (gradient checkpointing), to save memory.

    Args:
        config: ``shape`` of an input ``[C, H, W]``, ``classes``, ``stem`` (channels), ``stride`` of the stem, ``cells``
            as :class:`Cell` takes them, and ``heads``: indices of the cells that a classifier follows, ascending.

    Raises:
        ModelError: If the configuration is invalid, or its sizes do not fit each other.
    """

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        plans = check_description(config)
        stem = plans["stem"]
        self.stem = nn.Sequential(
            nn.Conv2d(plans["shape"][0], stem, 3, plans["stride"], 1, bias=False), nn.BatchNorm2d(stem)
        )
        self.cells, self.heads = nn.ModuleList(), nn.ModuleDict()
        self.recomputed = False
        self.active: int | None = None
        widths, scales = [stem, stem], [0, 0]
        for i, plan in enumerate(plans["cells"]):
            level = max(scales)
            cell = Cell(widths, [scale < level for scale in scales], plan)
            self.cells.append(cell)
            widths, scales = [widths[1], cell.width], [scales[1], level + plan["reduce"]]
            if i in plans["heads"]:
                self.heads[str(i)] = nn.Linear(cell.width, plans["classes"])

    def upto(self, x: Tensor, last: int) -> Tensor:
        """Return the logits, ``[N, classes]``, of the classifier behind cell ``last``; later cells do not run."""
        return self._heads(x, [last])[0]

    def within(self, name: str, last: int) -> bool:
        """Whether the parameter ``name`` is used by :meth:`upto` for cell ``last``."""
        part, _, rest = name.partition(".")
        number = int(rest.partition(".")[0]) if part != "stem" else 0
        return part == "stem" or (number <= last if part == "cells" else number == last)

    def needed(self) -> list[tuple[str, ...]]:
        """Return sets of operations of each of which one must stay: of each node, and of the readers of each input."""
        result = [*candidates_in(self).values()]
        reads: dict[tuple[str, int], list[str]] = {}
        for path, node in self.named_modules():
            for key, source in zip(node.ops, node.sources, strict=True) if isinstance(node, Candidates) else ():
                reads.setdefault((path.partition(".nodes.")[0], source), []).append(f"{path}.ops.{key}")
        result += [tuple(paths) for (_, source), paths in reads.items() if source < 2]
        return result

    def alike(self) -> dict[str, str]:
        """Return path of each node → ``normal n`` or ``reducing n``, equal for nodes at one place of alike cells."""
        result = {}
        for path in candidates_in(self):
            cell, _, number = path.partition(".nodes.")
            strides = [getattr(one, "stride", 1) for one in self.get_submodule(f"{cell}.nodes").modules()]
            result[path] = f"{'reducing' if 2 in strides or (2, 2) in strides else 'normal'} {number}"
        return result

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the logits behind cell ``active``, or of every classifier if ``active`` is ``None``."""
        logits = self._heads(x, sorted(map(int, self.heads)) if self.active is None else [self.active])
        return logits[0] if len(logits) == 1 else tuple(logits)

    def _heads(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        result = []
        # Depthwise convolutions are faster in this layout on a CPU, most of all those of few channels.
        first = second = self.stem(x.contiguous(memory_format=torch.channels_last))
        for i in range(wanted[-1] + 1):
            run = partial(again, self.cells[i]) if self.recomputed and self.training else self.cells[i]
            first, second = second, run(first, second)
            if i in wanted:
                result.append(self.heads[str(i)](F.adaptive_avg_pool2d(second, 1).flatten(1)))
        return result


def supernet(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 8,
    cells: int = 6,
    nodes: int = 3,
    stride: int = 2,
    heads: Sequence[int] = (),
    operations: Sequence[str] = OPERATIONS,
) -> CellsConfig:
    """Return the configuration of the super-network: every operation on every edge, halving twice.

    Args:
        shape: The shape of an input, ``[C, H, W]``.
        classes: The number of logits.
        width: Channels of a node before the first reduction; they double at each.
        cells: The number of cells.
        nodes: The number of nodes per cell.
        stride: The stride of the stem, which has three times ``width`` channels.
        heads: Indices of cells at which a stage of the search ends; the last cell has a classifier anyway.
        operations: The candidate operations of each edge.

    Raises:
        ModelError: If there are too many cells or nodes.
    """
    if not 0 < cells <= MOST_CELLS or not 0 < nodes <= MOST_NODES:
        raise ModelError(
            f"a space of cells has 1 to {MOST_CELLS} cells of 1 to {MOST_NODES} nodes, got {cells} and {nodes}; write "
            "it as cells:WIDTH-CELLS-NODES, for example cells:8-6-3"
        )
    reductions = {cells // 3, 2 * cells // 3} - {0}
    result: list[CellPlan] = []
    for i in range(cells):
        width *= 2 if i in reductions else 1
        result.append(
            {
                "reduce": i in reductions,
                "inputs": [width, width],
                "nodes": [
                    {"width": width, "ops": [[op, source, width] for source in range(2 + n) for op in operations]}
                    for n in range(nodes)
                ],
            }
        )
    stem = 3 * result[0]["inputs"][0]
    ends = sorted({*heads, cells - 1})
    return {"shape": [*shape], "classes": classes, "stem": stem, "stride": stride, "cells": result, "heads": ends}


def thin(config: CellsConfig, before: int, share: float) -> CellsConfig:
    """Return a configuration with a fraction of the operations left in its first cells, as a search may leave it.

    Each kind of operation keeps this fraction, spread evenly over the edges; each node keeps at least one operation.

    Args:
        config: The configuration of a network.
        before: The number of cells, from the first, that are thinned.
        share: The fraction of the operations of each kind that stays, rounded up.

    >>> config = thin(supernet((3, 8, 8), 2, cells=2, nodes=1), before=1, share=0.3)
    >>> [len(cell["nodes"][0]["ops"]) for cell in config["cells"]]
    [5, 14]
    """
    cells: list[CellPlan] = []
    for i, cell in enumerate(config["cells"]):
        ops = [(name, j, n) for j, node in enumerate(cell["nodes"]) for n, (name, _, _) in enumerate(_operations(node))]
        ops.sort(key=lambda op: OPERATIONS.index(op[0]))
        kept = {op[1:] for k, op in enumerate(ops) if i >= before or _ceil((k + 1) * share) > _ceil(k * share)}
        kept |= {(j, 0) for j in range(len(cell["nodes"])) if not any(at == j for at, _ in kept)}
        nodes: list[NodePlan] = [
            {**node, "ops": [op for n, op in enumerate(node["ops"]) if (j, n) in kept]}
            for j, node in enumerate(cell["nodes"])
        ]
        cells.append({**cell, "nodes": nodes})
    return {**config, "cells": cells}


def prefix(config: CellsConfig, first: int, last: int, share: float) -> Prefix:
    """Build the network up to a cell, as a stage of a search runs it.

    Args:
        config: The configuration of the whole network.
        first: The index of the first cell that has all its operations; earlier ones are thinned.
        last: The index of the last cell that runs.
        share: The fraction of the operations that earlier cells keep.
    """
    heads = sorted({*config["heads"], last})
    return Prefix(Cells(thin({**config, "heads": heads}, first, share)), last)


def _ceil(value: float) -> int:
    return ceil(round(value, 9))  # 0.1 × 30 is 3.0000000000000004


def describe(net: Cells, config: Mapping[str, object], gone: Container[str]) -> CellsConfig:
    """Return the configuration that builds exactly what is left of a network, with its last classifier alone.

    Args:
        net: The network after cuts.
        config: The configuration that it was built from.
        gone: Paths of the operations that were dropped.
    """
    whole, cells = check_description(config), list[CellPlan]()
    for i, plan in enumerate(whole["cells"]):
        cell = net.get_submodule(f"cells.{i}")
        assert isinstance(cell, Cell)
        widths = [_features(one) for one in cell.inputs]
        nodes: list[NodePlan] = []
        for j, was in enumerate(plan["nodes"]):
            node = cell.get_submodule(f"nodes.{j}")
            assert isinstance(node, Candidates)
            ops, outs = list[list[str | int]](), list[int]()
            for (name, source, mid), (key, op) in zip(_operations(was), node.ops.items(), strict=True):
                if f"cells.{i}.nodes.{j}.ops.{key}" not in gone:
                    ops.append([name, source, _features(op.get_submodule("0")) if name.startswith("sep") else mid])
                    outs.append(_features(op) or widths[source])
            nodes.append({"width": outs[0], "ops": ops})
            widths.append(outs[0])
        cells.append({"reduce": plan["reduce"], "inputs": widths[:2], "nodes": nodes})
    stem = net.stem[0]
    assert isinstance(stem, nn.Conv2d)
    return {**whole, "stem": stem.out_channels, "cells": cells, "heads": [len(cells) - 1]}


def _features(module: nn.Module) -> int:
    """Return the channels of the last BatchNorm in a module; 0 if it has none."""
    norms = [one.num_features for one in module.modules() if isinstance(one, nn.BatchNorm2d)]
    return norms[-1] if norms else 0


def check_description(config: Mapping[str, object]) -> CellsConfig:
    """Return a configuration of :class:`Cells`, or raise ModelError if it is invalid; builds nothing.

    Raises:
        ModelError: If it is invalid; says what is wrong.
    """
    data: Any = config
    try:
        cells, shape = data["cells"], data["shape"]
        sizes = [*shape, data["classes"], data["stem"], data["stride"]]
        sizes += [w for cell in cells for w in (*cell["inputs"], *(node["width"] for node in cell["nodes"]))]
        ops = [(j + 2, op) for cell in cells for j, node in enumerate(cell["nodes"]) for op in node["ops"]]
        sizes += [mid for _, (_, _, mid) in ops]
        right = (
            len(shape) == 3
            and 0 < len(cells) <= MOST_CELLS
            and all(0 < len(cell["nodes"]) <= MOST_NODES and len(cell["inputs"]) == 2 for cell in cells)
            and all(node["ops"] for cell in cells for node in cell["nodes"])
            and all(
                name in OPERATIONS and type(source) is int and 0 <= source < known for known, (name, source, _) in ops
            )
            and all(type(cell["reduce"]) is bool for cell in cells)
            and all(type(at) is int and 0 <= at < len(cells) for at in data["heads"])
            and len(cells) - 1 in data["heads"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"not the description of a network of cells: {error!r:.80}") from None
    if odd := [size for size in sizes if type(size) is not int or not 0 < size <= MOST]:
        raise ModelError(f"a network of cells has sizes from 1 to {MOST}; got {odd[0]!r:.40}")
    if not right:
        raise ModelError("not the description of a network of cells: see regrow.nets.cells.Cells for what it holds")
    return data
