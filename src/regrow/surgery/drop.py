"""Drop whole branches and bring them back: placeholders replace them, and the rest is proved to compute the same."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import lcm

from torch import nn
from torch.optim import Optimizer

from regrow.core.axes import Axis, AxisGraph, Example, Mark, Work, axes_in
from regrow.core.axes.operations import Branch, Placeholder
from regrow.core.plan import Plan, PlanError
from regrow.surgery.carry import Exchange, apply_unchecked, prepare_optimizers
from regrow.surgery.output_comparison import check_own_run
from regrow.surgery.undo_store import RemovedBranch, UndoStore
from regrow.tracing.branches import PlaceholderModule, find_branches, insert_placeholders, list_candidates, set_modules
from regrow.tracing.capture import Capture, TraceError, capture
from regrow.tracing.effects import BranchError, Effects, find_effect_difference, locate_branches
from regrow.tracing.graph import Names, assemble
from regrow.tracing.meta_copy import cast_example, fake_example, meta_copy
from regrow.tracing.readings import make_recording, trace_training
from regrow.tracing.rules import walk
from regrow.tracing.steps import find_caches, list_symbolic_steps


def _rejoin_axes(old: AxisGraph, branch: Branch, axes: AxisGraph) -> AxisGraph:
    """Return the network's axes (``axes``) with a branch restored, whose own axes are taken from ``old``.

    The axes inside it must not have changed since. The operations, work and branches of the result, and its order, must
    be taken from a new recording.
    """
    inner = old.restricted(branch.holds)
    lost = inner.axes.keys() - axes.axes.keys()

    def axis(key: str) -> Axis:
        if key not in old.axes:
            return axes[key]
        current = axes.axes.get(key) or replace(old[key], slots=())
        slots = (*current.slots, *(inner[key].slots if key in inner.axes else ()))
        return replace(old[key], size=current.size, ids=current.ids, next_id=current.next_id, slots=slots)

    keys = [key for key in old.axes if key in inner.axes or key in axes.axes]
    integers = {
        name: dim
        for name, dim in old.integers.items()
        if branch.holds(name.partition(":")[0]) or not lost.isdisjoint(axes_in(dim))
    }
    return replace(
        axes,
        axes={key: axis(key) for key in (*keys, *(axes.axes.keys() - old.axes.keys()))},
        shapes={**inner.shapes, **axes.shapes},
        parameters=axes.parameters | inner.parameters,
        counted=(*axes.counted, *inner.counted),
        itemsize={**inner.itemsize, **axes.itemsize},
        ties={**inner.ties, **axes.ties},
        integers={**integers, **axes.integers},
        folds=(*axes.folds, *inner.folds),
        unreached=(*axes.unreached, *inner.unreached),
    )


@contextmanager
def without_branches(
    model: nn.Module, axes: AxisGraph, plan: Plan, optimizers: Sequence[Optimizer], undo: UndoStore | None
) -> Iterator[tuple[AxisGraph, Plan, UndoStore | None]]:
    """Context manager in which placeholders replace the branches that a plan drops; undone if the body raises.

    Yields the axes without the branches, the plan without dropping them, and the undo store without their part, or
    ``None``. After the body the branches' parameters leave the optimizers, and ``undo`` gets the branches. Raises
    ``PlanError`` unless the rest of the network does the same without them.
    """
    if undo is not None:
        undo.check_network(axes)
    removed = tuple(plan.drop.values())
    new_axes = _prove_drop(model, axes, removed)
    changes = {key: replace(c, slots=new_axes[key].slots) for key, c in plan.changes.items() if key in new_axes.axes}
    named = model.named_parameters()
    lost = [Exchange(name, old, {}) for name, old in named if any(branch.holds(name) for branch in removed)]
    write_state = prepare_optimizers(optimizers, lost)
    dropped, kept = undo.split_off(removed, axes) if undo is not None else ({}, None)
    modules = insert_placeholders(model, _placeholders(removed))
    try:
        yield new_axes, Plan(changes, plan.means, plan.origin), kept
    except BaseException:
        set_modules(model, modules)
        raise
    write_state({})  # no parameter replaces those of the branches
    if undo is not None and kept is not None:
        branches = dict(kept.branches)
        for path, branch in dropped.items():
            branches[path] = replace(branch, modules={at: modules[at] for at in branch.branch.placeholders})
        undo.replace_contents(replace(kept, branches=branches, network=kept.network or axes.network))


def restore_branches(
    model: nn.Module, axes: AxisGraph, plan: Plan, optimizers: Sequence[Optimizer], undo: UndoStore | None
) -> tuple[nn.Module, AxisGraph]:
    """Restore the plan's dropped branches in place, with the weights they had; return the model and its axes.

    They leave ``undo``. Raises ``PlanError`` if one is not in it, or ``optimizers`` are given, which cannot follow.
    """
    if undo is None or (lost := next((path for path in plan.back if path not in undo.branches), "")):
        missing = plan.back[0] if undo is None else lost
        raise PlanError(
            f"{missing} is in no undo store; give the one that was there when it was dropped, apply(..., undo=undo)"
        )
    undo.check_network(axes)
    if plan.means or any(not change.idle for change in plan.changes.values()):
        raise PlanError("one plan brings branches back or changes units; make two")
    if optimizers:
        raise PlanError(
            "no optimizer can follow a branch that comes back, for no group of it is known; apply the plan without, "
            "then give the optimizer its parameters (add_param_group)"
        )
    new_axes, new_undo = axes, undo
    modules: dict[str, nn.Module] = {}
    for path in plan.back:
        _check_dropped(model, undo.branches[path].branch)
        removed = _replay_cuts(undo.branches[path], new_axes)
        new_axes, new_undo = _rejoin_axes(removed.axes, removed.branch, new_axes), new_undo.rejoin(removed)
        modules |= removed.modules
    placeholders = {path: model.get_submodule(path) for path in modules}
    like = next(model.parameters())
    for path, module in modules.items():
        module.to(like.device).train(placeholders[path].training)
    set_modules(model, modules)
    try:
        bare, mode = meta_copy(model, {})
        example = fake_example(cast_example(axes.example, model), mode)
        recorded = capture(bare, example, tracer=new_axes.tracer)
        new_axes = check_own_run(model, _update_axes(bare, example, recorded, new_axes))
    except BaseException as error:
        set_modules(model, placeholders)
        if isinstance(error, TraceError):
            raise PlanError(f"the network does not run with {', '.join(plan.back)} again: {error}") from None
        raise
    undo.replace_contents(new_undo)
    return model, new_axes


def _placeholders(branches: Iterable[Branch]) -> dict[str, Placeholder]:
    """Return module path → the placeholder that replaces it, for several branches."""
    return {path: placeholder for branch in branches for path, placeholder in branch.placeholders.items()}


def _check_dropped(model: nn.Module, branch: Branch) -> None:
    """Raise ``PlanError`` unless the branch's placeholders are in the model."""
    known = dict(model.named_modules())
    for path, placeholder in branch.placeholders.items():
        module = known.get(path)
        if not isinstance(module, PlaceholderModule) or module.placeholder != placeholder:
            raise PlanError(f"{path} is not dropped here, so it cannot come back; bring back what it lies in first")


