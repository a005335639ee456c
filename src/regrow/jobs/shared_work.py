"""Several pruning runs from one calibration: what runs of one model on the same data need not measure again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from regrow import evaluation
from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.scores import Need, Statistics
from regrow.core.sources import Source
from regrow.nets import Loaded
from regrow.scoring.weights import CachedColumns
from regrow.settings.prune import Settings
from regrow.store import statistics
from regrow.store.replacing import settle
from regrow.store.run_record import RUN, is_resumable, read_run, run_identity
from regrow.streaming.requirements import MemoryPlan
from regrow.tracing import trace


@dataclass(eq=False)
class SharedWork:
    """The axes, calibration sums and dense measurements of one model, kept in memory for the next run."""

    axes: AxisGraph | None = None  # the axes of the model; `None`: it is not traced yet
    # (digest of what they depend on, shard) → the sums of a shard of a source
    sums: dict[tuple[str, int], Statistics] = field(default_factory=dict)
    columns: CachedColumns = field(default_factory=lambda: CachedColumns({}))
    weights: tuple[float, ...] = ()
    # Source name → the measurement of the model before the cut
    dense: dict[str, evaluation.Perplexity | evaluation.Accuracy] = field(default_factory=dict)
    # What the first run was predicted to need of a limit of memory; `None`: nothing was predicted yet
    memory: MemoryPlan | None = None
    generated: Tensor | None = None  # the tokens of the windows that the model generated; `None`: none

    def trace(self, loaded: Loaded) -> AxisGraph:
        """Return the axes of the model, traced once."""
        if self.axes is None:
            self.axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
        return self.axes

    def check_weights(self, sums: Sequence[float]) -> None:
        """Raise InputError unless the model has the weights that it had in earlier runs."""
        self.weights = self.weights or (*sums,)
        if self.weights != (*sums,):
            raise InputError("the model has other weights each time it is built; seed it, or make one plan at a time")

    def digests(self, sources: Iterable[Source], needs: Iterable[Need], shards: int, *more: object) -> dict[str, str]:
        """Return source name → the digest by which its sums are found; methods that measure the same have the same."""
        measured = sorted(set(needs) - {Need.WEIGHTS})
        return {source.name: statistics.fingerprint(source, shards, measured, *more) for source in sources}

    def finished(self, digests: Mapping[str, str], shards: int) -> dict[tuple[str, int], Statistics]:
        """Return (source, shard) → sums, of those that are known."""
        places = [(name, digest, shard) for name, digest in digests.items() for shard in range(shards)]
        return {(name, shard): self.sums[place, shard] for name, place, shard in places if (place, shard) in self.sums}


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether a folder holds the finished pruning run of these settings; ``False`` if it is to be run or resumed."""
    settle(folder)
    wanted = run_identity("prune", asdict(settings), None)
    if (folder / RUN).is_file():
        data = read_run(folder)
        if data.get("finished") and data["verb"] == "prune" and data["settings"] == wanted["settings"]:
            return True
    is_resumable(folder, wanted)
    return False
