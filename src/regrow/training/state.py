"""The state of a training and of its learner, and checkpoints of both with the network, which may have changed shape.

A learner's state is a frozen dataclass. A field of type ``AxisTensor``, ``AxisTensor | None`` or
``Mapping[str, AxisTensor]`` holds tensors: they follow every plan, those with a learning rate are trained, and all are
stored by the name of the field (and the key). A field made by :func:`derived` is neither stored nor changed: the
learner computes it again on ``Event.RESUME``. Every other field is JSON data.

A run that is killed and resumed from its checkpoint ends with the same bits as one that was not.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar, get_type_hints

import msgspec
import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Dim, Product, Sum
from regrow.core.axes.axis import AxisTensor
from regrow.core.plan import Plan
from regrow.core.sources import device_of
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import broadcast_file, broadcast_record
from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError
from regrow.store.ledger import read_plan, replay
from regrow.store.tensors import read_header, read_tensors, write_tensors
from regrow.surgery import UndoStore
from regrow.surgery.layout import resize_axis_tensor
from regrow.training.schedule import Moments

S = TypeVar("S")

CHECKPOINT = "course.safetensors"
FORMAT = "regrow-course/4"

# The types of a state's fields that hold one tensor, or several by name.
_SINGLE, _MAPPING = (AxisTensor, AxisTensor | None), (Mapping[str, AxisTensor], dict[str, AxisTensor])


def derived(make: Callable[[], Any]) -> Any:
    """Declare a field that a learner computes from others, neither stored nor resized; ``make``: () → its default."""
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
    tensor_fields, _ = _stored_fields(_type(state))
    for name, single in tensor_fields.items():
        value = getattr(state, name)
        tensors |= {name: value} if single else {f"{name} {rest}": tensor for rest, tensor in value.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def with_axis_tensors(state: S, tensors: Mapping[str, AxisTensor]) -> S:
    """Return a copy of a state with other tensors, named as by :func:`axis_tensors`.

    Those of a mapping may be fewer or more. Raise ValueError if a name fits no field, or a single tensor is missing.
    """
    is_single, _ = _stored_fields(_type(state))
    values: dict[str, Any] = {name: None if single else {} for name, single in is_single.items()}
    for key, tensor in tensors.items():
        field_name, _, rest = key.partition(" ")
        if is_single.get(key, False):
            values[key] = tensor
        elif rest and not is_single.get(field_name, True):
            values[field_name][rest] = tensor
        else:
            raise ValueError(f"the method has no tensor {key!r}")
    missing = [name for name, value in values.items() if value is None and getattr(state, name) is not None]
    if missing:
        raise ValueError(f"the tensor {missing[0]!r} is missing")
    return replace(state, **values) if values else state  # type: ignore[type-var]


def follow_plan(state: S, axes: AxisGraph, plan: Plan) -> S:
    """Return the state after a plan: kept entries of tensors keep their values, new ones are 0; ``axes``: before it."""
    return with_axis_tensors(
        state, {name: resize_axis_tensor(tensor, axes, plan) for name, tensor in axis_tensors(state).items()}
    )


def json_values(state: Any) -> dict[str, Any]:
    """Return the fields of a state that are JSON data, by name."""
    _, types = _stored_fields(_type(state))
    return {name: msgspec.to_builtins(getattr(state, name)) for name in types}


def restore_state(state: S, tensors: Mapping[str, AxisTensor], values: Mapping[str, Any]) -> S:
    """Return a state with the stored tensors and values that :func:`axis_tensors` and :func:`json_values` returned.

    ``state``: one of the same type, of which the derived fields are kept. Raise ValueError if a tensor or value is
    missing, or does not fit.
    """
    _, types = _stored_fields(_type(state))
    if missing := [name for name in types if name not in values]:
        raise ValueError(f"the value {missing[0]!r} is missing")
    converted = {name: convert(values[name], hint) for name, hint in types.items()}
    return with_axis_tensors(replace(state, **converted), tensors)  # type: ignore[type-var]


def _type(state: Any) -> Any:
    """Return ``type(state)`` as ``Any``, since mypy takes the type of a type variable for unhashable."""
    return type(state)


@cache
def _stored_fields(state_type: Any) -> tuple[dict[str, bool], dict[str, Any]]:
    """Return the fields that hold tensors (name → whether a single one), and those with JSON data (name → type)."""
    hints = get_type_hints(state_type)
    stored = [field.name for field in fields(state_type) if not field.metadata.get("derived")]
    tensors = {name: hints[name] in _SINGLE for name in stored if hints[name] in (*_SINGLE, *_MAPPING)}
    return tensors, {name: hints[name] for name in stored if name not in tensors}


@dataclass(frozen=True)
class TrainState(Generic[S]):
    """The state of a training: the learner's state, the position in the tasks, and all measurements so far."""

    learner: S  # the state of the learner
    number: int = 0  # the number of finished tasks
    epoch: int = 0  # the number of finished epochs of the current task
    step: int = 0  # the number of finished steps of the current epoch
    rows: tuple[tuple[float, ...], ...] = ()  # the accuracy matrix so far, one row per finished task
    before: tuple[float, ...] = ()  # the accuracy of the untrained network on every task
    plans: tuple[Plan, ...] = ()  # every plan that was applied, in order
    events: tuple[Mapping[str, Any], ...] = ()  # one row per change of shape
    sizes: tuple[dict[str, Any], ...] = ()  # one row per finished task: parameters, MACs and bytes of state
    moments: Moments = field(default_factory=dict)  # the state of the optimizers


