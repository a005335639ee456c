"""Commits of a search: plans that remove what is masked, fit the network to its budget, or restore units."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regrow.allocation import commits
from regrow.allocation.commits import (
    least_cost,
    limit_removal,
    protect_cheapest,
    sample_operations,
    savings,
    select_removed,
)
from regrow.allocation.gates import GateMasks, Gates
from regrow.allocation.proposals import price_filters
from regrow.core.candidates import all_parts_active, exclusive_sets
from regrow.core.plan import Plan
from regrow.core.tasks import Examples
from regrow.methods.search import Commit, Search
from regrow.methods.search.space import SearchState, build_layout, copy_state, iterate_spans, measure_masked
from regrow.scoring.gradients import evaluation_mode
from regrow.surgery import apply
from regrow.surgery.gate import parametrize
from regrow.tracing.meta_copy import clone_model
from regrow.training.learner import Context, Step, Stream, task_loss
from regrow.training.state import follow_plan

FULL = 0.98  # the fraction of a target that is used, where a unit fits


@torch.no_grad()
def plan_masked_cut(
    search: Search, state: SearchState, context: Context, masks: GateMasks, target: float, fill: float = 0.0
) -> Commit:
    """Return the plan that removes what ``masks`` masks, as far as the size is above the allowed one, and the state.

    The allowed size is :meth:`Search.allowed_size`. Masked operations stay where ``target``, a size, could not be
    reached without them, and where they fill it: ``fill`` as in :func:`regrow.allocation.commits.limit_removal`.
    """
    layout, space = state.layout, search.space
    masks = limit_removal(layout, masks, search.allowed_size(state, context, target), fill)
    masks = protect_cheapest(build_layout(space, state.axes, context, space.part(-1)), masks, target, space.cuts)
    drop, keep = select_removed(layout, masks, context.axes)
    saved = savings(layout, masks)
    if masks.over is not None:
        state = state.with_zeros(state.zero_mask | (masks.over < 0))
    cut = dict(state.cut)
    for key, units in keep.items():
        removed = (int(unit) for i, unit in enumerate(context.axes[key].ids) if i not in units)
        cut[key] = (*cut.get(key, ()), *removed)
    state = replace(state, cut=cut, pending=saved["operations"], dropped={**state.dropped, **_price(layout, drop)})
    state = replace(state, saved=replace(state.saved, weights=saved["weights"]))
    origin = {"method": "search", "epoch": context.epoch}
    if drop:
        return Plan.dropping(context.axes, drop, keep, origin=origin), state
    state = search.update_layout(state, context)
    return Plan.keeping(context.axes, keep, origin=origin) if keep else None, state


def _price(layout: Gates, operations: Collection[str]) -> dict[str, float]:
    """Return the path of each of ``operations`` → its present cost."""
    prices = dict(zip(layout.ops, layout.prices().tolist(), strict=True)) if operations else {}
    return {path: prices[path] for path in operations}


def plan_drop(search: Search, state: SearchState, context: Context, ops: Tensor) -> Commit:
    """Return the plan that drops the operations with 0 in ``ops``, ``[operations]``, and the state after it.

    Unlike the removal of masked operations, it changes the network's outputs. ``None`` if there is nothing to drop.
    """
    masks = replace(search.masks(state, context), ops=ops)
    drop, _ = select_removed(state.layout, masks, context.axes)
    if not drop:
        return None, state
    pending, dropped = savings(state.layout, masks)["operations"], {**state.dropped, **_price(state.layout, drop)}
    state = replace(state, pending=pending, dropped=dropped)
    origin = {"method": "search", "epoch": context.epoch, "stood": True}
    return Plan.dropping(context.axes, drop, {}, origin=origin), state


def plan_fit(search: Search, state: SearchState, context: Context, target: float) -> Commit:
    """Return the plan that removes what is masked and, least important first, as much more as the target requires.

    Thresholds are set to 0 in place. Where candidates exclude each other, the plan is first :func:`plan_single_choice`.
    """
    plan, state = plan_single_choice(search, state, context)
    if plan:
        return plan, state
    with torch.no_grad():
        masks = search.masks(state, context)
        relative, levels = None, state.layout.levels
        if masks.over is not None:
            relative = levels.relative(levels.flat(context.parameters()), levels.active(masks.ops, masks.filters))
        ops, filters, weights = commits.fit_to_budget(state.layout, masks, relative, target)
        state = replace(state, zero_mask=state.zero_mask | weights)
        masks = replace(search.masks(state, context), ops=ops, filters=filters)
    plan, state = plan_masked_cut(search, state, context, masks, target, FULL)
    state.clear_thresholds()
    return plan, state


@torch.no_grad()
def fill_with_weights(search: Search, state: SearchState, context: Context, target: float) -> SearchState:
    """Return the state in which removed weights return, the largest first, as far as ``target`` has room for them."""
    masks, levels = search.masks(state, context), state.layout.levels
    if masks.over is None:
        return state
    flat, active = levels.flat(context.parameters()), levels.active(masks.ops, masks.filters)
    zero = state.zero_mask & active
    order = torch.where(zero, levels.relative(flat, active), -1.0).argsort(descending=True)[: int(zero.sum())]
    room = target - float(measure_masked(state, masks))
    price = levels.price[: levels.entries][order]
    returning = price.cumsum(0) <= room
    saved = replace(state.saved, weights=state.saved.weights - float(price[returning].sum()))
    return replace(state.with_zeros(state.zero_mask.index_fill(0, order[returning], False)), saved=saved)


def plan_single_choice(search: Search, state: SearchState, context: Context) -> Commit:
    """Return the plan that drops all but the best of each set of exclusive candidates, or ``None``; and the state."""
    sets, layout, alpha = exclusive_sets(context.model), state.layout, state.alpha.values.detach()
    if state.edges is not None:
        alpha = state.edges.share(alpha)
    if not sets:
        return None, state
    ops = layout.alive.float()
    indices = {path: i for i, path in enumerate(layout.ops)}
    for paths in sets:
        alive = [indices[path] for path in paths if layout.alive[indices[path]]]
        for best in sorted(alive, key=lambda i: float(alpha[layout.tied[i]]), reverse=True):
            others = torch.tensor([i for i in alive if i != best], dtype=torch.long, device=ops.device)
            trial = ops.index_fill(0, others, 0.0)
            if least_cost(replace(layout, alive=layout.alive & (trial > 0)), search.space.cuts) <= search.space.target:
                break  # the best with which the target can be met
        ops = trial
    return plan_drop(search, state, context, ops)


def plan_return(search: Search, state: SearchState, context: Context) -> Commit:
    """Return the plan that restores operations dropped in this stage for which the target has room, and the state.

    The most important come first, tied ones together, none that costs less than a tenth of the room. Thresholds
    of these are set to 0 in place. ``None`` where the network has :data:`FULL` of the target, or none fits.
    """
    layout, target, back = state.layout, search.space.target, list[str]()
    room = target - search.size(state, context)
    if room <= (1 - FULL) * target or not state.dropped or exclusive_sets(context.model):
        return None, state
    alpha = state.alpha.values.detach()
    dead = [i for i, path in enumerate(layout.ops) if path in state.dropped and not layout.alive[i]]
    for i in sorted((i for i in dead if layout.tied[i] == i), key=lambda i: float(alpha[i]), reverse=True):
        together = [j for j in dead if layout.tied[j] == i]
        cost = sum(state.dropped[layout.ops[j]] for j in together)
        if room / 10 <= cost <= room:
            back += [layout.ops[j] for j in together]
            state.operation_thresholds.values.data[together] = 0.0
            room -= cost
    return Plan(back=tuple(back), origin={"method": "search", "epoch": context.epoch}) if back else None, state


def plan_revival(share: float, state: SearchState, context: Context) -> Commit:
    """Return the plan that restores the fraction ``share`` of this stage's dropped operations, and the state.

    They are sampled as in MG-DARTS, by the size of ``state.drift`` and by α.
    """
    layout, count = state.layout, int(share * len(state.dropped))
    is_alive = {path: alive for path, alive, runs in zip(layout.ops, layout.alive, layout.runs, strict=True) if runs}
    dead, alive = [path for path in is_alive if not is_alive[path]], [path for path in is_alive if is_alive[path]]
    assert state.drift is not None  # set where a task starts
    drift = dict(zip(layout.ops, state.drift.values.abs().tolist(), strict=True))
    weight = dict(zip(layout.ops, state.alpha.values.detach().sigmoid().tolist(), strict=True))
    generator = context.generator(context.epoch, Stream.RETURNING_OPERATIONS)
    back = sample_operations(dead, alive, drift, weight, count, generator) if dead else []
    origin = {"method": "mgas", "epoch": context.epoch, "reset": True}
    return Plan(back=tuple(back), origin=origin) if back else None, state


def plan_restoration(search: Search, share: float, state: SearchState, context: Context) -> Commit:
    """Return the plan that restores the fraction ``share`` of this stage's cut filters, and the state.

    They have the largest scores by :func:`score_cut_filters`. ``None`` if that is no filter.
    """
    restorable = _find_restorable(state, context)
    count = int(share * sum(map(len, restorable.values())))
    if not count:
        return None, state
    back: dict[str, list[int]] = {}
    scores = score_cut_filters(search, state, context, restorable, take_examples(context))
    for _, key, unit in sorted(scores, reverse=True)[:count]:
        back.setdefault(key, []).append(unit)
    back = _take_multiples(state, back)
    return Plan.restoring(
        context.axes, back, origin={"method": "mgas", "epoch": context.epoch}
    ) if back else None, state


def _take_multiples(state: SearchState, back: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the first of ``back``, axis key → filters, so that axes keep multiples of their layout's ``round_to``."""
    result, step = dict[str, list[int]](), state.layout.round_to
    for key, (_, size, _) in iterate_spans(state.layout):
        units = back.get(key, [])
        if count := len(units) if size < step else len(units) // step * step:
            result[key] = units[:count]
    return result


