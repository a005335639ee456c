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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from regrow.tracing.forms import index_of, is_plain
from regrow.tracing.model_state import Snapshot, is_plain_object
from regrow.tracing.nodes import map_arguments, operands_in, parameters_of, writes
from regrow.tracing.record import Recorder

FIRST: Mapping[str, str] = {"layer_idx": "a cache of keys and values counts tokens by it"}
"""Attributes that number modules → why the first module of its class must not be dropped."""

Numbers = Mapping[nn.Module, Mapping[str, int]]
"""Module → the attributes that number it."""

PLAIN = frozenset((int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
"""Types whose values are compared."""


def numbers_of(module: nn.Module) -> dict[str, int]:
    """Return the integers that number a module, where nothing but the module itself answers for the name."""
    values = {name: vars(module).get(name) for name in FIRST if not hasattr(type(module), name)}
    return {name: value for name, value in values.items() if type(value) is int}


def structure_of(module: nn.Module, numbers: Numbers) -> tuple[object, ...]:
    """Return what tells a module from others: classes, attributes and tensors."""
    places: dict[int, int] = {}
    parts: list[object] = []
    objects: dict[int, object] = {}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if name in _HOOKS:
                if value:
                    raise TypeError
            elif name in ("_parameters", "_buffers"):
                for leaf, x in value.items():
                    parts.append((path, leaf, None if x is None else _tensor(x, places.setdefault(id(x), len(places)))))
            elif name == "_modules":
                parts.append((path, tuple([(leaf, inner is None) for leaf, inner in value.items()])))
            elif name not in numbers.get(child, ()):
                parts.append((path, name, _attribute(value, objects)))
        parts.append(type(child))
    return tuple(parts)


_HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))


def _tensor(x: Tensor, place: int) -> object:
    return (type(x), isinstance(x, nn.Parameter), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, place)


def _attribute(value: Any, objects: dict[int, object]) -> object:
    """Return the contents of a plain attribute or object (a configuration), and the identity of any other."""
    kind = type(value)
    if kind in PLAIN:
        return (kind, value)
    if kind is tuple or kind is list:
        return (kind, *[_attribute(one, objects) for one in value])
    if kind is dict:
        return (kind, *[(name, _attribute(one, objects)) for name, one in value.items()])
    if kind is set:
        return (kind, frozenset(value))
    if isinstance(value, random.Random) or kind.__module__.startswith("numpy.random"):
        raise TypeError  # what it gives next is not seen
    if id(value) not in objects:
        objects[id(value)] = (kind, id(value))
        if is_plain_object(value) and not isinstance(value, Tensor | nn.Module) and not callable(value):
            objects[id(value)] = (kind, *[(name, _attribute(one, objects)) for name, one in vars(value).items()])
    return objects[id(value)]


_TRIES = 3
"""How many calls of a structure are examined before its modules are run each time."""


@dataclass(frozen=True)
class _RecordedCall:
    """A recorded call of a module.

    Args:
        module: The module.
        outer: The modules that ran it.
        given: The nodes of its operands and of its own tensors before the call.
        after: Their nodes after it; another one where an operation gave a tensor that it was given.
        calls: The operations that were recorded.
        results: For each entry of its result: the number of an operand, an operation, or a plain value.
        spec: The form of its result.
        snapshot: What the module reaches, as it was before the call.
    """

    module: nn.Module
    outer: Mapping[str, Any]
    given: tuple[Node, ...]
    after: tuple[Node, ...]
    calls: tuple[Node, ...]
    results: tuple[tuple[str, Any], ...]
    spec: TreeSpec
    snapshot: Snapshot


def copy_repeats(model: nn.Module, recorder: Recorder) -> AbstractContextManager[None]:
    """Context manager in which the operations of repeated modules are copied from the first of them."""
    return RepeatedCalls(model, recorder).active()


