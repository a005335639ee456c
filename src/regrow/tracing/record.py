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
from regrow.tracing.interception import LINE, current_line, most_calls
from regrow.tracing.known_forms import KnownForms
from regrow.tracing.meta_copy import infer_result
from regrow.tracing.model_state import copy_tensor, output_tensors
from regrow.tracing.nodes import map_arguments, operands_in

aten = torch.ops.aten

# Operations that put entries in order, with the positions as their only or second result.
ORDERS = frozenset((aten.sort.default, aten.sort.stable, aten.topk.default, aten.argsort.default, aten.argsort.stable))

# Operations that also take masks; recorded with the positions where the mask is true.
_PICKS = frozenset((aten.index.Tensor, aten.index_put.default, aten.index_put_.default))

# Operations of forward-mode differentiation, which are refused
_FORWARD_MODE = frozenset((aten._make_dual.default, aten._unpack_dual.default))

# Exceptions of fake tensors that cannot tell a result without data.
_DATA_DECIDE = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
)


class DivergedError(RuntimeError):
    """Raised where a run reaches other data-dependent decisions than those it is to replay."""


def decision(*read: Tensor) -> tuple[Tensor, ...]:
    """Mark a data-dependent decision in a graph: returns the tensors that were read; what was decided is a constant."""
    return read


