"""Networks of cells: the DARTS-like space, whole (the super-network) or as a search left it, from one description.

A cell takes what the two cells before it gave, has nodes that each sum any number of operations on earlier values of
the cell, and gives its nodes side by side. Every cell has parameters and a wiring of its own.
"""

from collections.abc import Container, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.candidates import Candidates, Prefix, candidates_in
from regrow.nets.errors import ModelError
from regrow.nets.recomputed import again

OPERATIONS = ("skip", "sep3", "sep5", "dil3", "dil5", "avg", "max")
"""In the order of the authors' genotypes."""

MOST = 2**14
MOST_CELLS, MOST_NODES = 64, 16


class Pointwise(nn.Sequential):
    """relu → 1 × 1 convolution → BatchNorm, after averaging 2 × 2 where the picture gets smaller."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        first: list[nn.Module] = [nn.ReLU()] + ([nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else [])
        super().__init__(*first, nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))


class Depthwise(nn.Sequential):
    """relu → depthwise convolution → 1 × 1 convolution → BatchNorm."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, dilation: int) -> None:
        pad = dilation * (kernel - 1) // 2
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(before, before, kernel, stride, pad, dilation, groups=before, bias=False),
            nn.Conv2d(before, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )


def operation(name: str, before: int, after: int, stride: int, mid: int = 0) -> nn.Module:
    """An operation of the space.

    Args:
        name: One of ``OPERATIONS``.
        before: Channels in.
        after: Channels out; ``skip`` with stride 1 and pools cannot change them.
        stride: 1 or 2.
        mid: Channels inside a ``sep``; as many as come in unless given.

    Raises:
        ModelError: If it cannot lead from so many channels to so many.
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
    """Two inputs, some nodes, and the nodes side by side as the answer.

    Args:
        before: Channels of the two inputs.
        shrinks: Which of them have twice the size that they should have.
        plan: ``reduce``, ``inputs`` (their widths inside) and ``nodes``: for each its ``width`` and ``ops``, a list of
            ``[name, source, mid]``. Sources 0 and 1 are the inputs, 2 is the first node.
    """

    def __init__(self, before: Sequence[int], shrinks: Sequence[bool], plan: Mapping[str, Any]) -> None:
        super().__init__()
        widths = list(plan["inputs"])
        self.inputs = nn.ModuleList(
            Pointwise(b, w, 2 if s else 1) for b, w, s in zip(before, widths, shrinks, strict=True)
        )
        self.nodes = nn.ModuleList()
        for node in plan["nodes"]:
            ops = {}
            for name, source, mid in node["ops"]:
                stride = 2 if plan["reduce"] and source < 2 else 1
                ops[f"{name}_{source}"] = operation(name, widths[source], node["width"], stride, mid)
            self.nodes.append(Candidates(ops, [source for _, source, _ in node["ops"]]))
            widths.append(node["width"])
        self.width = sum(widths[2:])

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """``[N, C, H, W]`` of the cell before last and of the last one → ``[N, width, H, W]`` or half the size."""
        values = [self.inputs[0](first), self.inputs[1](second)]
        for node in self.nodes:
            values.append(node(*values))
        return torch.cat(values[2:], 1)


class Cells(nn.Module):
    """A stem, cells, and a linear classifier behind the last of them, and behind each at which a stage ends.

    Where ``recomputed`` is set, cells are computed a second time in the backward pass, and need little memory.

    Args:
        config: ``shape`` of an input ``[C, H, W]``, ``classes``, ``stem`` (channels), ``stride`` of the stem, ``cells``
            as :class:`Cell` has them, and ``heads``: numbers of the cells that a classifier follows, ascending.

    Raises:
        ModelError: If the description is none, or its sizes do not fit each other.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        config = check_description(config)
        stem = config["stem"]
        self.stem = nn.Sequential(
            nn.Conv2d(config["shape"][0], stem, 3, config["stride"], 1, bias=False), nn.BatchNorm2d(stem)
        )
        self.cells, self.heads = nn.ModuleList(), nn.ModuleDict()
        self.recomputed = False
        self.active: int | None = None
        widths, scales = [stem, stem], [0, 0]
        for i, plan in enumerate(config["cells"]):
            level = max(scales)
            cell = Cell(widths, [scale < level for scale in scales], plan)
            self.cells.append(cell)
            widths, scales = [widths[1], cell.width], [scales[1], level + plan["reduce"]]
            if i in config["heads"]:
                self.heads[str(i)] = nn.Linear(cell.width, config["classes"])

    def upto(self, x: Tensor, last: int) -> Tensor:
        """Logits ``[N, classes]`` of the classifier behind cell ``last``; later cells do not run."""
        return self._heads(x, [last])[0]

    def within(self, name: str, last: int) -> bool:
        """Whether a parameter takes part in :meth:`upto`."""
        part, _, rest = name.partition(".")
        number = int(rest.partition(".")[0]) if part != "stem" else 0
        return part == "stem" or (number <= last if part == "cells" else number == last)

    def needed(self) -> list[tuple[str, ...]]:
        """Sets of operations of which one must stay: those into a node, and those that read an input of a cell."""
        result = [*candidates_in(self).values()]
        reads: dict[tuple[str, int], list[str]] = {}
        for path, node in self.named_modules():
            for key, source in zip(node.ops, node.sources, strict=True) if isinstance(node, Candidates) else ():
                reads.setdefault((path.partition(".nodes.")[0], source), []).append(f"{path}.ops.{key}")
        result += [tuple(paths) for (_, source), paths in reads.items() if source < 2]
        return result

    def alike(self) -> dict[str, str]:
        """Path of each node → its kind and number: the same in all cells that reduce, and in all that do not."""
        result = {}
        for path in candidates_in(self):
            cell, _, number = path.partition(".nodes.")
            strides = [getattr(one, "stride", 1) for one in self.get_submodule(f"{cell}.nodes").modules()]
            result[path] = f"{'reducing' if 2 in strides or (2, 2) in strides else 'normal'} {number}"
        return result

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits ``[N, classes]`` behind cell ``active``; without it of every classifier, if there are several."""
        found = self._heads(x, sorted(map(int, self.heads)) if self.active is None else [self.active])
        return found[0] if len(found) == 1 else tuple(found)

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
) -> dict[str, Any]:
    """The description of the super-network: every operation on every edge, the picture halved after each third.

    Args:
        shape: Of an input, ``[C, H, W]``.
        classes: How many logits.
        width: Channels of a node before the first reduction; they double at each.
        cells: How many.
        nodes: Of each cell.
        stride: Of the stem, which has three times ``width`` channels.
        heads: Cells at which a stage ends; the last one has a classifier anyway.
        operations: The candidates of each edge.

    Raises:
        ModelError: If there are too many cells or nodes.
    """
    if not 0 < cells <= MOST_CELLS or not 0 < nodes <= MOST_NODES:
        raise ModelError(
            f"a space of cells has 1 to {MOST_CELLS} cells of 1 to {MOST_NODES} nodes, got {cells} and {nodes}; write "
            "it as cells:WIDTH-CELLS-NODES, for example cells:8-6-3"
        )
    reductions = {cells // 3, 2 * cells // 3} - {0}
    result: list[dict[str, Any]] = []
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


def thin(config: Mapping[str, Any], before: int, share: float) -> dict[str, Any]:
    """The description with a share of the operations of its first cells left, as a search may leave them.

    Each kind of operation keeps its share, spread evenly over the edges; each node keeps at least one operation.

    Args:
        config: The description of a network.
        before: How many cells are thinned.
        share: What share of the operations of each stays, rounded up.

    >>> config = thin(supernet((3, 8, 8), 2, cells=2, nodes=1), before=1, share=0.3)
    >>> [len(cell["nodes"][0]["ops"]) for cell in config["cells"]]
    [5, 14]
    """
    cells = []
    for i, cell in enumerate(config["cells"]):
        ops = [(name, j, n) for j, node in enumerate(cell["nodes"]) for n, (name, _, _) in enumerate(node["ops"])]
        ops.sort(key=lambda op: OPERATIONS.index(op[0]))
        kept = {op[1:] for k, op in enumerate(ops) if i >= before or _ceil((k + 1) * share) > _ceil(k * share)}
        kept |= {(j, 0) for j in range(len(cell["nodes"])) if not any(at == j for at, _ in kept)}
        nodes = [
            {**node, "ops": [op for n, op in enumerate(node["ops"]) if (j, n) in kept]}
            for j, node in enumerate(cell["nodes"])
        ]
        cells.append({**cell, "nodes": nodes})
    return {**config, "cells": cells}


def prefix(config: Mapping[str, Any], first: int, last: int, share: float) -> Prefix:
    """A network up to a cell, as a stage of a search runs it.

    Args:
        config: The description of the whole one.
        first: The first cell that has all its operations; those before have a share of them.
        last: The last cell that runs.
        share: Which.
    """
    heads = sorted({*config["heads"], last})
    return Prefix(Cells(thin({**config, "heads": heads}, first, share)), last)


def _ceil(value: float) -> int:
    return ceil(round(value, 9))  # 0.1 × 30 is 3.0000000000000004


def describe(net: Cells, config: Mapping[str, Any], gone: Container[str]) -> dict[str, Any]:
    """The description of what is left of a network of cells, with the last classifier alone; it builds exactly that.

    Args:
        net: The network, cut by plans.
        config: What it was built from.
        gone: Paths of the operations that were dropped.
    """
    cells = []
    for i, plan in enumerate(config["cells"]):
        cell = net.get_submodule(f"cells.{i}")
        assert isinstance(cell, Cell)
        widths = [_features(one) for one in cell.inputs]
        nodes = []
        for j, was in enumerate(plan["nodes"]):
            node = cell.get_submodule(f"nodes.{j}")
            assert isinstance(node, Candidates)
            ops, told = [], []
            for (name, source, mid), (key, op) in zip(was["ops"], node.ops.items(), strict=True):
                if f"cells.{i}.nodes.{j}.ops.{key}" not in gone:
                    ops.append([name, source, _features(op.get_submodule("0")) if name.startswith("sep") else mid])
                    told.append(_features(op) or widths[source])
            nodes.append({"width": told[0], "ops": ops})
            widths.append(told[0])
        cells.append({"reduce": plan["reduce"], "inputs": widths[:2], "nodes": nodes})
    stem = net.stem[0].out_channels
    return {**config, "stem": stem, "cells": cells, "heads": [len(cells) - 1]}


def _features(module: nn.Module) -> int:
    """The channels of the last norm of a module; 0 if it has none."""
    norms = [one.num_features for one in module.modules() if isinstance(one, nn.BatchNorm2d)]
    return norms[-1] if norms else 0


def check_description(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A description, once it is seen to be one; sizes are checked before anything is built.

    Raises:
        ModelError: If it is none; says what is wrong.
    """
    try:
        cells, shape = config["cells"], config["shape"]
        sizes = [*shape, config["classes"], config["stem"], config["stride"]]
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
            and all(type(at) is int and 0 <= at < len(cells) for at in config["heads"])
            and len(cells) - 1 in config["heads"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"not the description of a network of cells: {error!r:.80}") from None
    if odd := [size for size in sizes if type(size) is not int or not 0 < size <= MOST]:
        raise ModelError(f"a network of cells has sizes from 1 to {MOST}; got {odd[0]!r:.40}")
    if not right:
        raise ModelError("not the description of a network of cells: see regrow.nets.cells.Cells for what it holds")
    return config
