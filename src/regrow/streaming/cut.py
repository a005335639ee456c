"""Cut a network that is larger than memory: block by block its tensors are cut, checked in float64 and written."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from regrow.surgery.carry import ProposedChange, commit, prepare
from regrow.surgery.compensate import bias_of
from regrow.surgery.output_comparison import max_difference, max_magnitude
from regrow.surgery.proof import Deviation, changed_blocks, check_block
from regrow.surgery.runner import Answers, Runner, floats, preserve_generators, reseed
from regrow.tracing.blocks import GraphBlock
from regrow.tracing.capture import Capture, evaluating
from regrow.tracing.meta_copy import cast_example, copy_model
from regrow.tracing.own_run import as_double
from regrow.tracing.steps import restate_steps


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

    names = {block.path: block.names for block in network.blocks}
    leaves = tree_leaves((example.args, dict(example.kwargs)))
    with network.resident(network.outer), preserve_generators():
        reseed(0)
        runner = Runner(recorded, leaves, load, double)
        for block in blocks:
            with network.resident(names.get(block.path, ())):
                runner.run_until(runner.nodes[block.stop] if block.stop < len(runner.nodes) else None)
        runner.run_until()
    return runner.answers


@dataclass(frozen=True, eq=False)
class StreamedCut:
    """A plan for a network that is larger than memory, tried on a copy without numbers."""

    opened: OpenedNetwork
    change: ProposedChange  # the plan, with the shapes of what it makes
    loaded: Loaded  # the cut network without numbers, its tokenizer, an example input and its origin
    axes: AxisGraph

    def write(
        self, folder: Path, *, proof: bool = True, progress: Progress = silent, ranks: ProcessRank = SINGLE
    ) -> list[Deviation]:
        """Cut and write the network, as ``store.write_model`` writes one that is in memory."""
        deviations: list[Deviation] = []

        def each(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self._tensors(proof, deviations, progress, ranks):
                if name in shapes.tensors:
                    yield name, tensor

        @contextmanager
        def running(written: Path) -> Iterator[nn.Module]:
            network, change = self.network(written), self.change
            if proof:
                example = cast_example(change.tensors.axes.example, change.tensors.model)
                check_streamed_run(network, change.planned, change.recording.blocks, example)
            with network.on_demand() as model:
                yield model

        weights, changed = self.opened.weights, self.change.ready.values
        aligned = all(weights.is_aligned(name) for name in weights.stored if name not in changed)
        outside = OutsideTensors(each, running, aligned, ahead=self.opened.network().largest_block)
        store.write_model(self.loaded, folder, outside=outside)
        return deviations

    def share(self, ranks: ProcessRank, *, proof: bool = True) -> None:
        """Cut and check the blocks of this rank, and send them to rank 0, which writes them."""
        network, outbox = self.opened.network(), Outbox()
        blocks, compared = ranks.share(_ordered(network)), self._compared(proof)
        names = [*(block.names for block in blocks), ()]
        with network.resident(network.outer, names[0]):
            for i, block in enumerate(blocks):
                deviations: list[Deviation] = []
                with network.resident(block.names, names[i + 1]):
                    tensors = dict(self._cut(block.path, block.names, compared, deviations))
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
        return StreamedNetwork(self.loaded.model, weights, self.change.recording.blocks, results)

    def _compared(self, proof: bool) -> set[str]:
        """Return the paths of the blocks that are compared."""
        return {block.path for block in changed_blocks(self.change)} if proof else set()

    def _tensors(
        self, proof: bool, deviations: list[Deviation], progress: Progress, ranks: ProcessRank
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the cut network, block by block, each block after it was compared."""
        network, compared, what = self.opened.network(), self._compared(proof), "cutting and checking the blocks"
        for name, held in named_tensors(self.loaded.model).items():
            if not held.kind.carried:
                yield name, held.tensor
        ordered = _ordered(network)
        with network.resident(network.outer, ordered[0].names):
            progress(0, len(ordered) + 1, what)
            yield from self._cut("", network.outer, compared, deviations)
            for i, block in enumerate(ordered):
                progress(i + 1, len(ordered) + 1, what)
                if owner := i % ranks.size:
                    record, tensors = receive(owner)
                    deviations += [Deviation(*deviation) for deviation in record["deviations"]]
                    yield from zip(record["names"], tensors, strict=True)
                    continue
                following = ordered[i + ranks.size].names if i + ranks.size < len(ordered) else ()
                with network.resident(block.names, following):
                    yield from self._cut(block.path, block.names, compared, deviations)
        progress(len(ordered) + 1, len(ordered) + 1, what)

    def _cut(
        self, path: str, names: tuple[str, ...], compared: Collection[str], deviations: list[Deviation]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one block, or of what lies outside the blocks, after the plan."""
        change, whole = self.change, self.change.tensors
        cut = {*names, *(bias_of(weight) for weight in whole.plan.means if weight in names)}
        ready = prepare(whole.model, whole.axes, whole.plan, names=cut)
        for block in change.recording.blocks if path in compared else ():
            if block.path == path:
                deviations.append(check_block(replace(change, ready=ready), block))
        for name in sorted(cut):
            value = ready.values.get(name)
            module, _, leaf = name.rpartition(".")
            yield name, getattr(whole.model.get_submodule(module), leaf).detach() if value is None else value


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
    rehearsal = try_out(model, axes, plan)
    if axes.recording is None:
        raise PlanError("data decide what this network does; load it whole, without --memory")
    change = ProposedChange(ready, axes.recording, rehearsal.planned)
    known = replace(axes, steps=restate_steps(axes.steps, rehearsal.planned), recording=None)
    copied, after = commit(copy_model(model, lambda tensor: tensor), known, ready)
    return StreamedCut(opened, change, replace(opened.loaded, model=copied), after)
