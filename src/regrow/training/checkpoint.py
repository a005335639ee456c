"""Checkpoints: a network that may have changed its shape and the state of its training, in one file.

A run that is killed and resumed from its checkpoint ends with the same bits as one that was not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Dim, Product, Sum
from regrow.core.axis_tensor import AxisTensor
from regrow.core.plan import Plan
from regrow.core.sources import device_of
from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError
from regrow.store.ledger import replay
from regrow.store.tensors import read_header, read_tensors, write_tensors
from regrow.surgery import UndoStore
from regrow.training.state import TrainState, axis_tensors, restore_state, values_of

S = TypeVar("S")

CHECKPOINT = "course.safetensors"
FORMAT = "regrow-course/3"
_COUNTED = ("number", "epoch", "step", "before", "loss", "validation")
_GROWING = ("rows", "sizes", "events")


@dataclass(frozen=True)
class History:
    """The parts of a training state that grow with the number of tasks, where a run stores them outside its checkpoint.

    Args:
        plans: Every plan that was applied, in order.
        rows: The accuracy matrix, one row per finished task.
        sizes: One row per finished task: parameters, MACs and bytes of state.
        events: One row per change of shape, as far as they were logged.
    """

    plans: Sequence[Plan] = ()
    rows: Sequence[tuple[float, ...]] = ()
    sizes: Sequence[dict[str, Any]] = ()
    events: Sequence[dict[str, Any]] = ()


def write_checkpoint(
    path: Path,
    model: nn.Module,
    state: TrainState[S],
    undo: UndoStore | None = None,
    *,
    logged: int | None = None,
    trained_only: bool = False,
    header: Mapping[str, object] | None = None,
    writes: bool = True,
) -> None:
    """Write a checkpoint of a network and its training, atomically: the whole file, or nothing.

    Args:
        path: The file to create or replace.
        model: The network.
        state: The state of the training.
        undo: The store of what plans removed from the network, for learners that restore units.
        logged: The number of events, from the first on, that are in the run's :class:`History`, together with all plans
            and the rows of finished tasks; the file leaves these out, so that it does not grow with the number of
            tasks. ``None``: they are in the file.
        trained_only: Whether only the parameters with ``requires_grad`` are written, because nothing else changes.
        header: Further JSON data for the header of the file.
        writes: Whether this rank writes the file; others only take part in gathering sharded tensors.

    Raises:
        StoreError: If the disk is full or the file cannot be written.
    """
    tensors = axis_tensors(state.learner)
    weights = _trained(model) if trained_only else model.state_dict()
    parts: dict[str, Tensor] = {f"model {name}": value for name, value in weights.items()}
    parts |= {f"learner {name}": one.values for name, one in tensors.items()}
    numbers: dict[str, Any] = {}
    for name, memory in state.moments.items():
        for what, value in memory.items():
            if isinstance(value, Tensor):
                parts[f"optimiser {what} {name}"] = value
            elif value is not None:
                numbers[f"{what} {name}"] = value
    if undo is not None:
        parts |= {f"undo_store {name}": value for name, value in undo.contents().items()}
    whole: dict[str, Any] = {
        **(header or {}),
        "along": {name: [_to_json(one.dims), one.lr] for name, one in tensors.items()},
        "values": values_of(state.learner),
        "numbers": numbers,
        "course": {name: getattr(state, name) for name in (*_COUNTED, *(_GROWING if logged is None else ()))},
        "plans": len(state.plans) if logged is not None else [json.loads(plan.to_json()) for plan in state.plans],
        "logged": logged,
        "open": state.events[logged:] if logged is not None else [],
    }
    write_tensors(path, parts, whole, FORMAT, writes=writes)


def read_checkpoint(
    path: Path,
    model: nn.Module,
    axes: AxisGraph,
    learner: S,
    history: History | None = None,
    undo: UndoStore | None = None,
    *,
    trained_only: bool = False,
) -> tuple[nn.Module, AxisGraph, TrainState[S]]:
    """Read a checkpoint, apply its plans to the network, and return network, axes and training state.

    Args:
        path: The file.
        model: The network as it was first built; changed in place.
        axes: The axes of that network.
        learner: The learner's initial state.
        history: The parts that the run stores outside the checkpoint, if it leaves them out; there may be later ones
            too.
        undo: An empty store, which is filled with what plans removed, for learners that restore units.
        trained_only: Whether the file has only the parameters with ``requires_grad``.

    Raises:
        StoreError: If the file is damaged or was written for another network or method.
    """
    try:
        header, tensors = read_tensors(path, FORMAT)
        record = convert(header, schemas.CourseHeader)
        plans, measured = _measured(record, history or History())
        model, axes = replay(model, axes, plans, undo)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "learner": {}, "optimiser": {}, "undo_store": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(" ")
            parts[part][rest] = value
        if trained_only and parts["model"].keys() != _trained(model).keys():
            raise ValueError("it holds other parameters than those that are trained")
        model.load_state_dict(parts["model"], strict=not trained_only)
        removed = undo.contents() if undo is not None else {}
        for name, value in parts["undo_store"].items():
            removed[name].copy_(value)
        device = device_of(model)
        own = {
            name: AxisTensor(parts["learner"][name].to(device), tuple(map(_from_json, dims)), lr)
            for name, (dims, lr) in record.along.items()
        }
        restored = restore_state(learner, own, record.values)
        moments = _moments(parts["optimiser"], record.numbers)
        state = TrainState(restored, plans=tuple(plans), moments=moments, **measured)
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise _damaged(path, error) from None
    return model, axes, state


def check_checkpoint(path: Path, history: History) -> None:
    """Raise StoreError unless a run's logs have everything that its checkpoint relies on; changes nothing.

    Args:
        path: The checkpoint; nothing is checked if it does not exist.
        history: The logged rows and plans.

    Raises:
        StoreError: If rows or plans are missing, or the file is damaged.
    """
    if not path.is_file():
        return
    try:
        _, known = _measured(convert(read_header(path, FORMAT), schemas.CourseHeader), history)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    if len(known["rows"]) < known["number"]:
        raise StoreError(
            f"{path.with_name('metrics.jsonl')} holds {len(known['rows'])} of the {known['number']} tasks that are "
            "over; restore it"
        )


def count_tasks(path: Path) -> int:
    """Return the number of finished tasks of a checkpoint; 0 if the file does not exist.

    Args:
        path: The checkpoint.

    Raises:
        StoreError: If the file is damaged.
    """
    if not path.is_file():
        return 0
    try:
        return convert(read_header(path, FORMAT), schemas.CourseHeader).course.number
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def _measured(record: schemas.CourseHeader, history: History) -> tuple[list[Plan], dict[str, Any]]:
    """Return the applied plans, and the other stored fields of a training state."""
    course = record.course
    if isinstance(record.plans, int):
        many, logged = record.plans, record.logged or 0
        plans, rows = list(history.plans[:many]), list(history.rows[: course.number])
        sizes, events = history.sizes[: course.number], [*history.events[:logged], *record.open]
        for name, logs, expected in (("ledger.json", plans, many), ("metrics.jsonl", events[:logged], logged)):
            if len(logs) < expected:
                raise ValueError(f"{name} holds {len(logs)} of the {expected} changes of shape that it relies on")
    else:
        for plan in record.plans:
            convert(plan, schemas.PlanJson)
        plans = [Plan.from_json(json.dumps(plan)) for plan in record.plans]
        rows, sizes, events = [tuple(row) for row in course.rows], course.sizes, course.events
    known: dict[str, Any] = {"number": course.number, "epoch": course.epoch, "step": course.step, "loss": course.loss}
    known |= {"before": tuple(course.before), "validation": tuple(course.validation)}
    return plans, known | {"rows": tuple(rows), "sizes": tuple(sizes), "events": tuple(events)}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _damaged(path: Path, error: Exception) -> StoreError:
    text = " ".join(str(error).split())[:200]
    return StoreError(text if text.startswith(str(path)) else f"{path} cannot be used ({text}); restore it")


def _moments(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    moments: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        what, _, name = key.partition(" ")
        moments.setdefault(name, {})[what] = value
    return moments


def _to_json(dim: Any) -> Any:
    match dim:
        case Product(parts):
            return {"product": [_to_json(part) for part in parts]}
        case Sum(parts):
            return {"sum": [_to_json(part) for part in parts]}
        case tuple() | list() | torch.Size():
            return [_to_json(part) for part in dim]
    return dim


def _from_json(data: Any) -> Dim:
    match data:
        case {"product": [*parts]}:
            return Product(tuple(map(_from_json, parts)))
        case {"sum": [*parts]}:
            return Sum(tuple(map(_from_json, parts)))
        case int() | str():
            return data
    raise ValueError(f"not a dimension: {data!s:.60}")
