"""DARTS cells: softmax weights of the operations on each edge, which holds the operations of a node on one source."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.core.candidates import find_candidates

# How many edges into a node DARTS keeps
INPUTS = 2


@dataclass(frozen=True)
class Edges:
    """Index tables from the operations of a network to its edges and to their entries in α.

    α, ``[entries]``, are the architecture parameters of DARTS, one per operation and one for "none" per edge.

    Args:
        table: The entries of α on each edge, that of "none" first, ``[edges, most]``; padded with ``entries``.
        edge: The edge of each operation, ``[operations]``.
        column: The column of ``table`` that holds each operation, ``[operations]``.
        entries: How many entries α has.
    """

    table: Tensor
    edge: Tensor
    column: Tensor
    entries: int

    @classmethod
    def of(cls, model: nn.Module) -> "Edges":
        """Return the index tables of a network's candidate operations; raise ``ValueError`` if it has none."""
        entries = 0
        rows: list[list[int]] = []
        edge, column = [], []
        for node in find_candidates(model).values():
            edge_of: dict[int, int] = {}
            for source in node.sources:
                if source not in edge_of:
                    edge_of[source] = len(rows)
                    rows.append([entries])
                    entries += 1
                row = rows[edge_of[source]]
                edge.append(edge_of[source])
                column.append(len(row))
                row.append(entries)
                entries += 1
        if not rows:
            raise ValueError("the network has no candidates to choose from: mark them with regrow.Candidates")
        most = max(map(len, rows))
        table = torch.tensor([row + [entries] * (most - len(row)) for row in rows])
        return cls(table, torch.tensor(edge), torch.tensor(column), entries)

    def share(self, alpha: Tensor) -> Tensor:
        """Return each operation's softmax of ``alpha``, ``[entries]``, on its edge with "none": ``[operations]``."""
        logits = torch.cat([alpha, alpha.new_full((1,), -torch.inf)]).index_select(0, self.table.reshape(-1))
        return logits.view_as(self.table).softmax(1)[self.edge, self.column]


def select_operations(share: Tensor, edge: Tensor, node: Tensor) -> Tensor:
    """Return which operations a discrete cell keeps, ``[operations]`` bool: the best of each node's best two edges.

    Of each operation, ``[operations]``: ``share``, its softmax weight; ``edge`` and ``node``, the indices of its edge
    and of the node (sum) that it is added to.
    """
    result, used, room = torch.zeros_like(share, dtype=torch.bool), set(), dict.fromkeys(node.tolist(), INPUTS)
    edges, nodes = edge.tolist(), node.tolist()
    for i in share.argsort(descending=True, stable=True).tolist():
        if edges[i] not in used and room[nodes[i]]:
            result[i] = True
            used.add(edges[i])
            room[nodes[i]] -= 1
    return result
