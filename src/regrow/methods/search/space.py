"""The space of a search: what may be removed, what it costs, the importance of its parts, and masks that follow."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.allocation.commits import least
from regrow.allocation.gates import GateMasks, Gates, gates
from regrow.allocation.levels import counted_tensors
from regrow.allocation.timed import Prices
from regrow.core.amounts import Measure
from regrow.core.axes.axis import AxisTensor
from regrow.core.candidates import Staged, candidates_in, run_whole
from regrow.core.objectives import CLASSIFICATION
from regrow.core.plan import Plan
from regrow.core.sources import device_of, move_tensors
from regrow.core.tasks import Examples
from regrow.methods.search.state import SearchState
from regrow.surgery import apply
from regrow.surgery.gate import parametrize
from regrow.tracing.meta_copy import clone_model
from regrow.training.learner import Context, Replacements, Step, flags_along, task_loss
from regrow.training.state import axis_tensors, follow_plan, with_axis_tensors

GRANULARITIES = ("operations", "filters", "weights")


@dataclass(frozen=True)
class SearchSpace:
    """What a search may remove, and how the network's size is measured.

    Args:
        target: The largest allowed size of the found network.
        measure: The unit of size: parameters, non-zero parameters, MACs, bytes or milliseconds.
        granularities: Those of ``operations``, ``filters`` and ``weights`` that have masks.
        ends: The last part of the network that each stage trains, ascending; empty: the whole network, in one stage.
        prices: The time that weights and operations take, if the measure is time.
        removable: The granularities of which the method may remove something; empty: those that have masks.
    """

    target: float
    measure: Measure
    granularities: tuple[str, ...] = GRANULARITIES
    ends: tuple[int, ...] = ()
    prices: Prices | None = None
    removable: tuple[str, ...] = ()

    def part(self, stage: int) -> int:
        """Return the last part of the network that a stage trains; −1 for the whole network."""
        return self.ends[stage] if self.ends else -1

    @property
    def cuts(self) -> tuple[str, ...]:
        """The granularities of which the method may remove something."""
        return self.removable or self.granularities


class Rules:
    """A method's choices that the shared parts of a search call.

    Args:
        space: What the search may remove.
    """

    fills_with_bare = True
    """Whether a commit that would remove too much may also take back operations without weights."""

    trains_thresholds = False

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    def granularities(self, state: SearchState, context: Context) -> Sequence[str]:
        """Return the granularities whose masks are computed; the others are complete."""
        return self.space.granularities

    def masks(
        self, state: SearchState, context: Context, flat: Tensor | None = None, learning: bool = False
    ) -> GateMasks:
        """Return masks that keep what is at least as important as its threshold: σ(α), σ(κ), and |w| over its mean.

        ``flat`` has all weights, ``[weights]``; ``learning``: whether masks have gradients.
        """
        layout, searched = state.layout, self.granularities(state, context)
        if flat is None and "weights" in searched:
            flat = layout.levels.flat(context.parameters())

        def values(tensor: AxisTensor, trained: bool = True) -> Tensor:
            return tensor.values if learning and trained else tensor.values.detach()

        ops, filters, weights = (values(thresholds, self.trains_thresholds) for thresholds in state.thresholds)
        kappa = [values(state.kappa[key]) for key in layout.levels.axes]
        return layout.masks(
            (values(state.alpha), ops) if "operations" in searched else None,
            (torch.cat(kappa), filters) if "filters" in searched and kappa else None,
            None if flat is None or "weights" not in searched else (flat, state.zero_mask, weights),
        )

    def rates(self, context: Context) -> tuple[float, float]:
        """Return the learning rates of importances and of thresholds."""
        return 0.0, 0.0

    def trains(self, state: SearchState, context: Context) -> bool:
        """Whether importances are trained in this epoch."""
        return True

    def allowed(self, state: SearchState, context: Context, target: float) -> float:
        """Return the allowed size of the trained part now; a commit removes no more than that needs."""
        return target

    def shares(self, state: SearchState, masks: GateMasks) -> dict[str, float]:
        """Return the fraction of each granularity that masks keep in the trained part, to log each epoch."""
        runs, weights = state.layout.runs, masks.weights
        return {
            "operations": float(masks.ops[runs].mean()) if bool(runs.any()) else 1.0,
            "filters": float(masks.filters.mean()) if state.layout.levels.filters else 1.0,
            "weights": 1.0 if weights is None else float(weights.mean()),
        }


def check_space(space: SearchSpace, context: Context) -> None:
    """Raise ValueError for a search whose target cannot be reached, or whose candidates contain other candidates."""
    ops = [path for paths in candidates_in(context.model).values() for path in paths]
    for inner, outer in ((a, b) for a in ops for b in ops if a.startswith(f"{b}.")):
        raise ValueError(f"the candidate {inner} lies in another, {outer}: mark candidates on one level")
    if (smallest := least(build_layout(space, (), context, space.part(-1)), space.cuts)) > space.target:
        raise ValueError(
            f"a target of {space.target:g} {space.measure} is below what is left whatever goes, {smallest:g}: take a "
            "higher one, a smaller space, or more levels"
        )


def build_layout(space: SearchSpace, axes: tuple[str, ...], context: Context, part: int) -> Gates:
    """Return where operations, filters and weights lie in the network up to one of its parts, and what they cost."""
    staged = part >= 0

    def runs(name: str) -> bool:
        return not staged or cast(Staged, context.model).within(name, part)

    layout = gates(
        context.model,
        context.axes,
        {name: one for name, one in counted_tensors(context.model, space.measure).items() if runs(name)},
        axes or [axis.key for axis in context.axes.units()],
        cast(Staged, context.model).needed() if staged else [*candidates_in(context.model).values()],
        runs,
        space.measure,
        space.prices,
    )
    layout = move_tensors(layout, device_of(context.model))
    layout.levels.precompute()  # a resumed run's first step needs no more memory than any other
    return layout


def start_search(rules: Rules, context: Context) -> SearchState:
    """Return the initial state of a search, in which everything is kept."""
    n = sum(map(len, candidates_in(context.model).values()))
    axes = tuple(axis.key for axis in context.axes.units())
    importance, threshold = rules.rates(context)

    def zeros(size: int, lr: float) -> AxisTensor:
        return AxisTensor(torch.zeros(size, device=device_of(context.model)), (size,), lr)

    state = SearchState(
        alpha=zeros(n, importance),
        operation_thresholds=zeros(n, threshold),
        filter_thresholds=zeros(len(axes), threshold),
        weight_thresholds=zeros(n + 1, threshold),
        axes=axes,
        whole=measure_whole(rules.space, axes, context),
    )
    return update_layout(rules, state, context)


def update_layout(rules: Rules, state: SearchState, context: Context) -> SearchState:
    """Return the state for the network as it is now, and let the network run up to the current stage's last part.

    κ and flags of what was removed with an operation are discarded; restored filters and weights get new ones.
    """
    part = rules.space.part(state.stage)
    if rules.space.ends:
        cast(Staged, context.model).active = part
    layout = build_layout(rules.space, state.axes, context, part)
    kappa = {key: one for key, one in state.kappa.items() if key in context.axes.axes}
    for key, (_, size, _) in iterate_spans(layout):
        if key not in kappa:
            kappa[key] = AxisTensor(layout.alive.new_zeros(size, dtype=torch.float32), (key,), rules.rates(context)[0])
    zeros = {name: one for name, one in state.zeros.items() if name in context.axes.shapes}
    for name in layout.levels.weights:
        if name not in zeros:
            zeros[name] = flags_along(context, name)
    mask = torch.cat([zeros[name].values.reshape(-1) for name in layout.levels.weights])
    return replace(state, kappa=kappa, zeros=zeros, layout=layout, zero_mask=mask)


def iterate_spans(layout: Gates) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yield each axis key with the place of its first filter, its number of filters, and the least number it keeps."""
    return zip(layout.levels.axes, layout.spans, strict=True)


