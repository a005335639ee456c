"""Locate modules in a recording, and find those whose output is only added to the rest, which can be dropped."""

from collections.abc import Container, Iterable, Mapping
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
from regrow.tracing.nodes import (
    ALIASES,
    ZERO_PRESERVING,
    map_arguments,
    module_of,
    modules_around,
    op_name,
    shapes_of,
    writes_in_place,
)

# Operation that is linear in its weight and bias together → their positions.
_SCALED_BY: Mapping[str, slice] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "batch_norm"), slice(1, 3)),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), slice(2, 4)),
    "addmm": slice(0, 3, 2),
}

# Node → the node whose value replaces its own; ``None``: zeros replace it.
Replaced = Mapping[Node, Node | None]

# The output of a module that can be dropped, and its input, if that passes through; ``None``: zeros replace it.
Site = tuple[Node, Node | None]


class BranchError(Exception):
    """Raised with the reason why a module cannot be dropped."""


class Effects:
    """The data-flow graph of a recording: inputs and users of each node, without casts that change nothing.

    A cast to the dtype, device and layout that a tensor already has counts as the tensor itself.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._sources: dict[Node, Node] = {}  # cast that changes nothing → the node that made its tensor
        self.inputs: dict[Node, list[Node]] = {}
        self.users: dict[Node, list[Node]] = {}
        for node in capture.graph.nodes:
            if _returns_operand(node):
                self._sources[node] = self.source_of(node.args[0])
            elif not op_name(node).startswith("_assert"):
                self.inputs[node] = list(dict.fromkeys(map(self.source_of, node.all_input_nodes)))
                for read in self.inputs[node]:
                    self.users.setdefault(read, []).append(node)
        self.order = {node: i for i, node in enumerate(self.inputs)}  # node → its position in the graph
        self.calls = [node for node in self.inputs if node.op == "call_function"]
        self.end = next(node for node in self.inputs if node.op == "output")

    def source_of(self, node: Argument) -> Node:
        """Return the node that made the tensor, behind casts that change nothing."""
        assert isinstance(node, Node)
        return self._sources.get(node, node)

    @cached_property
    def fixed(self) -> set[Node]:
        """The nodes that depend on parameters, buffers and constants alone, or are zeros of any shape."""
        result: set[Node] = {*self.capture.states, *self.capture.constants}
        for node, inputs in self.inputs.items():
            is_fixed = result.issuperset(inputs) or op_name(node) == "zeros_like"
            if node.op == "get_attr" or (node.op == "call_function" and is_fixed):
                result.add(node)
        return result

    @cached_property
    def writers(self) -> dict[Node, list[Node]]:
        """Node that made a tensor → the operations that write into it in place."""
        result: dict[Node, list[Node]] = {}
        for node in self.calls:
            if writes_in_place(node) and node.args:
                result.setdefault(self.root(node.args[0]), []).append(node)
        return result

    @cached_property
    def inside(self) -> dict[str, list[Node]]:
        """Path of a module → the operations in it and in its children, in order; the network itself is left out."""
        result: dict[str, list[Node]] = {}
        for node in self.calls:
            for path, *_ in modules_around(node):
                if path:
                    result.setdefault(path, []).append(node)
        return result

    def root(self, value: Argument) -> Node:
        """Return the node that made the memory in which a value (the first, of a list) lies, behind views."""
        while True:
            node = self.source_of(value[0] if isinstance(value, list | tuple) else value)
            if node.op != "call_function" or not node.args or not _is_view(node):
                return node
            value = node.args[0]

    def live(self, replaced: Replaced) -> set[Node]:
        """Return the nodes on which the outputs depend once some values are replaced, without the replaced ones.

        They include operations that write in place into such a tensor, or into a parameter, a buffer or an input.
        """
        reached: set[Node] = set()
        pending = [*self.inputs[self.end]]
        pending += [node for origin, nodes in self.writers.items() if origin.op == "placeholder" for node in nodes]
        while pending:
            node = replacement_of(pending.pop(), replaced)
            if node not in reached:
                reached.add(node)
                pending += [*(() if node in replaced else self.inputs[node]), *self.writers.get(node, ())]
        return reached - replaced.keys()

    def dead(self, site: Site) -> set[Node]:
        """Return the operations on which no output depends once the module at ``site`` is dropped."""
        return {*self.calls} - self.live(dict([site]))

    def find_other_use(self, zeros: Iterable[Node]) -> str:
        """Return what else than adding is done with the values of some nodes, as a problem; empty if nothing is.

        Nothing is if all that is computed from them before an addition is 0 where they are 0, and the other summand
        depends on the network's input.
        """
        zero = set(zeros)  # and all nodes whose values are 0 with these
        first = min(map(self.order.__getitem__, zero), default=0)
        for node, inputs in islice(self.inputs.items(), first, None):
            if node in zero or zero.isdisjoint(inputs):
                continue
            if node is self.end:
                return "it is an answer of the network"
            others = [operand for operand in inputs if operand not in zero]
            name, where = op_name(node), module_of(node) or "the model"
            if name in ("add", "sub", "rsub"):
                if not others and not any(isinstance(x, int | float) and x for x in node.args[:2]):
                    zero.add(node)
                elif self.fixed.issuperset(others):
                    return f"nothing that depends on the input would be left of the sum in {where}"
            elif not others and name in ("cat", "concat", "stack", "sum", "mean"):
                zero.add(node)
            elif name in ZERO_PRESERVING | ALIASES | {"mul"} or (
                name == "div" and isinstance(node.args[0], Node) and self.source_of(node.args[0]) in zero
            ):
                if not self.fixed.issuperset(others):
                    return f"it is multiplied with something that is computed in {where}, not added to it"
                zero.add(node)
            else:
                return f"{name} in {where} reads it, which is no addition"
        return ""

    def find_site(self, path: str) -> Site:
        """Return a module's output node and its replacement (``None``: zeros); BranchError if it cannot be dropped."""
        inside = dict.fromkeys(self.inside.get(path, []))
        if not inside:
            raise BranchError("nothing is recorded in it: it hands on what it is given")
        outputs = [node for node in inside if not inside.keys() >= {*self.users.get(node, ())}]
        if len(outputs) != 1:
            raise BranchError("several things in it are used outside of it, or none")
        (node,) = outputs
        if not isinstance(node.meta.get("val"), Tensor):
            raise BranchError("what it gives is no tensor")
        problem = self.find_other_use(outputs)
        if not problem:
            return node, None
        source = self._find_passed_value(node, inside)
        if source is None:
            raise BranchError(problem)
        if any(writer not in inside for origin in inside for writer in self.writers.get(origin, ())):
            raise BranchError("what it gives is written into afterwards, which would change its input")
        return node, source

    def find_scales(self, node: Node, source: Node | None) -> list[str] | None:
        """Return names of parameters with which, all 0, a node is 0, or the ``source`` that it adds to; or ``None``."""
        name, operands = op_name(node), [self.source_of(x) for x in node.args if isinstance(x, Node)]
        if node is source:
            return []
        if name == "mul" and (scale := next((x for x in operands if x in self.capture.states), None)):
            return [self.capture.states[scale]]
        if name == "mul":  # what a norm multiplies with would undo the scale
            varying = [x for x in operands if x not in self.fixed]
            return self.find_scales(varying[0], None) if len(varying) == 1 else None
        if name == "add" and not node.kwargs and len(operands) == 2:
            parts = [self.find_scales(x, source) for x in operands]
            return None if None in parts else [name for part in parts for name in part or ()]
        if name in _SCALED_BY:
            weights = [x for x in node.args[_SCALED_BY[name]] if isinstance(x, Node)]
            return [self.capture.states.get(self.source_of(x), "") for x in weights]
        passes = name in ZERO_PRESERVING | ALIASES and operands
        return self.find_scales(operands[0], source) if passes else None

    def _find_passed_value(self, node: Node, inside: Container[Node]) -> Node | None:
        """Return the outside value that reaches a node through additions only, once, in the same shape; or ``None``."""
        ends, pending, sums = [], [node], 0  # sums: how many of the additions have no constant operand but 0
        while pending:
            part = pending.pop()
            if part not in inside:
                ends.append(part)
            elif op_name(part) == "add" and not part.kwargs:
                pending += [self.source_of(x) for x in part.args[:2] if isinstance(x, Node)]
                sums += all(isinstance(x, Node) or x == 0 for x in part.args[:2])
            elif op_name(part) in ALIASES | {"dropout"}:
                pending += [self.source_of(x) for x in part.args[:1]]
        ends = [end for end in ends if end not in self.fixed]
        if len(ends) != 1 or not sums:
            return None
        return ends[0] if tensor_forms(node.meta.get("val")) == tensor_forms(ends[0].meta.get("val")) else None


