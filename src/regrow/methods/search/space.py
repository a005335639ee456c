"""The space of a search: what may be removed, where it lies in the network, and what the network costs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from regrow.allocation.commits import least
from regrow.allocation.gates import GateMasks, Gates, gates
from regrow.allocation.levels import counted_tensors
from regrow.allocation.timed import Prices
from regrow.axis_tensor import AxisTensor
from regrow.candidates import Staged, candidates_in, single_in, tied_in
from regrow.method import Measure
from regrow.methods.search.state import SearchState
from regrow.training.learner import Context, Replacements, flags_along

GRANULARITIES = ("operations", "filters", "weights")


@dataclass(frozen=True)
class SearchSpace:
    """What a search may remove.

    Args:
        target: What the network may cost at the end.
        measure: What is counted.
        granularities: Of ``operations``, ``filters``, ``weights`` those that have masks.
        ends: The last part of the network that each stage trains, ascending; none: the whole network, in one stage.
        prices: The time that entries and operations take, if the measure is time.
        removable: The granularities of which the method may remove something; those that have masks, unless given.
    """

    target: float
    measure: Measure
    granularities: tuple[str, ...] = GRANULARITIES
    ends: tuple[int, ...] = ()
    prices: Prices | None = None
    removable: tuple[str, ...] = ()

    def part(self, stage: int) -> int:
        """The last part that a stage trains, that of the last stage for −1; −1 for the whole network."""
        return self.ends[stage] if self.ends else -1

    @property
    def cuts(self) -> tuple[str, ...]:
        """The granularities of which the method may remove something."""
        return self.removable or self.granularities


MaskRule = Callable[[SearchState, Context, Tensor | None, bool], GateMasks]
"""(state, context, all weights ``[weights]`` or ``None``, whether masks have gradients) → masks."""


@dataclass(frozen=True)
class Rules:
    """The choices of a method that the shared parts need.

    Args:
        space: What may be removed.
        masks: How importances and thresholds become masks.
        rates: context → the learning rates of importances and of thresholds.
        trains: (state, context) → whether importances are trained in this epoch.
        allowed: (state, context, target) → what the trained part may cost now; a commit goes no lower.
        fills_with_bare: Whether a commit that goes too low takes back operations that have no weights, too.
        shares: (state, masks) → the share of each granularity that masks keep, and what else is logged of each epoch.
        summary: state → what is logged at the end besides sizes and shares.
        own_parametrize: What replaces parameters; their masks do, unless given.
    """

    space: SearchSpace
    masks: MaskRule
    rates: Callable[[Context], tuple[float, float]]
    trains: Callable[[SearchState, Context], bool] = lambda state, context: True
    allowed: Callable[[SearchState, Context, float], float] = lambda state, context, target: target
    fills_with_bare: bool = True
    shares: Callable[[SearchState, GateMasks], dict[str, float]] = lambda state, masks: measure_shares(state, masks)
    summary: Callable[[SearchState], dict[str, float]] = lambda state: {}
    own_parametrize: Callable[[SearchState, Context], Replacements] | None = None

    def parametrize(self, state: SearchState, context: Context) -> Replacements:
        """What replaces parameters in the forward pass."""
        own = self.own_parametrize
        return own(state, context) if own else mask_parameters(self, state, context)


def check_space(space: SearchSpace, context: Context) -> None:
    """Refuse a search whose target no choice meets, or whose candidates contain candidates.

    Raises:
        ValueError: If it is one; names the smallest size that can be reached, or the candidates.
    """
    ops = [path for paths in candidates_in(context.model).values() for path in paths]
    for inner, outer in ((a, b) for a in ops for b in ops if a.startswith(f"{b}.")):
        raise ValueError(f"the candidate {inner} lies in another, {outer}: mark candidates on one level")
    if (smallest := least(build_layout(space, (), context, space.part(-1)), space.cuts)) > space.target:
        raise ValueError(
            f"a target of {space.target:g} {space.measure} is below what is left whatever goes, {smallest:g}: take a "
            "higher one, a smaller space, or more levels"
        )


def build_layout(space: SearchSpace, axes: tuple[str, ...], context: Context, part: int) -> Gates:
    """Where operations, filters and weights lie in the network up to one of its parts.

    Args:
        space: What may be removed.
        axes: The axes when the search began; those of now if there are none.
        context: The network.
        part: The last part that counts; −1 for the whole network.
    """
    staged, sums = part >= 0, candidates_in(context.model)

    def runs(name: str) -> bool:
        return not staged or cast(Staged, context.model).within(name, part)

    return gates(
        context.axes,
        {name: one for name, one in counted_tensors(context.model, space.measure).items() if runs(name)},
        sums,
        axes or [axis.key for axis in context.axes.units()],
        cast(Staged, context.model).needed() if staged else [*sums.values()],
        runs,
        space.measure,
        tied_in(context.model),
        single_in(context.model),
        space.prices,
    )


def start_search(rules: Rules, context: Context) -> SearchState:
    """The state of a search that begins: everything is kept."""
    n = sum(map(len, candidates_in(context.model).values()))
    axes = tuple(axis.key for axis in context.axes.units())
    importance, threshold = rules.rates(context)

    def zeros(size: int, lr: float) -> AxisTensor:
        return AxisTensor(torch.zeros(size), (size,), lr)

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
    """The state for the network as it is now, which runs up to the current stage's last part.

    κ and flags of what was removed with an operation are discarded; what came back gets new ones.
    """
    part = rules.space.part(state.stage)
    if rules.space.ends:
        cast(Staged, context.model).active = part
    layout = build_layout(rules.space, state.axes, context, part)
    kappa = {key: one for key, one in state.kappa.items() if key in context.axes.axes}
    for key, (_, size, _) in iterate_spans(layout):
        if key not in kappa:
            kappa[key] = AxisTensor(torch.zeros(size), (key,), rules.rates(context)[0])
    zeros = {name: one for name, one in state.zeros.items() if name in context.axes.shapes}
    for name in layout.levels.weights:
        if name not in zeros:
            zeros[name] = flags_along(context, name)
    mask = torch.cat([zeros[name].values.reshape(-1) for name in layout.levels.weights])
    return replace(state, kappa=kappa, zeros=zeros, layout=layout, zero_mask=mask)


def iterate_spans(layout: Gates) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Per axis: its key; the place of its first filter, how many filters it has, and how many it keeps at least."""
    return zip(layout.levels.axes, layout.spans, strict=True)


