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
from regrow.nets import Loaded
from regrow.store.shapes import Shapes
from regrow.store.state import named_tensors
from regrow.store.weights import OutsideTensors
from regrow.streaming.checkpoint import Checkpoint
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import OpenedNetwork
from regrow.streaming.weights import StoredWeights
from regrow.surgery.apply import check_plan, rehearse_plan
from regrow.surgery.carry import ProposedChange, commit, prepare
from regrow.surgery.compensate import bias_of
from regrow.surgery.output_comparison import max_difference, max_magnitude
from regrow.surgery.proof import Deviation, changed_blocks, check_block
from regrow.surgery.runner import Results, Runner, float_outputs, preserve_generators, reseed
from regrow.tracing.capture import Capture, in_eval_mode
from regrow.tracing.meta_copy import cast_example, copy_model
from regrow.tracing.own_run import as_double
from regrow.tracing.readings import GraphBlock
from regrow.tracing.steps import with_new_constants


def check_streamed_run(
    network: StreamedNetwork, recorded: Capture, blocks: Sequence[GraphBlock], example: Example
) -> None:
    """Raise PlanError unless a network's own forward pass gives what its recorded operations give on the example.

    ``recorded``, ``blocks``: the operations, and their division into blocks. Outputs that are not equal bit for bit may
    differ by three times the rounding of the recording, its distance from the same in float64.
    """
    with network.on_demand() as model, preserve_generators(), in_eval_mode(model), torch.no_grad():
        reseed(0)
        outputs = float_outputs(model(*example.args, **example.kwargs))
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
) -> Results:
    """Return the outputs of the recorded operations, run block by block, in float64 if ``double``."""

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
    return runner.outputs


@dataclass(frozen=True, eq=False)
class StreamedCut:
    """A plan for a network that is larger than memory, tried on a copy without numbers by :func:`propose_cut`."""

    opened: OpenedNetwork  # the network before the cut
    change: ProposedChange  # the plan, with the shapes of what it makes
    loaded: Loaded  # the cut network without numbers, its tokenizer, an example input and its origin
    axes: AxisGraph  # of the cut network

    @cached_property
    def changed_paths(self) -> frozenset[str]:
        """The paths of the blocks that the plan changes, which are compared with the masked ones."""
        return frozenset(block.path for block in changed_blocks(self.change))

    def write(self, folder: Path, *, progress: Progress = silent) -> list[Deviation]:
        """Cut the network and write it to ``folder`` as ``store.write_model`` does.

        Returns how far each changed block deviates from the masked one. Raises PlanError if that exceeds its bound, or
        if the written network's own forward pass differs from the recorded operations.
        """
        deviations: list[Deviation] = []

        def each(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
            tensors = self._tensors(deviations, progress)
            return ((name, tensor) for name, tensor in tensors if name in shapes.tensors)

        @contextmanager
        def running(written: Path) -> Iterator[nn.Module]:
            network, change = self.network(written), self.change
            example = cast_example(change.tensors.axes.example, change.tensors.model)
            check_streamed_run(network, change.planned, change.recording.blocks, example)
            with network.on_demand() as model:
                yield model

        weights, changed = self.opened.weights, self.change.ready.values
        aligned = all(weights.is_aligned(name) for name in weights.stored if name not in changed)
        outside = OutsideTensors(each, running, aligned, ahead=self.opened.network().largest_block)
        store.write_model(self.loaded, folder, outside=outside)
        return deviations

    def network(self, folder: Path, results: Path | None = None) -> StreamedNetwork:
        """Return the cut network as it was written to a folder, to be run one block at a time.

        Results of blocks are kept in the folder ``results``; ``None``: in memory.
        """
        written, before = Checkpoint.open(folder).places, self.opened.weights
        changed = self.change.ready.values.keys()
        # What the plan leaves alone is read from where it was, so that it lies in memory as in a network loaded whole.
        unchanged = {name: before.checkpoint.places[before.stored[name]] for name in written if name not in changed}
        aligned = {*changed, *(name for name in unchanged if before.stored[name] in before.checkpoint.aligned)}
        weights = StoredWeights(Checkpoint({**written, **unchanged}, aligned), self.loaded.model, before.name)
        weights.finite.update(changed & written.keys())  # checked when they were written
        return StreamedNetwork(self.loaded.model, weights, self.change.recording.blocks, results)

    def _tensors(self, deviations: list[Deviation], progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the cut network block by block; append to ``deviations`` when a block is compared."""
        network, what = self.opened.network(), "cutting and checking the blocks"
        for name, held in named_tensors(self.loaded.model).items():
            if not held.kind.carried:
                yield name, held.tensor
        # In the order of the files as far as possible: fewer seeks while they are written.
        ordered = sorted(network.blocks, key=lambda block: f"{block.path}.")
        with network.resident(network.outer, ordered[0].names):
            progress(0, len(ordered) + 1, what)
            yield from self._cut("", network.outer, deviations)
            for i, block in enumerate(ordered):
                progress(i + 1, len(ordered) + 1, what)
                following = ordered[i + 1].names if i + 1 < len(ordered) else ()
                with network.resident(block.names, following):
                    yield from self._cut(block.path, block.names, deviations)
        progress(len(ordered) + 1, len(ordered) + 1, what)

    def _cut(self, path: str, names: tuple[str, ...], deviations: list[Deviation]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the cut block ``path`` (``""``: outside the blocks), compared first if it changes.

        ``names``: the stored tensors in it, which must be in memory; its deviation is appended to ``deviations``.
        """
        change, whole = self.change, self.change.tensors
        cut = {*names, *(bias_of(weight) for weight in whole.plan.means if weight in names)}
        ready = prepare(whole.model, whole.axes, whole.plan, names=cut)
        for block in change.recording.blocks if path in self.changed_paths else ():
            if block.path == path:
                deviations.append(check_block(replace(change, ready=ready), block))
        for name in sorted(cut):
            value = ready.values.get(name)
            module, _, leaf = name.rpartition(".")
            yield name, getattr(whole.model.get_submodule(module), leaf).detach() if value is None else value


def propose_cut(opened: OpenedNetwork, plan: Plan) -> StreamedCut:
    """Try a plan on a copy without numbers of a network that is larger than memory; ``opened`` is not changed.

    Raises PlanError if it does not apply, or does more than cut units.
    """
    model, axes = opened.loaded.model, opened.axes
    check_plan(model, axes, plan)
    changes = plan.changes.values()
    if axes.recording is None or plan.changes_modules or any(change.grow or change.restore for change in changes):
        raise PlanError("only cuts of traced networks are made block by block; load it whole, without --memory")
    ready = prepare(model, axes, plan)
    rehearsal = rehearse_plan(model, axes, plan)
    change = ProposedChange(ready, axes.recording, rehearsal.planned)
    known = replace(axes, steps=with_new_constants(axes.steps, rehearsal.planned), recording=None)
    copied, after = commit(copy_model(model, lambda tensor: tensor), known, ready)
    return StreamedCut(opened, change, replace(opened.loaded, model=copied), after)
