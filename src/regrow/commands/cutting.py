"""A cut as the command and the Python interface carry it out: proved, repaired, measured and saved."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from regrow import evaluation, store
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.commands import measuring
from regrow.commands.forward_outputs import run_once
from regrow.commands.reconstruction import keep_dense, reconstruct
from regrow.errors import RefusedError
from regrow.nets import Loaded
from regrow.nets.precision import autocasting
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder
from regrow.sources import Source
from regrow.surgery import apply, verify
from regrow.training import tune

Measure = Callable[[AxisGraph, str], dict[str, evaluation.Perplexity]]
"""Function that logs size and quality of the network with these axes under a name, and returns its perplexities."""


@dataclass(frozen=True)
class CutRun:
    """What a cut is carried out with, and what is done after it.

    Args:
        loaded: The network, with what is needed to save it.
        sources: The data on which the statistics of BatchNorms are measured again.
        precision: The precision of forward passes.
        folder: The run folder; ``None``: nothing is proved, measured or saved.
        measure: Measures the network; not called without a folder.
        proof: Whether the cut network is compared with the masked one, in a folder.
        fit: The settings with which layers are fitted to the dense network after the cut; ``None``: they are not.
        fitted_on: Returns the data on which they are fitted.
        finetune: Trains the network after the cut.
        stage: Returns the context manager that times a stage of the run, by its name.
        progress: Called with (steps done, steps in all, what is being done).
    """

    loaded: Loaded
    sources: Sequence[Source]
    precision: str = "float32"
    folder: RunFolder | None = None
    measure: Measure = field(default=lambda axes, name: {})
    proof: bool = True
    fit: Mapping[str, Any] | None = None
    fitted_on: Callable[[], Sequence[Source]] = tuple
    finetune: Callable[[], None] | None = None
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext
    progress: Progress = silent

    def carry_out(self, axes: AxisGraph, plan: Plan, budget: Budget) -> tuple[AxisGraph, str]:
        """Cut the network in place; in a folder, prove that the plan holds, measure before and after, and save.

        Args:
            axes: The axes of the network.
            plan: The plan.
            budget: The budget that the plan meets.

        Returns:
            The axes after the cut, and what a user must know of the statistics of BatchNorms; empty: nothing.

        Raises:
            RefusedError: If the cut network does not compute what the masked one does; nothing is changed then.
        """
        folder, model = self.folder, self.loaded.model
        before = self._measured(axes, "dense")
        if folder and self.proof:
            with self.stage("verify"):
                self.progress(0, 1, "proving that masked = shrunk")
                self._verify(axes, plan, folder)
        run_once(model, axes.example)
        dense = None if self.fit is None else keep_dense(model)
        with self.stage("apply"):
            _, after = apply(model, axes, plan)
            if folder:
                record_plan(folder, plan, axes, after)
        cut: dict[str, evaluation.Perplexity] = {}
        if dense is not None and self.fit is not None:
            cut = self._measured(after, "cut")
            with self.stage("reconstruct"):
                reconstruct(model, dense, axes, plan, self.fitted_on(), self.fit, folder, self.progress)
            del dense
        note = self._tune(plan) if self.finetune or tune.find_running(model) else ""
        if folder:
            with self.stage("save"):
                store.write_model(self.loaded, folder.path)
            pruned = self._measured(after, "pruned")
            measuring.log_budget(folder, model, axes, after, budget)
            measuring.log_pairs(folder, before, pruned, cut)
            if note:
                folder.update(notes=[*folder.run().get("notes", ()), note])
        return after, note

    def _tune(self, plan: Plan) -> str:
        """Train the network, if that is wanted, and measure the statistics of BatchNorms again."""
        with self.stage("tune"), autocasting(self.loaded.model, self.precision):
            if self.finetune:
                self.finetune()
            return tune.recalibrate_changed(self.loaded.model, plan, self.sources)

    def _measured(self, axes: AxisGraph, name: str) -> dict[str, evaluation.Perplexity]:
        return self.measure(axes, name) if self.folder else {}

    def _verify(self, axes: AxisGraph, plan: Plan, folder: RunFolder) -> None:
        result = verify(self.loaded.model, axes, plan)
        folder.log("verify", **asdict(result), dtype="float64")
        if not result.ok:
            raise RefusedError(
                f"the plan does not hold on this model: masked and shrunk differ by {result.max_abs_diff:.3g} in "
                f"float64, the bound is {result.bound:.3g}; no model was saved, please report this one"
            )


def record_plan(folder: RunFolder, plan: Plan, before: AxisGraph, after: AxisGraph) -> None:
    """Write the plan of a run, and the axes before and after it.

    Args:
        folder: The run folder.
        plan: The plan.
        before: The axes before.
        after: The axes after.
    """
    folder.own_ledger.replace(plan)
    folder.write_axes([row.record() for row in before.inventory()], [row.record() for row in after.inventory()])
