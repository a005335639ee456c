"""Insert copies of residual blocks that give their input unchanged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from regrow.core.axes import Axis, AxisGraph, Example, Slot
from regrow.core.axes.operations import lies_in
from regrow.core.change import Change, Insertion
from regrow.core.plan import Plan, PlanError
from regrow.surgery.output_comparison import max_difference
from regrow.surgery.undo_store import UndoStore
from regrow.tracing import trace, with_branches
from regrow.tracing.capture import holds_numbers, in_eval_mode, trim_error
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.model_state import preserve_state
from regrow.tracing.own_run import ROUNDING, compute_outputs, measure_distance
from regrow.tracing.stacks import StackError, insert_copies, remove_copies

# Name of a module or tensor before blocks are inserted → its name after that
Rename = Callable[[str], str]


@contextmanager
def with_copies(
    model: nn.Module, axes: AxisGraph, plan: Plan, optimizers: Sequence[Optimizer], undo: UndoStore | None
) -> Iterator[tuple[AxisGraph, Plan, UndoStore | None]]:
    """Context manager in which the plan's blocks are inserted; undone if the body raises.

    Yields:
        The axes with the new blocks, the rest of the plan for them, and the undo store for them.
    """
    if optimizers:
        raise PlanError(
            "no optimiser can follow blocks that are inserted, for no group of theirs is known; apply the plan "
            "without, then give the optimiser their parameters (add_param_group)"
        )
    if undo is not None:
        undo.check_network(axes)
        if undo.branches:
            raise PlanError(f"{next(iter(undo.branches))} is dropped; bring it back before blocks are inserted")
    example = cast_example(axes.example, model)
    before = compute_outputs(model, example) if holds_numbers(model, axes.example) else None
    inserted = []
    try:
        for path, insertion in plan.insert.items():
            _insert(model, path, insertion)
            inserted.append(path)
        rename = renaming(model, plan)
        try:
            if before is not None:
                _check_identity(model, example, plan.insert)
                _check_outputs(model, example, before, plan)
            left, keys = _retraced(model, axes, example, rename)
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(f"the plan cannot be carried out: the network does not run: {trim_error(error)}") from None
        kept = None if undo is None else undo.renamed(rename, keys.get)
        yield left, Plan(_changes(left, plan, keys, model), origin=plan.origin), kept
    except BaseException:
        for path in reversed(inserted):
            remove_copies(model, path, plan.insert[path])
        raise
    if undo is not None and kept is not None:
        undo.become(kept)


def _insert(model: nn.Module, path: str, insertion: Insertion) -> None:
    try:
        insert_copies(model, path, insertion)
    except StackError as error:
        raise PlanError(f"{error}; make the plan for this network") from None


def _check_identity(model: nn.Module, example: Example, insert: Mapping[str, Insertion]) -> None:
    """Raise ``PlanError`` unless every inserted block gives its input unchanged when the network runs."""
    inputs: dict[nn.Module, Tensor] = {}
    changes: dict[nn.Module, float] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module] = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).clone()

    def compare(module: nn.Module, args: tuple[Any, ...], answer: object) -> None:
        made = next((x for x in tree_leaves(answer) if isinstance(x, Tensor)), None)
        before = inputs.pop(module)
        same = made is not None and torch.equal(made, before)
        changes[module] = 0.0 if same else max_difference([before], [made])

    copies = {
        list(model.get_submodule(path).children())[copy.position]: (path, copy)
        for path, insertion in insert.items()
        for copy in insertion.copies
    }
    with preserve_state(model, entries=True), in_eval_mode(model), torch.no_grad():  # which takes the hooks off, too
        for block in copies:
            block.register_forward_pre_hook(note, with_kwargs=True)
            block.register_forward_hook(compare)
        model(*example.args, **example.kwargs)
    for block, (path, copy) in copies.items():
        if changes.get(block) != 0:
            does = f"changes its input by {changes[block]:.3g}" if block in changes else "does not run"
            raise PlanError(
                f"the copy of block {copy.of} of stack {path!r} {does}; copy blocks that add to their input, and set "
                "their last projections to 0 (regrow grow --blocks finds them)"
            )


def _check_outputs(model: nn.Module, example: Example, before: Sequence[Tensor], plan: Plan) -> None:
    """Raise ``PlanError`` unless the network has the outputs that it had before blocks were inserted."""
    after = compute_outputs(model, example)
    distance, largest = measure_distance(before, after)
    rounding = ROUNDING * max(torch.finfo(x.dtype).eps for x in (*before, torch.ones(())) if x.is_floating_point())
    if not distance <= rounding * largest:
        raise PlanError(
            f"inserting blocks into {', '.join(map(repr, plan.insert))} changes the outputs by {distance:.1e} of "
            f"{largest:.1e}: the network does more with its blocks than run them in turn; grow widths (mlp=, axis=)"
        )


def renaming(model: nn.Module, plan: Plan) -> Rename:
    """Return the function from names before the plan's blocks are inserted to names after it."""
    tables: dict[str, dict[str, str]] = {}
    for path, insertion in plan.insert.items():
        first = next(iter(model.get_submodule(path)._modules))
        prefix = first.rstrip("0123456789")
        start = int(first.removeprefix(prefix))
        tables[path] = {f"{prefix}{start + i}": f"{prefix}{start + j}" for i, j in enumerate(insertion.kept)}

    def rename(name: str) -> str:
        for path, table in tables.items():
            if lies_in(name, path) and name != path:
                block, dot, rest = name[len(path) + 1 :].partition(".")
                return f"{path}.{table[block]}{dot}{rest}"
        return name

    return rename


