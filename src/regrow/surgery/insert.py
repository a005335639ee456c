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
from regrow.core.errors import first_line
from regrow.core.plan import Plan, PlanError
from regrow.surgery.output_comparison import max_difference
from regrow.surgery.undo_store import UndoStore
from regrow.tracing import trace, with_branches
from regrow.tracing.capture import holds_numbers, in_eval_mode
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.model_state import preserve_state
from regrow.tracing.own_run import ROUNDING, compute_outputs, measure_distance
from regrow.tracing.stacks import StackError, insert_copies, remove_copies

# Name of a module or tensor before blocks are inserted → its name after that
Rename = Callable[[str], str]


@contextmanager
def with_inserted_blocks(
    model: nn.Module, axes: AxisGraph, plan: Plan, optimizers: Sequence[Optimizer], undo: UndoStore | None
) -> Iterator[tuple[AxisGraph, Plan, UndoStore | None]]:
    """Context manager in which copies of blocks are inserted as a plan says; undone if the body raises.

    Yields:
        The axes with the new blocks, the plan's other changes for these axes, and the undo store for them, or ``None``.

    Raises:
        PlanError: If outputs change, a copy does not return its input, or ``optimizers`` are given: none can follow.
    """
    if optimizers:
        raise PlanError(
            "no optimizer can follow blocks that are inserted, for no group of theirs is known; apply the plan "
            "without, then give the optimizer their parameters (add_param_group)"
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
            try:
                insert_copies(model, path, insertion)
            except StackError as error:
                raise PlanError(f"{error}; make the plan for this network") from None
            inserted.append(path)
        rename = make_rename(model, plan)
        try:
            if before is not None:
                _check_identity(model, example, plan.insert)
                _check_outputs(model, example, before, plan)
            new_axes, keys = _retrace(model, axes, example, rename)
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(f"the plan cannot be carried out: the network does not run: {first_line(error)}") from None
        kept = None if undo is None else undo.rename(rename, keys.get)
        yield new_axes, Plan(_map_changes(new_axes, plan, keys, model), origin=plan.origin), kept
    except BaseException:
        for path in reversed(inserted):
            remove_copies(model, path, plan.insert[path])
        raise
    if undo is not None and kept is not None:
        undo.replace_contents(kept)


def _check_identity(model: nn.Module, example: Example, insert: Mapping[str, Insertion]) -> None:
    """Raise ``PlanError`` unless every inserted block returns its input unchanged when the network runs."""
    inputs: dict[nn.Module, Tensor] = {}
    changes: dict[nn.Module, float] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module] = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).clone()

    def compare(module: nn.Module, args: tuple[Any, ...], result: object) -> None:
        output = next((x for x in tree_leaves(result) if isinstance(x, Tensor)), None)
        before = inputs.pop(module)
        same = output is not None and torch.equal(output, before)
        changes[module] = 0.0 if same else max_difference([before], [output])

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
    """Raise ``PlanError`` unless the network's outputs are those ``before`` the plan's insertions, up to rounding."""
    after = compute_outputs(model, example)
    distance, largest = measure_distance(before, after)
    rounding = ROUNDING * max(torch.finfo(x.dtype).eps for x in (*before, torch.ones(())) if x.is_floating_point())
    if not distance <= rounding * largest:
        raise PlanError(
            f"inserting blocks into {', '.join(map(repr, plan.insert))} changes the outputs by {distance:.1e} of "
            f"{largest:.1e}: the network does more with its blocks than run them in turn; grow widths (mlp=, axis=)"
        )


def make_rename(model: nn.Module, plan: Plan) -> Rename:
    """Return the function from the name of a module or tensor before the plan's insertions to its name after them."""
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


def _retrace(model: nn.Module, axes: AxisGraph, example: Example, rename: Rename) -> tuple[AxisGraph, dict[str, str]]:
    """Return the axes of the network with inserted blocks, with old units' ids; and old axis key → its new key."""
    traced = trace(model, *example.args, **example.kwargs)
    if any(branch.gives != "nothing" for branch in axes.branches.values()):
        traced = with_branches(model, traced)
    home = {_slot_key(slot, slot.name): axis.key for axis in traced for slot in axis.slots}
    keys, known = {}, {}
    for axis in axes:
        slot_keys = [_slot_key(slot, rename(slot.name)) for slot in axis.slots]
        if new := next((home[slot_key] for slot_key in slot_keys if slot_key in home), ""):
            keys[axis.key] = new
            if traced[new].size == axis.size:
                known[new] = replace(traced[new], ids=axis.ids, next_id=axis.next_id)
    return replace(traced, axes={**traced.axes, **known}, network=axes.network, example=axes.example), keys


def _slot_key(slot: Slot, name: str) -> tuple[str, int, int, int]:
    """Return what identifies a slot of the tensor ``name`` across sizes: name, dimension, offset, inner."""
    return name, slot.dim, slot.offset, slot.inner


def _map_changes(axes: AxisGraph, plan: Plan, keys: Mapping[str, str], model: nn.Module) -> dict[str, Change]:
    """Return new axis key → the plan's change of it; each copied block gets the changes of the block that it copies.

    ``axes``, ``model``: with the inserted blocks; ``keys``: axis key before → after.
    """
    result: dict[str, Change] = {}
    for key, change in plan.changes.items():
        if change.idle or key not in keys:
            continue
        axis = axes[keys[key]]
        twins = [axis]
        for path, insertion in plan.insert.items():
            names = list(model.get_submodule(path)._modules)
            for copy in insertion.copies:
                source = f"{path}.{names[insertion.kept[copy.of]]}"
                if all(lies_in(slot.name, source) for slot in axis.slots):
                    twins.append(_find_twin(axes, axis, source, f"{path}.{names[copy.position]}"))
        result |= {twin.key: replace(change, slots=twin.slots, ids=twin.ids) for twin in twins}
    return result


def _find_twin(axes: AxisGraph, axis: Axis, source: str, copy: str) -> Axis:
    """Return the axis in the block at path ``copy`` that corresponds to ``axis`` in the block at path ``source``."""
    first = axis.slots[0]
    key = _slot_key(first, copy + first.name[len(source) :])
    same_size = (other for other in axes if other.size == axis.size)
    return next(other for other in same_size if any(_slot_key(slot, slot.name) == key for slot in other.slots))
