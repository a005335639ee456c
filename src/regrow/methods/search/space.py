"""The space of a search: what may be removed, what it costs, the importance of its parts, and the search's state."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from regrow.allocation.commits import least_cost
from regrow.allocation.darts import Edges
from regrow.allocation.gates import GateMasks, Gates, build_gates, counted_tensors
from regrow.allocation.latency import Latency
from regrow.allocation.levels import GRANULARITIES
from regrow.core.amounts import Measure
from regrow.core.axes.axis import AxisTensor
from regrow.core.axes.operations import Branch
from regrow.core.candidates import Staged, candidate_paths
from regrow.core.sources import device_of, move_tensors
from regrow.training.learner import Context
from regrow.training.state import axis_tensors, derived, with_axis_tensors


@dataclass(frozen=True)
class SearchSpace:
    """What a search may remove, and how the network's size is measured."""

    target: float  # the largest allowed size of the found network, in units of ``measure``
    measure: Measure
    granularities: tuple[str, ...] = GRANULARITIES  # those that have masks
    # The index of the last part of the network that each stage trains; empty: the whole network, in one stage.
    ends: tuple[int, ...] = ()
    removable: tuple[str, ...] = ()  # granularities of which something may be removed; empty: those that have masks
    latency: Latency | None = None  # the measured times, if these are the measure
    round_to: int = 1  # axes that lose filters keep multiples of this
    # Operations besides those of Candidates: path → a branch that can be dropped, with parameters that scale it
    blocks: Mapping[str, Branch] = field(default_factory=dict)

    def part(self, stage: int) -> int:
        """Return the index of the last network part that a stage trains, −1 for all; stage −1 is the last stage."""
        return self.ends[stage] if self.ends else -1

    @property
    def cuts(self) -> tuple[str, ...]:
        """The granularities of which something may be removed."""
        return self.removable or self.granularities

    def check(self, context: Context) -> None:
        """Raise ValueError if no removal reaches the target, or candidate operations contain other candidates."""
        ops = [path for paths in candidate_paths(context.model).values() for path in paths]
        for inner, outer in ((a, b) for a in ops for b in ops if a.startswith(f"{b}.")):
            raise ValueError(f"the candidate {inner} lies in another, {outer}: mark candidates on one level")
        smallest = least_cost(build_layout(self, (), context, self.part(-1)), self.cuts)
        if smallest > self.target:
            raise ValueError(
                f"a target of {self.target:g} {self.measure} is below what is left whatever goes, {smallest:g}: take a "
                "higher one, a smaller space, or more levels"
            )


@dataclass(frozen=True)
class Savings:
    """The reduction of the network's size by each granularity, in units of the search's measure."""

    operations: float = 0.0
    filters: float = 0.0
    weights: float = 0.0


@dataclass(frozen=True)
class StageMemory:
    """The memory of one stage of a search, measured in one step, in bytes."""

    stage: int  # from 0
    epoch: int  # of the step, from 1
    joint: bool  # whether masks were trained in that step
    held: int  # bytes of tensors that existed before the step
    peak: int  # the most bytes of live tensors in the step
    resident: int | None  # growth of the process's memory plus ``held``; ``None`` where this cannot be measured
    predicted: int | None  # when the stage began; ``None`` for the first stage
    recomputed: bool  # whether parts of the network were recomputed in the backward pass


def _empty() -> AxisTensor:
    """Return a state tensor without entries, a default."""
    return AxisTensor(torch.zeros(0), (0,))


@dataclass(frozen=True)
class SearchState:
    """What every search method carries from step to step: importances, thresholds, sizes, stage, what was removed."""

    # α, the importance of operations, [operations]; DARTS has one entry more per edge
    alpha: AxisTensor = field(default_factory=_empty)
    kappa: Mapping[str, AxisTensor] = field(default_factory=dict)  # axis key → κ of its filters, their importance
    operation_thresholds: AxisTensor = field(default_factory=_empty)  # [operations], each compared with σ(α)
    filter_thresholds: AxisTensor = field(default_factory=_empty)  # one per axis of ``axes``
    weight_thresholds: AxisTensor = field(default_factory=_empty)  # one per operation; the last for other weights
    zeros: Mapping[str, AxisTensor] = field(default_factory=dict)  # weight → which entries are fixed at 0
    drift: AxisTensor | None = None  # the smoothed gradient of α (MGAS)
    axes: tuple[str, ...] = ()  # the keys of the axes when the search began
    stage: int = 0  # the index of the present stage
    whole: float = 0.0  # the size of the network as it is, without classifiers of earlier stages
    saved: Savings = Savings()
    pending: float = 0.0  # the reduction of the size by operations in the plan that is about to be applied
    dropped: Mapping[str, float] = field(default_factory=dict)  # operation dropped in this stage → its cost then
    cut: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # axis key → ids of filters cut in this stage
    history: tuple[Mapping[str, int | float], ...] = ()  # the measurements of the last epoch
    multiplier: float = 0.0  # μ, the weight of the size in the loss
    start: float = 0.0  # the size when the stage began
    goal: float = 0.0  # the size that the stage has to reach
    memory: Mapping[str, StageMemory] = field(default_factory=dict)  # stage → memory, under a memory budget
    recomputed: bool = False  # whether parts of the network are recomputed in the backward pass
    layout: Gates = derived(lambda: None)  # where operations, filters and weights lie in the network now
    zero_mask: Tensor = derived(lambda: torch.zeros(0, dtype=torch.bool))  # ``zeros`` in one vector, [weights]
    earlier: tuple[Tensor, ...] = derived(tuple)  # operations and axes of earlier stages that are no longer pruned
    examples: int = derived(int)  # training examples seen in this epoch
    turn: int = derived(int)  # commit steps taken at this boundary
    edges: Edges = derived(lambda: None)  # where operations lie on the edges of cells (DARTS)
    chosen: float | None = derived(lambda: None)  # the size right after operations were chosen (DARTS)

    @property
    def thresholds(self) -> tuple[AxisTensor, AxisTensor, AxisTensor]:
        """The thresholds of operations, of filters and of weights, in this order."""
        return self.operation_thresholds, self.filter_thresholds, self.weight_thresholds

    def with_zeros(self, mask: Tensor) -> "SearchState":
        """Return the state in which exactly the weights in ``mask``, ``[weights]`` bool, are fixed at 0."""
        named = self.layout.levels.unflatten(mask)
        zeros = {name: replace(self.zeros[name], values=values.clone()) for name, values in named.items()}
        return replace(self, zeros={**self.zeros, **zeros}, zero_mask=mask)

    def clear_thresholds(self) -> None:
        """Set all thresholds to 0, in place, so that everything present is kept."""
        for thresholds in self.thresholds:
            thresholds.values.data.zero_()


