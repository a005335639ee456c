"""Checkpoints: a network that may have changed its shape and the state of its training, in one file.

A run that is killed and resumed from its checkpoint ends with the same bits as one that was not.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

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
from regrow.store.ledger import replay
from regrow.store.tensors import read_header, read_tensors, write_tensors
from regrow.surgery import UndoStore
from regrow.training.state import TrainState, axis_tensors, restore_state, values_of

S = TypeVar("S")

CHECKPOINT = "course.safetensors"
FORMAT = "regrow-course/3"


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
    """Write a checkpoint of a network and its training, atomically: the whole file, or nothing."""
    tensors = axis_tensors(state.learner)
    weights = _trained(model) if trained_only else model.state_dict()
    parts: dict[str, Tensor] = {f"model {name}": value for name, value in weights.items()}
    parts |= {f"learner {name}": one.values for name, one in tensors.items()}
    moments = {f"{what} {name}": value for name, memory in state.moments.items() for what, value in memory.items()}
    parts |= {f"optimiser {name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    if undo is not None:
        parts |= {f"undo_store {name}": value for name, value in undo.contents().items()}
    fields: tuple[str, ...] = ("number", "epoch", "step", "before", "loss", "validation")
    if logged is None:
        fields += ("rows", "sizes", "events")
    whole: dict[str, Any] = {
        **(header or {}),
        "along": {name: [_to_json(one.dims), one.lr] for name, one in tensors.items()},
        "values": values_of(state.learner),
        "numbers": {name: value for name, value in moments.items() if not isinstance(value, Tensor | None)},
        "course": {name: getattr(state, name) for name in fields},
        "plans": [json.loads(plan.to_json()) for plan in state.plans] if logged is None else len(state.plans),
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
        state = _progress(record, history or History(), learner)
        model, axes = replay(model, axes, state.plans, undo)
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
        along = {
            name: AxisTensor(parts["learner"][name].to(device), tuple(map(_from_json, dims)), lr)
            for name, (dims, lr) in record.along.items()
        }
        moments: dict[str, dict[str, Any]] = {}
        for key, number in {**parts["optimiser"], **record.numbers}.items():
            what, _, name = key.partition(" ")
            moments.setdefault(name, {})[what] = number
        learned = restore_state(learner, along, record.values)
        return model, axes, replace(state, learner=learned, moments=moments)
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise _damaged(path, error) from None


def read_start(
    ranks: ProcessRank,
    history: History | None,
    checkpoint: Path,
    model: nn.Module,
    axes: AxisGraph,
    learner: S,
    undo: UndoStore | None = None,
) -> tuple[nn.Module, AxisGraph, TrainState[S]]:
    """Return network, axes and training state from which training resumes; all ranks call this.

    Rank 0, which alone reads the run folder, gives its history; ``None``: training starts.
    """
    if ranks.several:
        stored = history and {**vars(history), "plans": [plan.to_json() for plan in history.plans]}
        if record := broadcast_record(ranks, stored):
            record["plans"] = [Plan.from_json(plan) for plan in record["plans"]]
            record["rows"] = [tuple(row) for row in record["rows"]]
        history = record and History(**record)
    if history is None:
        return model, axes, TrainState(learner)
    with TemporaryDirectory(prefix="regrow-") if ranks.several else nullcontext("") as folder:
        path = broadcast_file(ranks, checkpoint, Path(folder))
        return read_checkpoint(path, model, axes, learner, history, undo)


def check_checkpoint(path: Path, history: History) -> int:
    """Return the number of finished tasks of a checkpoint; 0 if there is none.

    Raises:
        StoreError: If the file is damaged, or logs lack rows or plans that it relies on.
    """
    if not path.is_file():
        return 0
    try:
        state = _progress(convert(read_header(path, FORMAT), schemas.CourseHeader), history, None)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    if len(state.rows) < state.number:
        raise StoreError(
            f"{path.with_name('metrics.jsonl')} holds {len(state.rows)} of the {state.number} tasks that are over; "
            "restore it"
        )
    return state.number


def _progress(record: schemas.CourseHeader, history: History, learner: S) -> TrainState[S]:
    """Return the stored training state with the learner's initial state, and without moments."""
    course = record.course
    if isinstance(record.plans, int):
        many, logged = record.plans, record.logged or 0
        plans, changes = history.plans[:many], history.events[:logged]
        for name, logs, expected in (("ledger.json", plans, many), ("metrics.jsonl", changes, logged)):
            if len(logs) < expected:
                raise ValueError(f"{name} holds {len(logs)} of the {expected} changes of shape that it relies on")
        rows: Sequence[Sequence[float]] = history.rows[: course.number]
        sizes, events = history.sizes[: course.number], [*changes, *record.open]
    else:
        for plan in record.plans:
            convert(plan, schemas.PlanJson)
        plans = [Plan.from_json(json.dumps(plan)) for plan in record.plans]
        rows, sizes, events = course.rows, course.sizes, course.events
    return TrainState(
        learner,
        course.number,
        course.epoch,
        course.step,
        tuple(map(tuple, rows)),
        tuple(course.before),
        tuple(plans),
        tuple(events),
        tuple(sizes),
        loss=course.loss,
        validation=tuple(course.validation),
    )


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _damaged(path: Path, error: Exception) -> StoreError:
    text = " ".join(str(error).split())[:200]
    return StoreError(text if text.startswith(str(path)) else f"{path} cannot be used ({text}); restore it")


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
