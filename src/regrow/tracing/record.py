"""Record a run of a network, on fake tensors or on real ones, whose data-dependent decisions can be replayed.

Where a network reads its data (which boxes overlap, which scores are high enough, whether a sum is positive),
``torch.export`` gives up. One real run gives every such value. The recording is the straight line of operations that
follows from these decisions: each is a constant in it, and the tensors it was based on are read by a marker,
:func:`decision`. With the same decisions the network runs again on tensors without numbers, at other sizes, and there
every operation and every shape can be compared with the recording, those after a decision too.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from regrow.core.axes import Decision
from regrow.tracing.interception import LINE, line_here, most_calls
from regrow.tracing.known_forms import KnownForms
from regrow.tracing.meta_copy import infer_result
from regrow.tracing.model_state import output_tensors
from regrow.tracing.nodes import map_arguments, operands_in

ORDERS = frozenset(
    (
        torch.ops.aten.sort.default,
        torch.ops.aten.sort.stable,
        torch.ops.aten.topk.default,
        torch.ops.aten.argsort.default,
        torch.ops.aten.argsort.stable,
    )
)
"""Operations that put entries in order, with the positions as their only or second result."""


class DivergedError(RuntimeError):
    """Raised where a run reaches other data-dependent decisions than those it is to replay."""


def decision(*read: Tensor) -> tuple[Tensor, ...]:
    """Mark a data-dependent decision in a graph: it takes the tensors that were read; the result is a constant."""
    return read


def compared_operands(node: Node) -> list[Node]:
    """Return the floating-point operands from which an operation computes integers or booleans."""
    made = [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
    if node.op != "call_function" or (node.target is not decision and all(x.is_floating_point() for x in made)):
        return []
    read = [(operand, _val(operand)) for operand in node.all_input_nodes]
    return [operand for operand, value in read if isinstance(value, Tensor) and value.is_floating_point()]


class TensorMap:
    """Mapping of tensor, by identity, → node that keeps its tensors; faster than one that lets them go."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Tensor, Node]] = {}

    def __getitem__(self, key: Tensor) -> Node:
        return self._entries[id(key)][1]

    def __setitem__(self, key: Tensor, value: Node) -> None:
        self._entries[id(key)] = (key, value)

    def __contains__(self, key: object) -> bool:
        return id(key) in self._entries