class RepeatedCalls:
    """Runs modules, or copies what an equal call recorded.

    Args:
        model: The network.
        recorder: What records its operations.
    """

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.recorder = recorder
        self.paths = {module: path for path, module in model.named_modules()}
        self.numbers = {module: own for module in model.modules() if (own := numbers_of(module))}
        self.repeated = _repeated(model, self.numbers)
        self.known: dict[object, _RecordedCall] = {}
        self.tries: Counter[object] = Counter()
        self.reads = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context manager in which the calls of repeated modules are copied."""
        if not self.repeated:
            yield
            return
        run, find = nn.Module.__call__, nn.Module.__getattr__
        inside = {module for block in self.repeated for module in block.modules()}
        numbers = {module: values for module, values in self.numbers.items() if module in inside}
        for module, values in numbers.items():
            for name in values:
                del vars(module)[name]

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._called(run, module, args, kwargs) if module in self.repeated else run(module, *args, **kwargs)

        def read(module: nn.Module, name: str) -> Any:
            if name in FIRST:
                self.reads += 1  # also where there is none: whether there is one may decide something
                if name in (values := numbers.get(module, {})):
                    return values[name]
            return find(module, name)

        nn.Module.__call__, nn.Module.__getattr__ = call, read  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = run, find  # type: ignore[method-assign]
            for module, values in numbers.items():
                vars(module).update({**values, **vars(module)})

    def _called(self, run: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        try:
            key = (structure_of(module, {}), spec, self._forms(leaves), _context())
            hash(key)
        except TypeError:
            return run(module, *args, **kwargs)
        inputs = [x for x in leaves if isinstance(x, Tensor)]
        tensors = [*inputs, *module.parameters(), *module.buffers()]
        given = tuple([self.recorder.nodes[x] for x in tensors])
        known = self.known.get(key)
        if known is not None and (mapping := _mapping(known.given, given)) and known.snapshot.is_unchanged():
            return self._copied(known, module, mapping, inputs, tensors)
        if self.tries[key] >= _TRIES:
            return run(module, *args, **kwargs)
        self.tries[key] += 1
        recorder, snapshot, outer = self.recorder, Snapshot(module), self.recorder.running()
        start, others, before = len(recorder.calls), recorder.constants_and_decisions(), (self.reads, _random_states())
        result = run(module, *args, **kwargs)
        same = (self.reads, _random_states()) == before and recorder.constants_and_decisions() == others
        if same and snapshot.is_unchanged():
            calls, after = tuple(recorder.calls[start:]), tuple([recorder.nodes[x] for x in tensors])
            leaves, spec = tree_flatten(result)
            results = tuple([_source(x, inputs, recorder.nodes) for x in leaves])
            made = {value for kind, value in results if kind == "made"}
            constant = any(node in recorder.plain for node in made)
            whole = made <= {*calls} and not constant and "unknown" not in dict(results)
            if whole and not _reaches_others(calls, {*given}):
                self.known[key] = _RecordedCall(module, outer, given, after, calls, results, spec, snapshot)
        return result

    def _copied(
        self,
        known: _RecordedCall,
        module: nn.Module,
        mapping: dict[Node, Node],
        inputs: list[Tensor],
        tensors: list[Tensor],
    ) -> Any:
        """Copy the operations of a known call, and return the result of this one."""
        pairs = zip(known.module.modules(), module.modules(), strict=True)
        names = {self.paths[a]: self.paths[b] for a, b in pairs if a in self.paths and b in self.paths}
        stacks: dict[int, dict[str, Any]] = {}
        for node in known.calls:
            args, kwargs = map_arguments((node.args, node.kwargs), Node, lambda operand: mapping.get(operand, operand))
            old = node.meta["nn_module_stack"]
            if id(old) not in stacks:
                inner = [(names.get(path, path), kind) for path, (_, kind) in old.items() if path not in known.outer]
                stacks[id(old)] = self.recorder.running() | {path: (path, kind) for path, kind in inner}
            mapping[node] = self.recorder.write_copy(node, args, kwargs, stacks[id(old)])
        for x, before, after in zip(tensors, known.given, known.after, strict=True):
            if after is not before:
                self.recorder.nodes[x] = mapping[after]
        made: dict[Node, Tensor] = {}
        results = []
        for kind, value in known.results:
            if kind == "made" and value not in made:
                made[value] = self._result(value.meta["val"], mapping[value])
            results.append(inputs[value] if kind == "given" else made[value] if kind == "made" else value)
        return tree_unflatten(results, known.spec)

    def _result(self, like: FakeTensor, node: Node) -> FakeTensor:
        """Return a new tensor for a copied operation."""
        with torch._C.DisableTorchFunction(), no_python_dispatcher(), torch._C._DisableTorchDispatch():
            form = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
            made = FakeTensor(self.recorder.fake, form, like.fake_device)
        node.meta["val"] = made
        self.recorder.nodes[made] = node
        return made

    def _forms(self, leaves: list[Any]) -> tuple[object, ...]:
        """Return what identifies the operands of a call; raise TypeError where nothing does."""
        places: dict[int, int] = {}
        return tuple([self._form(x, places.setdefault(id(x), len(places))) for x in leaves])

    def _form(self, x: Any, place: int) -> object:
        if not isinstance(x, Tensor):
            return _plain(x)
        if type(x) is not FakeTensor or x.fake_mode is not self.recorder.fake or x not in self.recorder.nodes:
            raise TypeError
        if x.constant is not None or not is_plain(x):
            raise TypeError
        node = self.recorder.nodes[x]
        same = node if node in self.recorder.plain else None  # its value could decide something
        return (x.shape, x.stride(), x.storage_offset(), x.dtype, x.fake_device, x.requires_grad, place, same)


def _random_states() -> tuple[object, ...]:
    """Return the states of the generators of Python and NumPy; torch's draws are recorded operations."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    leaves, _ = tree_flatten(numpy.random.get_state(legacy=False))
    return (random.getstate(), *[x.tobytes() if isinstance(x, numpy.ndarray) else x for x in leaves])


