"""A network that is pruned one block at a time: it is cut, repaired and written without ever being whole in memory."""

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regrow import store
from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan
from regrow.core.process_memory import return_memory
from regrow.core.sources import Source
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import broadcast_record, everywhere
from regrow.jobs import pruning
from regrow.jobs.cutting import WholeNetwork
from regrow.jobs.inputs import count_windows
from regrow.jobs.models import DTYPES
from regrow.jobs.prune_settings import model_spec, seeded_settings
from regrow.jobs.recording import ActiveRun, Invocation, Record
from regrow.jobs.recovering import reconstruct
from regrow.jobs.shared_work import SharedWork
from regrow.jobs.streamed import needs_of_model, plan_streaming
from regrow.jobs.streamed_recovery import PAIRED, RESULTS, StreamedRecovery, explain_lacking, predict_pairing
from regrow.methods.pruning.layer_orders import BATCH
from regrow.nets import Loaded
from regrow.settings.prune import Settings
from regrow.store import statistics
from regrow.store.shapes import Shapes
from regrow.store.state import named_tensors
from regrow.store.weights import OutsideTensors
from regrow.streaming.cut import StreamedCut, propose_cut
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import OpenedNetwork, open_network
from regrow.streaming.requirements import MemoryPlan
from regrow.streaming.weights import StoredWeights
from regrow.surgery.output_comparison import Deviation
from regrow.tracing import trace

CUT = "cut"
"""The folder, among the files for resuming, with the cut network as it is before layers are fitted."""


