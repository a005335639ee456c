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
from regrow.core.amounts import Measure
from regrow.core.axes.axis import AxisTensor
from regrow.core.candidates import Staged, candidates_in, single_in, tied_in
from regrow.core.sources import device_of, move_tensors
from regrow.methods.search.state import SearchState
from regrow.training.learner import Context, Replacements, flags_along

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
        """Return the last part of the network that a stage trains; −1 for the whole network.

        Args:
            stage: The number of the stage, from 0; −1 for the last one.
        """
        return self.ends[stage] if self.ends else -1

    @property
    def cuts(self) -> tuple[str, ...]:
        """The granularities of which the method may remove something."""
        return self.removable or self.granularities


MaskRule = Callable[[SearchState, Context, Tensor | None, bool], GateMasks]
"""(state, context, all weights ``[weights]`` or ``None``, whether masks have gradients) → masks."""


@dataclass(frozen=True)
class Rules:
    """A method's choices that the shared parts of a search call.

    Args:
        space: What the search may remove.
        masks: Computes masks from importances and thresholds.
        rates: context → the learning rates of importances and of thresholds.
        trains: (state, context) → whether importances are trained in this epoch.
        allowed: (state, context, target) → the allowed size of the trained part now; a commit removes no more than that
            needs.
        fills_with_bare: Whether a commit that would remove too much may also take back operations without weights.
        shares: (state, masks) → the fraction of each granularity that masks keep, and further values to log each epoch.
        summary: state → values to log at the end, besides sizes and fractions.
        own_parametrize: (state, context) → the replaced parameters; ``None``: the masked parameters.
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
        """Return the tensors that replace parameters in the forward pass.

        Args:
            state: The state of the search.
            context: The network.
        """
        own = self.own_parametrize
        return own(state, context) if own else mask_parameters(self, state, context)


def check_space(space: SearchSpace, context: Context) -> None:
    """Raise ValueError for a search whose target cannot be reached, or whose candidates contain other candidates.

    Args:
        space: What the search may remove.
        context: The network.

    Raises:
        ValueError: For such a search; names the smallest size that can be reached, or the candidates.
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
    """Return where operations, filters and weights lie in the network up to one of its parts, and what they cost.

    Args:
        space: What the search may remove.
        axes: The keys of the axes when the search began; empty: the present ones.
        context: The network.
        part: The last part that counts; −1 for the whole network.
    """
    staged, sums = part >= 0, candidates_in(context.model)

    def runs(name: str) -> bool:
        return not staged or cast(Staged, context.model).within(name, part)

    layout = gates(
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
    layout = move_tensors(layout, device_of(context.model))
    layout.levels.precompute()  # a resumed run's first step needs no more memory than any other
    return layout


def start_search(rules: Rules, context: Context) -> SearchState:
    """Return the initial state of a search, in which everything is kept.

    Args:
        rules: The choices of the method.
        context: The network.
    """
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

    Args:
        rules: The choices of the method.
        state: The state of the search.
        context: The network.
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
    """Yield each axis key with the place of its first filter, its number of filters, and the least number it keeps.

    Args:
        layout: Where filters lie in the network.
    """
    return zip(layout.levels.axes, layout.spans, strict=True)


def set_zeros(state: SearchState, mask: Tensor) -> SearchState:
    """Return the state with another set of weights fixed at 0.

    Args:
        state: The state of the search.
        mask: ``True`` for weights fixed at 0, ``[weights]``.
    """
    named = state.layout.levels.apart(mask)
    zeros = {name: replace(state.zeros[name], values=values.clone()) for name, values in named.items()}
    return replace(state, zeros={**state.zeros, **zeros}, zero_mask=mask)


def clear_thresholds(state: SearchState) -> None:
    """Set all thresholds to 0, in place, so that everything present is kept.

    Args:
        state: The state of the search.
    """
    for one in state.thresholds:
        one.values.data.zero_()


def measure_whole(space: SearchSpace, axes: tuple[str, ...], context: Context) -> float:
    """Return the size of the whole network with nothing masked, without the classifiers of all stages but the last.

    Args:
        space: What the search may remove, and the measure.
        axes: The keys of the axes when the search began.
        context: The network.
    """
    layout = build_layout(space, axes, context, space.part(-1))
    ops = layout.alive.float()
    return float(layout.levels.size(ops, ops.new_ones(layout.levels.filters)))


def measure_masked(state: SearchState, masks: GateMasks) -> Tensor:
    """Return the size of the trained part under masks, a scalar with the masks' gradients.

    Args:
        state: The state of the search.
        masks: The masks.
    """
    return state.layout.levels.size(masks.ops, masks.filters, masks.weights)


def measure_size(rules: Rules, state: SearchState, context: Context) -> float:
    """Return the size of the trained part under its current masks.

    Args:
        rules: The choices of the method.
        state: The state of the search.
        context: The network.
    """
    with torch.no_grad():
        return float(measure_masked(state, rules.masks(state, context, None, False)))


def measure_shares(state: SearchState, masks: GateMasks) -> dict[str, float]:
    """Return the fraction of each granularity that masks keep in the trained part.

    Args:
        state: The state of the search.
        masks: The masks.
    """
    runs, weights = state.layout.runs, masks.weights
    return {
        "operations": float(masks.ops[runs].mean()) if bool(runs.any()) else 1.0,
        "filters": float(masks.filters.mean()) if state.layout.levels.filters else 1.0,
        "weights": 1.0 if weights is None else float(weights.mean()),
    }


def mask_parameters(rules: Rules, state: SearchState, context: Context) -> Replacements:
    """Return the parameters under their masks, with the masks as ``aux``, and gradients in epochs that train masks.

    Args:
        rules: The choices of the method.
        state: The state of the search.
        context: The network.
    """
    if context.training:
        return _mask(rules, state, context, rules.trains(state, context))
    with torch.no_grad():
        return _mask(rules, state, context, False)


def _mask(rules: Rules, state: SearchState, context: Context, learning: bool) -> Replacements:
    parameters, levels = context.parameters(), state.layout.levels
    entrywise = levels.entrywise or "weights" in rules.space.granularities
    flat = levels.flat(parameters) if entrywise else None
    masks = rules.masks(state, context, flat, learning)
    values = levels.replace_weights(parameters, flat, masks.filter_scale, masks.over)
    return Replacements({**values, **scale_candidates(context, masks.op_scale, keep=True)}, masks)


def scale_candidates(context: Context, scale: Tensor, *, keep: bool) -> dict[str, Tensor]:
    """Return the scales of candidate operations, by name of the parameter that holds them.

    Args:
        context: The network.
        scale: One number per operation, ``[operations]``.
        keep: Whether the numbers are multiplied by the scales that the network has.
    """
    sums = candidates_in(context.model)
    parts, parameters = scale.split([*map(len, sums.values())]), context.parameters()
    names = [f"{path}.scale".lstrip(".") for path in sums]
    return {name: parameters[name] * part if keep else part for name, part in zip(names, parts, strict=True)}
