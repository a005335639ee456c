"""Locate modules in a recording, and find those whose output is only added to the rest, which can be dropped."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.node import Argument
from torch.utils._pytree import tree_leaves

from regrow.core.axes.operations import Branch, lies_in
from regrow.tracing.capture import Capture
from regrow.tracing.nodes import ALIASES, ZERO_PRESERVING, module_of, op_name, shapes_of, writes

Replaced = Mapping[Node, Node | None]
"""Node → the node whose value replaces its own; ``None``: zeros replace it."""


class Effects:
    """The data-flow graph of a recording: inputs and users of each operation, without casts that change nothing.

    A cast to the dtype, device and layout that a tensor already has counts as the tensor itself.

    Args:
        capture: The recording.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._same: dict[Node, Node] = {}
        self.inputs: dict[Node, list[Node]] = {}
        self.users: dict[Node, list[Node]] = {}
        for node in capture.graph.nodes:
            if _hands_on(node):
                self._same[node] = self.same(node.args[0])
            elif not op_name(node).startswith("_assert"):
                self.inputs[node] = list(dict.fromkeys(map(self.same, node.all_input_nodes)))
                for one in self.inputs[node]:
                    self.users.setdefault(one, []).append(node)
        self.place = {node: i for i, node in enumerate(self.inputs)}
        self.calls = [node for node in self.inputs if node.op == "call_function"]
        self.end = next(node for node in self.inputs if node.op == "output")

    def same(self, node: Argument) -> Node:
        """Return the node that made the tensor, behind casts that change nothing."""
        assert isinstance(node, Node)
        return self._same.get(node, node)

    @cached_property
    def fixed(self) -> set[Node]:
        """The nodes that depend on parameters, buffers and constants alone, or are zeros of any shape."""
        result: set[Node] = {*self.capture.states, *self.capture.constants}
        for node, given in self.inputs.items():
            still = node.op == "call_function" and (result.issuperset(given) or op_name(node) == "zeros_like")
            if node.op == "get_attr" or still:
                result.add(node)
        return result

    @cached_property
    def writers(self) -> dict[Node, list[Node]]:
        """Node that made a tensor → the operations that write into it in place."""
        result: dict[Node, list[Node]] = {}
        for node in self.calls:
            if writes(node) and node.args:
                result.setdefault(self.root(node.args[0]), []).append(node)
        return result

    def root(self, value: Argument) -> Node:
        """Return the node that made the memory in which a value lies, behind views."""
        while True:
            node = self.same(value[0] if isinstance(value, list | tuple) else value)
            if node.op != "call_function" or not node.args or not _views(node):
                return node
            value = node.args[0]

    def live(self, replaced: Replaced) -> set[Node]:
        """Return the nodes on which the outputs depend once some values are replaced, without the replaced ones.

        An operation that writes into a tensor in place counts where that tensor does.
        """
        reached: set[Node] = set()
        ask = [*self.inputs[self.end]]
        ask += [node for origin, nodes in self.writers.items() if origin.op == "placeholder" for node in nodes]
        while ask:
            node = replacement_of(ask.pop(), replaced)
            if node not in reached:
                reached.add(node)
                ask += [*(() if node in replaced else self.inputs[node]), *self.writers.get(node, ())]
        return reached - replaced.keys()

    def only_added(self, zeros: Iterable[Node]) -> str:
        """Return why the values of some nodes are not only summands; empty if they are.

        They are if everything computed from them before an addition is 0 where they are 0, and the other summand
        depends on the network's input.
        """
        silent = set(zeros)
        first = min(map(self.place.__getitem__, silent), default=0)
        for node, given in islice(self.inputs.items(), first, None):
            if node in silent or silent.isdisjoint(given):
                continue
            if node is self.end:
                return "it is an answer of the network"
            others = [one for one in given if one not in silent]
            name, where = op_name(node), module_of(node) or "the model"
            if name in ("add", "sub", "rsub"):
                if not others and not any(isinstance(x, int | float) and x for x in node.args[:2]):
                    silent.add(node)
                elif self.fixed.issuperset(others):
                    return f"nothing that depends on the input would be left of the sum in {where}"
            elif not others and name in ("cat", "concat", "stack", "sum", "mean"):
                silent.add(node)
            elif name in ZERO_PRESERVING | ALIASES | {"mul"} or (
                name == "div" and isinstance(node.args[0], Node) and self.same(node.args[0]) in silent
            ):
                if not self.fixed.issuperset(others):
                    return f"it is multiplied with something that is computed in {where}, not added to it"
                silent.add(node)
            else:
                return f"{name} in {where} reads it, which is no addition"
        return ""


