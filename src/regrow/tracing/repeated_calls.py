"""Record repeated modules once: later calls copy the operations of the first.

A deep network is mostly one block, again and again. Where a module in a list or sequence has the structure of one that
has run, and is called with operands of the same form, it runs the same operations on its own parameters; so they are
copied in the graph, without running the module's code. This is done only where nothing else could tell the two apart:

* the modules have the same classes, attributes, and shapes of tensors; what both reach beyond them are the same
  objects, with the same contents as at the first call. A block's number may differ if the first call did not read it;
* the first call changed nothing outside, drew no random number in Python, took no data-dependent decision, and gave
  tensors and plain values only.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from regrow.tracing.known_forms import is_plain
from regrow.tracing.model_state import LEAVES, Snapshot, is_plain_object
from regrow.tracing.nodes import map_arguments, writes_in_place

if TYPE_CHECKING:
    from regrow.tracing.record import Recorder

# The attribute that numbers the blocks of a network.
NUMBER = "layer_idx"


def _describe_module(module: nn.Module, numbered: Container[nn.Module] = ()) -> tuple[object, ...]:
    """Return a description of a module; equal ones run alike. TypeError if it has hooks or a random generator.

    ``numbered``: modules whose ``layer_idx`` is left out.
    """
    ids: dict[int, int] = {}
    parts: list[object] = []
    objects: dict[int, object] = {}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if name in _HOOKS:
                if value:
                    raise TypeError  # what a hook does is not seen
            elif name in ("_parameters", "_buffers"):
                for leaf, x in value.items():
                    parts.append((path, leaf, None if x is None else _describe_tensor(x, ids)))
            elif name == "_modules":
                parts.append((path, tuple([(leaf, inner is None) for leaf, inner in value.items()])))
            elif name != NUMBER or child not in numbered:
                parts.append((path, name, _describe_attribute(value, objects)))
        parts.append(type(child))
    return tuple(parts)


# Attributes of every module that hold its hooks
_HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))


def _describe_tensor(x: Tensor, ids: dict[int, int]) -> object:
    """Return a tensor's form, and its index among a module's distinct ones; ``ids``: id → index, is extended."""
    index = ids.setdefault(id(x), len(ids))
    return (type(x), isinstance(x, nn.Parameter), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, index)


def _describe_attribute(value: Any, objects: dict[int, object]) -> object:
    """Return the contents of a plain attribute or object (a configuration), and the identity of any other.

    Raises TypeError for a random generator. ``objects``: id → description, of the objects described before.
    """
    kind = type(value)
    if kind in LEAVES:
        return (kind, value)
    if kind is tuple or kind is list:
        return (kind, *[_describe_attribute(part, objects) for part in value])
    if kind is dict:
        return (kind, *[(name, _describe_attribute(part, objects)) for name, part in value.items()])
    if kind is set:
        return (kind, frozenset(value))
    if isinstance(value, random.Random) or kind.__module__.startswith("numpy.random"):
        raise TypeError  # what it gives next is not seen
    if id(value) not in objects:
        objects[id(value)] = (kind, id(value))
        if is_plain_object(value) and not isinstance(value, Tensor | nn.Module) and not callable(value):
            contents = [(name, _describe_attribute(part, objects)) for name, part in vars(value).items()]
            objects[id(value)] = (kind, *contents)
    return objects[id(value)]


# How many calls of a structure are examined before its modules are run each time.
_TRIES = 3


@dataclass(frozen=True)
class _RecordedCall:
    """A recorded call of a module, of which later calls copy the operations."""

    module: nn.Module
    outer: Mapping[str, Any]  # path → (path, class) of the modules that ran it
    before: tuple[Node, ...]  # the nodes of its operands and of its own tensors before the call
    after: tuple[Node, ...]  # and after it; another one where an operation gave a tensor that it was given
    calls: tuple[Node, ...]  # its operations, in order
    results: tuple[tuple[str, Any], ...]  # per entry of the result, as _find_source returns it
    spec: TreeSpec  # of the result
    snapshot: Snapshot  # what the module reaches, as it was before the call


@contextmanager
def copy_repeats(model: nn.Module, recorder: "Recorder") -> Iterator[None]:
    """Context manager in which calls of repeated modules copy the operations of the first (``nn.Module.__call__``)."""
    candidates = [module for module in model.modules() if not hasattr(type(module), NUMBER)]
    numbered = {module for module in candidates if type(vars(module).get(NUMBER)) is int}
    repeated = _find_repeated(model, numbered)
    if not repeated:
        yield
        return
    calls = _RepeatedCalls(model, recorder)
    run_module, find = nn.Module.__call__, nn.Module.__getattr__
    inside = {module for block in repeated for module in block.modules()}
    numbers = {module: vars(module).pop(NUMBER) for module in numbered & inside}

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a module, or copy a recorded call of a repeated one; replaces ``nn.Module.__call__``."""
        run = partial(run_module, module, *args, **kwargs)
        return calls.call(run, module, args, kwargs) if module in repeated else run()

    def read(module: nn.Module, name: str) -> Any:
        """Return an attribute that is not in a module's ``vars``; replaces ``nn.Module.__getattr__``."""
        if name == NUMBER:
            calls.reads += 1  # also where there is none: whether there is one may decide something
            if module in numbers:
                return numbers[module]
        return find(module, name)

    nn.Module.__call__, nn.Module.__getattr__ = call, read  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = run_module, find  # type: ignore[method-assign]
        for module, number in numbers.items():
            vars(module).setdefault(NUMBER, number)


