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

# The folder, among the files for resuming, with the tensors that a recovery has changed.
CHANGED_FOLDER = "changed"
# The folder, among the files for resuming, with the hidden states for which memory has no room.
STATES_FOLDER = "results"


@dataclass(frozen=True)
class WholeNetwork:
    """A network in memory as a pruning run uses it; attributes are as in :class:`BlockwiseNetwork`."""

    loaded: Loaded
    streamed: ClassVar[None] = None
    outside: ClassVar[None] = None
    is_shared: ClassVar[bool] = True

    def sum_parameters(self) -> list[float]:
        """Return a sum of entries of each parameter, in their order, to recognise the weights."""
        return parameter_sums(self.loaded.model)

    def parameters(self) -> Mapping[str, Tensor]:
        """Return every parameter under each of its names, detached but not copied."""
        return weights_of(self.loaded.model)

    def use_folder(self, folder: Path) -> None:
        """Do nothing: everything is in memory."""

    def cut(self, run: ActiveRun, axes: AxisGraph, plan: Plan) -> AxisGraph:
        """Apply a plan in place and return the axes afterwards; if a folder records the run, verify the plan first.

        Raises RefusedError, and changes nothing, if cut and masked network differ there.
        """
        model = self.loaded.model
        if run.record.is_kept:
            with run.stage("verify"):
                result = verify(model, axes, plan)
            run.record.log("verify", **asdict(result), dtype="float64")
            if not result.ok:
                raise RefusedError(
                    f"the plan does not hold on this model: masked and shrunk differ by {result.max_abs_diff:.3g} in "
                    f"float64, the bound is {result.bound:.3g}; no model was saved; this is a fault of regrow, please "
                    "report it"
                )
        warm_caches(model, axes.example)  # such as the anchors of detectors
        with run.stage("apply"):
            _, after = apply(model, axes, plan)
            return after

    def save(self, record: Record) -> None:
        """Write the network into the folder of a run."""
        store.write_model(self.loaded, record.path)


@dataclass(eq=False)
class BlockwiseNetwork:
    """A network whose numbers are in files, pruned one block at a time, with the interface of :class:`WholeNetwork`."""

    opened: OpenedNetwork  # the network before the cut
    plan: MemoryPlan
    states_folder: Path | None = None  # for hidden states that memory has no room for; `None`: they are in memory
    streamed_cut: StreamedCut | None = field(default=None, init=False)  # `None`: it is not cut yet
    cut_folder: Path | None = field(default=None, init=False)  # the folder of the cut network
    is_shared: bool = field(default=True, init=False)  # whether all processes see its files; else rank 0 alone runs it

    @property
    def loaded(self) -> Loaded:
        """The network without numbers, before the cut or, once :meth:`cut` has run, after it."""
        return self.opened.loaded if self.streamed_cut is None else self.streamed_cut.loaded

    @property
    def streamed(self) -> StreamedNetwork:
        """The network before or after the cut, as :attr:`loaded`, newly opened to be run block by block."""
        if self.streamed_cut is None or self.cut_folder is None:
            return self.opened.network(self.states_folder)
        return self.streamed_cut.network(self.cut_folder, self.states_folder)

    @property
    def outside(self) -> OutsideTensors:
        """What ``store.write_model`` gets the tensors of the network before the cut from."""
        network = self.opened.network()
        return _make_outside(self.opened.weights, self.opened.loaded.model, lambda folder: network.on_demand())

    def sum_parameters(self) -> list[float]:
        """Return a sum of entries of each parameter before the cut, in their order, to recognise the weights."""
        return self.opened.weights.sums()

    def parameters(self) -> Mapping[str, Tensor]:
        """Return name → parameter before the cut, each of which is read from its file at every access."""
        return self.opened.weights.parameters()

    def use_folder(self, folder: Path) -> None:
        """Keep hidden states in a run folder if memory has no room for them, deleting those that a killed run left."""
        self.states_folder = _recreate_states_folder(folder, self.plan)

    def cut(self, run: ActiveRun, axes: AxisGraph, plan: Plan) -> AxisGraph:
        """Write the cut network to the run's folder, comparing changed blocks with masked ones; return its axes.

        Rank 0 cuts and writes for all; all ranks call this.
        """
        with run.stage("apply"):
            self.streamed_cut = change = propose_cut(self.opened, plan)
            return_memory()
            deviations = change.write(run.record.path, progress=run.progress) if run.ranks.leads else []
            if deviations:
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


# The network of a pruning run: in memory, or read one block at a time.
PrunedNetwork = WholeNetwork | BlockwiseNetwork


@dataclass(frozen=True, eq=False)
class StreamedRecovery:
    """The networks before and after a cut, to be recovered one block at a time."""

    dense: OpenedNetwork  # before the cut
    cut: OpenedNetwork  # after it
    plan: MemoryPlan

    def models(self) -> tuple[Loaded, Loaded]:
        """Return the model before the cut and the one to recover, both without numbers."""
        dense, cut = self.dense.loaded, self.cut.loaded
        return dense, replace(dense, model=cut.model, files=(*dense.files, *cut.files))

    def open_pair(self, folder: Path) -> StreamedPair:
        """Return both networks, to be run block by block; delete hidden states that a killed run left in ``folder``."""
        results = _recreate_states_folder(folder, self.plan)
        changed = ChangedTensors(folder / statistics.FOLDER / CHANGED_FOLDER)
        return StreamedPair(self.dense.network(results), self.cut.network(results), changed)

    def outside(self, model: Loaded, changed: ChangedTensors) -> OutsideTensors:
        """Return what ``store.write_model`` gets the recovered tensors from: ``changed``, else the files of the cut."""

        def running(folder: Path) -> AbstractContextManager[nn.Module]:
            return self._open_saved(model, self.cut.axes, folder).on_demand()

        ahead = self.cut.network().largest_block
        return _make_outside(self.cut.weights, model.model, running, changed, ahead)

    def open_recovered(self, model: Loaded, axes: AxisGraph, folder: Path) -> StreamedNetwork:
        """Return the recovered network, as it was written to ``folder``, to be run one block at a time."""
        return self._open_saved(model, axes, folder, _recreate_states_folder(folder, self.plan))

    def _open_saved(self, model: Loaded, axes: AxisGraph, folder: Path, states: Path | None = None) -> StreamedNetwork:
        """Return a network of the files in ``folder``; hidden states are kept in ``states``, ``None``: in memory."""
        stored = Checkpoint.open(folder).places
        weights = StoredWeights(Checkpoint(stored, stored), model.model, self.cut.weights.name)
        blocks = axes.recording.blocks if axes.recording is not None else ()
        return StreamedNetwork(model.model, weights, blocks, states)


def _file_sizes(folder: Path) -> dict[str, int]:
    """Return file name → bytes of the weight files in a folder; empty if it does not exist."""
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def _recreate_states_folder(folder: Path, plan: MemoryPlan) -> Path | None:
    """Return an empty folder for hidden states in a run's, deleting what is there; ``None`` if they are in memory."""
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
    """Return what ``store.write_model`` gets the tensors of ``model``, without numbers, from.

    They are those in ``changed``, else those of its files (``weights``), else of the model itself. ``running``: opens
    the written folder as a network that can run; ``ahead``: the most bytes that wait to be written.
    """

    def iterate(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
        in_memory = named_tensors(model)
        for name in shapes.tensors:
            if changed is not None and name in changed:
                yield name, changed[name]
            else:
                yield name, weights[name] if name in weights else in_memory[name].tensor

    return OutsideTensors(iterate, running, all(map(weights.is_aligned, weights.stored)), ahead)
