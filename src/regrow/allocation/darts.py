"""DARTS cells: softmax weights of the operations on each edge, and the partial channels of PC-DARTS.

An edge holds the operations into a node that read the same source. With partial channels (Xu et al.: PC-DARTS, Partial
Channel Connections for Memory-Efficient Architecture Search, arXiv 1907.05737, section 3.2), operations process only
some channels while they are weighed.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regrow.core.candidates import find_candidates

# How many edges into a node DARTS keeps
INPUTS = 2


@dataclass(frozen=True)
class Edges:
    """Index tables from the operations of a network to its edges and to their entries in α and β.

    α are the architecture parameters of DARTS, one per operation and one for "none" per edge; β those of PC-DARTS, one
    per edge.

    Args:
        table: The entries of α on each edge, that of "none" first, ``[edges, most]``; padded with ``entries``.
        edge: The edge of each operation, ``[operations]``.
        column: The column of ``table`` that holds each operation, ``[operations]``.
        entries: How many entries α has.
        node: The index of the node that each edge leads into, ascending, ``[edges]``.
        beta: The entry of β that belongs to each edge, ``[edges]``.
        into: The number of edges into each node.
    """

    table: Tensor
    edge: Tensor
    column: Tensor
    entries: int
    node: Tensor
    beta: Tensor
    into: tuple[int, ...]

    @property
    def betas(self) -> int:
        """How many entries β has."""
        return int(self.beta.max()) + 1

    @classmethod
    def of(cls, model: nn.Module, names: Mapping[str, str]) -> "Edges":
        """Build the index tables of a network's candidate operations.

        ``names``: path of a node → its name; nodes of the same name share their entries of α and β.
        """
        entries: dict[tuple[str, int, str], int] = {}
        weights: dict[tuple[str, int], int] = {}
        rows: list[list[int]] = []
        edge, column, nodes, betas = [], [], [], []
        for number, (path, node) in enumerate(find_candidates(model).items()):
            name = names.get(path, path)
            here: dict[int, int] = {}
            for key, source in zip(node.ops, node.sources, strict=True):
                if source not in here:
                    here[source] = len(rows)
                    rows.append([entries.setdefault((name, source, ""), len(entries))])
                    nodes.append(number)
                    betas.append(weights.setdefault((name, source), len(weights)))
                row = rows[here[source]]
                edge.append(here[source])
                column.append(len(row))
                row.append(entries.setdefault((name, source, key), len(entries)))
        if not rows:
            raise ValueError("the network has no candidates to choose from: mark them with regrow.Candidates")
        most, into = max(map(len, rows)), tuple(Counter(nodes).values())
        table = torch.tensor([row + [len(entries)] * (most - len(row)) for row in rows])
        edges, columns, ends, beta = (torch.tensor(values) for values in (edge, column, nodes, betas))
        return cls(table, edges, columns, len(entries), ends, beta, into)

    def share(self, alpha: Tensor, beta: Tensor | None = None) -> Tensor:
        """Return the softmax weight of each operation among those of its edge and "none", ``[operations]``.

        With β, ``[betas]``, the weight of the operation's edge is multiplied in.
        """
        logits = torch.cat([alpha, alpha.new_full((1,), -torch.inf)]).index_select(0, self.table.reshape(-1))
        weights = logits.view_as(self.table).softmax(1)[self.edge, self.column]
        return weights if beta is None else weights * self.between(beta).index_select(0, self.edge)

    def between(self, beta: Tensor) -> Tensor:
        """Return the softmax weight of each edge among the edges into its node, ``[edges]`` (PC-DARTS)."""
        grown = (beta - beta.detach().max()).exp().index_select(0, self.beta)
        total = grown.new_zeros(len(self.node)).index_add(0, self.node, grown)
        return grown / total.index_select(0, self.node)


def select_operations(share: Tensor, edge: Tensor, node: Tensor) -> Tensor:
    """Return which operations the discrete cell of DARTS keeps: the best of each of the best edges into each node."""
    result, seen, left = torch.zeros_like(share, dtype=torch.bool), set(), dict.fromkeys(node.tolist(), INPUTS)
    edges, nodes = edge.tolist(), node.tolist()
    for i in share.argsort(descending=True, stable=True).tolist():
        if edges[i] not in seen and left[nodes[i]]:
            result[i] = True
            seen.add(edges[i])
            left[nodes[i]] -= 1
    return result


def partial_channels(model: nn.Module, many: int, weights: Callable[[], list[Tensor]]) -> list[RemovableHandle]:
    """Hook nodes so that operations process 1 / ``many`` of the channels and the others bypass them (PC-DARTS).

    Each node then outputs  shuffle([operations on the first C / many channels ; Σ w_e · the other channels of edge e]).

    The operation itself keeps all channels, but its convolutions see 0 in the others: it computes what a narrower one
    would, at the memory and time of the whole. The other channels are max-pooled where the node halves the resolution.

    >>> from regrow.core.candidates import Candidates
    >>> net = nn.Sequential(Candidates({"mixed": nn.Conv2d(2, 2, 1, bias=False)}))
    >>> _ = nn.init.constant_(net[0].ops["mixed"].weight, 5.0)
    >>> handles = partial_channels(net, 2, lambda: [torch.ones(1)])
    >>> net(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)).flatten().tolist()
    [5.0, 3.0]
    """
    handles = []

    def mask_input(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (_first(inputs[0], many),)

    for number, (path, node) in enumerate(find_candidates(model).items()):
        for module in node.modules():
            if isinstance(module, nn.Conv2d):
                if module.out_channels % many:
                    raise ValueError(
                        f"one channel of {many} is worked on, and {path} has {module.out_channels}: take a divisor"
                    )
                handles.append(module.register_forward_pre_hook(mask_input))

        def bypass(node: Any, inputs: tuple[Tensor, ...], total: Tensor, number: int = number) -> Tensor:
            out = _first(total, many)
            for source, weight in zip(dict.fromkeys(node.sources), weights()[number], strict=True):
                rest = inputs[source]
                if rest.shape[2:] != total.shape[2:]:
                    rest = F.max_pool2d(rest, 2, ceil_mode=True)
                out = out + weight * (rest - _first(rest, many))
            return F.channel_shuffle(out, many)

        handles.append(node.register_forward_hook(bypass))
    return handles


def _first(x: Tensor, many: int) -> Tensor:
    """Return the first 1 / ``many`` of the channels, and 0 in place of the others."""
    return x * (torch.arange(x.shape[1], device=x.device) < x.shape[1] // many).to(x.dtype)[:, None, None]
