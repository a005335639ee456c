"""Results of operations on constants alone, so that numbers that a network makes of its sizes follow the sizes.

A mask or a row of positions is made of numbers only. Where a network asks for an entry of it (``item``, a size that
only data know), the entry is computed; nothing is computed before, since most networks never ask.
"""

from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.tracing.forms import map_arguments


class ConstantResults:
    """The nodes of a recording whose values are made of constants alone, and their values once they are needed."""

    def __init__(self) -> None:
        self.known: dict[Node, Any] = {}
        self.calls: list[tuple[Node, Any, Any, Any]] = []

    def __contains__(self, node: object) -> bool:
        return node in self.known

    def add(self, node: Node, value: Tensor) -> None:
        """Add a constant.

        Args:
            node: Its placeholder.
            value: Its value, which nothing else may write into.
        """
        self.known[node] = value

    def add_call(self, node: Node, func: Any, args: Any, kwargs: Any) -> None:
        """Add an operation on constants; it is run when a value is needed.

        Args:
            node: The operation.
            func: What it runs.
            args: Its positional operands as nodes.
            kwargs: Its operands by name.
        """
        self.known[node] = None
        self.calls.append((node, func, args, kwargs))

    def holds(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation works on constants alone, and draws no random numbers.

        Args:
            func: The operation.
            args: Its positional operands as nodes.
            kwargs: Its operands by name.
        """
        read: list[Node] = []
        map_arguments((args, kwargs), Node, read.append)
        return all(x in self.known for x in read) and torch.Tag.nondeterministic_seeded not in func.tags

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on constants and return its result.

        Args:
            func: The operation.
            args: Its positional operands as nodes.
            kwargs: Its operands by name.
        """
        with no_python_dispatcher(), unset_fake_temporarily():
            self._catch_up()
            return self._result(func, args, kwargs)

    def forget(self, args: Any, kwargs: Any) -> None:
        """Forget constants that an operation on other tensors too may write into, and all that share their storage.

        Args:
            args: The positional operands of the operation as nodes.
            kwargs: Its operands by name.
        """
        nodes = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Node) and x in self.known]
        if not nodes:
            return
        with no_python_dispatcher(), unset_fake_temporarily():
            self._catch_up()
        written = {place for node in nodes for place in _storages(self.known[node])}
        self.known = {node: x for node, x in self.known.items() if written.isdisjoint(_storages(x))}

    def _catch_up(self) -> None:
        """Run the operations that were added since."""
        for node, func, args, kwargs in self.calls:
            self.known[node] = self._result(func, args, kwargs)
        self.calls.clear()

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        values, named = map_arguments((args, kwargs), Node, self.known.__getitem__)
        return func(*values, **named)


def _storages(value: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(value) if isinstance(x, Tensor)}