def copy_state(state: SearchState) -> SearchState:
    """Return the state with copies of its stored tensors, so that changing them in place leaves ``state`` alone."""
    tensors = axis_tensors(state).items()
    return with_axis_tensors(state, {name: replace(t, values=t.values.detach().clone()) for name, t in tensors})


def build_layout(space: SearchSpace, axes: tuple[str, ...], context: Context, part: int) -> Gates:
    """Return where operations, filters and weights lie in the network up to ``part`` (−1: in all), and their costs.

    ``axes``: keys of the axes whose units are the filters; empty: all of the network. ``part``: an index as from
    :meth:`SearchSpace.part`.
    """
    is_staged = part >= 0

    def runs(name: str) -> bool:
        return not is_staged or cast(Staged, context.model).uses_parameter(name, part)

    layout = build_gates(
        context.model,
        context.axes,
        {name: tensor for name, tensor in counted_tensors(context.model, space.measure).items() if runs(name)},
        axes or [axis.key for axis in context.axes.units()],
        cast(Staged, context.model).required_groups() if is_staged else [*candidate_paths(context.model).values()],
        runs,
        space.measure,
        space.latency,
        space.round_to,
        space.blocks,
    )
    layout = move_tensors(layout, device_of(context.model))
    layout.levels.precompute()  # a resumed run's first step needs no more memory than any other
    return layout


def iterate_spans(layout: Gates) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yield (axis key, (index of its first filter, its number of filters, the least number of them that it keeps))."""
    return zip(layout.levels.axes, layout.spans, strict=True)


def measure_unmasked(space: SearchSpace, axes: tuple[str, ...], context: Context) -> float:
    """Return the network's size in ``space.measure``, nothing masked, without auxiliary classifiers of earlier parts.

    ``axes``: as in :func:`build_layout`.
    """
    layout = build_layout(space, axes, context, space.part(-1))
    ops = layout.alive.float()
    return float(layout.levels.size(ops, ops.new_ones(layout.levels.filters)))


def measure_masked(state: SearchState, masks: GateMasks) -> Tensor:
    """Return the size of the trained part under masks, in the search's measure, a scalar with the masks' gradients."""
    return state.layout.levels.size(masks.ops, masks.filters, masks.weights)


def split_scale(context: Context, scale: Tensor) -> dict[str, Tensor]:
    """Return name of the parameter of each sum of candidates → its operations' entries of ``scale``."""
    nodes = candidate_paths(context.model)
    parts = scale.split([*map(len, nodes.values())])
    return {f"{path}.scale".lstrip("."): part for path, part in zip(nodes, parts, strict=True)}


def scale_operations(
    context: Context, state: SearchState, values: Mapping[str, Tensor], scale: Tensor
) -> dict[str, Tensor]:
    """Return ``values`` (name → what replaces a parameter) with each operation's output scaled, ``[operations]``."""
    parameters, blocks = context.parameters(), state.layout.blocks
    result, first = dict(values), len(scale) - len(blocks)
    for name, part in split_scale(context, scale[:first]).items():
        result[name] = parameters[name] * part
    for block, factor in zip(blocks.values(), scale[first:], strict=True):
        for name in filter(parameters.__contains__, block.scales):  # none once it was dropped
            result[name] = result.get(name, parameters[name]) * factor
    return result


def rank_evenly(state: SearchState) -> SearchState:
    """Return the state with κ falling along each axis, so that all axes lose the same fraction, last filters first."""

    def rank(like: Tensor) -> Tensor:
        n = len(like)
        return torch.logit((torch.arange(n, 0, -1, device=like.device) - 0.5) / n)

    return replace(state, kappa={key: replace(t, values=rank(t.values)) for key, t in state.kappa.items()})