def _find_restorable(state: SearchState, context: Context) -> dict[str, list[int]]:
    """Return axis key → ids of the filters that were cut in this stage and can be restored."""
    stored = context.undo.restorable if context.undo else {}
    found = {
        # One that was restored and cut again is named twice.
        key: [unit for unit in ids if ids.count(unit) == 1 and unit in stored.get(key, ())]
        for key, ids in state.cut.items()
        if key in state.layout.levels.axes
    }
    return {key: units for key, units in found.items() if units}


def plan_refill(search: Search, state: SearchState, context: Context, target: float) -> Commit:
    """Return the plan that restores the best of the cut filters that fit into half of the room, or one; and the state.

    They are scored by :func:`score_cut_filters`. Half, since what a filter costs rises with the others. ``None`` where
    the network has :data:`FULL` of ``target``, or none fits.
    """
    restorable, masks = _find_restorable(state, context), search.masks(state, context)
    room = target - float(measure_masked(state, masks))
    prices = price_filters(state.layout, masks)
    # The more of them, the more one costs where a tensor makes and reads filters of one axis.
    cost = {key: float(prices[base]) * (1 + 1 / size) for key, (base, size, _) in iterate_spans(state.layout)}
    restorable = {key: units for key, units in restorable.items() if cost[key] <= room}
    if room <= (1 - FULL) * target or not restorable:
        return None, state
    scores = sorted(score_cut_filters(search, state, context, restorable, take_examples(context)), reverse=True)
    back, used = dict[str, list[int]](), 0.0
    for _, key, unit in scores:
        if not back or used + cost[key] <= room / 2:
            back.setdefault(key, []).append(unit)
            used += cost[key]
    back = _take_multiples(state, back)
    return Plan.restoring(
        context.axes, back, origin={"method": "search", "epoch": context.epoch}
    ) if back else None, state


