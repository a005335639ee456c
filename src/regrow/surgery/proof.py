"""The proof of a change: compare masked and cut network in float64, on some blocks of each class, before it is made.

That both run the same operations on the same operands with the same constants has been checked before
(:func:`regrow.tracing.trial.rehearse`), on the whole network. What is left to show is that tensors were cut and folded
as the operations need it, and that is the same for all blocks of one class.
"""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from functools import cached_property
from math import isfinite
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
from regrow.surgery.output_comparison import RELATIVE_BOUND, all_true, measure_difference, measure_magnitude
from regrow.surgery.runner import (
    LARGE,
    GetTensor,
    Masking,
    Runner,
    make_masking,
    preserve_generators,
    reseed,
    run_both,
    tensor_getter,
)
from regrow.tracing.capture import Capture
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.model_state import state_of
from regrow.tracing.nodes import op_name, uncast
from regrow.tracing.readings import GraphBlock
from regrow.tracing.steps import list_operations

ROUNDING = 16  # how many units in the last place a tensor may differ from its value in float64
# How many blocks of a class are checked at most: the smallest, the largest, and others if all are small
PER_CLASS = 4
SMALL = 2**18  # the most entries in the tensors of a block that counts as small
CROP = 3  # entries of each spatial dimension that a block is tested with, if its operations allow any size
FAULT, NOT_FINITE = "a fault of regrow, please report it", "not finite; check its weights"


class Deviation(NamedTuple):
    """The largest difference of a block's outputs between cut and masked network, in float64, and its bound."""

    largest_difference: float
    bound: float


class _NotAloneError(Exception):
    """Raised where a block cannot be run by itself; both networks are run as a whole then."""


def check_blocks(change: ProposedChange) -> None:
    """Raise ``PlanError`` unless masked and cut network agree in float64, on some blocks of each class.

    A block runs on the same random numbers in both; values that depend on no parameter (positions, attention masks) are
    computed. Units that are restored are masked in the planned network. New ones are not: they must not change the
    function. If a block differs, or cannot run by itself, both networks run as a whole, on the example.
    """
    pair = _Pair(change)
    with preserve_generators():
        if len(change.recording.blocks) > 1 and all(pair.agrees(block) for block in select_blocks(change)):
            return
        try:
            masked, planned = pair.run_whole()
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            raise PlanError(
                f"the plan cannot be carried out: what it leaves does not run in float64 ({why}); plan other sizes"
            ) from error
    distance = float(measure_difference(masked.outputs, planned.outputs))
    largest = float(measure_magnitude(masked.outputs))
    if not distance <= RELATIVE_BOUND * largest:
        raise PlanError(describe_difference(distance, largest))


def check_block(change: ProposedChange, block: GraphBlock) -> Deviation:
    """Compare one block of masked and cut network, as :func:`check_blocks`; raise ``PlanError`` if it differs."""
    pair = _Pair(change, block)
    with preserve_generators():
        same = pair.agrees(block)
    where = block.path or "what lies outside the blocks"
    if not pair.gaps:
        raise PlanError(f"{where} cannot be compared by itself; load the model whole, without --memory")
    deviations = [Deviation(float(gap), float(bound)) for gap, bound in pair.gaps]
    worst = max(deviations, key=lambda deviation: deviation.largest_difference - deviation.bound)
    if not same:
        raise PlanError(f"{where}: {describe_difference(worst.largest_difference, worst.bound / RELATIVE_BOUND)}")
    return worst


def describe_difference(distance: float, largest: float) -> str:
    """Return the error message for a planned network that differs by ``distance``; ``largest``: the largest output."""
    why = f"the network computes numbers that are {NOT_FINITE}"
    if isfinite(distance):
        why = (
            f"what it leaves differs by {distance:.1e} from the masked network, whose largest output is {largest:.1e} "
        )
        why += f"(float64); {FAULT}"
    return f"the plan cannot be carried out: {why}"


def select_blocks(change: ProposedChange) -> list[GraphBlock]:
    """Return at most ``PER_CLASS`` blocks of each changed class: smallest and largest by entries, more if all small."""
    sizes = {name: value.numel() for name, value in {**state_of(change.tensors.model), **change.ready.values}.items()}
    classes: dict[int, list[tuple[int, GraphBlock]]] = {}
    for block in changed_blocks(change):
        classes.setdefault(block.block_class, []).append((sum(sizes[name] for name in block.states), block))
    result: list[GraphBlock] = []
    for members in classes.values():
        ordered = sorted(members, key=lambda member: member[0])
        (least, smallest), (most, largest) = ordered[0], ordered[-1]
        selected = [smallest] if least == most else [smallest, largest]
        if most <= SMALL:
            selected += [block for _, block in ordered[:-1] if block not in selected]
        result += selected[:PER_CLASS]
    return sorted(result, key=lambda block: block.start)


