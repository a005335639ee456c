"""The ledger of a run: every plan applied to the network, in order, so that it can be replayed.

Unit ids are written as intervals (:mod:`regrow.store.convert`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from regrow.core.axes import AxisGraph
from regrow.core.axes.operations import Branch, Placeholder
from regrow.core.plan import FORMAT as PLAN_FORMAT
from regrow.core.plan import Plan, PlanError
from regrow.store import schemas
from regrow.store.atomic import write_text
from regrow.store.convert import check_fields, check_format, convert, expand_plans, read_json, shorten_plan
from regrow.store.errors import StoreError
from regrow.surgery import UndoStore, apply
from regrow.tracing import with_branches

FORMAT = "regrow-ledger/2"
_MAX_BYTES = 2**30  # of a ledger that is read
_HEAD, _TAIL = f'{{"format": "{FORMAT}", "plans": [\n', "\n]}\n"


@dataclass(frozen=True)
class Ledger:
    """The file ``ledger.json``: every plan that was applied to a network, in order; ``len`` is their number.

    The first ``skip`` plans of the file belong to earlier runs: methods neither return, count nor change them.
    """

    path: Path  # it need not exist yet
    skip: int = 0

    def plans(self) -> tuple[Plan, ...]:
        """Return the plans in the order in which they were applied; empty if there is no file. Raises StoreError."""
        plans = []
        for i, entry in enumerate(self._entries()[self.skip :], self.skip):
            try:
                plans.append(read_plan(entry))
            except (PlanError, StoreError) as error:
                why = str(error).removesuffix("; restore it")
                raise StoreError(f"{self.path}: plan {i + 1} cannot be used ({why}); restore the file") from None
        return tuple(plans)

    def append(self, plan: Plan) -> None:
        """Write a plan to the end of the file, made if missing, atomically; it is on the disk when this returns."""
        line = _format_plan(json.loads(plan.to_json()))
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        # The plans before it are not parsed again if the file has the layout that is written here.
        if text.startswith(_HEAD) and text.endswith(_TAIL) and len(_HEAD + _TAIL) < len(text) < _MAX_BYTES:
            write_text(self.path, f"{text.removesuffix(_TAIL)},\n{line}{_TAIL}")
        else:
            self._write([*map(_format_plan, self._entries()), line])

    def replace(self, plan: Plan) -> None:
        """Make a plan the only one, in place of those of a stopped attempt; nothing is written if it is already."""
        if list(map(_format_plan, self._entries()[self.skip :])) != [_format_plan(json.loads(plan.to_json()))]:
            self.truncate(0)
            self.append(plan)

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` plans: a killed process did not store the result of the others."""
        entries, count = self._entries(), count + self.skip
        if len(entries) > count == 0:
            self.path.unlink()
        elif len(entries) > count:
            self._write(map(_format_plan, entries[:count]))

    def _write(self, lines: Iterable[str]) -> None:
        """Write the whole file atomically; ``lines``: each plan as JSON text."""
        write_text(self.path, _HEAD + ",\n".join(lines) + _TAIL)

    def __len__(self) -> int:
        return max(0, len(self._entries()) - self.skip)

    def _entries(self) -> list[Any]:
        """Return the plans of the whole file as JSON data, with expanded intervals; empty if there is no file."""
        data = read_json(self.path, _MAX_BYTES)
        if data is None:
            return []
        check_format(data, FORMAT, self.path)
        plans = convert(data, schemas.LedgerJson, self.path).plans
        try:
            return expand_plans(plans, self.path.stat().st_size)
        except StoreError as error:
            raise StoreError(f"{self.path}: {error}") from None


def _format_plan(plan: Any) -> str:
    """Return a plan (JSON data, changed in place) as a line of the file, with unit numbers as intervals."""
    return json.dumps(shorten_plan(plan))


def read_plan(data: object) -> Plan:
    """Convert JSON data to a plan strictly; raise PlanError or StoreError for missing, unknown and mistyped fields."""
    if not isinstance(data, dict) or data.get("format") != PLAN_FORMAT:
        raise PlanError(f"not a plan: expected the format {PLAN_FORMAT!r}")
    drop = convert(data.get("drop"), dict[str, dict[str, Placeholder]], "drop")
    plan = convert(data | {"drop": {}}, Plan)
    plan = replace(plan, drop={path: Branch(path, placeholders) for path, placeholders in drop.items()})
    check_fields(data, json.loads(plan.to_json()))
    return plan


def replay(
    model: nn.Module, axes: AxisGraph, plans: Iterable[Plan], undo: UndoStore | None = None
) -> tuple[nn.Module, AxisGraph]:
    """Apply plans one after the other, in place, and return the model and its axes afterwards.

    ``model``, ``axes``: the network that the first plan was made for, and its trace. ``undo``: keeps removed weights,
    with which a later plan restores units; ``None``: one for this call alone. Raises PlanError for a plan that does not
    fit.
    """
    plans = list(plans)
    restores = any(plan.back or any(change.restore for change in plan.changes.values()) for plan in plans)
    undo = UndoStore() if undo is None and restores else undo
    axes = with_branches_of(plans, model, axes)
    for plan in plans:
        model, axes = apply(model, axes, plan, undo=undo)
    return model, axes


def with_branches_of(plans: Iterable[Plan], model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the axes; if a plan drops a module that is not in ``axes.branches``, with all droppable ones in there."""
    unknown = any(path not in axes.branches for plan in plans for path in plan.drop)
    return with_branches(model, axes) if unknown else axes
