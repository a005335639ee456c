"""Recovery of a network that is larger than memory: what differs from a recovery that loads both networks whole."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.errors import ResourceError
from regrow.jobs.inputs import count_windows
from regrow.jobs.models import DTYPES
from regrow.jobs.prune_settings import model_spec
from regrow.jobs.recovering import LastCut
from regrow.jobs.recovery_memory import (
    PAIRED,
    count_sums,
    explain_lacking,
    plan_pairing,
    predict_pairing,
    predict_refit,
)
from regrow.jobs.streamed import RESULTS, needs_of_model, start_streaming
from regrow.methods.recovery.streamed import ChangedTensors, StreamedPair
from regrow.nets import Loaded
from regrow.settings.recover import CLOSED_FORM, Settings
from regrow.store import statistics
from regrow.store.run_folder import RunFolder
from regrow.store.shapes import Shapes
from regrow.store.state import named_tensors
from regrow.store.weights import OutsideTensors
from regrow.streaming.checkpoint import Checkpoint
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import OpenedNetwork, open_network
from regrow.streaming.requirements import MemoryPlan, MemoryTerms, explain_refusal, plan_memory
from regrow.streaming.weights import StoredWeights
from regrow.tracing.blocks import GraphBlock

CHANGED = "changed"
"""The folder, among the files for resuming, with the tensors that a recovery has changed."""


@dataclass(frozen=True, eq=False)
class StreamedRecovery:
    """The networks before and after a cut, to be recovered one block at a time.

    Args:
        dense: The network before the cut, without numbers, and its stored weights.
        cut: The network after the cut.
        plan: How the run stays within its memory.
        lacking: Why memory has no room for a block of both at a time, and what to do; empty: it has.
    """

    dense: OpenedNetwork
    cut: OpenedNetwork
    plan: MemoryPlan
    lacking: str = ""

    def models(self) -> tuple[Loaded, Loaded]:
        """Return the model before the cut, and the one to recover, both without numbers."""
        dense, cut = self.dense.loaded, self.cut.loaded
        return dense, replace(dense, model=cut.model, files=(*dense.files, *cut.files))

    def start(self, folder: Path) -> StreamedPair:
        """Return both networks, to be run block by block; what hidden states a killed run left is deleted."""
        shutil.rmtree(folder / statistics.FOLDER / RESULTS, ignore_errors=True)
        results = self._results(folder)
        if results is not None:
            results.mkdir(parents=True)
        changed = ChangedTensors(folder / statistics.FOLDER / CHANGED)
        return StreamedPair(self.dense.network(results), self.cut.network(results), changed, self.lacking)

    def outside(self, model: Loaded, changed: ChangedTensors) -> OutsideTensors:
        """Return the tensors of the recovered network, which has no numbers, as ``store.write_model`` takes them."""
        weights, recording = self.cut.weights, self.cut.axes.recording
        blocks = recording.blocks if recording is not None else ()

        def each(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
            held = named_tensors(model.model)
            for name in shapes.tensors:
                if name in changed:
                    yield name, changed[name]
                else:
                    yield name, weights[name] if name in weights else held[name].tensor

        @contextmanager
        def running(place: Path) -> Iterator[nn.Module]:
            with self._written(model.model, place, blocks).on_demand() as net:
                yield net

        aligned = all(map(weights.is_aligned, weights.stored))
        return OutsideTensors(each, running, aligned, ahead=self.cut.network().largest_block)

    def recovered(self, model: Loaded, axes: AxisGraph, folder: Path) -> StreamedNetwork:
        """Return the recovered network, as it was written to the run folder, to be run one block at a time."""
        blocks = axes.recording.blocks if axes.recording is not None else ()
        return self._written(model.model, folder, blocks, self._results(folder))

    def _written(
        self, model: nn.Module, folder: Path, blocks: tuple[GraphBlock, ...], results: Path | None = None
    ) -> StreamedNetwork:
        stored = Checkpoint.open(folder).places
        weights = StoredWeights(Checkpoint(stored, stored), model, self.cut.weights.name)
        return StreamedNetwork(model, weights, blocks, results)

    def _results(self, folder: Path) -> Path | None:
        return folder / statistics.FOLDER / RESULTS if self.plan.on_disk else None


def open_recovery(
    settings: Settings, source: RunFolder, cut: LastCut, terms: MemoryTerms, announce: Callable[[str], None]
) -> StreamedRecovery:
    """Open the networks of a recovery that does not fit into its memory, and predict what it needs block by block.

    Args:
        settings: The settings of the recovery.
        source: The run to recover.
        cut: The cut behind it.
        terms: What it needs of the limit with both networks in memory.
        announce: Called with one line that says how the run stays within the limit.

    Raises:
        InputError: If the recovery, the cut, or how the model runs, needs both networks in memory.
        ResourceError: If it does not fit even with one block in memory.
        StoreError: If a saved network gives another output than the recorded one.
    """
    spec = model_spec(cut.settings)
    dtype = DTYPES.get(spec.dtype)
    dense = open_network(str(cut.before or spec.name), dtype)
    if cut.before:
        origin = replace(dense.loaded.origin, name=Path(spec.name).name)
        dense = replace(dense, loaded=replace(dense.loaded, origin=origin))
    plan, lacking = _plan(settings, cut, dense, terms)
    needs = {"recovery where the run dropped whole modules": bool(cut.plan.drop)}
    start_streaming(dense, plan, needs | needs_of_model(spec, cut.settings.precision, dense), announce)
    recovered = open_network(str(source.path), dtype)
    recovered.check_output()
    return StreamedRecovery(dense, recovered, plan, lacking)


def _plan(settings: Settings, cut: LastCut, dense: OpenedNetwork, terms: MemoryTerms) -> tuple[MemoryPlan, str]:
    """Predict what a recovery needs with one block in memory; raise ResourceError if that is more than the limit.

    Returns:
        The prediction, and why there is no room for a block of both networks at a time, if there is none.
    """
    assert settings.by in CLOSED_FORM
    sources, window = max(1, len(cut.settings.sources)), cut.settings.seq_len
    windows = sources * count_windows(settings.tokens // sources, window)
    most = max(windows, (len(cut.settings.unseen) + sources) * count_windows(cut.settings.eval_tokens, window))
    network = dense.network()
    plan = plan_memory(network, sys.maxsize, most, window, what="evaluating")
    refit, sums = settings.by == "refit", count_sums(settings, cut)
    more = predict_refit(dense.loaded.model, windows * window, window, sums=sums) if refit else 0
    plan = replace(plan, limit=terms.limit, whole=terms.needed, least=plan.least + more, decision=True)
    beside = predict_pairing(network, windows * window, window) if refit else 0
    paired = refit and settings.recovery_settings.get("target") in PAIRED
    plan = plan_pairing(plan, beside) if paired else plan
    if plan.least > plan.limit:
        raise ResourceError(explain_refusal(f"recovery by {settings.by}", plan.least, plan.limit))
    return plan, explain_lacking(plan, beside) if refit and not paired else ""
