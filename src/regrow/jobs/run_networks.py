"""The networks of a pruning run and of a recovery, in memory or one block at a time: cut, repaired and written."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from regrow import store
from regrow.core.axes import AxisGraph
from regrow.core.errors import RefusedError
from regrow.core.plan import Plan
from regrow.core.process_memory import return_memory
from regrow.core.sources import Source
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import broadcast_record, everywhere
from regrow.jobs.forward_outputs import run_once
from regrow.jobs.memory_needs import PAIRED, explain_lacking, predict_pairing
from regrow.jobs.models import trace_loaded
from regrow.jobs.recording import ActiveRun, Record
from regrow.jobs.recovering import keep_dense, reconstruct
from regrow.methods.recovery import ChangedTensors, RecoveryTask, StreamedPair
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
from regrow.streaming.opening import OpenedNetwork, open_network
from regrow.streaming.requirements import MemoryPlan
from regrow.streaming.weights import StoredWeights
from regrow.surgery import apply, verify

CUT = "cut"
"""The folder, among the files for resuming, with the cut network as it is before layers are fitted."""
CHANGED = "changed"
"""The folder, among the files for resuming, with the tensors that a recovery has changed."""
RESULTS = "results"
"""The folder, among the files for resuming, with the hidden states for which memory has no room."""


@dataclass
class WholeNetwork:
    """A network in memory as a pruning run uses it; it is cut in place."""

    loaded: Loaded
    dense: nn.Module | None = field(default=None, init=False)  # after a cut: the network before it, to fit layers to
    visits: ClassVar[None] = None
    outside: ClassVar[None] = None

    @property
    def identity(self) -> nn.Module:
        """What the processes of a run compare: its weights."""
        return self.loaded.model

    def sums(self) -> list[float]:
        """Return a sum of each parameter."""
        return parameter_sums(self.loaded.model)

    def parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters by name, for scores."""
        return weights_of(self.loaded.model)

    def use_folder(self, folder: Path) -> None:
        """Do nothing: everything is in memory."""

    def evaluators(self, ranks: ProcessRank) -> ProcessRank | None:
        """Return the processes that share an evaluation: all, of text; rank 0 evaluates other data alone."""
        return ranks if ranks.leads or self.loaded.tokenizer is not None else None

    def cut(self, run: ActiveRun, axes: AxisGraph, plan: Plan, *, proof: bool, fits: bool) -> AxisGraph:
        """Prove a plan, if the run is kept, and carry it out; return the axes after it.

        ``fits``: whether layers are fitted to dense outputs later.
        """
        model = self.loaded.model
        if proof and run.record.kept:
            with run.stage("verify"):
                run.progress(0, 1, "proving that masked = shrunk")
                result = verify(model, axes, plan)
            run.record.log("verify", **asdict(result), dtype="float64")
            if not result.ok:
                raise RefusedError(
                    f"the plan does not hold on this model: masked and shrunk differ by {result.max_abs_diff:.3g} in "
                    f"float64, the bound is {result.bound:.3g}; no model was saved, please report this one"
                )
        run_once(model, axes.example)
        self.dense = keep_dense(model) if fits else None
        with run.stage("apply"):
            return apply(model, axes, plan)[1]

    def reconstruct(
        self, run: ActiveRun, axes: AxisGraph, plan: Plan, sources: Sequence[Source], settings: Mapping[str, Any]
    ) -> None:
        """Fit layers that read cut units to dense outputs; ``axes`` are those before the cut."""
        dense, self.dense = self.dense, None
        assert dense is not None
        task = RecoveryTask(self.loaded.model, dense, axes, plan, sources, progress=run.progress)
        reconstruct(task, settings, run.record)

    def save(self, record: Record) -> None:
        """Write the network into the folder of a run."""
        store.write_model(self.loaded, record.path)