def compared_operands(node: Node) -> list[Node]:
    """Return the floating-point operands from which a node computes integers, booleans or a decision; else none."""
    results = [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
    if node.op != "call_function" or (node.target is not decision and all(x.is_floating_point() for x in results)):
        return []
    read = [(operand, _get_value(operand)) for operand in node.all_input_nodes]
    return [operand for operand, value in read if isinstance(value, Tensor) and value.is_floating_point()]


class TensorMap:
    """Mapping of tensor, by identity, → node; it keeps its tensors alive, and is faster than a weak mapping."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Tensor, Node]] = {}

    def __getitem__(self, key: Tensor) -> Node:
        return self._entries[id(key)][1]

    def __setitem__(self, key: Tensor, value: Node) -> None:
        self._entries[id(key)] = (key, value)

    def __contains__(self, key: object) -> bool:
        return id(key) in self._entries


class ConstantResults:
    """Values of those nodes of a recording that follow from constants alone; they are computed once one is needed."""

    def __init__(self) -> None:
        self.values: dict[Node, Any] = {}  # None: pending
        self.pending: list[tuple[Node, Any, Any, Any]] = []  # node, operation, args, kwargs

    def __contains__(self, node: object) -> bool:
        return node in self.values

    def add_call(self, node: Node, func: Any, args: Any, kwargs: Any) -> None:
        """Add an operation on constants, with nodes for tensors; it is run when a value is needed."""
        self.values[node] = None
        self.pending.append((node, func, args, kwargs))

    def are_operands(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation, with nodes for tensors, works on constants alone, and draws no random numbers."""
        constant = all(node in self.values for node in operands_in((args, kwargs)))
        return constant and torch.Tag.nondeterministic_seeded not in func.tags

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation on constants (nodes), with real values."""
        with no_python_dispatcher(), unset_fake_temporarily():
            self._run_pending()
            return self._run_call(func, args, kwargs)

    def forget(self, args: Any, kwargs: Any) -> None:
        """Forget constants that an operation on other tensors too may write into, and all that share their storage."""
        nodes = [node for node in operands_in((args, kwargs)) if node in self.values]
        if not nodes:
            return
        with no_python_dispatcher(), unset_fake_temporarily():
            self._run_pending()
        written = {address for node in nodes for address in _storage_addresses(self.values[node])}
        self.values = {node: x for node, x in self.values.items() if written.isdisjoint(_storage_addresses(x))}

    def _run_pending(self) -> None:
        """Run the operations that were added since the last time."""
        for node, func, args, kwargs in self.pending:
            self.values[node] = self._run_call(func, args, kwargs)
        self.pending.clear()

    def _run_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation whose operands are given as nodes with known values."""
        values, named = map_arguments((args, kwargs), Node, self.values.__getitem__)
        return func(*values, **named)


def _storage_addresses(value: Any) -> set[int]:
    """Return the data pointers of the storages of all tensors in a nested value."""
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
        """Begin a recording; ``running`` returns path → (path, class) of the running modules.

        ``answers``: decisions to replay, in order; ``orders``: results of sorting operations; ``fake``: ``None`` if
        the tensors are real.
        """
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
        self.constant_results = ConstantResults()
        self.calls: list[Node] = []  # the operations so far, in order
        self.forms = KnownForms(self.fake)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch not to wrap :meth:`__torch_dispatch__`."""
        return False  # nothing here is compiled, and torch would load its compiler to make sure

    def end(self, result: Any) -> None:
        """Add the network's output to the graph; raise OutputError if it holds no tensors."""
        tensors = output_tensors(result)
        self.graph.output(tuple(map(self._node, tensors)))
        if self.real:
            self.values[:0] = [x.detach() for x in tensors if x.is_floating_point()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operation that torch dispatches, and return its result."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation and return its result; where data decide the result, record a decision instead."""
        if func.namespace == "profiler":  # marks for torch's profiler compute nothing
            return func(*args, **kwargs)
        if func in _FORWARD_MODE:
            raise RuntimeError("it takes forward derivatives (torch.func.jvp), which cannot be run again as recorded")
        if func in _PICKS:
            args = (args[0], [part for index in args[1] for part in self._positions(index)], *args[2:])
        # `constant`: the result follows from numbers in the code, so the recording may compute it.
        nodes, named = map_arguments((args, kwargs), Tensor, self._node)
        constant = self.constant_results.are_operands(func, nodes, named)
        try:
            form = self.forms.infer_once(self._infer, func, *map_arguments((nodes, named), Node, _get_value))
        except _DATA_DECIDE:
            if not constant:
                return self._record_decision(func, args, kwargs)
            return tree_map_only(Tensor, self._constant, self.constant_results.run(func, nodes, named))
        if not constant and func._schema.is_mutable:  # overwritten by data
            self.constant_results.forget(nodes, named)
        node = self._write(func, nodes, named, form)
        self._keep_compared_values(node, args, kwargs)
        out = func(*args, **kwargs) if self.real else form
        if self.real and func in ORDERS:
            arguments = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
            out = _reorder(args[0], arguments.get("dim", -1), out, next(self.orders, None))  # -1: the default of ORDERS
        if constant:
            self.constant_results.add_call(node, func, nodes, named)
        self._associate(node, out, form, constant)
        return out

    def _infer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation on fake tensors; raise one of ``_DATA_DECIDE`` where data decide it."""
        if (form := infer_result(func, args, kwargs, self.fake)) is not NotImplemented:
            return form
        with self.fake:
            form = func(*args, **kwargs)
        for x in tree_leaves(form):
            if isinstance(x, FakeTensor):
                x.constant = None  # else fake tensors know small numbers, and ask less than real ones
        return form

    def _positions(self, index: Tensor | None) -> list[Tensor | None]:
        """Return a boolean index as one tensor of positions per dimension; any other index as the only entry."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        positions = self._record(aten.nonzero.default, (index,), {})
        return list(self._record(aten.unbind.int, (positions, 1), {}))

    def _record_decision(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a data-dependent decision and return its result: the next replayed one, or that of the data.

        Raises DivergedError if the replayed one is of another operation or module, or none is left for fake tensors.
        """
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        nodes = [self._node(x) for x in read]
        node = self._write(decision, tuple(nodes), {}, list(map(_get_value, nodes)))
        node.meta["asks"] = str(func)
        self._keep_compared_values(node, args, kwargs)
        module, replayed = next(reversed(node.meta["nn_module_stack"]), ""), next(self.answers, None)
        # On fake tensors every decision must be a replayed one.
        diverges = not self.real if replayed is None else (replayed.op, replayed.module) != (str(func), module)
        if diverges:
            raise DivergedError(f"{func} in {module or 'the model'} asks what the recorded run did not ask there")
        answer = func(*args, **kwargs) if replayed is None else _cast_answer(read, replayed.answer)
        self.decisions.append(Decision(str(func), module, tree_map_only(Tensor, copy_tensor, answer)))
        node.meta["number"] = not isinstance(answer, Tensor | list | tuple)
        return tree_map_only(Tensor, lambda x: self._constant(x, is_known=False), answer)

    def _keep_compared_values(self, node: Node, args: Any, kwargs: Any) -> None:
        """On real tensors, append copies to ``values`` of the operands that an operation (``node``) compares."""
        if self.real:
            live = {self._node(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            self.values += [copy_tensor(live[operand]) for operand in compared_operands(node)]

    def _write(self, target: Any, args: Any, kwargs: Any, val: Any) -> Node:
        """Add an operation (on nodes) to the graph, with its fake result ``val``, the running modules and the line."""
        node = self._add(target, args, kwargs)
        node.meta |= {"val": val, "nn_module_stack": self.running(), LINE: current_line()}
        return node

    def _add(self, target: Any, args: Any, kwargs: Any) -> Node:
        """Add an operation on nodes to the graph and to ``calls``; raise RuntimeError above the limit of operations."""
        if len(self.calls) >= most_calls.get():
            raise RuntimeError(f"it runs more than {len(self.calls)} operations")
        node = self.graph.create_node("call_function", target, args, kwargs)
        self.calls.append(node)
        return node

    def write_copy(self, node: Node, args: Any, kwargs: Any, stack: dict[str, Any]) -> Node:
        """Record an operation once more, on other operands (nodes) in modules ``stack``; return the new node."""
        copied = self._add(node.target, args, kwargs)
        copied.meta |= node.meta | {"nn_module_stack": stack}
        return copied

    def _associate(self, node: Node, out: Any, form: Any, constant: bool) -> None:
        """Enter the tensors of a result in ``nodes``; entries of a list get a node of their own (``getitem``).

        ``out``: the result; ``form``: the same on fake tensors; ``constant``: whether it follows from constants alone.
        """
        if isinstance(out, Tensor):
            self.nodes[out] = node
        elif isinstance(out, list | tuple):
            for i, (part, val) in enumerate(zip(out, form, strict=True)):
                if isinstance(part, Tensor):
                    entry = self._write(getitem, (node, i), {}, val)
                    if constant:
                        self.constant_results.add_call(entry, getitem, (node, i), {})
                    self._associate(entry, part, val, constant)

    def _node(self, x: Tensor) -> Node:
        """Return the node of a tensor; one that no recorded operation made is added as a constant."""
        if x not in self.nodes:
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                raise RuntimeError("it runs inside torch.func (vmap, grad), whose tensors cannot be recorded")
            self._constant(x, copied=False)
        return self.nodes[x]

    def _constant(self, x: Tensor, is_known: bool = True, copied: bool = True) -> Tensor:
        """Add a constant's placeholder; return a copy, or ``x`` unless ``copied``. ``is_known``: no data decided it."""
        value = x
        if copied:
            value = copy_tensor(x) if self.real else self.fake.from_tensor(x)
        node = self.placeholder(value)
        self.constants[node] = copy_tensor(x)
        if is_known and not isinstance(x, FakeTensor):
            self.constant_results.values[node] = copy_tensor(x)
        return value

    def placeholder(self, value: Any) -> Node:
        """Add an input of the graph and return its node: for a parameter, buffer, constant, or input of the network."""
        with self.graph.inserting_before(self.calls[0]) if self.calls else nullcontext():
            node = self.graph.placeholder(f"given_{len(self.graph.nodes)}")
        node.meta["val"] = value
        if isinstance(value, Tensor):
            node.meta["val"] = value if isinstance(value, FakeTensor) else self.fake.from_tensor(value)
            self.nodes[value] = node
        return node


def _get_value(node: Node) -> Any:
    """Return the fake tensors that a node stands for, or the plain value of a placeholder."""
    return node.meta["val"]


def _cast_answer(read: list[Tensor], answer: object) -> object:
    """Return a replayed decision in the only floating-point dtype of the tensors ``read`` now; else unchanged."""
    dtypes = {x.dtype for x in read if x.is_floating_point()}
    if len(dtypes) != 1:
        return answer
    dtype = dtypes.pop()
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, answer)


def _reorder(x: Tensor, dim: int, result: Tensor | Sequence[Tensor], order: Tensor | None) -> Tensor | Sequence[Tensor]:
    """Return the ``result`` of sorting ``x`` along ``dim`` in ``order`` (positions), if that has the right shape."""
    positions = result if isinstance(result, Tensor) else result[1]
    if order is None or order.shape != positions.shape:
        return result
    return order if isinstance(result, Tensor) else (x.gather(dim, order), order)
