"""The networks of a pruning run and of a recovery, in memory or one block at a time: cut, repaired and written."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from regrow import store
from regrow.core.axes import AxisGraph
from regrow.core.errors import RefusedError
from regrow.core.plan import Plan
from regrow.core.process_memory import return_memory
from regrow.distributed.parallel import broadcast_record, everywhere
from regrow.jobs.forward_outputs import warm_caches
from regrow.jobs.recording import ActiveRun, Record
from regrow.methods.recovery import ChangedTensors, StreamedPair
from regrow.nets import Loaded
from regrow.scoring.weights import weights_of
from regrow.store import statistics
from regrow.store.shapes import Shapes
from regrow.store.state import named_tensors
from regrow.store.statistics import parameter_sums
from regrow.store.weights import AHEAD, OutsideTensors
from regrow.streaming.checkpoint import Checkpoint
from regrow.streaming.cut import StreamedCut, propose_cut
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import OpenedNetwork
from regrow.streaming.requirements import MemoryPlan
from regrow.streaming.weights import StoredWeights
from regrow.surgery import apply, verify

CHANGED_FOLDER = "changed"
"""The folder, among the files for resuming, with the tensors that a recovery has changed."""
STATES_FOLDER = "results"
"""The folder, among the files for resuming, with the hidden states for which memory has no room."""


@dataclass(frozen=True)
class WholeNetwork:
    """A network in memory as a pruning run uses it; it is cut in place."""

    loaded: Loaded
    streamed: ClassVar[None] = None
    outside: ClassVar[None] = None
    is_shared: ClassVar[bool] = True

    def sum_parameters(self) -> list[float]:
        """Return a sum of each parameter."""
        return parameter_sums(self.loaded.model)

    def parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters by name, for scores."""
        return weights_of(self.loaded.model)

    def use_folder(self, folder: Path) -> None:
        """Do nothing: everything is in memory."""

    def cut(self, run: ActiveRun, axes: AxisGraph, plan: Plan) -> AxisGraph:
        """Prove a plan, if the run is kept, and carry it out; return the axes after it."""
        model = self.loaded.model
        if run.record.is_kept:
            with run.stage("verify"):
                run.progress(0, 1, "proving that masked = shrunk")
                result = verify(model, axes, plan)
            run.record.log("verify", **asdict(result), dtype="float64")
            if not result.ok:
                raise RefusedError(
                    f"the plan does not hold on this model: masked and shrunk differ by {result.max_abs_diff:.3g} in "
                    f"float64, the bound is {result.bound:.3g}; no model was saved, please report this one"
                )
        warm_caches(model, axes.example)
        with run.stage("apply"):
            return apply(model, axes, plan)[1]

    def save(self, record: Record) -> None:
        """Write the network into the folder of a run."""
        store.write_model(self.loaded, record.path)


