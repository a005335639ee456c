"""A network in memory as a pruning run uses it: cut in place, proved, repaired and saved."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from regrow import store
from regrow.core.axes import AxisGraph
from regrow.core.errors import RefusedError
from regrow.core.plan import Plan
from regrow.core.sources import Source
from regrow.distributed import ProcessRank
from regrow.jobs.forward_outputs import run_once
from regrow.jobs.recording import ActiveRun, Record
from regrow.jobs.recovering import keep_dense, reconstruct
from regrow.nets import Loaded
from regrow.scoring.weights import weights_of
from regrow.store.statistics import parameter_sums
from regrow.surgery import apply, verify


@dataclass
class WholeNetwork:
    """A network in memory; it is cut in place."""

    loaded: Loaded
    dense: nn.Module | None = field(default=None, init=False)
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
        """Carry out a plan, and return the axes after it."""
        model = self.loaded.model
        if proof and run.record.kept:
            with run.clock.stage("verify"):
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
        with run.clock.stage("apply"):
            _, after = apply(model, axes, plan)
        return after

    def reconstruct(
        self, run: ActiveRun, axes: AxisGraph, plan: Plan, sources: Sequence[Source], settings: Mapping[str, Any]
    ) -> None:
        """Fit layers that read cut units to dense outputs."""
        dense, self.dense = self.dense, None
        assert dense is not None
        reconstruct(self.loaded.model, dense, axes, plan, sources, settings, run.record, run.progress)

    def save(self, record: Record) -> None:
        """Write the network into the folder of a run."""
        store.write_model(self.loaded, record.path)