def replacement_of(node: Node, replaced: Replaced) -> Node:
    """Return the node whose value replaces that of another one; a node replaced by zeros, or not at all, itself."""
    while (source := replaced.get(node)) is not None:
        node = source
    return node


def _hands_on(node: Node) -> bool:
    """Whether an operation returns the very tensor that it is given."""
    if op_name(node) not in ("to", "type_as", "contiguous") or not node.args or not isinstance(node.args[0], Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return (before.dtype, before.device, before.stride()) == (after.dtype, after.device, after.stride())


def _views(node: Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    named = op_name(node) in ALIASES | {"reshape", "flatten", "getitem"}
    return named or any(result.alias_info is not None for result in returns)


def describe_effects(ours: Effects, replaced: Replaced, theirs: Effects, zeros: Mapping[Node, Node]) -> str:
    """Return the first difference between a network with replaced values and another network; empty if none.

    Both are reduced to the operations on which their outputs depend, which are compared one by one.
    """
    partner: dict[Node, Node] = dict(zeros)
    kept, other = ours.live(replaced), theirs.live(dict.fromkeys(zeros.values()))
    if problem := _placed(ours.capture, kept, theirs.capture, other, partner):
        return problem
    mine, its = ([n for n in one.calls if n in alive] for one, alive in ((ours, kept), (theirs, other)))
    if len(mine) != len(its):
        return f"the answers rest on {len(its)} operations, not on {len(mine)}"
    for node, twin in zip([*mine, ours.end], [*its, theirs.end], strict=True):
        where = f"{op_name(twin) or 'the answer'} in {module_of(twin) or 'the model'}"
        if node.target != twin.target or shapes_of(node) != shapes_of(twin):
            return f"{where} runs where {op_name(node)} did, or has another shape"
        for one, two in ((node.args, twin.args), (node.kwargs, twin.kwargs)):
            if not _alike(one, two, lambda a, b: partner.get(replacement_of(ours.same(a), replaced)) is theirs.same(b)):
                return f"{where} is given something else"
        partner[node] = twin
    return ""


def _placed(ours: Capture, kept: set[Node], theirs: Capture, other: set[Node], partner: dict[Node, Node]) -> str:
    """Pair parameters and buffers by name, inputs and constants by order; return what does not pair, or empty."""
    named = {name: node for node, name in theirs.states.items()}
    for node in kept & ours.states.keys():
        if ours.states[node] not in named:
            return f"{ours.states[node]} is gone"
        partner[node] = named[ours.states[node]]

    mine, its = ([n for n in run.constants if n in alive] for run, alive in ((ours, kept), (theirs, other)))
    given, takes = ([*run.inputs, *run.graph.find_nodes(op="get_attr")] for run in (ours, theirs))
    equal = len(mine) == len(its) and len(given) == len(takes)
    if not equal or not all(_equal(ours.constants[a], theirs.constants[b]) for a, b in zip(mine, its, strict=True)):
        return "the network makes other constants"
    partner.update(zip([*mine, *given], [*its, *takes], strict=True))
    return ""


def _alike(one: object, other: object, same: Callable[[Node, Node], bool]) -> bool:
    if isinstance(one, Node):
        return isinstance(other, Node) and same(one, other)
    if isinstance(one, tuple | list):
        if not isinstance(other, tuple | list) or len(one) != len(other):
            return False
        return all(_alike(a, b, same) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return False
        return all(_alike(one[key], other[key], same) for key in one)
    return bool(one == other)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return any(isinstance(x, FakeTensor) or x.is_meta for x in (one, other)) or torch.equal(one, other)


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
            for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
                if path:
                    result.setdefault(path, []).append(node)
        return result

    def site(self, path: str) -> BranchSite:
        """Return the output of a module and its replacement, if the module can be dropped."""
        known = dict.fromkeys(self.inside.get(path, []))
        if not known:
            raise BranchError("nothing is recorded in it: it hands on what it is given")
        given = [node for node in known if not known.keys() >= {*self.effects.users.get(node, ())}]
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

    def _through(self, node: Node, known: Container[Node]) -> Node | None:
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
        """Return the operations on which no output depends once the branch is dropped."""
        return {*self.effects.calls} - self.effects.live({at.node: at.source})


def outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths of modules that lie in no other one."""
    every = [*paths]
    return [path for path in every if not any(lies_in(path, other) and path != other for other in every)]


def locate_branches(recorded: RecordedModules, branches: Iterable[Branch]) -> dict[Node, Node | None]:
    """Return what dropping branches replaces in a recording: output node → input node, or ``None`` for zeros."""
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
    """Return (shape, dtype) of every tensor in a nested value."""
    return [(x.shape, x.dtype) for x in tree_leaves(value) if isinstance(x, Tensor)]