@dataclass(eq=False)
class BlockwiseNetwork:
    """A network that is pruned one block at a time; it has the interface of a network in memory."""

    opened: OpenedNetwork
    plan: MemoryPlan
    states_folder: Path | None = None  # where hidden states are kept that memory has no room for; `None`: in memory
    streamed_cut: StreamedCut | None = field(default=None, init=False)  # the cut, once it is made
    cut_folder: Path | None = field(
        default=None, init=False
    )  # the folder of the cut network; `None`: it is not cut yet
    is_shared: bool = field(
        default=True, init=False
    )  # whether all processes see its files; else rank 0 measures it alone

    @property
    def loaded(self) -> Loaded:
        """The network without numbers, as it is now."""
        return self.opened.loaded if self.streamed_cut is None else self.streamed_cut.loaded

    @property
    def streamed(self) -> StreamedNetwork:
        """The network as it is now, to be run block by block."""
        if self.streamed_cut is None or self.cut_folder is None:
            return self.opened.network(self.states_folder)
        return self.streamed_cut.network(self.cut_folder, self.states_folder)

    @property
    def outside(self) -> OutsideTensors:
        """The tensors of the network before the cut, as ``store.write_model`` takes them."""
        network = self.opened.network()
        return _make_outside(self.opened.weights, self.opened.loaded.model, lambda folder: network.on_demand())

    def sum_parameters(self) -> list[float]:
        """Return a sum of each parameter."""
        return self.opened.weights.sums()

    def parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters by name, each of which is read when it is asked for."""
        return self.opened.weights.parameters()

    def use_folder(self, folder: Path) -> None:
        """Keep hidden states in a folder, if memory has no room for them; what a killed run left there is deleted."""
        self.states_folder = _recreate_states_folder(folder, self.plan)

    def cut(self, run: ActiveRun, axes: AxisGraph, plan: Plan) -> AxisGraph:
        """Try a plan, and write the cut network, whose changed blocks are compared with the masked ones.

        Rank 0 cuts and writes for all.
        """
        with run.stage("apply"):
            self.streamed_cut = change = propose_cut(self.opened, plan)
            return_memory()
            if run.ranks.leads and (deviations := change.write(run.record.path, progress=run.progress)):
                worst = max(deviations, key=lambda deviation: deviation.largest_difference - deviation.bound)
                row = {"ok": True, "max_abs_diff": worst.largest_difference, "bound": worst.bound}
                run.record.log("verify", row, blocks=len(deviations), dtype="float64")
            return_memory()
        folder, sizes = broadcast_record(run.ranks, [str(run.record.path.resolve()), _file_sizes(run.record.path)])
        self.cut_folder = Path(folder)
        self.is_shared = everywhere(run.ranks, _file_sizes(self.cut_folder) == sizes)
        return change.axes

    def save(self, record: Record) -> None:
        """Do nothing: the network was written as it was cut."""


PrunedNetwork = WholeNetwork | BlockwiseNetwork
"""The network of a pruning run: in memory, or read one block at a time."""


@dataclass(frozen=True, eq=False)
class StreamedRecovery:
    """The networks before and after a cut, to be recovered one block at a time."""

    dense: OpenedNetwork
    cut: OpenedNetwork
    plan: MemoryPlan

    def models(self) -> tuple[Loaded, Loaded]:
        """Return the model before the cut, and the one to recover, both without numbers."""
        dense, cut = self.dense.loaded, self.cut.loaded
        return dense, replace(dense, model=cut.model, files=(*dense.files, *cut.files))

    def open_pair(self, folder: Path) -> StreamedPair:
        """Return both networks, to be run block by block; what hidden states a killed run left is deleted."""
        results = _recreate_states_folder(folder, self.plan)
        changed = ChangedTensors(folder / statistics.FOLDER / CHANGED_FOLDER)
        return StreamedPair(self.dense.network(results), self.cut.network(results), changed)

    def outside(self, model: Loaded, changed: ChangedTensors) -> OutsideTensors:
        """Return the tensors of the recovered network, which has no numbers, as ``store.write_model`` takes them."""

        def running(folder: Path) -> AbstractContextManager[nn.Module]:
            return self._open_written(model, self.cut.axes, folder).on_demand()

        ahead = self.cut.network().largest_block
        return _make_outside(self.cut.weights, model.model, running, changed, ahead)

    def open_recovered(self, model: Loaded, axes: AxisGraph, folder: Path) -> StreamedNetwork:
        """Return the recovered network, as it was written to the run folder, to be run one block at a time."""
        return self._open_written(model, axes, folder, _recreate_states_folder(folder, self.plan))

    def _open_written(
        self, model: Loaded, axes: AxisGraph, folder: Path, results: Path | None = None
    ) -> StreamedNetwork:
        stored = Checkpoint.open(folder).places
        weights = StoredWeights(Checkpoint(stored, stored), model.model, self.cut.weights.name)
        blocks = axes.recording.blocks if axes.recording is not None else ()
        return StreamedNetwork(model.model, weights, blocks, results)


def _file_sizes(folder: Path) -> dict[str, int]:
    """Return the names and sizes of the weight files in a folder; nothing where it is not there."""
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def _recreate_states_folder(folder: Path, plan: MemoryPlan) -> Path | None:
    """Return an empty folder for hidden states; ``None`` if they are in memory."""
    if not plan.on_disk:
        return None
    results = folder / statistics.FOLDER / STATES_FOLDER
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    return results


def _make_outside(
    weights: StoredWeights,
    model: nn.Module,
    running: Callable[[Path], AbstractContextManager[nn.Module]],
    changed: ChangedTensors | None = None,
    ahead: int = AHEAD,
) -> OutsideTensors:
    """Return the tensors of a network without numbers as ``store.write_model`` takes them, some of them changed."""

    def each(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
        held = named_tensors(model)
        for name in shapes.tensors:
            if changed is not None and name in changed:
                yield name, changed[name]
            else:
                yield name, weights[name] if name in weights else held[name].tensor

    return OutsideTensors(each, running, all(map(weights.is_aligned, weights.stored)), ahead)
