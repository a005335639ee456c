"""Where a sequence of tasks stands, on the disk: a run that is killed goes on where it was, bit for bit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.axes import AxisGraph, Dim, Product, Sum
from regrow.learner import Along, Learner
from regrow.plan import Plan
from regrow.runs.learning import Course
from regrow.runs.ledger import replay
from regrow.store import schemas
from regrow.store.errors import StoreError
from regrow.store.tensors import read_header, read_tensors, write_tensors

FORMAT = "regrow-course/1"
_COUNTED = ("number", "epoch", "rows", "before", "events", "sizes", "loss")


def write_course(path: Path, model: nn.Module, learner: Learner, course: Course) -> None:
    """Write a network, what its learner remembers, and what was measured: all of it, or nothing.

    Raises:
        StoreError: If the disk is full or does not let us write.
    """
    parts: dict[str, Tensor] = {f"model {name}": value for name, value in model.state_dict().items()}
    parts |= {f"learner {name}": one.values for name, one in learner.tensors.items()}
    numbers: dict[str, Any] = {}
    for name, memory in course.moments.items():
        for what, value in memory.items():
            if isinstance(value, Tensor):
                parts[f"optimiser {what} {name}"] = value
            elif value is not None:
                numbers[f"{what} {name}"] = value
    if learner.attic is not None:
        parts |= {f"attic {name}": value for name, value in learner.attic.contents().items()}
    header = {
        "along": {name: [_plain(one.dims), one.lr] for name, one in learner.tensors.items()},
        "values": learner.values,
        "numbers": numbers,
        "course": {name: getattr(course, name) for name in _COUNTED},
        "plans": [json.loads(plan.to_json()) for plan in course.plans],
    }
    write_tensors(path, parts, header, FORMAT)


def tasks_over(path: Path) -> int:
    """How many tasks a file says are over; 0 if it is not there.

    Raises:
        StoreError: If the file is damaged.
    """
    if not path.is_file():
        return 0
    try:
        return schemas.convert(read_header(path, FORMAT), schemas.CourseHeader).course.number
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def read_course(path: Path, model: nn.Module, axes: AxisGraph, learner: Learner) -> tuple[AxisGraph, Course]:
    """Put a network and its learner where a file says they stood.

    Args:
        path: The file.
        model: The network as it was first built; changed in place.
        axes: Its axes.
        learner: As it was first built; changed in place.

    Returns:
        The axes as they are now, and what was measured.

    Raises:
        StoreError: If the file is damaged, or is not of this network.
    """
    try:
        header, tensors = read_tensors(path, FORMAT)
        record = schemas.convert(header, schemas.CourseHeader)
        for plan in record.plans:
            schemas.convert(plan, schemas.Plan)
        plans = [Plan.from_json(json.dumps(plan)) for plan in record.plans]
        model, axes = replay(model, axes, plans, learner.attic)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "learner": {}, "optimiser": {}, "attic": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(" ")
            parts[part][rest] = value
        model.load_state_dict(parts["model"])
        for name, value in parts["attic"].items():
            learner.attic.contents()[name].copy_(value)
        learner.values = record.values
        learner.tensors = {
            name: Along(parts["learner"][name], tuple(map(_dim, dims)), lr) for name, (dims, lr) in record.along.items()
        }
        told = record.course
        course = Course(
            number=told.number,
            epoch=told.epoch,
            rows=[tuple(row) for row in told.rows],
            before=tuple(told.before),
            plans=plans,
            events=told.events,
            sizes=told.sizes,
            moments=_moments(parts["optimiser"], record.numbers),
            loss=told.loss,
        )
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise _damaged(path, error) from None
    return axes, course


def _damaged(path: Path, error: Exception) -> StoreError:
    text = " ".join(str(error).split())[:200]
    return StoreError(text if text.startswith(str(path)) else f"{path} cannot be used ({text}); restore it")


def _moments(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        what, _, name = key.partition(" ")
        found.setdefault(name, {})[what] = value
    return found


def _plain(dim: Any) -> Any:
    """A dimension as JSON data."""
    match dim:
        case Product(parts):
            return {"product": [_plain(part) for part in parts]}
        case Sum(parts):
            return {"sum": [_plain(part) for part in parts]}
        case tuple() | list() | torch.Size():
            return [_plain(part) for part in dim]
    return dim


def _dim(data: Any) -> Dim:
    match data:
        case {"product": [*parts]}:
            return Product(tuple(map(_dim, parts)))
        case {"sum": [*parts]}:
            return Sum(tuple(map(_dim, parts)))
        case int() | str():
            return data
    raise ValueError(f"not a dimension: {data!s:.60}")