def _mapping(known: tuple[Node, ...], given: tuple[Node, ...]) -> dict[Node, Node] | None:
    """Return node of the known call → that of this one; ``None`` if one node would be two."""
    mapping: dict[Node, Node] = {}
    return mapping if all(mapping.setdefault(a, b) is b for a, b in zip(known, given, strict=True)) else None


def _repeated(model: nn.Module, numbers: Numbers) -> frozenset[nn.Module]:
    """Return the modules of lists and sequences of which another one has the same structure, or is the same."""
    result: set[nn.Module] = set()
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            alike: dict[object, list[nn.Module]] = {}
            classes = Counter(map(type, stack._modules.values()))
            for child in stack._modules.values():
                if child is not None and len(child._modules) and (classes[type(child)] > 1 or len(stack) == 1):
                    with suppress(TypeError):
                        alike.setdefault(structure_of(child, numbers), []).append(child)
            result |= {child for same in alike.values() for child in same if len(same) > 1 or len(stack) == 1}
    return frozenset(result)


def _plain(value: Any) -> object:
    if type(value) in PLAIN:
        return (type(value), value)
    raise TypeError


def _context() -> tuple[object, ...]:
    """Return what a run depends on beside the network."""
    if torch._C._is_any_autocast_enabled():
        raise TypeError
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
    )


def _source(x: Any, inputs: list[Tensor], nodes: Any) -> tuple[str, Any]:
    """Return where an entry of a result comes from."""
    if not isinstance(x, Tensor):
        return ("plain", x) if type(x) in PLAIN else ("unknown", None)
    if (index := index_of(x, inputs)) is not None:
        return "given", index
    usual = type(x) is FakeTensor and is_plain(x) and not x.requires_grad
    node = nodes[x] if usual and not x.storage_offset() and x in nodes else None
    return ("made", node) if node is not None and node.meta["val"] is x else ("unknown", None)


def _reaches_others(calls: tuple[Node, ...], given: set[Node]) -> bool:
    """Whether an operation writes into a tensor that is not of the call, or gives one."""
    inside = {*calls} | given
    for node in calls:
        outside = {id(operand.meta["val"]) for operand in node.all_input_nodes if operand not in inside}
        if id(node.meta["val"]) in outside:
            return True
        if outside and writes(node):
            takes = parameters_of(node.target)
            values = {**dict(zip((taken.name for taken in takes), node.args, strict=False)), **node.kwargs}
            written = [values.get(taken.name) for taken in takes if taken.alias_info and taken.alias_info.is_write]
            if any(operand not in inside for operand in operands_in(written)):
                return True
    return False