class _RepeatedCalls:
    """Runs modules, or copies what an equal call recorded."""

    def __init__(self, model: nn.Module, recorder: "Recorder") -> None:
        self.recorder = recorder
        self.paths = {module: path for path, module in model.named_modules()}
        self.recorded_calls: dict[object, _RecordedCall] = {}
        self.tries: Counter[object] = Counter()
        self.reads = 0  # how often the number of a module was read

    def call(self, run: Callable[[], Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the result of a module's call: copied from an equal one, or that of ``run()``, which may be kept."""
        leaves, spec = tree_flatten((args, kwargs))
        if torch._C._is_any_autocast_enabled():
            return run()
        try:
            modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch._C._len_torch_function_stack()
            key = (_describe_module(module), spec, self._describe_operands(leaves), modes)
            hash(key)
        except TypeError:
            return run()
        inputs = [x for x in leaves if isinstance(x, Tensor)]
        tensors = [*inputs, *module.parameters(), *module.buffers()]
        nodes = tuple([self.recorder.nodes[x] for x in tensors])
        earlier = self.recorded_calls.get(key)
        mapping = _map_nodes(earlier.before, nodes) if earlier is not None else None
        if earlier is not None and mapping and earlier.snapshot.is_unchanged():
            return self._copy_call(earlier, module, mapping, inputs, tensors)
        if self.tries[key] >= _TRIES:
            return run()
        self.tries[key] += 1
        snapshot, outer, start = Snapshot(module), self.recorder.running(), len(self.recorder.calls)
        state = self._read_state()
        result = run()
        if self._read_state() == state and snapshot.is_unchanged():
            calls = tuple(self.recorder.calls[start:])
            after = tuple([self.recorder.nodes[x] for x in tensors])
            leaves, spec = tree_flatten(result)
            results = tuple([_find_source(x, inputs, self.recorder.nodes) for x in leaves])
            computed = {value for kind, value in results if kind == "computed"}
            has_constant = any(node in self.recorder.constant_results for node in computed)
            can_be_copied = computed <= {*calls} and not has_constant and "unknown" not in dict(results)
            if can_be_copied and _is_closed(calls, {*nodes}):
                self.recorded_calls[key] = _RecordedCall(module, outer, nodes, after, calls, results, spec, snapshot)
        return result

    def _read_state(self) -> tuple[object, ...]:
        """Return what a call that is copied may not change: counts of reads and records, and random generators."""
        numpy = sys.modules.get("numpy")
        leaves = tree_flatten(numpy.random.get_state(legacy=False))[0] if numpy is not None else []
        draws = [x.tobytes() if hasattr(x, "tobytes") else x for x in leaves]
        counts = self.reads, len(self.recorder.constants), len(self.recorder.decisions)
        return (*counts, random.getstate(), *draws)

    def _copy_call(
        self,
        earlier: _RecordedCall,
        module: nn.Module,
        mapping: dict[Node, Node],
        inputs: list[Tensor],
        tensors: list[Tensor],
    ) -> Any:
        """Copy the operations of a known call, and return the result of this one; extends ``mapping`` (node → copy).

        ``inputs``: the tensors that the module is given; ``tensors``: these and its own.
        """
        pairs = zip(earlier.module.modules(), module.modules(), strict=True)
        names = {self.paths[a]: self.paths[b] for a, b in pairs if a in self.paths and b in self.paths}
        stacks: dict[int, dict[str, Any]] = {}
        for node in earlier.calls:
            args, kwargs = map_arguments((node.args, node.kwargs), Node, lambda operand: mapping.get(operand, operand))
            old = node.meta["nn_module_stack"]
            if id(old) not in stacks:
                inner = [(names.get(path, path), kind) for path, (_, kind) in old.items() if path not in earlier.outer]
                stacks[id(old)] = self.recorder.running() | {path: (path, kind) for path, kind in inner}
            mapping[node] = self.recorder.write_copy(node, args, kwargs, stacks[id(old)])
        for x, before, after in zip(tensors, earlier.before, earlier.after, strict=True):
            if after is not before:
                self.recorder.nodes[x] = mapping[after]
        copies: dict[Node, Tensor] = {}
        sources: dict[str, Any] = {"operand": inputs, "computed": copies}
        results = []
        for kind, value in earlier.results:
            if kind == "computed" and value not in copies:
                copies[value] = self._make_result(value.meta["val"], mapping[value])
            results.append(sources[kind][value] if kind in sources else value)
        return tree_unflatten(results, earlier.spec)

    def _make_result(self, like: FakeTensor, node: Node) -> FakeTensor:
        """Return a new fake tensor of the form of ``like`` as the value of a copied operation's node."""
        with torch._C.DisableTorchFunction(), no_python_dispatcher(), torch._C._DisableTorchDispatch():
            form = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
            result = FakeTensor(self.recorder.fake, form, like.fake_device)
        node.meta["val"] = result
        self.recorder.nodes[result] = node
        return result

    def _describe_operands(self, leaves: list[Any]) -> tuple[object, ...]:
        """Return what identifies the operands of a call (``leaves``); raise TypeError where nothing does."""
        ids: dict[int, int] = {}
        return tuple([self._describe_operand(x, ids.setdefault(id(x), len(ids))) for x in leaves])

    def _describe_operand(self, x: Any, index: int) -> object:
        """Return what identifies an operand; ``index``: which of the distinct operands it is."""
        if type(x) in LEAVES:
            return (type(x), x)
        if not is_plain(x) or x.fake_mode is not self.recorder.fake or x not in self.recorder.nodes:
            raise TypeError
        node = self.recorder.nodes[x]
        constant = node if node in self.recorder.constant_results else None  # its value could decide something
        return (x.shape, x.stride(), x.storage_offset(), x.dtype, x.fake_device, x.requires_grad, index, constant)


def _map_nodes(earlier: tuple[Node, ...], nodes: tuple[Node, ...]) -> dict[Node, Node] | None:
    """Return node of the known call → that of this one, in order; ``None`` if one node would be two."""
    mapping = dict(zip(earlier, nodes, strict=True))
    return mapping if all(mapping[a] is b for a, b in zip(earlier, nodes, strict=True)) else None


def _find_repeated(model: nn.Module, numbered: Container[nn.Module]) -> frozenset[nn.Module]:
    """Return the modules in lists and sequences that may be copied: another one there has the same description."""
    result: set[nn.Module] = set()
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            groups: dict[object, list[nn.Module]] = {}
            classes = Counter(map(type, stack._modules.values()))
            for child in stack._modules.values():
                if child is not None and len(child._modules) and (classes[type(child)] > 1 or len(stack) == 1):
                    with suppress(TypeError):
                        groups.setdefault(_describe_module(child, numbered), []).append(child)
            result |= {child for group in groups.values() for child in group if len(group) > 1 or len(stack) == 1}
    return frozenset(result)


def _find_source(x: Any, inputs: list[Tensor], nodes: Any) -> tuple[str, Any]:
    """Return where a result's entry is from: ("plain", value), ("operand", index in ``inputs``), ("computed", node).

    ("unknown", ``None``) for all else. ``nodes``: tensor → node.
    """
    if not isinstance(x, Tensor):
        return ("plain", x) if type(x) in LEAVES else ("unknown", None)
    for index, operand in enumerate(inputs):
        if operand is x:
            return "operand", index
    usual = is_plain(x) and not x.requires_grad
    node = nodes[x] if usual and not x.storage_offset() and x in nodes else None
    return ("computed", node) if node is not None and node.meta["val"] is x else ("unknown", None)


def _is_closed(calls: tuple[Node, ...], operands: set[Node]) -> bool:
    """Whether no operation that reads a tensor from outside a call writes into a tensor, or returns what it read."""
    inside = {*calls} | operands
    for node in calls:
        outside = [operand.meta["val"] for operand in node.all_input_nodes if operand not in inside]
        if outside and (writes_in_place(node) or any(value is node.meta["val"] for value in outside)):
            return False
    return True