def _replay_cuts(removed: RemovedBranch, axes: AxisGraph) -> RemovedBranch:
    """Return a copy of a dropped branch with the cuts of its axes since; ``PlanError`` if units were added to them."""
    old = removed.axes
    inner = old.restricted(removed.branch.holds)
    keep = {}
    for axis in inner:
        key, current = axis.key, axes.axes.get(axis.key)
        if current is None or current.ids == axis.ids:
            continue
        positions = {unit: i for i, unit in enumerate(axis.ids)}
        if not positions.keys() >= set(current.ids) or current.next_id != axis.next_id:
            raise PlanError(
                f"axis {key!r} has other units than when {removed.branch.module} was dropped; cut those first"
            )
        keep[key] = [positions[unit] for unit in current.ids]
    if not keep:
        return removed
    inner = replace(inner, axes={key: replace(axis, inside="") for key, axis in inner.axes.items()})
    # Only copies of the branch's modules are changed, inside an otherwise empty module.
    shell = _build_shell({path: copy.deepcopy(module) for path, module in removed.modules.items()})
    undo = copy.copy(removed.undo)
    shell, cut = apply_unchecked(shell, inner, Plan.keeping(inner, keep), undo=undo)
    remaining = {key: replace(axis, inside=old[key].inside) for key, axis in cut.axes.items()}
    modules = {path: shell.get_submodule(path) for path in removed.modules}
    return replace(removed, axes=replace(old, axes={**old.axes, **remaining}), undo=undo, modules=modules)


