"""Edges: the operations of one node that read the same source, weighed against each other."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.candidates import Candidates, candidates_in


@dataclass(frozen=True)
class Edges:
    """Where the operations of a network lie on its edges, and which entry of α, and of β, is whose.

    Args:
        table: The entries of α on each edge, that of none first, ``[edges, most]``; ``entries`` where there are fewer.
        edge: The edge of each operation, ``[operations]``.
        column: Its column of the table, ``[operations]``.
        entries: How many entries α has.
        node: The node that each edge leads into, ``[edges]``.
        beta: The entry of β of each edge, ``[edges]``.
    """

    table: Tensor
    edge: Tensor
    column: Tensor
    entries: int
    node: Tensor
    beta: Tensor

    @property
    def betas(self) -> int:
        """How many entries β has."""
        return int(self.beta.max()) + 1

    @classmethod
    def of(cls, model: nn.Module, names: Mapping[str, str]) -> "Edges":
        """The edges of a network.

        Args:
            model: The network.
            names: Path of a node → its name, where several have their entries together.

        Raises:
            ValueError: If it has no candidates.
        """
        entries: dict[tuple[str, int, str], int] = {}
        rows: list[list[int]] = []
        edge, column, nodes = [], [], []
        weights: dict[tuple[str, int], int] = {}
        betas = []
        for number, path in enumerate(candidates_in(model)):
            node, name = model.get_submodule(path), names.get(path, path)
            assert isinstance(node, Candidates)
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
        most = max(map(len, rows))
        table = [row + [len(entries)] * (most - len(row)) for row in rows]
        own = [torch.tensor(one) for one in (table, edge, column, nodes, betas)]
        return cls(own[0], own[1], own[2], len(entries), own[3], own[4])

    def share(self, alpha: Tensor, beta: Tensor | None = None) -> Tensor:
        """The weight of each operation among those of its edge and none, ``[operations]``.

        Args:
            alpha: Of operations, ``[entries]``.
            beta: Of edges, ``[betas]``: what it makes of each edge among those into its node is multiplied in.
        """
        logits = torch.cat([alpha, alpha.new_full((1,), -torch.inf)]).index_select(0, self.table.reshape(-1))
        found = logits.view_as(self.table).softmax(1)[self.edge, self.column]
        return found if beta is None else found * self.between(beta).index_select(0, self.edge)

    def between(self, beta: Tensor) -> Tensor:
        """The weight of each edge among those into its node, ``[edges]``; ``beta`` as in :meth:`share`."""
        grown = (beta - beta.detach().max()).exp().index_select(0, self.beta)
        total = grown.new_zeros(len(self.node)).index_add(0, self.node, grown)
        return grown / total.index_select(0, self.node)


def select_operations(share: Tensor, edge: Tensor, node: Tensor, most: int = 2) -> Tensor:
    """The operations that are kept: the best of each of the best edges into each node.

    Args:
        share: The weight of each operation, ``[operations]``.
        edge: The edge of each, ``[operations]``.
        node: The node of each, ``[operations]``.
        most: How many edges into a node are kept.

    Returns:
        ``[operations]`` bool.

    >>> select_operations(torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.tensor([0, 0, 1, 2]), torch.zeros(4)).tolist()
    [False, True, True, False]
    """
    result, seen, left = torch.zeros_like(share, dtype=torch.bool), set(), dict.fromkeys(node.tolist(), most)
    edges, nodes = edge.tolist(), node.tolist()
    for i in share.argsort(descending=True, stable=True).tolist():
        if edges[i] not in seen and left[nodes[i]]:
            result[i] = True
            seen.add(edges[i])
            left[nodes[i]] -= 1
    return result