def replacement_of(node: Node, replaced: Replaced) -> Node:
    """Return the node whose value a node has in the end; itself if it is not replaced, or by zeros."""
    while (source := replaced.get(node)) is not None:
        node = source
    return node


def _returns_operand(node: Node) -> bool:
    """Whether an operation is a cast that returns the very tensor that it is given."""
    if op_name(node) not in ("to", "type_as", "contiguous") or not node.args or not isinstance(node.args[0], Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return (before.dtype, before.device, before.stride()) == (after.dtype, after.device, after.stride())


def _is_view(node: Node) -> bool:
    """Whether the result of an operation may share the memory of its first operand."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    named = op_name(node) in ALIASES | {"reshape", "flatten", "getitem"}
    return named or any(result.alias_info is not None for result in returns)


def find_effect_difference(ours: Effects, replaced: Replaced, theirs: Effects, zeros: Mapping[Node, Node]) -> str:
    """Describe the first difference between ``ours``, with some values replaced, and ``theirs``; empty if none.

    ``zeros``: node of ``ours`` → node of ``theirs`` that gives the zeros in its place. Both are reduced to the
    operations on which their outputs depend, which are compared one by one.
    """
    our_live, their_live = ours.live(replaced), theirs.live(dict.fromkeys(zeros.values()))
    named = {name: node for node, name in theirs.capture.states.items()}
    partner: dict[Node, Node] = dict(zeros)
    for node in our_live & ours.capture.states.keys():
        name = ours.capture.states[node]
        if name not in named:
            return f"{name} is gone"
        partner[node] = named[name]
    our_constants = [node for node in ours.capture.constants if node in our_live]
    their_constants = [node for node in theirs.capture.constants if node in their_live]
    our_inputs = [*ours.capture.inputs, *ours.capture.graph.find_nodes(op="get_attr")]
    their_inputs = [*theirs.capture.inputs, *theirs.capture.graph.find_nodes(op="get_attr")]
    pairs = [*zip(our_constants, their_constants, strict=False)]
    equal = all(_are_equal(ours.capture.constants[a], theirs.capture.constants[b]) for a, b in pairs)
    if len(our_constants) != len(their_constants) or len(our_inputs) != len(their_inputs) or not equal:
        return "the network makes other constants"
    partner |= dict(pairs) | dict(zip(our_inputs, their_inputs, strict=True))
    our_calls = [node for node in ours.calls if node in our_live]
    their_calls = [node for node in theirs.calls if node in their_live]
    if len(our_calls) != len(their_calls):
        return f"the answers rest on {len(their_calls)} operations, not on {len(our_calls)}"
    for node, twin in zip([*our_calls, ours.end], [*their_calls, theirs.end], strict=True):
        read = map_arguments(
            (node.args, node.kwargs), Node, lambda x: partner.get(replacement_of(ours.source_of(x), replaced))
        )
        is_same = node.target == twin.target and shapes_of(node) == shapes_of(twin)
        if not is_same or read != map_arguments((twin.args, twin.kwargs), Node, theirs.source_of):
            return f"{op_name(twin) or 'the answer'} in {module_of(twin) or 'the model'} is another operation there"
        partner[node] = twin
    return ""


def _are_equal(x: Tensor, other: Tensor) -> bool:
    """Whether two constants have one shape, dtype and values; of tensors without values, shape and dtype."""
    if x.shape != other.shape or x.dtype != other.dtype:
        return False
    return any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in (x, other)) or torch.equal(x, other)


def outermost(paths: Iterable[str]) -> list[str]:
    """Return those of some module paths that lie in no other one of them."""
    all_paths = [*paths]
    return [path for path in all_paths if not any(lies_in(path, other) and path != other for other in all_paths)]


def locate_branches(effects: Effects, branches: Iterable[Branch]) -> dict[Node, Node | None]:
    """Return what dropping branches replaces: output node → input node, or ``None`` for zeros; or BranchError."""
    replaced: dict[Node, Node | None] = {}
    for branch in branches:
        node, source = effects.find_site(branch.module)
        if (source is None) != (branch.gives == "zero"):
            raise BranchError(f"{branch.module} does something else here")
        replaced[node] = source
    if problem := effects.find_other_use(node for node, source in replaced.items() if source is None):
        raise BranchError(problem)
    return replaced


def tensor_forms(value: object) -> list[tuple[torch.Size, torch.dtype]]:
    """Return (shape, dtype) of every tensor in a nested value."""
    return [(x.shape, x.dtype) for x in tree_leaves(value) if isinstance(x, Tensor)]