def changed_blocks(change: ProposedChange) -> list[GraphBlock]:
    """Return the blocks that a plan changes: those with operations on its axes, or with tensors that it computes."""
    changed, computed = change.tensors.units.keys(), change.ready.values.keys()
    steps = change.tensors.axes.steps
    reach = [any(not changed.isdisjoint(axes_in(dim)) for row in step.shapes for dim in row or ()) for step in steps]
    blocks = change.recording.blocks
    return [block for block in blocks if any(reach[block.start : block.stop]) or not computed.isdisjoint(block.states)]


class _Pair:
    """The masked and the planned network, run block by block, or ``only`` one block.

    ``gaps``: (difference, bound) of each output of the block that was compared last.
    """

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
        mask = make_masking(recorded.capture, reads, self.axes.sizes(), keep, self.plan.means)
        load = tensor_getter(model, ready.values)
        back: Masking | None = None
        if self.restores:
            old = {key: tuple((~layout.is_new).nonzero().flatten().tolist()) for key, layout in tensors.units.items()}
            back = make_masking(change.planned, reads, tensors.sizes, old, NONE)
        else:
            load = _exact_loader(load, tensors, self.rounded, self.exact)
        self.sides: tuple[tuple[Capture, GetTensor, Masking | None], ...] = (
            (recorded.capture, tensor_getter(model), mask),
            (change.planned, load, back),
        )
        example = cast_example(self.axes.example, model)
        self.given = tree_leaves((example.args, dict(example.kwargs)))

    def _layouts(self, dims: Sequence[Dim]) -> dict[int, Layout]:
        """Return dimension index → its layout after the plan, for those of ``dims`` that change."""
        return lay_out_dims(dims, self.axes.sizes(), self.change.tensors.units)

    @cached_property
    def steps(self) -> dict[Node, int]:
        """Operation of either network → its index."""
        return {node: i for runner in self.runners for i, node in enumerate(runner.nodes)}

    def _make_runners(self) -> tuple[Runner, Runner]:
        """Return runners of the masked and the planned network that have run nothing yet."""
        (whole, load, mask), (planned, load_cut, mask_cut) = self.sides
        rounded = self.rounded  # a reference to this pair would be a cycle, and keep the tensors of its block
        ours = Runner(whole, self.given, load, True, mask, exact=lambda name: True)
        return ours, Runner(planned, self.given, load_cut, True, mask_cut, exact=lambda name: name not in rounded)

    @cached_property
    def runners(self) -> tuple[Runner, Runner]:
        """Runners of both networks, with every value computed that depends on no parameter."""
        pair = self._make_runners()
        for runner, (capture, *_) in zip(pair, self.sides, strict=True):
            runner.run_only(_parameter_free(capture, self.axes.parameters, runner.writers))
        return pair

    def run_whole(self) -> tuple[Runner, Runner]:
        """Run both networks to the end on the example; return their runners (masked, planned) with the outputs."""
        self.exact.clear()
        self._check_rounding(self.rounded)
        masked, planned = self._make_runners()
        run_both(masked, planned, self.change.recording.blocks)
        return masked, planned

    def agrees(self, block: GraphBlock) -> bool:
        """Whether both networks compute the same in a block from the same inputs; False if it cannot run alone."""
        ours = list_operations(self.change.recording.capture)[block.start : block.stop]
        local = all(op_name(node) in _LOCAL or torch.Tag.pointwise in getattr(node.target, "tags", ()) for node in ours)
        for crop in (CROP, None) if local else (None,):
            try:
                if self._compare(block, crop):
                    return True
            except PlanError:
                raise
            except (_NotAloneError, RuntimeError, IndexError, ValueError):
                pass  # such as a block that is none of images after all
        return False

    def _compare(self, block: GraphBlock, crop: int | None) -> bool:
        """Run a block in both networks on random inputs (images ``crop`` wide); return whether they agree."""
        self.gaps.clear()
        generator = torch.Generator().manual_seed(block.start)
        runner = self.runners[0]
        inputs = {
            step: self._make_input(step, generator, crop)
            for step in block.inputs
            if isinstance(step, int) and runner.nodes[step] not in runner.env
        }
        names = self.rounded.intersection({*block.states, *map(bias_of, self.plan.means.keys() & block.states)})
        small = [name for name in names if self.change.ready.values[name].numel() <= LARGE]
        self.exact |= {name: self.change.tensors.load(name, exact=True) for name in small}
        try:
            self._check_rounding(small)
            ours, theirs = (self._run(i, block, {step: pair[i] for step, pair in inputs.items()}) for i in (0, 1))
        finally:
            self.exact.clear()
        return all_true([self._is_equal(step, ours[step], theirs[step]) for step in ours])

    def _make_input(self, step: int, generator: torch.Generator, crop: int | None) -> tuple[Tensor, Tensor]:
        """Return random numbers for the result of operation ``step``, a block's input, and the same after the plan."""
        form, dims = self.runners[0].nodes[step].meta.get("val"), self.axes.steps[step].shapes[0]
        if not isinstance(form, Tensor) or not form.is_floating_point() or dims is None:
            raise _NotAloneError
        cropped = [crop if crop and i > 1 and isinstance(dim, int) and dim > crop else 0 for i, dim in enumerate(dims)]
        shape = [size or int(whole) for size, whole in zip(cropped, form.shape, strict=True)]
        value = torch.randn(shape, dtype=torch.float64, generator=generator).to(form.device)
        layouts = self._layouts(dims)
        return value, resize(f"seam {step}", value, layouts, dict.fromkeys(layouts, frozenset({Role.PRODUCES})))

    def _run(self, side: int, block: GraphBlock, inputs: Mapping[int, Tensor]) -> dict[int, Any]:
        """Run a block of one network (0: masked, 1: planned); return operation index → result that is read later."""
        runner = self.runners[side]
        inside = _block_nodes(runner.nodes, block)
        before = {}
        for node in dict.fromkeys(operand for operation in inside for operand in operation.all_input_nodes):
            source = uncast(node)
            if node in inside or node in runner.states or node in runner.env:
                continue
            if source in runner.states or source in runner.env:
                before[node] = runner.value(source)
            elif _is_float(node) and self.steps.get(source) in inputs:
                before[node] = inputs[self.steps[source]].clone()
            else:
                raise _NotAloneError
        reseed(block.start)
        results = runner.run_only(inside, before, [runner.nodes[step] for step in block.outputs])
        if block.stop == len(runner.nodes):  # what is read later are the network's outputs
            return dict(enumerate(runner.outputs, block.stop))
        return dict(zip(block.outputs, results, strict=True))

    def _is_equal(self, step: int, ours: Any, theirs: Any) -> Tensor:
        """Return whether the entries of operation ``step``'s result that stay are the same in both, ``[]`` bool."""
        steps = self.axes.steps
        dims = steps[step].shapes[0] if step < len(steps) else ()
        if not isinstance(ours, Tensor) or dims is None:
            raise _NotAloneError
        for dim, layout in self._layouts(dims).items():
            stays = (~layout.is_new).nonzero().flatten()
            ours = ours.index_select(dim, layout.source[stays].to(ours.device))
            theirs = theirs.index_select(dim, stays.to(theirs.device))
        if not ours.is_floating_point():
            same = ours.shape == theirs.shape
            return (ours == theirs).all() if same else torch.tensor(False)
        bound = RELATIVE_BOUND * measure_magnitude([ours])
        gap = measure_difference([ours], [theirs]).to(bound.device)
        self.gaps.append((gap, bound))
        return ours.isfinite().all() & (gap <= bound)

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
            finite = bool(change.ready.values[name].isfinite().all())
            why = f"would be cut otherwise than in float64; {FAULT}" if finite else f"has numbers that are {NOT_FINITE}"
            raise PlanError(f"the plan cannot be carried out: {name} {why}")