def reset_modules(context: Context, paths: Sequence[str]) -> None:
    """Re-initialise modules (``paths``) at random, in place; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.generator(context.epoch, Stream.RESET).initial_seed() % 2**63)
        for path in paths:
            for module in context.model.get_submodule(path).modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()


def take_examples(context: Context) -> Examples:
    """Return a random batch, on the device, of as many training examples as a step has; more could need more memory."""
    count = -(-len(context.task.train) // context.steps)  # rounded up
    generator = context.generator(context.epoch, Stream.GRADIENT_EXAMPLES)
    return next(context.task.train.batches(count, seed=generator.initial_seed())).to(context.device)


def differentiate_weights(search: Search, state: SearchState, context: Context, batch: Examples) -> Tensor:
    """Return the gradient of the batch's mean loss with respect to the weights under masks, ``[weights]``.

    In evaluation mode nothing is recomputed, so an eighth of the examples is used at a time.
    """
    values = search.parametrize(state, replace(context, eval_task=context.number)).values
    levels = state.layout.levels
    learned = {name: values[name].detach().requires_grad_() for name in levels.weights}
    total = torch.zeros(len(levels.reads), device=levels.reads.device)
    for indices in torch.arange(len(batch)).split(max(1, len(batch) // 8)):
        with evaluation_mode(context.model), parametrize(context.model, {**values, **learned}):
            examples = batch.take(indices)
            loss = task_loss(None, context, Step(0, examples)).value * (len(examples) / len(batch))
            gradients = torch.autograd.grad(loss, [*learned.values()], allow_unused=True, materialize_grads=True)
        total = total + levels.flat(dict(zip(learned, gradients, strict=True)))
    return total


def score_cut_filters(
    search: Search, state: SearchState, context: Context, cut: Mapping[str, Sequence[int]], batch: Examples
) -> list[tuple[float, str, int]]:
    """Return (score, axis key, filter id) of cut filters; the score is |∂ loss / ∂ g| at g = 0 on ``batch``.

    ``cut``: axis key → ids of filters. g is the scale of the filter where it is read. All are restored at this scale in
    a copy of the network, with thresholds at 0.
    """
    plan = Plan.restoring(context.axes, cut)
    with all_parts_active(context.model):
        copied = clone_model(context.model)
    model, axes = apply(copied, context.axes, plan, undo=copy.copy(context.undo))
    restored = replace(context, model=model, axes=axes)
    probe = copy_state(follow_plan(state, context.axes, plan))
    probe.clear_thresholds()
    probe = search.update_layout(probe, restored)
    for key, ids in cut.items():
        probe.kappa[key].values[[axes[key].ids.index(unit) for unit in ids]] = -50.0  # a scale of 2 σ(κ) ≈ 0
    levels = probe.layout.levels
    products = differentiate_weights(search, probe, restored, batch) * levels.flat(restored.parameters()).detach()
    score = products.new_zeros(levels.filters + 1).index_add(0, levels.reads, products).abs().tolist()
    first = {key: base for key, (base, _, _) in iterate_spans(probe.layout)}
    return [(score[first[key] + axes[key].ids.index(unit)], key, unit) for key, ids in cut.items() for unit in ids]
