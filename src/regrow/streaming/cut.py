"""Cut a network that is larger than memory: block by block its tensors are cut, checked in float64 and written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow import store
from regrow.core.axes import AxisGraph, Example
from regrow.core.plan import Plan, PlanError
from regrow.core.progress import Progress, silent
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import Outbox, receive
from regrow.nets import Loaded
from regrow.store.shapes import Shapes
from regrow.store.state import named_tensors
from regrow.store.weights import OutsideTensors
from regrow.streaming.checkpoint import Checkpoint
from regrow.streaming.network import StreamedBlock, StreamedNetwork
from regrow.streaming.opening import OpenedNetwork
from regrow.streaming.weights import StoredWeights
from regrow.surgery.apply import check, try_out
from regrow.surgery.carry import commit, prepare
from regrow.surgery.compensate import bias_of
from regrow.surgery.output_comparison import Deviation, ProposedChange, max_difference, max_magnitude
from regrow.surgery.proof import changed_blocks, check_block
from regrow.surgery.runner import Answers, Runner, floats, preserve_generators, reseed
from regrow.tracing.capture import Capture, evaluating
from regrow.tracing.meta_copy import cast_example, copy_model
from regrow.tracing.own_run import as_double
from regrow.tracing.readings import GraphBlock
from regrow.tracing.steps import operations, restate_steps


def check_streamed_run(
    network: StreamedNetwork, recorded: Capture, blocks: Sequence[GraphBlock], example: Example
) -> None:
    """Raise ``PlanError`` unless a network's own forward pass gives what its recording gives.

    Outputs that are not equal bit for bit may differ by three times the rounding of the recording.
    """
    with network.on_demand() as model, preserve_generators(), evaluating(model), torch.no_grad():
        reseed(0)
        outputs = floats(model(*example.args, **example.kwargs))
    replayed = _replay(network, recorded, blocks, example)
    distance = max_difference(outputs, replayed)
    if distance == 0:
        return
    rounding = max_difference(replayed, _replay(network, recorded, blocks, example, double=True))
    if not distance <= 3 * rounding:
        raise PlanError(
            f"the plan cannot be carried out: outputs of the cut network differ by {distance:.1e} of "
            f"{max_magnitude(outputs):.1e} from what was recorded; load the model whole, without --memory"
        )


def _replay(
    network: StreamedNetwork, recorded: Capture, blocks: Sequence[GraphBlock], example: Example, double: bool = False
) -> Answers:
    """Return the outputs of a recording, with one block in memory at a time."""

    def load(name: str, double: bool) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor = getattr(network.model.get_submodule(path), leaf).detach()
        return as_double(tensor) if double else tensor

    nodes = operations(recorded)
    names = {block.path: block.names for block in network.blocks}
    leaves = tree_leaves((example.args, dict(example.kwargs)))
    with network.resident(network.outer), preserve_generators():
        reseed(0)
        runner = Runner(recorded, leaves, load, double)
        for block in blocks:
            with network.resident(names.get(block.path, ())):
                runner.run_until(nodes[block.stop] if block.stop < len(nodes) else None)
        runner.run_until()
    return runner.answers


@dataclass(frozen=True, eq=False)
class StreamedCut:
    """A plan for a network that is larger than memory, tried on a copy without numbers."""

    opened: OpenedNetwork
    change: ProposedChange  # the plan, with the shapes of what it makes
    loaded: Loaded  # the cut network without numbers, its tokenizer, an example input and its origin
    axes: AxisGraph

    @cached_property
    def changed_paths(self) -> frozenset[str]:
        """The paths of the blocks that are compared."""
        return frozenset(block.path for block in changed_blocks(self.change))

    def write(self, folder: Path, *, progress: Progress = silent, ranks: ProcessRank = SINGLE) -> list[Deviation]:
        """Cut and write the network, as ``store.write_model`` writes one that is in memory."""
        deviations: list[Deviation] = []

        def each(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self._tensors(deviations, progress, ranks):
                if name in shapes.tensors:
                    yield name, tensor

        @contextmanager
        def running(written: Path) -> Iterator[nn.Module]:
            network, change = self.network(written), self.change
            example = cast_example(change.axes.example, change.model)
            check_streamed_run(network, change.planned, change.recording.blocks, example)
            with network.on_demand() as model:
                yield model

        weights, changed = self.opened.weights, self.change.ready.values
        aligned = all(weights.is_aligned(name) for name in weights.stored if name not in changed)
        outside = OutsideTensors(each, running, aligned, ahead=self.opened.network().largest_block)
        store.write_model(self.loaded, folder, outside=outside)
        return deviations

    def share(self, ranks: ProcessRank) -> None:
        """Cut and check the blocks of this rank, and send them to rank 0, which writes them."""
        network, outbox = self.opened.network(), Outbox()
        blocks = ranks.share(_ordered(network))
        names = [*(block.names for block in blocks), ()]
        with network.resident(network.outer, names[0]):
            for i, block in enumerate(blocks):
                deviations: list[Deviation] = []
                with network.resident(block.names, names[i + 1]):
                    tensors = dict(self._cut(block.path, block.names, deviations))
                    outbox.flush()  # no more than one block waits
                    outbox.send({"names": [*tensors], "deviations": deviations}, [*tensors.values()])
        outbox.flush()

    def network(self, folder: Path, results: Path | None = None) -> StreamedNetwork:
        """Return the cut network, to be run one block at a time."""
        made, before = Checkpoint.open(folder).places, self.opened.weights
        changed = self.change.ready.values.keys()
        # What the plan leaves alone is read from where it was, so that it lies in memory as in a network loaded whole.
        left = {name: before.checkpoint.places[before.stored[name]] for name in made if name not in changed}
        aligned = {*changed, *(name for name in left if before.stored[name] in before.checkpoint.aligned)}
        weights = StoredWeights(Checkpoint({**made, **left}, aligned), self.loaded.model, before.name)
        weights.finite.update(changed & made.keys())  # checked when they were written
        assert self.change.axes.recording is not None
        return StreamedNetwork(self.loaded.model, weights, self.change.axes.recording.blocks, results)

    def _tensors(
        self, deviations: list[Deviation], progress: Progress, ranks: ProcessRank
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the cut network, block by block, each block after it was compared."""
        network, what = self.opened.network(), "cutting and checking the blocks"
        for name, held in named_tensors(self.loaded.model).items():
            if not held.kind.carried:
                yield name, held.tensor
        ordered = _ordered(network)
        with network.resident(network.outer, ordered[0].names):
            progress(0, len(ordered) + 1, what)
            yield from self._cut("", network.outer, deviations)
            for i, block in enumerate(ordered):
                progress(i + 1, len(ordered) + 1, what)
                if owner := i % ranks.size:
                    record, tensors = receive(owner)
                    deviations += map(Deviation._make, record["deviations"])
                    yield from zip(record["names"], tensors, strict=True)
                    continue
                following = ordered[i + ranks.size].names if i + ranks.size < len(ordered) else ()
                with network.resident(block.names, following):
                    yield from self._cut(block.path, block.names, deviations)
        progress(len(ordered) + 1, len(ordered) + 1, what)

    def _cut(self, path: str, names: tuple[str, ...], deviations: list[Deviation]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one block, or of what lies outside the blocks, after the plan."""
        change = self.change
        cut = {*names, *(bias_of(weight) for weight in change.plan.means if weight in names)}
        ready = prepare(change.model, change.axes, change.plan, names=cut)
        for block in change.recording.blocks if path in self.changed_paths else ():
            if block.path == path:
                deviations.append(check_block(replace(change, ready=ready), block))
        for name in sorted(cut):
            value = ready.values.get(name)
            module, _, leaf = name.rpartition(".")
            yield name, getattr(change.model.get_submodule(module), leaf).detach() if value is None else value


def _ordered(network: StreamedNetwork) -> list[StreamedBlock]:
    """Return the blocks in the order of the files as far as possible, so that these are hashed as they are written."""
    return sorted(network.blocks, key=lambda block: f"{block.path}.")


def propose_cut(opened: OpenedNetwork, plan: Plan) -> StreamedCut:
    """Try a plan on a copy without numbers of a network that is larger than memory."""
    model, axes = opened.loaded.model, opened.axes
    check(model, axes, plan)
    if plan.changes_modules or any(change.grow or change.restore for change in plan.changes.values()):
        raise PlanError("only cuts are made block by block; load the model whole, without --memory")
    ready = prepare(model, axes, plan)
    rehearsal = try_out(model, axes, plan, ready.resizing(axes))
    if rehearsal is None or axes.recording is None:
        raise PlanError("a network with declared axes is not cut block by block; load it whole, without --memory")
    change = ProposedChange(model, axes, plan, axes.recording, rehearsal.planned, ready)
    known = replace(axes, steps=restate_steps(axes.steps, rehearsal.planned), recording=None)
    copied, after = commit(copy_model(model, lambda tensor: tensor), known, plan, ready)
    return StreamedCut(opened, change, replace(opened.loaded, model=copied), after)
