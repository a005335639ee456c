"""Where a sequence of tasks stands, on the disk: a run that is killed goes on where it was, bit for bit."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.axes import AxisGraph, Dim, Product, Sum
from regrow.axis_tensor import AxisTensor
from regrow.commands.folder import RunFolder
from regrow.learner import Learner
from regrow.ledger import replay
from regrow.plan import Plan
from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError
from regrow.store.tensors import read_header, read_tensors, write_tensors
from regrow.training.learning import Course

COURSE = "course.safetensors"
FORMAT, FORMAT_1 = "regrow-course/2", "regrow-course/1"
_COUNTED = ("number", "epoch", "before", "loss")
_GROWING = ("rows", "sizes", "events")


@dataclass(frozen=True)
class History:
    """What a run keeps in ``metrics.jsonl`` and ``ledger.json`` alone: the part of a course that grows with its length.

    Args:
        plans: Every plan that was carried out, in order.
        rows: The accuracy matrix.
        sizes: One record per task that is over.
        events: One record per change of shape, as far as they were logged.
    """

    plans: Sequence[Plan] = ()
    rows: Sequence[tuple[float, ...]] = ()
    sizes: Sequence[dict[str, Any]] = ()
    events: Sequence[dict[str, Any]] = ()


def read_history(folder: RunFolder, events: str = "growth") -> History:
    """The history of a run.

    Args:
        folder: Its folder.
        events: What its changes of shape are logged as: ``"growth"`` or ``"commit"``.

    Raises:
        StoreError: If a file is damaged.
    """
    found = folder.metrics()
    tasks = [dict(row) for row in found if row["what"] == "task"]
    if wrong := [i for i, row in enumerate(tasks) if row["task"] != i]:
        raise StoreError(
            f"{folder.path / 'metrics.jsonl'}: row {wrong[0] + 1} of the kind 'task' is of task "
            f"{tasks[wrong[0]]['task']}, not {wrong[0]}; restore it"
        )
    rows = [tuple(nan if share is None else share for share in row.pop("accuracy", ())) for row in tasks]
    sizes = [{name: value for name, value in row.items() if name not in ("what", "name")} for row in tasks]
    changes = [{name: value for name, value in row.items() if name != "what"} for row in found if row["what"] == events]
    return History(folder.ledger.plans(), rows, sizes, changes)


def write_course(path: Path, model: nn.Module, learner: Learner, course: Course, *, logged: int | None = None) -> None:
    """Write a network, what its learner remembers, and how far it has got: all of it, or nothing.

    Args:
        path: The file to make or replace.
        model: The network.
        learner: Its learner.
        course: How far it has got.
        logged: How many events, from the first on, are in the run's :class:`History`, with what was measured of tasks
            that are over, and all plans: the file leaves those out, so that it does not grow with the number of tasks.
            ``None``: they are in the file.

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
    if learner.undo is not None:
        parts |= {f"attic {name}": value for name, value in learner.undo.contents().items()}
    header = {
        "along": {name: [_plain(one.dims), one.lr] for name, one in learner.tensors.items()},
        "values": learner.values,
        "numbers": numbers,
        "course": {name: getattr(course, name) for name in (*_COUNTED, *(_GROWING if logged is None else ()))},
        "plans": len(course.plans) if logged is not None else [json.loads(plan.to_json()) for plan in course.plans],
        "logged": logged,
        "open": course.events[logged:] if logged is not None else [],
    }
    write_tensors(path, parts, header, FORMAT)


def check_course(folder: RunFolder) -> None:
    """Assert that a learning run has logged what its file of the course goes by, before anything is changed.

    Args:
        folder: The folder of the run; that file need not be there.

    Raises:
        StoreError: If measurements or plans are missing, or a file is damaged.
    """
    history, path = read_history(folder), folder.path / COURSE
    if not path.is_file():
        return
    try:
        _, known = _counted(convert(read_header(path, FORMAT, FORMAT_1), schemas.CourseHeader), history)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    if len(known["rows"]) < known["number"]:
        raise StoreError(
            f"{folder.path / 'metrics.jsonl'} holds {len(known['rows'])} of the {known['number']} tasks that are over; "
            "restore it"
        )


def tasks_over(path: Path) -> int:
    """How many tasks a file says are over; 0 if it is not there.

    Raises:
        StoreError: If the file is damaged.
    """
    if not path.is_file():
        return 0
    try:
        return convert(read_header(path, FORMAT, FORMAT_1), schemas.CourseHeader).course.number
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def read_course(
    path: Path, model: nn.Module, axes: AxisGraph, learner: Learner, history: History | None = None
) -> tuple[AxisGraph, Course]:
    """Put a network and its learner where a file says they stood.

    Args:
        path: The file.
        model: The network as it was first built; changed in place.
        axes: Its axes.
        learner: As it was first built; changed in place.
        history: What the run keeps elsewhere, if the file leaves it out; it may go further than the file.

    Returns:
        The axes as they are now, and what was measured.

    Raises:
        StoreError: If the file is damaged, or is not of this network.
    """
    try:
        header, tensors = read_tensors(path, FORMAT, FORMAT_1)
        record = convert(header, schemas.CourseHeader)
        plans, told = _counted(record, history or History())
        model, axes = replay(model, axes, plans, learner.undo)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "learner": {}, "optimiser": {}, "attic": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(" ")
            parts[part][rest] = value
        model.load_state_dict(parts["model"])
        for name, value in parts["attic"].items():
            learner.undo.contents()[name].copy_(value)
        learner.values = record.values
        learner.tensors = {
            name: AxisTensor(parts["learner"][name], tuple(map(_dim, dims)), lr)
            for name, (dims, lr) in record.along.items()
        }
        course = Course(**told, plans=plans, moments=_moments(parts["optimiser"], record.numbers))
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise _damaged(path, error) from None
    return axes, course


def _counted(record: schemas.CourseHeader, history: History) -> tuple[list[Plan], dict[str, Any]]:
    """The plans that were carried out, and the fields of a course but those and its moments."""
    told = record.course
    if isinstance(record.plans, int):
        many, logged = record.plans, record.logged or 0
        plans, rows, sizes = list(history.plans[:many]), list(history.rows[: told.number]), history.sizes[: told.number]
        events = [*history.events[:logged], *record.open]
        for name, found, expected in (("ledger.json", plans, many), ("metrics.jsonl", events[:logged], logged)):
            if len(found) < expected:
                raise ValueError(f"{name} holds {len(found)} of the {expected} changes of shape that it goes by")
    else:
        for plan in record.plans:
            convert(plan, schemas.PlanJson)
        plans = [Plan.from_json(json.dumps(plan)) for plan in record.plans]
        rows, sizes, events = [tuple(row) for row in told.rows], told.sizes, told.events
    known = {"number": told.number, "epoch": told.epoch, "before": tuple(told.before), "loss": told.loss}
    return plans, known | {"rows": rows, "sizes": list(sizes), "events": list(events)}


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
