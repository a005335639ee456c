"""Put copies of blocks into a stack and take them out again: modules, their numbers, and the configuration's depth."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.change import Insertion
from regrow.tracing.block_numbers import DEPTHS, FIRST, PER_BLOCK
from regrow.tracing.meta_copy import copy_model

INSERTIONS = "block_insertions"
"""The attribute of a stack that records the insertions into it which no configuration tells of."""
_NUMBERED = re.compile(r"(.*?)(\d+)")


class StackError(ValueError):
    """Raised with the reason why a module is no stack into which the blocks can be inserted."""


def stack_at(model: nn.Module, path: str, size: int) -> nn.Sequential | nn.ModuleList:
    """Return the stack of a path.

    Args:
        model: The network.
        path: The path of the stack.
        size: How many modules it must have.

    Raises:
        StackError: If there is no such stack, or it has another number of modules or names that are not numbered.
    """
    stack = dict(model.named_modules()).get(path)
    if not isinstance(stack, nn.Sequential | nn.ModuleList):
        raise StackError(f"the network has no nn.Sequential or nn.ModuleList {path!r}")
    if len(stack) != size:
        raise StackError(f"stack {path!r} has {len(stack)} modules here, not {size}")
    _prefix(stack)
    return stack


def insert_copies(model: nn.Module, path: str, insertion: Insertion) -> None:
    """Put copies of blocks into a stack, in place; parameters that are to be 0 in a copy are set to 0.

    Args:
        model: The network.
        path: The path of the stack.
        insertion: The copies.

    Raises:
        StackError: If there is no such stack, or a block has no parameter of a name; nothing is changed then.
    """
    stack = stack_at(model, path, insertion.size)
    old = list(stack)
    made = {copy.position: _copied(model, old[copy.of], copy.zeros) for copy in insertion.copies}
    modules = [made[i] if i in made else old[of] for i, of in enumerate(insertion.sources)]
    _replace(stack, modules, insertion.sources)
    if not _deepen(model, path, insertion.size, insertion.sources):
        setattr(stack, INSERTIONS, (*getattr(stack, INSERTIONS, ()), insertion))


def remove_copies(model: nn.Module, path: str, insertion: Insertion) -> list[nn.Module]:
    """Take the blocks of an insertion out of a stack again, in place; return all modules that it had.

    Args:
        model: The network.
        path: The path of the stack.
        insertion: The insertion that is undone.

    Raises:
        StackError: If there is no such stack; nothing is changed then.
    """
    stack = stack_at(model, path, insertion.after)
    before = list(stack)
    _replace(stack, [before[i] for i in insertion.kept], insertion.kept)
    _deepen(model, path, insertion.after, insertion.kept)
    if insertions := getattr(stack, INSERTIONS, ()):
        setattr(stack, INSERTIONS, insertions[:-1])
        if len(insertions) == 1:
            delattr(stack, INSERTIONS)
    return before


def put_back(model: nn.Module, path: str, insertion: Insertion, modules: Sequence[nn.Module]) -> None:
    """Undo :func:`remove_copies`, in place.

    Args:
        model: The network.
        path: The path of the stack.
        insertion: The insertion that was undone.
        modules: All modules that the stack had, as returned.
    """
    stack = stack_at(model, path, insertion.size)
    _replace(stack, list(modules), insertion.sources, moved=insertion.kept)
    if not _deepen(model, path, insertion.size, insertion.sources):
        setattr(stack, INSERTIONS, (*getattr(stack, INSERTIONS, ()), insertion))


def find_insertions(model: nn.Module) -> dict[str, tuple[Insertion, ...]]:
    """Return path of a stack → the insertions into it, in order, that no configuration tells of.

    Args:
        model: The network.
    """
    return {path: vars(module)[INSERTIONS] for path, module in model.named_modules() if INSERTIONS in vars(module)}


def _replace(
    stack: nn.Sequential | nn.ModuleList, modules: list[nn.Module], sources: Sequence[int], moved: Sequence[int] = ()
) -> None:
    """Give a stack other modules under consecutive names, and renumber the modules that hold their own number.

    Args:
        stack: The stack.
        modules: Its new modules.
        sources: For each, its index before, which the numbers in it are relative to.
        moved: If given, the indices of the modules whose numbers change; all of them otherwise.
    """
    prefix, start = _prefix(stack)
    stack._modules.clear()
    stack._modules.update({f"{prefix}{start + i}": module for i, module in enumerate(modules)})
    for i, (module, of) in enumerate(zip(modules, sources, strict=True)):
        for one in module.modules() if not moved or i in moved else ():
            for name in FIRST:
                if type(number := vars(one).get(name)) is int:
                    setattr(one, name, number + i - of)


def _prefix(stack: nn.Sequential | nn.ModuleList) -> tuple[str, int]:
    """Return what the names of a stack's modules have in common, and the number of the first."""
    names = list(stack._modules)
    first = _NUMBERED.fullmatch(names[0]) if names else None
    if first is None or names != [f"{first[1]}{int(first[2]) + i}" for i in range(len(names))]:
        raise StackError("the modules of the stack have names that are not numbered one after the other")
    return first[1], int(first[2])


def _copied(model: nn.Module, block: nn.Module, zeros: Sequence[str]) -> nn.Module:
    """Return a copy of a block that shares what the block shares with the rest of the network (a configuration)."""
    names = dict(block.named_parameters())
    if lost := next((name for name in zeros if name not in names), ""):
        raise StackError(f"a block that is copied has no parameter {lost!r}")
    inside = {id(module) for module in block.modules()}
    outside = [module for one in _others(model, block) for module in (one,) if id(module) not in inside]
    shared = {id(value): value for module in outside for value in vars(module).values() if _is_shareable(value)}
    known = {id(module) for module in outside}
    memo: dict[int, Any] = {}
    for module in block.modules():
        memo |= {id(v): v for v in vars(module).values() if id(v) in shared}
        memo |= {id(child): child for child in module._modules.values() if child is not None and id(child) in known}
    made: nn.Module = copy_model(block, lambda x: x.detach().clone(), memo)
    parameters = dict(made.named_parameters())
    with torch.no_grad():
        for name in zeros:
            parameters[name].zero_()
    return made


def _others(model: nn.Module, block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a network that are reached without entering a block."""
    yield model
    for child in model._modules.values():
        if child is not None and child is not block:
            yield from _others(child, block)


def _is_shareable(value: object) -> bool:
    plain = (int, float, bool, str, bytes, type, dict, list, tuple, set, Tensor, nn.Module)
    return value is not None and not isinstance(value, plain) and not callable(value)


def _deepen(model: nn.Module, path: str, size: int, sources: Sequence[int]) -> bool:
    """Set the depth in the configurations around a stack; return whether the network's own one tells it."""
    parts = path.split(".")
    around = [model, *(model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))]
    configs = {id(one): one for module in around if (one := getattr(module, "config", None)) is not None}
    told = False
    own = getattr(model, "config", None)
    text = getattr(own, "get_text_config", lambda: None)()
    for config in configs.values():
        values: Mapping[str, Any] = getattr(config, "__dict__", {})
        deep = [name for name, value in values.items() if name in DEPTHS and type(value) is int and value == size]
        rows = [name for name in values if name in PER_BLOCK and _length(values[name]) == size]
        for name in deep if deep else ():
            setattr(config, name, len(sources))
        for name in rows if deep else ():
            setattr(config, name, type(values[name])(values[name][i] for i in sources))
        told |= bool(deep) and (config is own or config is text)
    return told


def _length(value: object) -> int:
    return len(value) if isinstance(value, list | tuple) else -1