def _exact_loader(
    load: GetTensor, tensors: PlannedTensors, computed: Container[str], exact: Mapping[str, Tensor]
) -> GetTensor:
    """Return ``load``, but in float64 what the plan computes (names) is unrounded: from ``exact``, or computed anew."""

    def load_exact(name: str, double: bool) -> Tensor:
        if not double or name not in computed:
            return load(name, double)
        return exact[name] if name in exact else tensors.load(name, exact=True)

    return load_exact


def _parameter_free(
    recorded: Capture, parameters: Collection[str], writers: Mapping[Node, Sequence[Node]]
) -> list[Node]:
    """Return the operations that depend on no parameter (by name) and read nothing that ``writers`` write in place."""
    dependent: set[Node] = {node for node, name in recorded.states.items() if name in parameters}
    # A tensor that is written in place may not be computed once for all, before or after the write.
    dependent |= {node for origin, writes in writers.items() for node in (origin, *writes)}
    result = []
    for node in recorded.graph.nodes:
        if node in dependent or not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
        elif node.op not in ("placeholder", "output"):
            result.append(node)
    return result


def _block_nodes(nodes: Sequence[Node], block: GraphBlock) -> dict[Node, None]:
    """Return the operations of a block with the casts and copies between them."""
    node, last = nodes[block.start], nodes[block.stop - 1]
    result: dict[Node, None] = {node: None}
    while node is not last:
        node = node.next
        result[node] = None
    return result


def _is_float(node: Node) -> bool:
    """Whether a recorded operation's result is a floating-point tensor."""
    form = node.meta.get("val")
    return isinstance(form, Tensor) and form.is_floating_point()


# Operations that run on images of any size, beside those that work entry by entry
_CONVOLUTIONS, _POOLS = ("conv1d", "conv2d", "conv3d"), ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
_LOCAL = frozenset((*_CONVOLUTIONS, *_POOLS, "batch_norm", "cat", "mean", "dropout", "output"))
