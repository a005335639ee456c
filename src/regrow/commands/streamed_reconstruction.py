"""Reconstruction of a network that is larger than memory: the cut network lies in files until its layers are fitted."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regrow import store
from regrow.axes import AxisGraph
from regrow.commands.models import DTYPES
from regrow.commands.reconstruction import reconstruct
from regrow.commands.recovery_memory import PAIRED, explain_lacking, predict_pairing
from regrow.commands.streamed import StreamedRun
from regrow.commands.streamed_recovery import StreamedRecovery
from regrow.plan import Plan
from regrow.process_memory import return_memory
from regrow.progress import Progress
from regrow.run_folder import RunFolder
from regrow.sources import Source
from regrow.store import statistics
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import open_network
from regrow.tracing import trace

CUT = "cut"
"""The folder, among the files for resuming, with the cut network as it is before the reconstruction."""


@dataclass(frozen=True, eq=False)
class StreamedReconstruction:
    """The layers of a cut network that are fitted one block at a time.

    Args:
        run: The network before the cut.
        folder: The run folder, which gets the reconstructed network.
        dtype: The format of the weights; empty: that in which they are stored.
    """

    run: StreamedRun
    folder: RunFolder
    dtype: str = ""

    @property
    def place(self) -> Path:
        """The folder of the cut network until it is reconstructed."""
        return self.folder.path / statistics.FOLDER / CUT

    def write(
        self, axes: AxisGraph, plan: Plan, sources: Sequence[Source], given: Mapping[str, object], progress: Progress
    ) -> StreamedNetwork:
        """Fit the layers that read cut units, and write the network into the run folder.

        Args:
            axes: The axes of the network before the cut.
            plan: The plan of the cut, whose result lies in :attr:`place`.
            sources: The data to fit on.
            given: As for :func:`regrow.commands.reconstruction.reconstruct`.
            progress: Called with (steps done, steps in all, what is being done).

        Returns:
            The reconstructed network, to be run one block at a time.
        """
        cut = open_network(str(self.place), DTYPES.get(self.dtype))
        tokens, windows = (sum(counts) for counts in zip(*((one.tokens, len(one)) for one in sources), strict=True))
        more = predict_pairing(self.run.opened.network(), tokens, -(-tokens // windows))
        lacking = "" if given.get("target") in PAIRED else explain_lacking(self.run.plan, more)
        both = StreamedRecovery(self.run.opened, cut, self.run.plan, lacking)
        pair, (dense, loaded) = both.start(self.folder), both.models()
        reconstruct(loaded.model, dense.model, axes, plan, sources, given, self.folder, progress, streamed=pair)
        return_memory()
        store.write_model(loaded, self.folder.path, outside=both.outside(loaded, pair.changed))
        shutil.rmtree(self.place)
        after = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
        return both.recovered(loaded, after, self.folder)
