"""The proof of a change: compare masked and cut network in float64, on some blocks of each class, before it is made.

That both run the same operations on the same operands with the same constants has been checked before
(:func:`regrow.tracing.trial.rehearse`), on the whole network. What is left to show is that tensors were cut and folded
as the operations need it, and that is the same for all blocks of one class.
"""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.core.axes import Dim, Role, axes_in
from regrow.core.plan import NONE, PlanError
from regrow.surgery.carry import ProposedChange
from regrow.surgery.compensate import PlannedTensors, bias_of
from regrow.surgery.layout import Layout, lay_out_dims, resize
from regrow.surgery.output_comparison import (
    RELATIVE_BOUND,
    all_true,
    max_difference,
    max_magnitude,
    measure_difference,
    measure_magnitude,
)
from regrow.surgery.runner import LARGE, Load, Masking, Runner, loader, masking, preserve_generators, reseed, run_both
from regrow.tracing.capture import Capture
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.model_state import state_of
from regrow.tracing.nodes import op_name, uncast
from regrow.tracing.readings import GraphBlock
from regrow.tracing.steps import list_operations

# How many units in the last place a tensor may differ from its value in float64
ROUNDING = 16

# How many blocks of a class are checked at most: the narrowest, the widest, and two more if they are small
PER_CLASS = 4

# The most entries in the tensors of a block that counts as small
SMALL = 2**18

# Entries of each spatial dimension that a block is tested with, if its operations allow any size
CROP = 3


class Deviation(NamedTuple):
    """How far a block of the cut network is from the masked one, in float64, and how far it may be."""

    largest_difference: float
    bound: float


class _NotAloneError(Exception):
    """Raised where a block cannot be run by itself."""


def check_blocks(change: ProposedChange) -> None:
    """Raise ``PlanError`` unless masked and cut network agree in float64, on some blocks of each class.

    A block runs on the same random numbers in both; values that depend on no parameter (positions, attention masks) are
    computed. Units that are restored are masked in the planned network. New ones are not: they must not change the
    function. If a block differs, or cannot run by itself, both networks run as a whole, on the example.
    """
    pair = _Pair(change)
    with preserve_generators():
        if len(change.recording.blocks) > 1 and all(pair.same(block) for block in select_blocks(change)):
            return
        try:
            ours, theirs = pair.run_whole()
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            raise PlanError(
                f"the plan cannot be carried out: what it leaves does not run in float64 ({why}); plan other sizes"
            ) from error
    if not (distance := max_difference(ours.answers, theirs.answers)) <= RELATIVE_BOUND * max_magnitude(ours.answers):
        raise PlanError(describe_difference(distance, max_magnitude(ours.answers)))


def check_block(change: ProposedChange, block: GraphBlock) -> Deviation:
    """Compare one block of the masked and the cut network in float64, as :func:`check_blocks` does; return how far."""
    pair = _Pair(change, block)
    with preserve_generators():
        same = pair.same(block)
    where = block.path or "what lies outside the blocks"
    if not pair.gaps:
        raise PlanError(f"{where} cannot be compared by itself; load the model whole, without --memory")
    gap, largest = max(((float(one), float(other)) for one, other in pair.gaps), key=lambda row: row[0] - row[1])
    if not same:
        raise PlanError(f"{where}: {describe_difference(gap, largest / RELATIVE_BOUND)}")
    return Deviation(gap, largest)


def describe_difference(distance: float, largest: float) -> str:
    """Return the error message for a planned network whose outputs differ from those of the masked one."""
    return (
        f"the plan cannot be carried out: what it leaves differs by {distance:.1e} from the masked network, whose "
        f"largest output is {largest:.1e} (float64); a fault of regrow, please report it"
    )


def select_blocks(change: ProposedChange) -> list[GraphBlock]:
    """Return the blocks to check: of each changed class the narrowest, the widest, and two more if they are small.

    Where all are equally wide, the first is both.
    """
    sizes = {name: value.numel() for name, value in {**state_of(change.tensors.model), **change.ready.values}.items()}
    classes: dict[int, list[tuple[int, GraphBlock]]] = {}
    for block in changed_blocks(change):
        classes.setdefault(block.block_class, []).append((sum(sizes[name] for name in block.states), block))
    result: list[GraphBlock] = []
    for members in classes.values():
        ordered = sorted(members, key=lambda member: member[0])
        (least, narrowest), (most, widest) = ordered[0], ordered[-1]
        selected = [narrowest] if least == most else [narrowest, widest]
        if most <= SMALL:
            selected += [block for _, block in ordered[:-1] if block not in selected]
        result += selected[:PER_CLASS]
    return sorted(result, key=lambda block: block.start)


def changed_blocks(change: ProposedChange) -> list[GraphBlock]:
    """Return the blocks that a plan changes: those with operations on its axes, or with tensors that it computes."""
    moved, made = change.tensors.units.keys(), change.ready.values.keys()
    steps = change.tensors.axes.steps
    reach = [any(not moved.isdisjoint(axes_in(dim)) for row in step.shapes for dim in row or ()) for step in steps]
    blocks = change.recording.blocks
    return [block for block in blocks if any(reach[block.start : block.stop]) or not made.isdisjoint(block.states)]


