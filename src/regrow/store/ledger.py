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
_LONGEST = 2**30
_HEAD, _TAIL = f'{{"format": "{FORMAT}", "plans": [\n', "\n]}\n"


@dataclass(frozen=True)
class Ledger:
    """File with every plan that was applied to a network, in order; append to it, read it, or cut its end off."""

    path: Path  # the ledger.json of a run; it need not exist yet
    skip: int = 0  # how many plans at the head of the file belong to earlier runs; they are neither read nor removed

    def plans(self) -> tuple[Plan, ...]:
        """Return every plan, in the order in which they were applied; empty if there is no file."""
        plans = []
        for i, entry in enumerate(self._entries()[self.skip :], self.skip):
            try:
                plans.append(read_plan(entry))
            except (PlanError, StoreError) as error:
                why = str(error).removesuffix("; restore it")
                raise StoreError(f"{self.path}: plan {i + 1} cannot be used ({why}); restore the file") from None
        return tuple(plans)

    def append(self, plan: Plan) -> None:
        """Write a plan to the end of the file; the plans before it are not parsed."""
        line = _line(json.loads(plan.to_json()))
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if text.startswith(_HEAD) and text.endswith(_TAIL) and len(_HEAD + _TAIL) < len(text) < _LONGEST:
            write_text(self.path, f"{text.removesuffix(_TAIL)},\n{line}{_TAIL}")
        else:
            self._write([*map(_line, self._entries()), line])

    def replace(self, plan: Plan) -> None:
        """Write the only plan of a run; that of an attempt that was stopped is replaced if it is another."""
        if list(map(_line, self._entries()[self.skip :])) != [_line(json.loads(plan.to_json()))]:
            self.truncate(0)
            self.append(plan)

    def truncate(self, many: int) -> None:
        """Remove all but the first ``many`` plans: those whose result a killed process did not store."""
        entries, many = self._entries(), many + self.skip
        if len(entries) > many == 0:
            self.path.unlink()
        elif len(entries) > many:
            self._write(map(_line, entries[:many]))

    def _write(self, lines: Iterable[str]) -> None:
        write_text(self.path, _HEAD + ",\n".join(lines) + _TAIL)

    def __len__(self) -> int:
        return max(0, len(self._entries()) - self.skip)

    def _entries(self) -> list[Any]:
        data = read_json(self.path, _LONGEST)
        if data is None:
            return []
        check_format(data, FORMAT, self.path)
        plans = convert(data, schemas.LedgerJson, self.path).plans
        try:
            return expand_plans(plans, self.path.stat().st_size)
        except StoreError as error:
            raise StoreError(f"{self.path}: {error}") from None


def _line(plan: Any) -> str:
    return json.dumps(shorten_plan(plan))


def read_plan(data: object) -> Plan:
    """Read a plan from JSON data strictly: missing, unknown and mistyped fields are errors that name the field."""
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
    """Apply plans one after the other to the model they were made for, to get the same shapes again.

    A plan that restores units restores those that the plans before it cut, with the weights that this model has.
    """
    plans = list(plans)
    back = any(plan.back or any(change.restore for change in plan.changes.values()) for plan in plans)
    undo = UndoStore() if undo is None and back else undo
    axes = with_branches_of(plans, model, axes)
    for plan in plans:
        model, axes = apply(model, axes, plan, undo=undo)
    return model, axes


def with_branches_of(plans: Iterable[Plan], model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the axes with the modules that can be dropped, if plans drop some that the axes do not name."""
    unknown = any(path not in axes.branches for plan in plans for path in plan.drop)
    return with_branches(model, axes) if unknown else axes
