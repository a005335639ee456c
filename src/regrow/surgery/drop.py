"""Whole branches go and come back: modules are exchanged for stands, and what stays is proved to compute the same."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from torch.fx import Node
from torch.optim import Optimizer

from regrow.axes import Axis, AxisGraph, Example, Mark, Work
from regrow.branches import Branch
from regrow.plan import Plan, PlanError
from regrow.surgery.attic import Attic
from regrow.surgery.gone import Gone
from regrow.surgery.optimizer import Exchange, follow
from regrow.tracing.branches import Recorded, RefusedError, branches, located
from regrow.tracing.capture import Capture, TraceError, capture
from regrow.tracing.effects import Effects, otherwise
from regrow.tracing.graph import Names, assemble
from regrow.tracing.hollow import faked, fitting, hollow
from regrow.tracing.reach import reach
from regrow.tracing.rules import POINTWISE, RULES
from regrow.tracing.stand import Dropped, exchange, put
from regrow.tracing.steps import steps
from regrow.tracing.walk import walk


@contextmanager
def dropping(
    model: nn.Module, axes: AxisGraph, plan: Plan, optimizers: Sequence[Optimizer], attic: Attic | None
) -> Iterator[tuple[AxisGraph, Plan, Attic | None]]:
    """Inside, the branches of a plan are gone; they come back if anything there fails.

    Args:
        model: The network.
        axes: Its axes.
        plan: The plan; it fits them.
        optimizers: Those that move parameters; what goes leaves their groups when all is done.
        attic: Gets the modules when all is done.

    Yields:
        The axes without the branches, what is left of the plan for them, and what is left of the attic.

    Raises:
        PlanError: If the network without the branches is not proved to compute what is left of the sums.
    """
    gone = tuple(plan.drop.values())
    left = _without(model, axes, gone)
    rest = {key: replace(change, slots=left[key].slots) for key, change in plan.changes.items() if key in left.axes}
    lost = [(n, p) for n, p in model.named_parameters() if any(branch.holds(n) for branch in gone)]
    forget = follow(optimizers, [Exchange(name, parameter, {}) for name, parameter in lost])
    stowed, kept = attic.parted(gone, axes) if attic is not None else ({}, None)
    modules = exchange(model, {path: stand for branch in gone for path, stand in branch.stands.items()})
    try:
        yield left, Plan(rest, plan.means, plan.origin), kept
    except BaseException:
        put(model, modules)
        raise
    forget({})
    if attic is not None and kept is not None:
        held = {p: replace(one, modules={at: modules[at] for at in one.branch.stands}) for p, one in stowed.items()}
        vars(attic).update(vars(replace(kept, branches={**kept.branches, **held})))


def brought_back(
    model: nn.Module, axes: AxisGraph, plan: Plan, optimizers: Sequence[Optimizer], attic: Attic | None
) -> tuple[nn.Module, AxisGraph]:
    """The model with dropped branches where they were, with what they held, and its axes.

    Raises:
        PlanError: If a branch is not in the attic or not dropped here, an axis that it lies on has changed since, or
            the plan does anything else. Nothing is changed then.
    """
    if attic is None or (lost := next((path for path in plan.back if path not in attic.branches), "")):
        missing = plan.back[0] if attic is None else lost
        raise PlanError(
            f"{missing} is in no attic; give the one that was there when it was dropped, apply(..., attic=attic)"
        )
    if plan.means or any(not change.idle for change in plan.changes.values()):
        raise PlanError("one plan brings branches back or changes units; make two")
    if optimizers:
        raise PlanError(
            "no optimiser can follow a branch that comes back, for no group of it is known; apply the plan without, "
            "then give the optimiser its parameters (add_param_group)"
        )
    back, again = [attic.branches[path] for path in plan.back], attic
    left = axes
    for gone in back:
        _check_back(model, left, gone)
        left, again = gone.rejoined(left), again.rejoined(gone)
    modules = {path: module for gone in back for path, module in gone.modules.items()}
    stands = {path: model.get_submodule(path) for path in modules}
    like = next(model.parameters())
    for path, module in modules.items():
        module.to(like.device).train(stands[path].training)
    put(model, modules)
    try:
        copy, mode = hollow(model, {})
        given = faked(fitting(axes.example, model), mode)
        left = _described(copy, given, capture(copy, given), left)
    except TraceError as error:
        put(model, stands)
        raise PlanError(f"the network does not run with {', '.join(plan.back)} again: {error}") from None
    except BaseException:
        put(model, stands)
        raise
    vars(attic).update(vars(again))
    return model, left


def _check_back(model: nn.Module, axes: AxisGraph, gone: Gone) -> None:
    known = dict(model.named_modules())
    for path, stand in gone.branch.stands.items():
        here = known.get(path)
        if not isinstance(here, Dropped) or here.stand != stand:
            raise PlanError(f"{path} is not dropped here, so it cannot come back; bring back what it lies in first")
    for key, axis in gone.axes.axes.items():
        if not any(gone.branch.holds(slot.name) for slot in axis.slots) or key not in axes.axes:
            continue
        if (axes[key].ids, axes[key].born) != (axis.ids, axis.born):
            raise PlanError(
                f"axis {key!r} has other units than when {gone.branch.module} was dropped; restore those first"
            )


def _without(model: nn.Module, axes: AxisGraph, gone: Sequence[Branch]) -> AxisGraph:
    """The axes of a network without some branches, proved on a copy without numbers."""
    names = ", ".join(branch.module for branch in gone)
    copy, mode = hollow(model, {})
    given = faked(fitting(axes.example, model), mode)
    try:
        whole = Effects(capture(copy, given))
        replaced = located(Recorded(whole), gone)
        exchange(copy, {path: stand for branch in gone for path, stand in branch.stands.items()})
        small = Effects(capture(copy, given))
    except (RefusedError, TraceError) as error:
        raise PlanError(f"{names} cannot be dropped: {error}") from None
    inside = Recorded(small).inside
    zeros: dict[Node, Node] = {}
    for (node, source), branch in zip(replaced.items(), gone, strict=True):
        if source is None:
            zeros[node] = inside[branch.module][-1]
    if problem := otherwise(whole, replaced, small, zeros):
        raise PlanError(f"{names} cannot be dropped: without it the network does something else, {problem}")
    if idle := [name for name in small.capture.unused if name not in whole.capture.unused]:
        raise PlanError(f"{names} cannot be dropped: nothing would use {idle[0]} any more, which stays")
    return _described(copy, given, small.capture, axes.without(gone))


def _described(copy: nn.Module, given: Example, recorded: Capture, axes: AxisGraph) -> AxisGraph:
    """Axes with what the network does now: its operations, its work, its branches, and what can be cut of it.

    Args:
        copy: The network as it is now, without numbers.
        given: What it was recorded with.
        recorded: The record.
        axes: Its axes, as far as they are known.
    """
    w = walk(recorded, RULES, POINTWISE)
    reach(copy, given, w)
    fresh, names = assemble(copy, w, axes.example)
    found = {frozenset(axis.slots): axis for axis in fresh}
    now = {key: found.get(frozenset(axis.slots)) for key, axis in axes.axes.items()}
    known = {one.key: key for key, one in now.items() if one is not None}
    order = {name: i for i, name in enumerate([*fresh.counted, *(fold.weight for fold in fresh.folds)])}
    names = Names({number: known[key] for number, key in names.keys.items() if key in known})
    return replace(
        axes,
        axes={key: _now(axis, now[key]) for key, axis in axes.axes.items()},
        counted=tuple(sorted(axes.counted, key=lambda name: order.get(name, len(order)))),
        folds=tuple(sorted(axes.folds, key=lambda fold: order.get(fold.weight, len(order)))),
        steps=steps(w, names),
        work=tuple(Work(module, op, names.dims(dims)) for module, op, dims in w.work),
        notes=fresh.notes,
        trained=fresh.trained,
        branches=branches(copy, recorded, axes.example) if axes.branches else {},
    )


def _now(axis: Axis, fresh: Axis | None) -> Axis:
    """An axis as it is without what was dropped: the same units, and what a new trace says of cutting them."""
    if not axis.free or axis.size == 1:
        return axis
    if fresh is None:
        reason = "only what was dropped held its units together; trace the network anew to cut them"
        return replace(axis, mark=Mark.FROZEN, reason=reason)
    told = {name: getattr(fresh, name) for name in ("slots", "mark", "reason", "least", "multiple", "narrow")}
    return replace(axis, **told)
