"""A mapping from tensors, by identity, for fake tensors that are kept alive anyway."""

from collections.abc import Iterator, MutableMapping

from torch import Tensor
from torch.fx import Node


class TensorMap(MutableMapping[Tensor, Node]):
    """Mapping of tensor → node that keeps its tensors; faster than one that lets them go.

    >>> import torch
    >>> x, graph = torch.ones(2), torch.fx.Graph()
    >>> nodes = TensorMap()
    >>> nodes[x] = graph.placeholder("x")
    >>> x in nodes, torch.ones(2) in nodes
    (True, False)
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Tensor, Node]] = {}

    def __getitem__(self, key: Tensor) -> Node:
        """Return the node of a tensor."""
        return self._entries[id(key)][1]

    def __setitem__(self, key: Tensor, value: Node) -> None:
        """Set the node of a tensor."""
        self._entries[id(key)] = (key, value)

    def __delitem__(self, key: Tensor) -> None:
        """Forget a tensor."""
        del self._entries[id(key)]

    def __contains__(self, key: object) -> bool:
        return id(key) in self._entries

    def __iter__(self) -> Iterator[Tensor]:
        return (tensor for tensor, _ in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)
