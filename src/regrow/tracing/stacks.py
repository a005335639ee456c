"""Find stacks of residual blocks, and the parameters of a block that make a copy compute nothing when they are 0."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Product, RecordedStep, Role, axes_in
from regrow.core.axes.operations import lies_in
from regrow.core.change import Insertion, Stack
from regrow.core.errors import first_line
from regrow.tracing.branches import ModuleCall, find_placeholders, record_calls
from regrow.tracing.capture import TraceError
from regrow.tracing.effects import tensor_forms
from regrow.tracing.meta_copy import cast_example, copy_model, fake_copy
from regrow.tracing.nodes import ALIASES
from regrow.tracing.repeated_calls import NUMBER

# Names of configuration entries that hold how many blocks a stack has.
DEPTHS = frozenset(("num_hidden_layers", "n_layer", "n_layers", "num_layers"))

# Names of configuration entries that hold a list with one entry per block.
PER_BLOCK = frozenset(("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers"))

# The attribute of a stack that records the insertions into it which no configuration tells of.
INSERTIONS = "block_insertions"
_NUMBERED = re.compile(r"(.*?)(\d+)")


class StackError(ValueError):
    """Raised with the reason why a module is no stack into which the blocks can be inserted."""


def get_stack(model: nn.Module, path: str, size: int) -> nn.Sequential | nn.ModuleList:
    """Return the stack at a path; raise StackError unless it holds ``size`` modules, numbered one after the other."""
    stack = dict(model.named_modules()).get(path)
    if not isinstance(stack, nn.Sequential | nn.ModuleList):
        raise StackError(f"the network has no nn.Sequential or nn.ModuleList {path!r}")
    if len(stack) != size:
        raise StackError(f"stack {path!r} has {len(stack)} modules here, not {size}")
    _get_numbering(stack)
    return stack


def insert_copies(model: nn.Module, path: str, insertion: Insertion) -> None:
    """Put copies of blocks into a stack, in place; StackError if it does not fit ``insertion``.

    Parameters that are to be 0 in a copy are set to 0. Configurations, or else the stack, record the insertion.
    """
    stack = get_stack(model, path, insertion.size)
    old = list(stack)
    copies = {copy.position: _copy_block(model, old[copy.of], copy.zeros) for copy in insertion.copies}
    modules = [copies.get(i, old[of]) for i, of in enumerate(insertion.sources)]
    configuration_tells = _rearrange(model, path, modules, insertion.sources)
    if not configuration_tells:
        setattr(stack, INSERTIONS, (*getattr(stack, INSERTIONS, ()), insertion))


def remove_copies(model: nn.Module, path: str, insertion: Insertion) -> None:
    """Undo :func:`insert_copies`, in place; StackError if the stack at ``path`` does not fit ``insertion``."""
    stack = get_stack(model, path, insertion.after)
    before = list(stack)
    _rearrange(model, path, [before[i] for i in insertion.kept], insertion.kept)
    if insertions := getattr(stack, INSERTIONS, ()):
        setattr(stack, INSERTIONS, insertions[:-1])
        if len(insertions) == 1:
            delattr(stack, INSERTIONS)


def remove_dropped(model: nn.Module) -> nn.Module:
    """Return a copy without the blocks of which all was dropped, the others renumbered; it shares the model's tensors.

    ``model`` itself if there are none, or its configuration does not tell how many blocks it has.
    """
    copied, dropped = model, find_placeholders(model)
    for path, stack in model.named_modules():
        if isinstance(stack, nn.Sequential | nn.ModuleList) and any(lies_in(name, path) for name in dropped):
            kept = [i for i, block in enumerate(stack) if next(block.parameters(), None) is not None]
            if 0 < len(kept) < len(stack):
                copied = copy_model(model, Tensor.detach) if copied is model else copied
                blocks = [*copied.get_submodule(path).children()]
                if not _rearrange(copied, path, [blocks[i] for i in kept], kept):
                    return model
    return copied


def _rearrange(model: nn.Module, path: str, modules: Sequence[nn.Module], sources: Sequence[int]) -> bool:
    """Give a stack other modules, in place, and renumber them; return whether the network's configuration was changed.

    ``sources``: per module, its position before, or that of the block it copies. Configurations of modules around that
    hold the depth are set.
    """
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.Sequential | nn.ModuleList)
    size, (prefix, start) = len(stack), _get_numbering(stack)
    stack._modules.clear()
    stack._modules.update({f"{prefix}{start + i}": module for i, module in enumerate(modules)})
    for i, (module, of) in enumerate(zip(modules, sources, strict=True)):
        for child in module.modules():
            if type(number := vars(child).get(NUMBER)) is int:
                setattr(child, NUMBER, number + i - of)
    parts, has_changed = path.split("."), False
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    main = getattr(model, "config", None)
    text = getattr(main, "get_text_config", lambda: None)()  # of transformers' multimodal networks
    for config in (getattr(module, "config", None) for module in around):
        values: Mapping[str, Any] = getattr(config, "__dict__", {})
        deep = [name for name, value in values.items() if name in DEPTHS and type(value) is int and value == size]
        if deep:
            for name in deep:
                setattr(config, name, len(sources))
            for name in PER_BLOCK & values.keys():
                if isinstance(values[name], list | tuple) and len(values[name]) == size:
                    setattr(config, name, type(values[name])(values[name][i] for i in sources))
            has_changed |= config is main or config is text
    return has_changed


def find_insertions(model: nn.Module) -> dict[str, tuple[Insertion, ...]]:
    """Return path of a stack → the insertions into it, in order, that no configuration tells of."""
    return {path: vars(module)[INSERTIONS] for path, module in model.named_modules() if INSERTIONS in vars(module)}


def _get_numbering(stack: nn.Sequential | nn.ModuleList) -> tuple[str, int]:
    """Return the common prefix of a stack's names, and the number of the first; raise StackError if not numbered."""
    names = list(stack._modules)
    first = _NUMBERED.fullmatch(names[0]) if names else None
    if first is None or names != [f"{first[1]}{int(first[2]) + i}" for i in range(len(names))]:
        raise StackError("the modules of the stack have names that are not numbered one after the other")
    return first[1], int(first[2])


