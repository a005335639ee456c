"""Locate modules in a recording, and find those whose output is only added to the rest, which can be dropped."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.core.branches import Branch
from regrow.tracing.effects import Effects
from regrow.tracing.nodes import ALIASES, op_name


@dataclass(frozen=True)
class BranchSite:
    """The output of a droppable module in a recording, and the value that replaces it.

    Args:
        node: The node of the module's output.
        source: The module's input, if that passes through to the output; ``None``: zeros replace the output.
    """

    node: Node
    source: Node | None


class BranchError(Exception):
    """Raised with the reason why a module cannot be dropped."""


@dataclass(frozen=True)
class RecordedModules:
    """The operations of a recording, grouped by module.

    Args:
        effects: The recording's operations and their users.
    """

    effects: Effects

    @cached_property
    def inside(self) -> dict[str, list[Node]]:
        """Path of a module → the operations in it, those of its children included."""
        result: dict[str, list[Node]] = {}
        for node in self.effects.calls:
            for path in enclosing_modules(node):
                result.setdefault(path, []).append(node)
        return result

    def site(self, path: str) -> BranchSite:
        """Return the output of a module and its replacement, if the module can be dropped.

        Args:
            path: The path of the module.

        Raises:
            BranchError: If its output is not only added to something, nor its own input plus something.
        """
        own = self.inside.get(path, [])
        if not own:
            raise BranchError("nothing is recorded in it: it hands on what it is given")
        known = {*own}
        given = [node for node in own if not known.issuperset(self.effects.users.get(node, ()))]
        if len(given) != 1:
            raise BranchError("several things in it are used outside of it" if given else "nothing uses what it gives")
        (node,) = given
        if not isinstance(node.meta.get("val"), Tensor):
            raise BranchError("what it gives is no tensor")
        problem = self.effects.only_added(given)
        if not problem:
            return BranchSite(node, None)
        source = self._through(node, known)
        if source is None:
            raise BranchError(problem)
        if any(one not in known for origin in known for one in self.effects.writers.get(origin, ())):
            raise BranchError("what it gives is written into afterwards, which would change its input")
        return BranchSite(node, source)

    def _through(self, node: Node, known: set[Node]) -> Node | None:
        """Return the outside value that reaches a node through additions only, once, in the same shape; or ``None``."""
        ends, ask, sums = [], [node], 0
        while ask:
            one = ask.pop()
            if one not in known:
                ends.append(one)
            elif op_name(one) == "add" and not one.kwargs:
                ask += [self.effects.same(part) for part in one.args[:2] if isinstance(part, Node)]
                sums += all(isinstance(part, Node) or part == 0 for part in one.args[:2])
            elif op_name(one) in ALIASES | {"dropout"}:
                ask += [self.effects.same(part) for part in one.args[:1]]
        ends = [one for one in ends if one not in self.effects.fixed]
        if len(ends) != 1 or not sums:
            return None
        return ends[0] if tensor_forms(node.meta.get("val")) == tensor_forms(ends[0].meta.get("val")) else None

    def dead(self, at: BranchSite) -> set[Node]:
        """Return the operations on which no output depends once the branch is dropped.

        Args:
            at: The output of the branch.
        """
        return {*self.effects.calls} - self.effects.live({at.node: at.source})


def enclosing_modules(node: Node) -> list[str]:
    """Return the paths of the modules in whose forward a node was recorded, outermost first.

    Args:
        node: The node.
    """
    return [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values() if path]


def locate_branches(recorded: RecordedModules, branches: Iterable[Branch]) -> dict[Node, Node | None]:
    """Return what dropping branches replaces in a recording: output node → input node, or ``None`` for zeros.

    Args:
        recorded: The recording.
        branches: The branches.

    Raises:
        BranchError: If one cannot be dropped in this recording, or nothing would be left of a sum.
    """
    replaced: dict[Node, Node | None] = {}
    for branch in branches:
        at = recorded.site(branch.module)
        if (at.source is None) != (branch.gives == "zero"):
            raise BranchError(f"{branch.module} does something else here")
        replaced[at.node] = at.source
    if problem := recorded.effects.only_added(node for node, source in replaced.items() if source is None):
        raise BranchError(problem)
    return replaced


def tensor_forms(value: object) -> list[tuple[torch.Size, torch.dtype]]:
    """Return (shape, dtype) of every tensor in a nested value.

    Args:
        value: Tensors in lists, tuples and dicts.
    """
    return [(x.shape, x.dtype) for x in tree_leaves(value) if isinstance(x, Tensor)]
