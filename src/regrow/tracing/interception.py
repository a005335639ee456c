"""Context for recording a run: which module is running, and calls that bypass torch's dispatcher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode


class SpellOut(TorchFunctionMode):
    """Torch function mode that replaces calls that bypass the dispatcher (``tolist``, ``data``) by recordable ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and all(isinstance(x, Tensor) for x in args):
            x, index, value = args
            if index.dim() == 1 and value.dim() <= x.dim() and value.dtype == x.dtype:
                x.index_put_((index,), value)
                return None
        if func is Tensor.tolist:
            return _listed(args[0])
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def _listed(x: Tensor) -> Any:
    return x.item() if x.dim() == 0 else [_listed(one) for one in x.unbind()]


@contextmanager
def follow_modules(model: nn.Module) -> Iterator[Callable[[], dict[str, tuple[str, type]]]]:
    """Context manager that yields a function: path → (path, class) of the modules running now, innermost last.

    Args:
        model: The network.
    """
    paths = {module: path for path, module in model.named_modules()}
    stacks: list[dict[str, tuple[str, type]]] = [{}]

    def begins(module: nn.Module, given: Any) -> None:
        path = paths.get(module)
        stacks.append(stacks[-1] if path is None else {**stacks[-1], path: (path, type(module))})

    def ends(module: nn.Module, given: Any, result: Any) -> None:
        stacks.pop()

    hooks = [
        register_module_forward_pre_hook(begins),
        register_module_forward_hook(ends, always_call=True),
    ]
    try:
        yield lambda: stacks[-1]
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def as_exporting() -> Iterator[None]:
    """Context manager in which ``torch.compiler.is_compiling`` and ``is_exporting`` return true."""
    before = {name: getattr(torch.compiler, name) for name in _ASKED}
    try:
        for name in _ASKED:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


_ASKED = ("_is_compiling_flag", "_is_exporting_flag")


most_calls: ContextVar[float] = ContextVar("most_calls", default=inf)
"""The most operations that a recording may have."""


@contextmanager
def limit_calls(most: int) -> Iterator[None]:
    """Context manager in which a recording fails that has more than so many operations.

    Args:
        most: The most operations.
    """
    token = most_calls.set(most)
    try:
        yield
    finally:
        most_calls.reset(token)