@dataclass(eq=False)
class StreamedRun:
    """A network that is pruned one block at a time; it has the interface of a network in memory.

    Args:
        opened: The network without numbers, and its stored weights.
        plan: How the run stays within its memory.
        dtype: The format of the weights; empty: that in which they are stored.
        results: Where hidden states are kept that memory has no room for; ``None``: in memory.
        change: The cut, once it is made.
        running: Returns the cut network, or that whose layers are fitted; ``None``: it is not cut yet.
        shared: Whether all processes see the files of the network.
    """

    opened: OpenedNetwork
    plan: MemoryPlan
    dtype: str = ""
    results: Path | None = None
    change: StreamedCut | None = field(default=None, init=False)
    running: Callable[[], StreamedNetwork] | None = field(default=None, init=False)
    shared: bool = field(default=True, init=False)

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

    def sums(self) -> list[float]:
        """Return a sum of each parameter."""
        return self.opened.weights.sums()

    def parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters by name, each of which is read when it is asked for."""
        return self.opened.weights.parameters()

    def use_folder(self, folder: Path) -> None:
        """Keep hidden states in a folder, if memory has no room for them.

        Args:
            folder: The run folder, or a temporary one; what a killed run left in it is deleted.
        """
        if self.plan.on_disk:
            self.results = folder / statistics.FOLDER / RESULTS
            shutil.rmtree(self.results, ignore_errors=True)
            self.results.mkdir(parents=True, exist_ok=True)

    @property
    def outside(self) -> OutsideTensors:
        """Return the tensors of the network before the cut, as ``store.write_model`` takes them."""
        network, weights, model = self.opened.network(), self.opened.weights, self.opened.loaded.model

        def each(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
            held = named_tensors(model)
            for name in shapes.tensors:
                yield name, weights[name] if name in weights else held[name].tensor

        @contextmanager
        def running(folder: Path) -> Iterator[nn.Module]:
            with network.on_demand() as running:
                yield running

        return OutsideTensors(each, running, all(map(weights.is_aligned, weights.stored)))

    def cut(self, run: ActiveRun, axes: AxisGraph, plan: Plan, *, proof: bool, fits: bool) -> AxisGraph:
        """Try a plan, write the cut network into the run folder, and log how far its blocks are from the masked ones.

        Args:
            run: The run, whose folder gets the network; its processes share the blocks, and rank 0 writes.
            axes: The axes of the network.
            plan: The plan.
            proof: Whether every changed block is compared.
            fits: Whether layers are fitted to dense outputs later, so that the network goes to a folder of its own.

        Returns:
            The axes after the cut.
        """
        with run.clock.stage("apply"):
            self.change = change = propose_cut(self.opened, plan)
            return_memory()
            place = run.record.path / statistics.FOLDER / CUT if fits else run.record.path
            if run.ranks.leads:
                deviations = change.write(place, proof=proof, progress=run.progress, ranks=run.ranks)
                _log_deviations(run.record, deviations)
            else:
                change.share(run.ranks, proof=proof)
            return_memory()
        files = {str(file.resolve()): file.stat().st_size for file in sorted(place.glob("*.safetensors"))}
        written = broadcast_record(run.ranks, {"folder": str(place.resolve()), "files": files})
        folder, sizes = Path(written["folder"]), written["files"]
        here = all(Path(file).is_file() and Path(file).stat().st_size == size for file, size in sizes.items())
        self.shared = everywhere(run.ranks, here)
        self.running = lambda: change.network(folder, self.results)
        return change.axes

    def evaluators(self, ranks: ProcessRank) -> ProcessRank | None:
        """Return the processes that share an evaluation; ``None``: rank 0 alone sees the files of the cut network.

        Args:
            ranks: The processes.
        """
        return ranks if self.shared else SINGLE if ranks.leads else None

    def reconstruct(
        self, run: ActiveRun, axes: AxisGraph, plan: Plan, sources: Sequence[Source], settings: Mapping[str, Any]
    ) -> None:
        """Fit the layers that read cut units one block at a time, and write the network into the run folder.

        Args:
            run: The run, which gets a row.
            axes: The axes before the cut.
            plan: The plan.
            sources: The data to fit on.
            settings: Settings that differ from the defaults.
        """
        record, place = run.record, run.record.path / statistics.FOLDER / CUT
        cut = open_network(str(place), DTYPES.get(self.dtype))
        tokens, windows = (sum(counts) for counts in zip(*((one.tokens, len(one)) for one in sources), strict=True))
        more = predict_pairing(self.opened.network(), tokens, -(-tokens // windows))
        lacking = "" if settings.get("target") in PAIRED else explain_lacking(self.plan, more)
        both = StreamedRecovery(self.opened, cut, self.plan, lacking)
        pair, (dense, loaded) = both.start(record.path), both.models()
        reconstruct(loaded.model, dense.model, axes, plan, sources, settings, record, run.progress, streamed=pair)
        return_memory()
        store.write_model(loaded, record.path, outside=both.outside(loaded, pair.changed))
        shutil.rmtree(place)
        after = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
        self.running = lambda: both.recovered(loaded, after, record.path)

    def save(self, record: Record) -> None:
        """Do nothing: the network was written as it was cut.

        Args:
            record: The run.
        """


def _log_deviations(record: Record, deviations: Sequence[Deviation]) -> None:
    """Log how far the blocks of a cut network are from the masked ones: the row of the worst one."""
    if deviations:
        worst = max(deviations, key=lambda one: one.largest_difference - one.bound)
        row: dict[str, Any] = {"ok": True, "max_abs_diff": worst.largest_difference, "bound": worst.bound}
        record.log("verify", **row, blocks=len(deviations), dtype="float64")


PrunedNetwork = WholeNetwork | StreamedRun
"""The network of a pruning run: in memory, or read one block at a time."""


def open_streamed(
    settings: Settings, invocation: Invocation, shared: SharedWork
) -> tuple[StreamedRun | None, MemoryPlan]:
    """Open the network that settings name, to be read one block at a time unless it fits, and predict what it needs.

    Args:
        settings: The settings of the run.
        invocation: How the command was called, with its memory.
        shared: What earlier runs of this process have opened.
    """
    if shared.memory:
        gc.collect()
        return_memory()
    spec, pruner = model_spec(settings), pruning.build_pruner(settings.method, seeded_settings(settings))
    opened = open_network(spec.name, DTYPES.get(spec.dtype))
    counts = (
        (len(settings.sources), settings.tokens),
        (len(settings.sources) + len(settings.unseen), settings.eval_tokens),
    )
    windows = max(many * count_windows(tokens, settings.seq_len) for many, tokens in counts)
    size = max(settings.batch_size, min(BATCH, windows)) if pruner.products else settings.batch_size
    amounts = -(-windows // size), settings.seq_len * size
    needs = needs_of_model(spec, settings.precision, opened)
    plan = plan_streaming(opened, invocation, settings, pruner, amounts, needs, shared.memory)
    return StreamedRun(opened, plan, settings.dtype) if plan.streams else None, plan
