"""Where modules lie in a recording, and whether what they give is only added to the rest."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.branches import Branch
from regrow.tracing.effects import Effects
from regrow.tracing.walk import ALIASES, op_name


@dataclass(frozen=True)
class BranchSite:
    """Where a branch lies in a recording.

    Args:
        node: What the module gives.
        source: Its input, where that goes through; ``None`` where its result is replaced by zeros.
    """

    node: Node
    source: Node | None


class BranchError(Exception):
    """A module cannot be dropped."""


@dataclass(frozen=True)
class RecordedModules:
    """A recording, by module."""

    effects: Effects

    @cached_property
    def inside(self) -> dict[str, list[Node]]:
        """Path of a module → its operations, those of its parts too."""
        result: dict[str, list[Node]] = {}
        for node in self.effects.calls:
            for path in enclosing_modules(node):
                result.setdefault(path, []).append(node)
        return result

    def site(self, path: str) -> BranchSite:
        """Where a module lies as a branch.

        Raises:
            BranchError: If what it gives is neither only added, nor its input and more.
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
        """The value from outside that reaches a node by additions only, at least one, once; of the same form."""
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
        """The operations that nothing rests on once the branch is gone."""
        return {*self.effects.calls} - self.effects.live({at.node: at.source})


def enclosing_modules(node: Node) -> list[str]:
    """The paths of the modules in whose forward a node was recorded, the outermost first."""
    return [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values() if path]


def locate_branches(recorded: RecordedModules, branches: Iterable[Branch]) -> dict[Node, Node | None]:
    """What is replaced in a recording when branches go: each value, and its input, or ``None`` for zeros.

    Raises:
        BranchError: If one is no branch here, or nothing would be left of a sum.
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


def tensor_forms(value: object) -> list[tuple[Any, ...]]:
    """Shape and precision of every tensor in a value."""
    return [(x.shape, x.dtype) for x in tree_leaves(value) if isinstance(x, Tensor)]