class _Pair:
    """The masked and the planned network, run block by block."""

    def __init__(self, change: ProposedChange, only: GraphBlock | None = None) -> None:
        self.change = change
        self.gaps: list[tuple[Tensor, Tensor]] = []
        recorded, ready, tensors = change.recording, change.ready, change.tensors
        self.axes, self.plan, model = tensors.axes, tensors.plan, tensors.model
        self.rounded = set(filter(tensors.computes, ready.values))  # computed instead of selected
        self.restores = any(units.restore for units in self.plan.changes.values())
        self.exact: dict[str, Tensor] = {}
        reads = tuple(read for read in recorded.reads if only is None or only.start <= read.step < only.stop)
        keep = {key: units.keep for key, units in self.plan.changes.items()}
        mask = masking(recorded.capture, reads, self.axes.sizes(), keep, self.plan.means)
        load = loader(model, ready.values)
        back: Masking | None = None
        if self.restores:
            old = {key: tuple((~lay.is_new).nonzero().flatten().tolist()) for key, lay in tensors.units.items()}
            back = masking(change.planned, reads, tensors.sizes, old, NONE)
        else:
            load = _exact_loader(load, tensors, self.rounded, self.exact)
        self.sides: tuple[tuple[Capture, Load, Masking | None], ...] = (
            (recorded.capture, loader(model), mask),
            (change.planned, load, back),
        )
        example = cast_example(self.axes.example, model)
        self.given = tree_leaves((example.args, dict(example.kwargs)))

    def _lays(self, dims: Sequence[Dim]) -> dict[int, Layout]:
        return lay_out_dims(dims, self.axes.sizes(), self.change.tensors.units)

    @cached_property
    def steps(self) -> dict[Node, int]:
        """Operation of either network → its number."""
        return {node: i for runner in self.runners for i, node in enumerate(runner.nodes)}

    def _fresh(self) -> tuple[Runner, Runner]:
        (whole, load, mask), (planned, load_cut, mask_cut) = self.sides
        rounded = self.rounded  # a reference to this pair would be a cycle, and keep the tensors of its block
        ours = Runner(whole, self.given, load, True, mask, exact=lambda name: True)
        return ours, Runner(planned, self.given, load_cut, True, mask_cut, exact=lambda name: name not in rounded)

    @cached_property
    def runners(self) -> tuple[Runner, Runner]:
        """Runners of both networks, with every value computed that depends on no parameter."""
        pair = self._fresh()
        for runner, (capture, *_) in zip(pair, self.sides, strict=True):
            runner.run_only(_past_parameters(capture, self.axes.parameters, runner.writers))
        return pair

    def run_whole(self) -> tuple[Runner, Runner]:
        """Run both networks on the example."""
        self.exact.clear()
        self._check_rounding(self.rounded)
        cut, masked = self._fresh()
        run_both(cut, masked, self.change.recording.blocks)
        return cut, masked

    def same(self, block: GraphBlock) -> bool:
        """Whether both networks are known to compute the same in a block from the same inputs."""
        ours = list_operations(self.change.recording.capture)[block.start : block.stop]
        local = all(op_name(node) in _LOCAL or torch.Tag.pointwise in getattr(node.target, "tags", ()) for node in ours)
        for crop in (CROP, None) if local else (None,):
            try:
                if self._same(block, crop):
                    return True
            except PlanError:
                raise
            except (_NotAloneError, RuntimeError, IndexError, ValueError):
                pass  # such as a block that is none of images after all
        return False

    def _same(self, block: GraphBlock, crop: int | None) -> bool:
        self.gaps.clear()
        generator = torch.Generator().manual_seed(block.start)
        runner = self.runners[0]
        seams = {
            step: self._seam(step, generator, crop)
            for step in block.inputs
            if isinstance(step, int) and runner.nodes[step] not in runner.env
        }
        names = self.rounded.intersection({*block.states, *map(bias_of, self.plan.means.keys() & block.states)})
        small = [name for name in names if self.change.ready.values[name].numel() <= LARGE]
        self.exact |= {name: self.change.tensors.load(name, exact=True) for name in small}
        try:
            self._check_rounding(small)
            ours, theirs = (self._run(i, block, {step: pair[i] for step, pair in seams.items()}) for i in (0, 1))
        finally:
            self.exact.clear()
        return all_true([self._alike(step, ours[step], theirs[step]) for step in ours])

    def _seam(self, step: int, generator: torch.Generator, crop: int | None) -> tuple[Tensor, Tensor]:
        """Return random numbers for a value between two blocks, and the same after the plan."""
        form, dims = self.runners[0].nodes[step].meta.get("val"), self.axes.steps[step].shapes[0]
        if not isinstance(form, Tensor) or not form.is_floating_point() or dims is None:
            raise _NotAloneError
        few = [crop if crop and i > 1 and isinstance(dim, int) and dim > crop else None for i, dim in enumerate(dims)]
        shape = [n or int(whole) for n, whole in zip(few, form.shape, strict=True)]
        made = torch.randn(shape, dtype=torch.float64, generator=generator).to(form.device)
        lays = self._lays(dims)
        return made, resize(f"seam {step}", made, lays, dict.fromkeys(lays, frozenset({Role.PRODUCES})))

    def _run(self, side: int, block: GraphBlock, seams: Mapping[int, Tensor]) -> dict[int, Any]:
        """Return the results of a block's operations that later ones read, or the network's outputs."""
        runner = self.runners[side]
        nodes = runner.nodes
        inside = _between(nodes, block)
        before = {}
        for node in dict.fromkeys(one for other in inside for one in other.all_input_nodes):
            made = uncast(node)
            if node in inside or node in runner.states or node in runner.env:
                continue
            if made in runner.states or made in runner.env:
                before[node] = runner.value(made)
            elif _is_float(node) and self.steps.get(made) in seams:
                before[node] = seams[self.steps[made]].clone()
            else:
                raise _NotAloneError
        reseed(block.start)
        results = runner.run_only(inside, before, [nodes[step] for step in block.outputs])
        if block.stop == len(nodes):
            return dict(enumerate(runner.answers, len(nodes)))
        return dict(zip(block.outputs, results, strict=True))

    def _alike(self, step: int, ours: Any, theirs: Any) -> Tensor:
        """Return whether a result is the same in both networks, ``[]`` bool."""
        steps = self.axes.steps
        dims = steps[step].shapes[0] if step < len(steps) else ()
        if not isinstance(ours, Tensor) or dims is None:
            raise _NotAloneError
        for dim, lay in self._lays(dims).items():
            stays = (~lay.is_new).nonzero().flatten()
            ours = ours.index_select(dim, lay.source[stays].to(ours.device))
            theirs = theirs.index_select(dim, stays.to(theirs.device))
        if not ours.is_floating_point():
            same = ours.shape == theirs.shape
            return (ours == theirs).all() if same else torch.tensor(False)
        largest = RELATIVE_BOUND * measure_magnitude([ours])
        gap = measure_difference([ours], [theirs]).to(largest.device)
        self.gaps.append((gap, largest))
        return ours.isfinite().all() & (gap <= largest)

    def _check_rounding(self, names: Iterable[str]) -> None:
        """Raise ``PlanError`` if tensors to be written differ from the checked float64 ones by more than rounding."""
        change = self.change
        if self.restores:  # restored entries are not computed
            return
        verdicts = {}
        for name in sorted(names):
            written = change.ready.values[name]
            exact = self.exact.get(name)
            exact = change.tensors.load(name, exact=True) if exact is None else exact
            bound = ROUNDING * torch.finfo(written.dtype).eps * measure_magnitude([exact])
            verdicts[name] = measure_difference([exact], [written]).to(bound.device) <= bound
        if not all_true([*verdicts.values()]):
            name = next(name for name, same in verdicts.items() if not same)
            raise PlanError(
                f"the plan cannot be carried out: {name} would be cut otherwise than in float64; "
                "a fault of regrow, please report it"
            )


