"""The state of a learner: a frozen dataclass whose fields say how they are stored and whether they follow plans.

A field of type ``AxisTensor``, ``AxisTensor | None`` or ``Mapping[str, AxisTensor]`` holds tensors: they follow every
plan, those with a learning rate are trained, and all are stored by the name of the field (and the key). A field made by
:func:`derived` is neither stored nor changed: the learner computes it again on ``Event.RESUME``. Every other field is
JSON data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Generic, TypeVar, get_type_hints

import msgspec

from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import AxisTensor
from regrow.core.plan import Plan
from regrow.store.convert import convert
from regrow.surgery.layout import resize_axis_tensor
from regrow.training.schedule import Moments

S = TypeVar("S")

GrowthEvent = Mapping[str, Any]
"""The record of one change of shape, as JSON data."""

_ONE, _SEVERAL = (AxisTensor, AxisTensor | None), (Mapping[str, AxisTensor], dict[str, AxisTensor])


def derived(make: Callable[[], Any]) -> Any:
    """Declare a field of a state that is computed from the rest: not stored, and not changed by plans."""
    return field(default_factory=make, repr=False, compare=False, metadata={"derived": True})


def axis_tensors(state: Any) -> dict[str, AxisTensor]:
    """Return the tensors of a state by name: that of the field, followed by the key if it is a mapping.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class State:
    ...     anchor: Mapping[str, AxisTensor]
    >>> list(axis_tensors(State({"weight": AxisTensor(torch.zeros(2), (2,))})))
    ['anchor weight']
    """
    tensors: dict[str, Any] = {}
    for name, single in _tensor_fields(_kind(state)).items():
        value = getattr(state, name)
        tensors |= {name: value} if single else {f"{name} {rest}": one for rest, one in value.items()}
    return {name: one for name, one in tensors.items() if one is not None}


def with_axis_tensors(state: S, tensors: Mapping[str, AxisTensor]) -> S:
    """Return the state with other tensors, named as by :func:`axis_tensors`; those that are missing are removed."""
    known = _tensor_fields(_kind(state))
    values: dict[str, Any] = {name: None if single else {} for name, single in known.items()}
    for key, one in tensors.items():
        first, _, rest = key.partition(" ")
        if known.get(key, False):
            values[key] = one
        elif rest and not known.get(first, True):
            values[first][rest] = one
        else:
            raise ValueError(f"the method has no tensor {key!r}")
    missing = [name for name, value in values.items() if value is None and getattr(state, name) is not None]
    if missing:
        raise ValueError(f"the tensor {missing[0]!r} is missing")
    return replace(state, **values) if values else state  # type: ignore[type-var]


def follow_plan(state: S, axes: AxisGraph, plan: Plan) -> S:
    """Return the state after a plan: kept entries of its tensors keep their values, new ones are 0."""
    return with_axis_tensors(
        state, {name: resize_axis_tensor(one, axes, plan) for name, one in axis_tensors(state).items()}
    )


def values_of(state: Any) -> dict[str, Any]:
    """Return the fields of a state that are JSON data, by name."""
    return {name: msgspec.to_builtins(getattr(state, name)) for name in _value_fields(_kind(state))}


def restore_state(state: S, tensors: Mapping[str, AxisTensor], values: Mapping[str, Any]) -> S:
    """Rebuild a state from its stored tensors and values."""
    hints, names = get_type_hints(type(state)), _value_fields(_kind(state))
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"the value {missing[0]!r} is missing")
    known = {name: convert(values[name], hints[name]) for name in names}
    return with_axis_tensors(replace(state, **known), tensors)  # type: ignore[type-var]


@cache
def _tensor_fields(kind: Any) -> dict[str, bool]:
    """Return the fields that hold tensors: name → whether it holds a single one."""
    hints = get_type_hints(kind)
    known = (*_ONE, *_SEVERAL)
    return {name: hints[name] in _ONE for name in _stored(kind) if hints[name] in known}


@cache
def _value_fields(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in _stored(kind) if name not in _tensor_fields(kind))


def _kind(state: Any) -> Any:
    return type(state)


def _stored(kind: Any) -> list[str]:
    return [one.name for one in fields(kind) if not one.metadata.get("derived")]


@dataclass(frozen=True)
class TrainState(Generic[S]):
    """The state of a training: the learner's state, the position in the tasks, and all measurements so far.

    Args:
        learner: The state of the learner.
        number: The number of finished tasks.
        epoch: The number of finished epochs of the current task.
        step: The number of finished steps of the current epoch.
        rows: The accuracy matrix so far, one row per finished task.
        before: The accuracy of the untrained network on every task.
        plans: Every plan that was applied, in order.
        events: One row per change of shape.
        sizes: One row per finished task: parameters, MACs and bytes of state.
        moments: The state of the optimizers.
        loss: The smoothed training loss of the current task.
        validation: The score on held-out examples after each epoch of the current task.
    """

    learner: S
    number: int = 0
    epoch: int = 0
    step: int = 0
    rows: tuple[tuple[float, ...], ...] = ()
    before: tuple[float, ...] = ()
    plans: tuple[Plan, ...] = ()
    events: tuple[GrowthEvent, ...] = ()
    sizes: tuple[dict[str, Any], ...] = ()
    moments: Moments = field(default_factory=dict)
    loss: float | None = None
    validation: tuple[float, ...] = ()
