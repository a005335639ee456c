"""Results of operations on fake tensors, inferred once for operands of the same shapes, strides, dtypes and devices."""

from collections.abc import Callable, Hashable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# Shape, stride, dtype and device of a fake tensor
Form = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class KnownForms:
    """A cache of results by operation, forms of its operands, and its other arguments, on fake tensors of one mode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.cache: dict[Hashable, Form | int] = {}  # int: the result is the operand with this index

    def infer_once(self, infer: Callable[..., Any], func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation on fake tensors, by ``infer(func, args, kwargs)`` if it is not cached.

        Cached are results that are one tensor, either an operand itself or of storage of its own. Results of operations
        that write in place, or run under autocast, are not.
        """
        operands: list[Tensor] = []
        try:
            key = (func, torch.get_default_dtype(), _describe((args, kwargs), operands))
            cached = self.cache.get(key)
        except TypeError:  # nothing identifies one of the arguments
            return infer(func, args, kwargs)
        if isinstance(cached, int):
            return operands[cached]
        if cached is not None:
            shape, stride, dtype, device = cached
            with no_python_dispatcher():
                return FakeTensor(self.mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)
        result = infer(func, args, kwargs)
        if not (func._schema.is_mutable or torch._C._is_any_autocast_enabled()):
            itself = next((i for i, operand in enumerate(operands) if operand is result), None)
            if itself is not None:
                self.cache[key] = itself
            elif is_plain(result) and not result.storage_offset() and _storage(result) not in map(_storage, operands):
                self.cache[key] = _form_of(result)
        return result


def _describe(value: object, operands: list[Tensor]) -> Hashable:
    """Return a cache key of an argument, and append its tensors to ``operands``; raise TypeError if it has none."""
    if isinstance(value, Tensor):
        if not is_plain(value):
            raise TypeError
        operands.append(value)
        return (*_form_of(value), next(i for i, operand in enumerate(operands) if operand is value))
    if isinstance(value, list | tuple):
        return tuple([_describe(part, operands) for part in value])
    if isinstance(value, dict):
        return _describe([*value.items()], operands)
    return type(value), value  # 1, 1.0 and True are equal


def is_plain(x: object) -> TypeGuard[FakeTensor]:
    """Whether a value is a fake tensor that its form describes completely: dense, of unknown value, no lazy flags."""
    return (
        type(x) is FakeTensor and x.layout is torch.strided and x.constant is None and not (x.is_conj() or x.is_neg())
    )


def _form_of(x: FakeTensor) -> Form:
    """Return shape, stride, dtype and device of a fake tensor."""
    return x.shape, x.stride(), x.dtype, x.fake_device


def _storage(x: Tensor) -> int:
    """Return a number that identifies a tensor's storage while that exists."""
    return x.untyped_storage()._cdata