def set_zeros(state: SearchState, mask: Tensor) -> SearchState:
    """Return the state with another set of weights fixed at 0."""
    named = state.layout.levels.apart(mask)
    zeros = {name: replace(state.zeros[name], values=values.clone()) for name, values in named.items()}
    return replace(state, zeros={**state.zeros, **zeros}, zero_mask=mask)


def clear_thresholds(state: SearchState) -> None:
    """Set all thresholds to 0, in place, so that everything present is kept."""
    for one in state.thresholds:
        one.values.data.zero_()


def measure_whole(space: SearchSpace, axes: tuple[str, ...], context: Context) -> float:
    """Return the size of the whole network with nothing masked, without the classifiers of all stages but the last."""
    layout = build_layout(space, axes, context, space.part(-1))
    ops = layout.alive.float()
    return float(layout.levels.size(ops, ops.new_ones(layout.levels.filters)))


def measure_masked(state: SearchState, masks: GateMasks) -> Tensor:
    """Return the size of the trained part under masks, a scalar with the masks' gradients."""
    return state.layout.levels.size(masks.ops, masks.filters, masks.weights)


def measure_size(rules: Rules, state: SearchState, context: Context) -> float:
    """Return the size of the trained part under its current masks."""
    with torch.no_grad():
        return float(measure_masked(state, rules.masks(state, context)))