def _copy_block(model: nn.Module, block: nn.Module, zeros: Sequence[str]) -> nn.Module:
    """Return a copy of a block, with parameters ``zeros`` at 0; it shares what the block shares with other modules."""
    if lost := sorted({*zeros} - dict(block.named_parameters()).keys()):
        raise StackError(f"a block that is copied has no parameter {lost[0]!r}")
    inside = {*block.modules()}
    outside = {module for module in _modules_outside(model, block) if module not in inside}
    shared = {id(value) for module in outside for value in vars(module).values() if _is_shareable(value)}
    memo: dict[int, Any] = {}
    for module in inside:
        memo |= {id(value): value for value in vars(module).values() if id(value) in shared}
        memo |= {id(child): child for child in module._modules.values() if child in outside}
    copied: nn.Module = copy_model(block, memo=memo)
    parameters = dict(copied.named_parameters())
    with torch.no_grad():
        for name in zeros:
            parameters[name].zero_()
    return copied


def _modules_outside(model: nn.Module, block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a network that are reached without entering a block."""
    yield model
    for child in model._modules.values():
        if child is not None and child is not block:
            yield from _modules_outside(child, block)


def _is_shareable(value: object) -> bool:
    """Whether an attribute is an object such as a configuration, not data, a tensor, a module or a function.

    A copied block shares it with the block if the blocks of the stack share it.
    """
    plain = (int, float, bool, str, bytes, type, dict, list, tuple, set, Tensor, nn.Module)
    return value is not None and not isinstance(value, plain) and not callable(value)


# Operations between a sum and the output of a block, or between the sum and what is added, that only move entries.
_MOVING = ALIASES | {
    *("dropout", "relu", "hardtanh", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze"),
    *("unsqueeze", "roll", "slice", "getitem", "narrow", "contiguous"),
}


def find_stacks(model: nn.Module, axes: AxisGraph) -> dict[str, Stack]:
    """Return path → stack, for every container with two or more modules of one class, of which some can be copied.

    A module can be copied if it runs once, gives a tensor of the form of its first input, to which it has added
    something (a rectifier may follow), and parameters write what is added. Of stacks in stacks, the innermost count.
    """
    try:
        calls, _ = record_calls(*fake_copy(model, cast_example(axes.example, model)))
    except Exception as error:
        raise TraceError(f"the network does not run on tensors without numbers: {first_line(error)}") from None
    blocks = _Blocks(axes, calls)
    result: dict[str, Stack] = {}
    for path, module in model.named_modules():
        if path and isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1:
            try:
                get_stack(model, path, len(module))
            except StackError:
                continue
            classes = Counter(map(type, module))
            zeros = {
                i: names
                for i, (name, child) in enumerate(module._modules.items())
                if classes[type(child)] > 1 and (names := blocks.find_zeroed(f"{path}.{name}"))
            }
            if zeros:
                result[path] = Stack(len(module), zeros)
    return {path: stack for path, stack in result.items() if not any(lies_in(o, path) and o != path for o in result)}


@dataclass(frozen=True)
class _Blocks:
    """The axes and module calls of a network, for the search for blocks that can be copied."""

    axes: AxisGraph
    calls: Mapping[str, list[ModuleCall]]  # path of a module → its calls in one run

    def find_zeroed(self, path: str) -> tuple[str, ...]:
        """Return which parameters in a module must be 0 in a copy that passes its input on; empty: no such copy."""
        calls = self.calls.get(path, [])
        if len(calls) != 1 or not _keeps_form(calls[0]):
            return ()
        inside = {i for i, step in enumerate(self.axes.steps) if lies_in(step.module, path)}
        outputs = [i for i in inside if not inside.issuperset(self.users.get(i, ())) or i not in self.users]
        names = self._find_written(outputs[0], inside) if len(outputs) == 1 else ()
        return tuple(n.removeprefix(f"{path}.") for n in names) if all(lies_in(n, path) for n in names) else ()

    def _find_written(self, output: int, inside: set[int]) -> tuple[str, ...]:
        """Return the parameters that make what is added to a block's input; empty if it is not such a sum.

        ``output``: the number of the operation that gives the block's output; ``inside``: those of its operations.
        """
        pending, visited, sums, passes_input = [output], {output}, 0, False
        names: dict[str, None] = {}
        for number in pending:  # which grows
            step = self.axes.steps[number]
            before = [operand for operand in step.operands if isinstance(operand, int)]
            if number not in inside:
                passes_input = True
            elif step.op in _MOVING or (step.op == "add" and before):
                sums += step.op == "add" and len(before) > 1
                names |= dict.fromkeys(_named_operands(step))
                pending += [operand for operand in before if operand not in visited]
                visited |= {*before}
            else:
                makers = [*_named_operands(step)] or self._find_makers(number, inside, output)
                if not makers:
                    return ()
                names |= dict.fromkeys(makers)
        return tuple(name for name in names if name in self.axes.parameters) if passes_input and sums else ()

    def _find_makers(self, number: int, inside: set[int], output: int) -> list[str]:
        """Return the nearest parameters before operation ``number`` in a block that make units of the output's axes."""
        out = {key for dims in self.axes.steps[output].shapes for key in axes_in(Product(dims or ()))}
        makes = {s.name for key in out for s in self.axes[key].slots if s.role in (Role.PRODUCES, Role.SHIFTS)}
        pending, visited = [number], {number}
        makers: list[str] = []
        for step in map(self.axes.steps.__getitem__, pending):  # which grows
            names = [name for name in _named_operands(step) if name in makes]
            makers += names
            before = [i for i in step.operands if isinstance(i, int) and i in inside and i not in visited]
            pending += before if not names else []
            visited |= {*before}
        return makers

    @cached_property
    def users(self) -> dict[int, list[int]]:
        """Number of an operation → those of the operations that read its result."""
        result: dict[int, list[int]] = {}
        for i, step in enumerate(self.axes.steps):
            for operand in step.operands:
                if isinstance(operand, int):
                    result.setdefault(operand, []).append(i)
        return result


def _named_operands(step: RecordedStep) -> Iterable[str]:
    """Yield the operands of an operation that are no results of others: parameters, buffers, inputs."""
    return (operand for operand in step.operands if isinstance(operand, str))


def _keeps_form(call: ModuleCall) -> bool:
    """Whether the first tensor in a module's output has the shape and dtype of its first input."""
    inputs = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
    forms = tensor_forms(inputs)[:1]
    return bool(forms) and forms == tensor_forms(call.output)[:1]