def set_zeros(state: SearchState, mask: Tensor) -> SearchState:
    """The state with other weights that are 0 for good, ``[weights]``."""
    named = state.layout.levels.apart(mask)
    zeros = {name: replace(state.zeros[name], values=values.clone()) for name, values in named.items()}
    return replace(state, zeros={**state.zeros, **zeros}, zero_mask=mask)


def clear_thresholds(state: SearchState) -> None:
    """Set all thresholds to 0, in place, so that everything that is there is kept."""
    for one in state.thresholds:
        one.values.data.zero_()


def measure_whole(space: SearchSpace, axes: tuple[str, ...], context: Context) -> float:
    """The size of the network as it is, with nothing masked, without classifiers of stages but the last."""
    layout = build_layout(space, axes, context, space.part(-1))
    return float(layout.levels.size(layout.alive.float(), torch.ones(layout.levels.filters)))


def measure_masked(state: SearchState, masks: GateMasks) -> Tensor:
    """The size of the trained part under masks, a scalar with their gradients."""
    return state.layout.levels.size(masks.ops, masks.filters, masks.weights)


def measure_size(rules: Rules, state: SearchState, context: Context) -> float:
    """The size of the trained part under its masks."""
    with torch.no_grad():
        return float(measure_masked(state, rules.masks(state, context, None, False)))


def measure_shares(state: SearchState, masks: GateMasks) -> dict[str, float]:
    """The share of each granularity that masks keep in the trained part."""
    runs, weights = state.layout.runs, masks.weights
    return {
        "operations": float(masks.ops[runs].mean()) if bool(runs.any()) else 1.0,
        "filters": float(masks.filters.mean()) if state.layout.levels.filters else 1.0,
        "weights": 1.0 if weights is None else float(weights.mean()),
    }


def mask_parameters(rules: Rules, state: SearchState, context: Context) -> Replacements:
    """The parameters under their masks; ``aux`` holds the masks. They have gradients in epochs that train them."""
    if context.training:
        return _mask(rules, state, context, rules.trains(state, context))
    with torch.no_grad():
        return _mask(rules, state, context, False)


def _mask(rules: Rules, state: SearchState, context: Context, learning: bool) -> Replacements:
    parameters, levels = context.parameters(), state.layout.levels
    flat = levels.flat(parameters)
    masks = rules.masks(state, context, flat, learning)
    values = levels.apart(levels.masked(flat, masks.filter_scale, masks.over))
    return Replacements({**values, **scale_candidates(context, masks.op_scale, keep=True)}, masks)


def scale_candidates(context: Context, scale: Tensor, *, keep: bool) -> dict[str, Tensor]:
    """The scales of candidates: ``[operations]`` numbers, times their own where these are kept."""
    sums = candidates_in(context.model)
    parts, parameters = scale.split([*map(len, sums.values())]), context.parameters()
    names = [f"{path}.scale".lstrip(".") for path in sums]
    return {name: parameters[name] * part if keep else part for name, part in zip(names, parts, strict=True)}