def mask_parameters(rules: Rules, state: SearchState, context: Context) -> Replacements:
    """Return the parameters under their masks, with the masks as ``aux``, and gradients in epochs that train masks."""
    parameters, levels = context.parameters(), state.layout.levels
    with nullcontext() if context.training else torch.no_grad():
        entrywise = levels.entrywise or "weights" in rules.space.granularities
        flat = levels.flat(parameters) if entrywise else None
        masks = rules.masks(state, context, flat, context.training and rules.trains(state, context))
        values = levels.replace_weights(parameters, flat, masks.filter_scale, masks.over)
        return Replacements({**values, **scale_candidates(context, masks.op_scale, keep=True)}, masks)


def scale_candidates(context: Context, scale: Tensor, *, keep: bool) -> dict[str, Tensor]:
    """Return the scales of candidate operations, by name of the parameter that holds them."""
    sums = candidates_in(context.model)
    parts, parameters = scale.split([*map(len, sums.values())]), context.parameters()
    names = [f"{path}.scale".lstrip(".") for path in sums]
    return {name: parameters[name] * part if keep else part for name, part in zip(names, parts, strict=True)}


def measure_relative(state: SearchState, context: Context, masks: GateMasks) -> Tensor:
    """Return |w| divided by the mean |w| of what is kept of its tensor, ``[weights]``."""
    levels = state.layout.levels
    return levels.relative(levels.flat(context.parameters()), levels.standing(masks.ops, masks.filters))


def rank_evenly(state: SearchState) -> SearchState:
    """Return the state in which a filter's importance is its place in its axis, so all axes lose the same fraction."""

    def rank(like: Tensor) -> Tensor:
        n = len(like)
        return torch.logit((torch.arange(n, 0, -1, device=like.device) - 0.5) / n)

    return replace(state, kappa={key: replace(one, values=rank(one.values)) for key, one in state.kappa.items()})


def differentiate_weights(rules: Rules, state: SearchState, context: Context, batch: Examples) -> Tensor:
    """Return ∂ loss / ∂ the masked weights, ``[weights]``; the network is left in evaluation mode.

    In that mode nothing is recomputed, so an eighth of the examples is used at a time.
    """
    values = mask_parameters(rules, state, replace(context, answered=context.number)).values
    levels = state.layout.levels
    learned = {name: values[name].detach().requires_grad_() for name in levels.weights}
    total = torch.zeros(len(levels.reads), device=levels.reads.device)
    context.model.eval()
    for piece in torch.arange(len(batch)).split(max(1, len(batch) // 8)):
        with parametrize(context.model, {**values, **learned}):
            loss = _share_of_loss(context, batch.take(piece), len(batch))
            gradients = torch.autograd.grad(loss, [*learned.values()], allow_unused=True, materialize_grads=True)
        total = total + levels.flat(dict(zip(learned, gradients, strict=True)))
    return total


def _share_of_loss(context: Context, piece: Examples, n: int) -> Tensor:
    """Return what some of ``n`` examples contribute to the mean loss, a scalar."""
    if context.objective is CLASSIFICATION:
        return F.cross_entropy(context.logits(piece.inputs), piece.labels, reduction="sum") / n
    return task_loss(None, context, Step(0, piece)).value * (len(piece) / n)


def score_cut_filters(
    rules: Rules, state: SearchState, context: Context, cut: Mapping[str, Sequence[int]], batch: Examples
) -> list[tuple[float, str, int]]:
    """Score cut filters by how much the loss would change if they came back: |∂ loss / ∂ g| at g = 0.

    g scales what reads the filter. All of them are restored at this scale in a copy of the network, so that its outputs
    are those of the network at the start of a stage, with thresholds at 0.
    """
    plan = Plan.restoring(context.axes, cut)
    with run_whole(context.model):
        copied = clone_model(context.model)
    model, axes = apply(copied, context.axes, plan, undo=copy.copy(context.undo))
    there = replace(context, model=model, axes=axes)
    probe = copy_state(follow_plan(state, context.axes, plan))
    clear_thresholds(probe)
    probe = update_layout(rules, probe, there)
    places = {key: [axes[key].ids.index(one) for one in ids] for key, ids in cut.items()}
    for key, own in places.items():
        probe.kappa[key].values[own] = -50.0
    levels = probe.layout.levels
    each = differentiate_weights(rules, probe, there, batch) * levels.flat(there.parameters()).detach()
    score = each.new_zeros(levels.filters + 1).index_add(0, levels.reads, each).abs().tolist()
    first = {key: base for key, (base, _, _) in iterate_spans(probe.layout)}
    return [
        (score[first[key] + i], key, one) for key, ids in cut.items() for i, one in zip(places[key], ids, strict=True)
    ]


def copy_state(state: SearchState) -> SearchState:
    """Return the state with copies of its tensors, which can be changed in place."""
    tensors = axis_tensors(state).items()
    return with_axis_tensors(state, {name: replace(one, values=one.values.detach().clone()) for name, one in tensors})