def _retraced(model: nn.Module, axes: AxisGraph, example: Example, rename: Rename) -> tuple[AxisGraph, dict[str, str]]:
    """Return the axes of the changed network, in which the units of old axes keep their ids; and key → its new key."""
    left = trace(model, *example.args, **example.kwargs)
    if any(branch.gives != "nothing" for branch in axes.branches.values()):
        left = with_branches(model, left)
    home = {_spot(slot, slot.name): axis.key for axis in left for slot in axis.slots}
    keys, known = {}, {}
    for axis in axes:
        spots = [_spot(slot, rename(slot.name)) for slot in axis.slots]
        if new := next((home[spot] for spot in spots if spot in home), ""):
            keys[axis.key] = new
            if left[new].size == axis.size:
                known[new] = replace(left[new], ids=axis.ids, next_id=axis.next_id)
    return replace(left, axes={**left.axes, **known}, network=axes.network, example=axes.example), keys


def _spot(slot: Slot, name: str) -> tuple[str, int, int, int]:
    return name, slot.dim, slot.offset, slot.inner


def _changes(left: AxisGraph, plan: Plan, keys: Mapping[str, str], model: nn.Module) -> dict[str, Change]:
    """Return the plan's changes for the changed network; copies get those of the blocks that they copy."""
    result: dict[str, Change] = {}
    for key, change in plan.changes.items():
        if change.idle or key not in keys:
            continue
        axis = left[keys[key]]
        twins = [axis]
        for path, insertion in plan.insert.items():
            names = list(model.get_submodule(path)._modules)
            for copy in insertion.copies:
                source = f"{path}.{names[insertion.kept[copy.of]]}"
                if all(lies_in(slot.name, source) for slot in axis.slots):
                    twins.append(_twin(left, axis, source, f"{path}.{names[copy.position]}"))
        result |= {twin.key: replace(change, slots=twin.slots, ids=twin.ids) for twin in twins}
    return result


def _twin(left: AxisGraph, axis: Axis, source: str, copy: str) -> Axis:
    """Return the axis of a copied block that corresponds to an axis of the block that it copies."""
    first = axis.slots[0]
    wanted = _spot(first, copy + first.name[len(source) :])
    alike = (other for other in left if other.size == axis.size)
    return next(other for other in alike if any(_spot(slot, slot.name) == wanted for slot in other.slots))