def _build_shell(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module that contains the given modules at their paths, and nothing else."""
    shell = nn.Module()
    for path, module in modules.items():
        *parents, leaf = path.split(".")
        parent = shell
        for name in parents:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(leaf, module)
    return shell


def _prove_drop(model: nn.Module, axes: AxisGraph, removed: Sequence[Branch]) -> AxisGraph:
    """Return the axes without some branches; ``PlanError`` unless the rest runs the same operations on fake tensors."""
    bare, mode = meta_copy(model, {})
    example = fake_example(cast_example(axes.example, model), mode)
    # A module of class Candidates sums its operations and leaves out those that return None: nothing to prove.
    candidates = [branch for branch in removed if branch.gives == "nothing"]
    others = [branch for branch in removed if branch.gives != "nothing"]
    try:
        insert_placeholders(bare, _placeholders(candidates))
        recorded = capture(bare, example, tracer=axes.tracer)
        remaining = axes.without(removed)
        may_be_idle = {*axes.ties, *axes.ties.values(), *axes.unreached}
        if candidates and (idle := [n for n in recorded.unused if n in remaining.shapes and n not in may_be_idle]):
            raise BranchError(f"nothing would use {idle[0]} any more, which stays")
        if not others:
            return _update_axes(bare, example, recorded, remaining)
        whole = Effects(recorded)
        replaced = locate_branches(whole, others)
        insert_placeholders(bare, _placeholders(others))
        small = Effects(capture(bare, example, tracer=axes.tracer))
        pairs = zip(replaced.items(), others, strict=True)
        zeros = {node: small.inside[branch.module][-1] for (node, source), branch in pairs if source is None}
        if problem := find_effect_difference(whole, replaced, small, zeros):
            raise BranchError(f"without it the network does something else, {problem}")
        if idle := [name for name in small.capture.unused if name not in whole.capture.unused]:
            raise BranchError(f"nothing would use {idle[0]} any more, which stays")
        return _update_axes(bare, example, small.capture, remaining)
    except (BranchError, TraceError) as error:
        names = ", ".join(branch.module for branch in removed)
        raise PlanError(f"{names} cannot be dropped: {error}") from None


def _update_axes(bare: nn.Module, example: Example, recorded: Capture, axes: AxisGraph) -> AxisGraph:
    """Return ``axes`` updated by a new recording of the network: operations, work, branches, and what can be cut.

    ``bare``: a copy of the network on fake tensors, of which ``recorded`` was made with ``example``.
    """
    w = walk(recorded)
    trace_training(bare, example, w)
    fresh, names = assemble(bare, w, axes.example)
    axis_of = {slot: axis for axis in fresh for slot in axis.slots}
    parts = {a.key: [*dict.fromkeys(axis_of[slot].key for slot in a.slots if slot in axis_of)] for a in axes}
    current = {key: _match_axis(axes[key], [fresh[part] for part in keys]) for key, keys in parts.items()}
    known = {part: key for key, axis in current.items() if axis is not None for part in parts[key]}
    # Candidates' operations alone give nothing: other branches are there if with_branches has looked for them.
    has_branches = any(branch.gives != "nothing" for branch in axes.branches.values())
    order = {name: i for i, name in enumerate([*fresh.counted, *(fold.weight for fold in fresh.folds)])}
    names = Names({number: known[key] for number, key in names.keys.items() if key in known})
    return replace(
        axes,
        axes={key: _refresh_axis(axis, current[key]) for key, axis in axes.axes.items()},
        counted=tuple(sorted(axes.counted, key=lambda name: order.get(name, len(order)))),
        folds=tuple(sorted(axes.folds, key=lambda fold: order.get(fold.weight, len(order)))),
        steps=list_symbolic_steps(w, names),
        recording=make_recording(bare, w, names),
        work=tuple(Work(module, op, names.dims(dims)) for module, op, dims in w.work),
        caches=find_caches(w, names),
        notes=fresh.notes,
        trained=fresh.trained,
        branches=(find_branches(bare, recorded, axes.example, axes.branches) if has_branches else {})
        | list_candidates(bare),
    )


def _match_axis(axis: Axis, parts: Sequence[Axis]) -> Axis | None:
    """Return the new trace's axis with the slots of an old one, merged from ``parts``; ``None`` if none has them."""
    if {*axis.slots} != {slot for part in parts for slot in part.slots}:
        return None
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    alike = all(
        part.free and (part.size, part.mark, part.count, part.inside) == (axis.size, first.mark, "", axis.inside)
        for part in parts
    )
    if not alike:
        return None
    least, multiple = max(part.least for part in parts), lcm(*(part.multiple for part in parts))
    narrow = next((part.narrow for part in parts if part.narrow), "")
    return replace(first, key=axis.key, slots=axis.slots, least=least, multiple=multiple, narrow=narrow)


def _refresh_axis(axis: Axis, fresh: Axis | None) -> Axis:
    """Return an axis with the slots, mark and limits of a new trace; frozen where it has none (``fresh=None``)."""
    if not axis.free or axis.size == 1:
        return axis
    if fresh is None:
        reason = "only what was dropped held its units together; trace the network anew to cut them"
        return replace(axis, mark=Mark.FROZEN, reason=reason)
    return replace(
        axis,
        slots=fresh.slots,
        mark=fresh.mark,
        reason=fresh.reason,
        least=fresh.least,
        multiple=fresh.multiple,
        narrow=fresh.narrow,
    )
