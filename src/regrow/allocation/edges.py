"""The edges of a DARTS cell: operations that read the same source, and softmax weights among them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.core.candidates import Candidates, candidates_in

INPUTS = 2
"""How many edges into a node DARTS keeps."""


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

        Args:
            model: The network, its nodes marked with :class:`regrow.Candidates`.
            names: Path of a node → its name; nodes of the same name share their entries of α and β.

        Raises:
            ValueError: If the network has no candidates.
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
        return cls(own[0], own[1], own[2], len(entries), own[3], own[4], tuple(Counter(nodes).values()))

    def share(self, alpha: Tensor, beta: Tensor | None = None) -> Tensor:
        """Return the softmax weight of each operation among those of its edge and "none", ``[operations]``.

        Args:
            alpha: The architecture parameters α, ``[entries]``.
            beta: The edge parameters β, ``[betas]``, or ``None``; if given, the weight of the operation's edge is
                multiplied in.
        """
        logits = torch.cat([alpha, alpha.new_full((1,), -torch.inf)]).index_select(0, self.table.reshape(-1))
        weights = logits.view_as(self.table).softmax(1)[self.edge, self.column]
        return weights if beta is None else weights * self.between(beta).index_select(0, self.edge)

    def between(self, beta: Tensor) -> Tensor:
        """Return the softmax weight of each edge among the edges into its node, ``[edges]`` (PC-DARTS).

        Args:
            beta: The edge parameters β, ``[betas]``.
        """
        grown = (beta - beta.detach().max()).exp().index_select(0, self.beta)
        total = grown.new_zeros(len(self.node)).index_add(0, self.node, grown)
        return grown / total.index_select(0, self.node)


def select_operations(share: Tensor, edge: Tensor, node: Tensor) -> Tensor:
    """Derive the discrete cell of DARTS: keep the best operation of each of the best edges into each node.

    Args:
        share: The softmax weight of each operation, ``[operations]``.
        edge: The edge of each operation, ``[operations]``.
        node: The node of each operation, ``[operations]``.

    Returns:
        Whether each operation is kept, ``[operations]`` bool.

    >>> select_operations(torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.tensor([0, 0, 1, 2]), torch.zeros(4)).tolist()
    [False, True, True, False]
    """
    result, seen, left = torch.zeros_like(share, dtype=torch.bool), set(), dict.fromkeys(node.tolist(), INPUTS)
    edges, nodes = edge.tolist(), node.tolist()
    for i in share.argsort(descending=True, stable=True).tolist():
        if edges[i] not in seen and left[nodes[i]]:
            result[i] = True
            seen.add(edges[i])
            left[nodes[i]] -= 1
    return result