def _exact_loader(load: Load, tensors: PlannedTensors, computed: Container[str], exact: Mapping[str, Tensor]) -> Load:
    """Return a loader of the planned network that takes computed tensors without rounding, those in ``exact`` first."""

    def loaded(name: str, double: bool) -> Tensor:
        if not double or name not in computed:
            return load(name, double)
        return exact[name] if name in exact else tensors.load(name, exact=True)

    return loaded


def _past_parameters(
    recorded: Capture, parameters: Collection[str], writers: Mapping[Node, Sequence[Node]]
) -> list[Node]:
    """Return the operations that depend on no parameter and read nothing that is written in place."""
    made: set[Node] = {node for node, name in recorded.states.items() if name in parameters}
    made |= {node for origin, ones in writers.items() for node in (origin, *ones)}
    result = []
    for node in recorded.graph.nodes:
        if node in made or not made.isdisjoint(node.all_input_nodes):
            made.add(node)
        elif node.op not in ("placeholder", "output"):
            result.append(node)
    return result


def _between(nodes: Sequence[Node], block: GraphBlock) -> dict[Node, None]:
    """Return the operations of a block with the casts and copies between them."""
    node, last = nodes[block.start], nodes[block.stop - 1]
    result: dict[Node, None] = {}
    while True:
        result[node] = None
        if node is last:
            return result
        node = node.next


def _is_float(node: Node) -> bool:
    form = node.meta.get("val")
    return isinstance(form, Tensor) and form.is_floating_point()


# Operations that run on images of any size, beside those that work entry by entry
_LOCAL = frozenset(
    (
        *("conv1d", "conv2d", "conv3d", "batch_norm", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "cat", "mean"),
        *("dropout", "output"),
    )
)
