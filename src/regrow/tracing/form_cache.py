"""Remember shape, strides, dtype and device of operations' results, since networks run the same ones again and again.

A result depends on the operation, the forms of its operands and its other arguments only. What does not fit this is
not remembered: operations that write into operands, results that share memory with an operand without being it, and
results that are no tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Form = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device] | int
"""Shape, strides, dtype and device of a result; the index of the operand that is returned itself."""

_MOST = 20_000
_known: dict[object, Form | list[Form]] = {}


def remember_result(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode, infer: Callable[[], Any]
) -> Any:
    """Return what an operation gives on fake tensors, inferred only if it was not seen with such operands.

    Args:
        func: The operation.
        args: Its positional arguments; tensors are fake.
        kwargs: Its arguments by name.
        mode: The mode of the fake tensors.
        infer: Infers the result.
    """
    given: list[Tensor] = []
    try:
        key = (func, torch.get_default_dtype(), _key(args, mode, given), _key(kwargs, mode, given))
        known = _known.get(key)
    except TypeError:  # an argument of another kind
        return infer()
    if func._schema.is_mutable or mode.shape_env is not None or torch._C._is_any_autocast_enabled():
        return infer()
    if known is None:
        result = infer()
        if (forms := _forms(result, given)) is not None:
            if len(_known) >= _MOST:
                forget_results()
            _known[key] = forms
        return result
    with no_python_dispatcher():
        if isinstance(known, list):
            return [_made(form, given, mode) for form in known]
        return _made(known, given, mode)


def forget_results() -> None:
    """Forget all results."""
    _known.clear()


def _made(form: Form, given: list[Tensor], mode: FakeTensorMode) -> Tensor:
    if isinstance(form, int):
        return given[form]
    shape, stride, dtype, device = form
    return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


def _key(value: Any, mode: FakeTensorMode, given: list[Tensor]) -> object:
    """Return what identifies an argument, and collect its tensors; raise TypeError where nothing does."""
    kind = type(value)
    if kind is FakeTensor:
        if value.fake_mode is not mode or value.constant is not None or value.layout is not torch.strided:
            raise TypeError
        if value.is_conj() or value.is_neg():
            raise TypeError
        place = next((i for i, one in enumerate(given) if one is value), len(given))
        given.append(value)
        return (value.shape, value.stride(), value.dtype, value.fake_device, place)
    if kind is tuple or kind is list:
        return (kind, *[_key(one, mode, given) for one in value])
    if kind is dict:
        return tuple([(name, _key(one, mode, given)) for name, one in value.items()])
    if kind is int or value is None or kind in _NAMES:
        return value
    if kind is float or kind is bool:
        return (kind, value)
    raise TypeError


_NAMES = frozenset((str, torch.dtype, torch.device, torch.layout, torch.memory_format))


def _forms(result: Any, given: list[Tensor]) -> Form | list[Form] | None:
    """Return the forms of a result; ``None`` if they do not say all about it."""
    if type(result) in (list, tuple):
        forms = [_form(one, given) for one in result]
        whole = [form for form in forms if form is not None]
        return whole if type(result) is list and len(whole) == len(forms) else None
    return _form(result, given)


def _form(x: Any, given: list[Tensor]) -> Form | None:
    if (place := next((i for i, one in enumerate(given) if one is x), None)) is not None:
        return place
    if type(x) is not FakeTensor or x.layout is not torch.strided or x.is_conj() or x.is_neg():
        return None
    shares = x.untyped_storage()._cdata in {one.untyped_storage()._cdata for one in given}
    if shares or x.requires_grad or x.storage_offset():
        return None
    return x.shape, x.stride(), x.dtype, x.fake_device