class ConstantResults:
    """The nodes of a recording whose values are made of constants alone, and their values once they are needed."""

    def __init__(self) -> None:
        self.known: dict[Node, Any] = {}
        self.calls: list[tuple[Node, Any, Any, Any]] = []

    def __contains__(self, node: object) -> bool:
        return node in self.known

    def add_call(self, node: Node, func: Any, args: Any, kwargs: Any) -> None:
        """Add an operation on constants; it is run when a value is needed."""
        self.known[node] = None
        self.calls.append((node, func, args, kwargs))

    def holds(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation works on constants alone, and draws no random numbers."""
        constant = all(node in self.known for node in operands_in((args, kwargs)))
        return constant and torch.Tag.nondeterministic_seeded not in func.tags

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on constants and return its result."""
        with no_python_dispatcher(), unset_fake_temporarily():
            self._catch_up()
            return self._result(func, args, kwargs)

    def forget(self, args: Any, kwargs: Any) -> None:
        """Forget constants that an operation on other tensors too may write into, and all that share their storage."""
        nodes = [node for node in operands_in((args, kwargs)) if node in self.known]
        if not nodes:
            return
        with no_python_dispatcher(), unset_fake_temporarily():
            self._catch_up()
        written = {address for node in nodes for address in _storages(self.known[node])}
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


class Recorder(ProxyTorchDispatchMode):
    """Torch dispatch mode that records operations before autograd and decompositions, as ``torch.export`` does.

    The base class is one that torch accepts at this place; everything else is done here. Each operation is also run on
    fake tensors: where these cannot tell the result, the data decide.
    """

    def __init__(
        self,
        answers: tuple[Decision, ...],
        orders: Iterable[Tensor],
        running: Callable[[], dict[str, Any]],
        fake: FakeTensorMode | None,
    ) -> None:
        super().__init__(PythonKeyTracer(), "real", pre_dispatch=True)
        self.graph = Graph()  # its placeholders are parameters, buffers, inputs and constants
        self.states: dict[Node, str] = {}  # placeholder → name of the parameter or buffer
        self.constants: dict[Node, Tensor] = {}  # what the network made from numbers, and results of decisions
        self.decisions: list[Decision] = []
        self.values: list[Tensor] = []  # on real tensors: floating-point outputs, then what is compared
        self.running, self.real = running, fake is None
        self.fake = fake or FakeTensorMode(allow_non_fake_inputs=True)
        self.answers, self.orders = iter(answers), iter(orders)
        self.nodes: TensorMap | WeakTensorKeyDictionary = WeakTensorKeyDictionary() if self.real else TensorMap()
        self.plain = ConstantResults()
        self.calls: list[Node] = []
        self.forms = KnownForms(self.fake)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and torch would load its compiler to make sure

    def end(self, result: Any) -> None:
        """Add the output to the graph."""
        tensors = output_tensors(result)
        self.graph.output(tuple(map(self._node, tensors)))
        if self.real:
            self.values[:0] = [x.detach() for x in tensors if x.is_floating_point()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self._seen(func, args, kwargs or {})

    def _seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if func in _FORWARD_MODE:
            raise RuntimeError("it takes forward derivatives (torch.func.jvp), which cannot be run again as recorded")
        if func in _PICKS:
            args = (args[0], [part for index in args[1] for part in self._positions(index)], *args[2:])
        nodes, named = map_arguments((args, kwargs), Tensor, self._node)
        plain = self.plain.holds(func, nodes, named)
        try:
            form = self._inferred(func, *map_arguments((nodes, named), Node, _val))
        except _DATA_DECIDE:
            if not plain:
                return self._decided(func, args, kwargs)
            return tree_map_only(Tensor, self._constant, self.plain.run(func, nodes, named))  # no data decide it
        if not plain and func._schema.is_mutable:
            self.plain.forget(nodes, named)
        node = self._write(func, nodes, named, form)
        self._keep_compared(node, args, kwargs)
        out = func(*args, **kwargs) if self.real else form
        if self.real and func in ORDERS:
            dim = {**dict(zip((x.name for x in func._schema.arguments), args, strict=False)), **kwargs}.get("dim", -1)
            out = _reorder(args[0], dim, out, next(self.orders, None))
        if plain:
            self.plain.add_call(node, func, nodes, named)
        self._name(node, out, form, plain)
        return out

    def _inferred(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation on fake tensors; layers of one form infer it once."""
        return self.forms.infer_once(self._infer, func, args, kwargs)

    def _infer(self, func: Any, args: Any, kwargs: Any) -> Any:
        if (form := infer_result(func, args, kwargs, self.fake)) is not NotImplemented:
            return form
        with self.fake:
            form = func(*args, **kwargs)
        for x in tree_leaves(form):
            if isinstance(x, FakeTensor):
                x.constant = None  # else fake tensors know small numbers, and ask less than real ones
        return form

    def _positions(self, index: Tensor | None) -> list[Tensor | None]:
        """Return a boolean index as one tensor of positions per dimension; other indices unchanged."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        positions = self._seen(torch.ops.aten.nonzero.default, (index,), {})
        return list(self._seen(torch.ops.aten.unbind.int, (positions, 1), {}))

    def _decided(self, func: Any, args: Any, kwargs: Any) -> Any:
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        nodes = [self._node(x) for x in read]
        node = self._write(decision, tuple(nodes), {}, list(map(_val, nodes)))
        node.meta["asks"] = str(func)
        self._keep_compared(node, args, kwargs)
        module, known = next(reversed(node.meta["nn_module_stack"]), ""), next(self.answers, None)
        if not self.real if known is None else (known.op, known.module) != (str(func), module):
            raise DivergedError(f"{func} in {module or 'the model'} asks what the recorded run did not ask there")
        answer = func(*args, **kwargs) if known is None else _cast_answer(read, known.answer)
        self.decisions.append(Decision(str(func), module, tree_map_only(Tensor, copy_tensor, answer)))
        node.meta["number"] = not isinstance(answer, Tensor | list | tuple)
        return tree_map_only(Tensor, lambda x: self._constant(x, plain=False), answer)

    def _keep_compared(self, node: Node, args: Any, kwargs: Any) -> None:
        if self.real:
            live = {self._node(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            self.values += [copy_tensor(live[operand]) for operand in compared_operands(node)]

    def _write(self, target: Any, args: Any, kwargs: Any, val: Any) -> Node:
        node = self._add(target, args, kwargs)
        node.meta |= {"val": val, "nn_module_stack": self.running(), LINE: line_here()}
        return node

    def _add(self, target: Any, args: Any, kwargs: Any) -> Node:
        if len(self.calls) >= most_calls.get():
            raise RuntimeError(f"it runs more than {len(self.calls)} operations")
        node = self.graph.create_node("call_function", target, args, kwargs)
        self.calls.append(node)
        return node

    def write_copy(self, node: Node, args: Any, kwargs: Any, stack: dict[str, Any]) -> Node:
        """Record an operation once more, on other operands and in another module."""
        made = self._add(node.target, args, kwargs)
        made.meta |= node.meta | {"nn_module_stack": stack}
        return made

    def _name(self, node: Node, out: Any, form: Any, plain: bool) -> None:
        """Associate the results of an operation with its node."""
        if isinstance(out, Tensor):
            self.nodes[out] = node
        elif isinstance(out, list | tuple):
            for i, (part, val) in enumerate(zip(out, form, strict=True)):
                if isinstance(part, Tensor):
                    entry = self._write(getitem, (node, i), {}, val)
                    if plain:
                        self.plain.add_call(entry, getitem, (node, i), {})
                    self._name(entry, part, val, plain)

    def _node(self, x: Tensor) -> Node:
        """Return the node of a tensor; a tensor that no operation made becomes a constant."""
        if x not in self.nodes:
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                raise RuntimeError("it runs inside torch.func (vmap, grad), whose tensors cannot be recorded")
            self._constant(x, copied=False)
        return self.nodes[x]

    def _constant(self, x: Tensor, plain: bool = True, copied: bool = True) -> Tensor:
        """Add a placeholder for a tensor and return a copy, or the tensor itself unless ``copied``."""
        flowing = x if not copied else copy_tensor(x) if self.real else self.fake.from_tensor(x)
        node = self.placeholder(flowing)
        self.constants[node] = copy_tensor(x)
        if plain and not isinstance(x, FakeTensor):
            self.plain.known[node] = copy_tensor(x)
        return flowing

    def placeholder(self, value: Any) -> Node:
        """Add an input of the graph: a parameter, a buffer, a constant, or an input of the network."""
        with self.graph.inserting_before(self.calls[0]) if self.calls else nullcontext():
            node = self.graph.placeholder(f"given_{len(self.graph.nodes)}")
        node.meta["val"] = value
        if isinstance(value, Tensor):
            node.meta["val"] = value if isinstance(value, FakeTensor) else self.fake.from_tensor(value)
            self.nodes[value] = node
        return node


def _val(node: Node) -> Any:
    return node.meta["val"]


def copy_tensor(x: Tensor) -> Tensor:
    """Return a copy without a history."""
    return x.detach().clone()


def _cast_answer(read: list[Tensor], answer: object) -> object:
    """Return a replayed decision in the precision of the tensors it was taken on."""
    dtypes = {x.dtype for x in read if x.is_floating_point()}
    if len(dtypes) != 1:
        return answer
    dtype = dtypes.pop()
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, answer)


def _reorder(x: Tensor, dim: int, result: Tensor | Sequence[Tensor], order: Tensor | None) -> Tensor | Sequence[Tensor]:
    """Return the result of a sorting operation in a given order, if that has the right shape."""
    positions = result if isinstance(result, Tensor) else result[1]
    if order is None or order.shape != positions.shape:
        return result
    return order if isinstance(result, Tensor) else (x.gather(dim, order), order)


_PICKS = frozenset((torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default))
"""Operations that also take masks; recorded with the positions where the mask is true."""

_FORWARD_MODE = frozenset((torch.ops.aten._make_dual.default, torch.ops.aten._unpack_dual.default))

_DATA_DECIDE = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""Exceptions of fake tensors that cannot tell a result without data."""