def write_checkpoint(
    path: Path,
    model: nn.Module,
    state: TrainState[S],
    undo: UndoStore | None = None,
    *,
    outside: bool = False,
    trained_only: bool = False,
    header: Mapping[str, object] | None = None,
) -> None:
    """Write a checkpoint of a network and its training to a safetensors file, atomically.

    ``undo``: the store of removed weights, if the learner has one; ``outside``: plans, rows, sizes and events are
    stored elsewhere, and not here; ``trained_only``: of the network, only parameters that require gradients;
    ``header``: JSON data that is added to the file's header.
    """
    tensors = axis_tensors(state.learner)
    weights = _trained_parameters(model) if trained_only else model.state_dict()
    parts: dict[str, Tensor] = {f"model {name}": value for name, value in weights.items()}
    parts |= {f"learner {name}": tensor.values for name, tensor in tensors.items()}
    moments = {f"{key} {name}": value for name, entries in state.moments.items() for key, value in entries.items()}
    parts |= {f"optimizer {name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    if undo is not None:
        parts |= {f"undo_store {name}": value for name, value in undo.contents().items()}
    fields: tuple[str, ...] = ("number", "epoch", "step", "before")
    if not outside:
        fields += ("rows", "sizes", "events")
    record: dict[str, Any] = {
        **(header or {}),
        "along": {name: [_dims_to_json(tensor.dims), tensor.lr] for name, tensor in tensors.items()},
        "values": json_values(state.learner),
        "numbers": {name: value for name, value in moments.items() if not isinstance(value, Tensor | None)},
        "course": {name: getattr(state, name) for name in fields},
        "plans": len(state.plans) if outside else [json.loads(plan.to_json()) for plan in state.plans],
    }
    write_tensors(path, parts, record, FORMAT)


def read_checkpoint(
    path: Path,
    model: nn.Module,
    axes: AxisGraph,
    learner: S,
    history: TrainState[None] | None = None,
    undo: UndoStore | None = None,
    *,
    trained_only: bool = False,
) -> tuple[nn.Module, AxisGraph, TrainState[S]]:
    """Read a checkpoint, apply its plans to the network, in place, and return network, axes and training state.

    ``model`` and ``axes`` are those before the first plan, ``learner`` is the learner's initial state; ``history`` has
    what was stored elsewhere (``outside``): plans, rows, sizes and events; ``None``: nothing was; ``undo``: an empty
    store, which is filled. Raise StoreError if the file does not fit them.
    """
    try:
        header, tensors = read_tensors(path, FORMAT)
        record = convert(header, schemas.CourseHeader)
        state = _stored_progress(record, history, learner)
        model, axes = replay(model, axes, state.plans, undo)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "learner": {}, "optimizer": {}, "undo_store": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(" ")
            parts[part][rest] = value
        if trained_only and parts["model"].keys() != _trained_parameters(model).keys():
            raise ValueError("it holds other parameters than those that are trained")
        model.load_state_dict(parts["model"], strict=not trained_only)
        removed = undo.contents() if undo is not None else {}
        for name, value in parts["undo_store"].items():
            removed[name].copy_(value)
        device = device_of(model)
        learner_tensors = {
            name: AxisTensor(parts["learner"][name].to(device), tuple(map(_dim_from_json, dims)), lr)
            for name, (dims, lr) in record.along.items()
        }
        moments: dict[str, dict[str, Any]] = {}
        for key, number in {**parts["optimizer"], **record.numbers}.items():
            moment, _, name = key.partition(" ")
            moments.setdefault(name, {})[moment] = number
        learned = restore_state(learner, learner_tensors, record.values)
        return model, axes, replace(state, learner=learned, moments=moments)
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise _damage_error(path, error) from None


def resume_training(
    ranks: ProcessRank,
    history: TrainState[None] | None,
    checkpoint: Path,
    model: nn.Module,
    axes: AxisGraph,
    learner: S,
    undo: UndoStore | None = None,
) -> tuple[nn.Module, AxisGraph, TrainState[S]]:
    """Return network, axes and training state from which training resumes, or at the start if ``history`` is ``None``.

    All ranks call this. Rank 0, which alone reads the run folder, passes its ``history`` (plans, rows, sizes and
    events) and the file ``checkpoint``, which is not read without one; others pass ``None``. The network is changed in
    place. Raise StoreError as :func:`read_checkpoint`.
    """
    if ranks.several:
        sent = history and {**vars(history), "plans": [plan.to_json() for plan in history.plans]}
        if record := broadcast_record(ranks, sent):
            plans = tuple(read_plan(json.loads(plan)) for plan in record["plans"])
            history = TrainState(**record | {"plans": plans})
    if history is None:
        return model, axes, TrainState(learner)
    with TemporaryDirectory(prefix="regrow-") if ranks.several else nullcontext("") as folder:
        path = broadcast_file(ranks, checkpoint, Path(folder))
        return read_checkpoint(path, model, axes, learner, history, undo)


def check_checkpoint(path: Path, history: TrainState[None]) -> int:
    """Return the number of finished tasks of a checkpoint, 0 if there is no file.

    Raise StoreError if ``history``, the rows and plans stored elsewhere, lacks any that the checkpoint relies on.
    """
    if not path.is_file():
        return 0
    try:
        state = _stored_progress(convert(read_header(path, FORMAT), schemas.CourseHeader), history, None)
    except (ValueError, KeyError, TypeError) as error:
        raise _damage_error(path, error) from None
    if len(state.rows) < state.number:
        raise StoreError(
            f"{path.with_name('metrics.jsonl')} holds {len(state.rows)} of the {state.number} tasks that are over; "
            "restore it"
        )
    return state.number


def _stored_progress(record: schemas.CourseHeader, history: TrainState[None] | None, learner: S) -> TrainState[S]:
    """Return the training state in a checkpoint's header, with the learner's state ``learner``, and without moments.

    ``history``: as in :func:`read_checkpoint`; what it has beyond the checkpoint is left out. ValueError for less.
    """
    course = record.course
    state = TrainState(learner, course.number, course.epoch, course.step, before=tuple(course.before))
    if not isinstance(record.plans, int):  # the history is in the checkpoint
        rows, plans = tuple(map(tuple, course.rows)), tuple(map(read_plan, record.plans))
        return replace(state, rows=rows, plans=plans, events=tuple(course.events), sizes=tuple(course.sizes))
    past = history or TrainState(None)
    for name, changes in (("ledger.json", past.plans), ("metrics.jsonl", past.events)):
        if len(changes) < record.plans:
            raise ValueError(f"{name} holds {len(changes)} of the {record.plans} changes of shape that it relies on")
    plans, events = past.plans[: record.plans], past.events[: record.plans]
    return replace(state, rows=past.rows[: state.number], sizes=past.sizes[: state.number], plans=plans, events=events)


def _trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _damage_error(path: Path, error: Exception) -> StoreError:
    """Return the error for a file that cannot be used, with the reason in one line."""
    text = " ".join(str(error).split())[:200]
    return StoreError(text if text.startswith(str(path)) else f"{path} cannot be used ({text}); restore it")


def _dims_to_json(dim: Any) -> Any:
    """Return the size of a dimension, an int, axis key, product or sum, or several of them, as JSON data."""
    match dim:
        case Product(parts):
            return {"product": [_dims_to_json(part) for part in parts]}
        case Sum(parts):
            return {"sum": [_dims_to_json(part) for part in parts]}
        case tuple() | list() | torch.Size():
            return [_dims_to_json(part) for part in dim]
    return dim


def _dim_from_json(data: Any) -> Dim:
    """Return the dimension that :func:`_dims_to_json` has written; ValueError if it is none."""
    match data:
        case {"product": [*parts]}:
            return Product(tuple(map(_dim_from_json, parts)))
        case {"sum": [*parts]}:
            return Sum(tuple(map(_dim_from_json, parts)))
        case int() | str():
            return data
    raise ValueError(f"not a dimension: {data!s:.60}")