@dataclass(eq=False)
class StreamedRun:
    """A network that is pruned one block at a time; it has the interface of a network in memory."""

    opened: OpenedNetwork
    plan: MemoryPlan
    results: Path | None = None  # where hidden states are kept that memory has no room for; `None`: in memory
    change: StreamedCut | None = field(default=None, init=False)  # the cut, once it is made
    # Returns the cut network, or that whose layers are fitted; `None`: it is not cut yet
    running: Callable[[], StreamedNetwork] | None = field(default=None, init=False)
    shared: bool = field(default=True, init=False)  # whether all processes see the files of the network

    @property
    def loaded(self) -> Loaded:
        """The network without numbers, as it is now."""
        return self.opened.loaded if self.change is None else self.change.loaded

    @property
    def visits(self) -> StreamedNetwork:
        """The network as it is now, to be run block by block."""
        return self.opened.network(self.results) if self.running is None else self.running()

    @property
    def identity(self) -> StoredWeights:
        """What the processes of a run compare: its weights."""
        return self.opened.weights

    @property
    def outside(self) -> OutsideTensors:
        """The tensors of the network before the cut, as ``store.write_model`` takes them."""
        network = self.opened.network()
        return _outside(self.opened.weights, self.opened.loaded.model, lambda folder: network.on_demand())

    def sums(self) -> list[float]:
        """Return a sum of each parameter."""
        return self.opened.weights.sums()

    def parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters by name, each of which is read when it is asked for."""
        return self.opened.weights.parameters()

    def use_folder(self, folder: Path) -> None:
        """Keep hidden states in a folder, if memory has no room for them; what a killed run left there is deleted."""
        self.results = _open_results(folder, self.plan)

    def evaluators(self, ranks: ProcessRank) -> ProcessRank | None:
        """Return the processes that share an evaluation: all, or rank 0 where it alone sees the cut network's files."""
        return ranks if self.shared else SINGLE if ranks.leads else None

    def cut(self, run: ActiveRun, axes: AxisGraph, plan: Plan, *, proof: bool, fits: bool) -> AxisGraph:
        """Try a plan, and write the cut network, whose changed blocks are compared with the masked ones for ``proof``.

        Rank 0 cuts and writes for all. A network whose layers are fitted later goes to a folder of its own.
        """
        with run.stage("apply"):
            self.change = change = propose_cut(self.opened, plan)
            return_memory()
            target = run.record.path / statistics.FOLDER / CUT if fits else run.record.path
            if run.ranks.leads and (deviations := change.write(target, proof=proof, progress=run.progress)):
                worst = max(deviations, key=lambda deviation: deviation.largest_difference - deviation.bound)
                run.record.log(
                    "verify",
                    ok=True,
                    max_abs_diff=worst.largest_difference,
                    bound=worst.bound,
                    blocks=len(deviations),
                    dtype="float64",
                )
            return_memory()
        files = {str(file.resolve()): file.stat().st_size for file in sorted(target.glob("*.safetensors"))}
        written = broadcast_record(run.ranks, {"folder": str(target.resolve()), "files": files})
        folder, sizes = Path(written["folder"]), written["files"]
        here = all(Path(file).is_file() and Path(file).stat().st_size == size for file, size in sizes.items())
        self.shared = everywhere(run.ranks, here)
        self.running = lambda: change.network(folder, self.results)
        return change.axes

    def reconstruct(
        self, run: ActiveRun, axes: AxisGraph, plan: Plan, sources: Sequence[Source], settings: Mapping[str, Any]
    ) -> None:
        """Fit layers that read cut units one block at a time, and write the network into the run folder."""
        record, folder = run.record, run.record.path / statistics.FOLDER / CUT
        tokens, windows = sum(source.tokens for source in sources), sum(map(len, sources))
        beside = predict_pairing(self.opened.network(), tokens, -(-tokens // windows))
        lacking = "" if settings.get("target") in PAIRED else explain_lacking(self.plan, beside)
        both = StreamedRecovery(self.opened, open_network(str(folder)), self.plan, lacking)
        pair, (dense, loaded) = both.start(record.path), both.models()
        task = RecoveryTask(loaded.model, dense.model, axes, plan, sources, progress=run.progress, streamed=pair)
        reconstruct(task, settings, record)
        return_memory()
        store.write_model(loaded, record.path, outside=both.outside(loaded, pair.changed))
        shutil.rmtree(folder)
        after = trace_loaded(loaded)
        self.running = lambda: both.recovered(loaded, after, record.path)

    def save(self, record: Record) -> None:
        """Do nothing: the network was written as it was cut."""


PrunedNetwork = WholeNetwork | StreamedRun
"""The network of a pruning run: in memory, or read one block at a time."""


@dataclass(frozen=True, eq=False)
class StreamedRecovery:
    """The networks before and after a cut, to be recovered one block at a time."""

    dense: OpenedNetwork
    cut: OpenedNetwork
    plan: MemoryPlan
    lacking: str = ""  # why memory has no room for a block of both at a time, and what to do; empty: it has

    def models(self) -> tuple[Loaded, Loaded]:
        """Return the model before the cut, and the one to recover, both without numbers."""
        dense, cut = self.dense.loaded, self.cut.loaded
        return dense, replace(dense, model=cut.model, files=(*dense.files, *cut.files))

    def start(self, folder: Path) -> StreamedPair:
        """Return both networks, to be run block by block; what hidden states a killed run left is deleted."""
        results = _open_results(folder, self.plan)
        changed = ChangedTensors(folder / statistics.FOLDER / CHANGED)
        return StreamedPair(self.dense.network(results), self.cut.network(results), changed, self.lacking)

    def outside(self, model: Loaded, changed: ChangedTensors) -> OutsideTensors:
        """Return the tensors of the recovered network, which has no numbers, as ``store.write_model`` takes them."""

        def running(folder: Path) -> AbstractContextManager[nn.Module]:
            return self._written(model, self.cut.axes, folder).on_demand()

        ahead = self.cut.network().largest_block
        return _outside(self.cut.weights, model.model, running, changed, ahead)

    def recovered(self, model: Loaded, axes: AxisGraph, folder: Path) -> StreamedNetwork:
        """Return the recovered network, as it was written to the run folder, to be run one block at a time."""
        return self._written(model, axes, folder, _results(folder, self.plan))

    def _written(self, model: Loaded, axes: AxisGraph, folder: Path, results: Path | None = None) -> StreamedNetwork:
        stored = Checkpoint.open(folder).places
        weights = StoredWeights(Checkpoint(stored, stored), model.model, self.cut.weights.name)
        blocks = axes.recording.blocks if axes.recording is not None else ()
        return StreamedNetwork(model.model, weights, blocks, results)


def _results(folder: Path, plan: MemoryPlan) -> Path | None:
    return folder / statistics.FOLDER / RESULTS if plan.on_disk else None


def _open_results(folder: Path, plan: MemoryPlan) -> Path | None:
    """Return an empty folder for hidden states; ``None`` if they are in memory."""
    shutil.rmtree(folder / statistics.FOLDER / RESULTS, ignore_errors=True)
    results = _results(folder, plan)
    if results is not None:
        results.mkdir(parents=True)
    return results


def _outside(
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
