"""Growth as the command and the Python interface carry it out: the checked change, and the training after it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from torch import nn

from regrow.core.axes import AxisGraph, Example
from regrow.core.errors import RefusedError
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source, preserve_random_state
from regrow.jobs.forward_outputs import (
    NetworkState,
    examples_of,
    measure_change,
    measure_exactly,
    outputs_of,
    run_once,
)
from regrow.jobs.recording import Record
from regrow.nets.devices import autocasting
from regrow.surgery import apply, verify
from regrow.surgery.runner import Answers
from regrow.surgery.whole import shallow_copy
from regrow.tracing.block_copies import insert_copies
from regrow.tracing.capture import first_line
from regrow.tracing.meta_copy import cast_example
from regrow.training.grown import GrowthTraining, added_entries, mean_loss, train_grown

CHANGE = 1e-3
"""The largest change of an output in the model's own precision, relative to the largest output, that is kept."""
PASSED_ON = 1e-7
"""The largest relative change behind blocks that give their input unchanged: every operation gets the same numbers."""


@dataclass(frozen=True)
class CheckedGrowth:
    """A growth of a network, which is carried out only if the network's own forward gives the same as before.

    Args:
        model: The network.
        axes: Its axes.
        plan: The plan.
        proof: Whether the network is compared in float64, too.
        stage: Returns the context manager that times a stage of a run, by its name.
        progress: Called with (steps done, steps in all, what is being done).
    """

    model: nn.Module
    axes: AxisGraph
    plan: Plan
    proof: bool = True
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext
    progress: Progress = silent

    def carry_out(self) -> tuple[AxisGraph, dict[str, Any]]:
        """Grow the network in place; it is left as it was, bit for bit, if its outputs change or it does not run.

        Returns:
            The axes afterwards, and the ``verify`` row of a run; none for a network without numbers.

        Raises:
            RefusedError: If the outputs change by more than rounding; names the stack, if one is the cause.
            PlanError: If the plan does not fit the network.
        """
        if any(x.is_meta for x in self.model.parameters()):
            return apply(self.model, self.axes, self.plan)[1], {}
        state = NetworkState.of(self.model)
        try:
            with preserve_random_state():
                return self._grow()
        except BaseException:
            state.restore()
            raise

    def _grow(self) -> tuple[AxisGraph, dict[str, Any]]:
        model, axes, plan = self.model, self.axes, self.plan
        examples = examples_of(cast_example(axes.example, model))
        run_once(model, examples[0])
        before = [(examples[0], outputs_of(model, examples[0]))]
        before += [(x, made) for x in examples[1:] if (made := _try_outputs(model, x)) is not None]
        if not before[0][1]:
            raise RefusedError("what the network returns has no tensor that could be compared; let it return tensors")
        exact = self._share_of_noise(*before[0]) if plan.insert else 0.0
        for path in plan.insert:
            self._check_stack(path, before, exact)
        proof: dict[str, Any] = {}
        if self.proof:
            with self.stage("verify"):
                self.progress(0, 1, "comparing the outputs in float64")
                result = verify(model, axes, plan)
                proof = asdict(result)
                if not result.ok:
                    _refuse(result.max_abs_diff, result.bound, "float64")
        with self.stage("apply"):
            self.progress(0, 1, "growing")
            _, after = apply(model, axes, plan)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        share = CHANGE * (1 if dtype in ("float32", "float64") else 100) if plan.changes else exact
        measured = [measure_change(made, self._run(x)) for x, made in before]
        for change, largest in measured:
            if not change <= share * (largest or 1.0):
                _refuse(change, share * largest, dtype)
        change, largest = measured[0]
        row = {"output_change": change, "relative_change": change / (largest or 1.0), "output_dtype": dtype}
        if self.proof:
            return after, {**proof, "dtype": "float64", **row}
        return after, {"max_abs_diff": change, "bound": share * largest, "ok": True, "dtype": dtype, **row}

    def _run(self, example: Example) -> Answers:
        try:
            return outputs_of(self.model, example)
        except Exception as error:
            raise RefusedError(
                f"the grown network does not run on what the network ran on: {first_line(error)}; {_AS_BEFORE}"
            ) from None

    def _share_of_noise(self, example: Example, before: Answers) -> float:
        """Return the largest relative change that is none: on accelerators, sums may differ from run to run."""
        return max(PASSED_ON, min(3 * measure_exactly(before, self._run(example)), CHANGE))

    def _check_stack(self, path: str, before: Sequence[tuple[Example, Answers]], share: float) -> None:
        """Raise ``RefusedError`` unless a copy of the network with more blocks in one stack gives what it gave before.

        The blocks give their input unchanged, so that every operation behind them gets the same numbers.
        """
        twin = shallow_copy(self.model)
        try:
            insert_copies(twin, path, self.plan.insert[path])
            measured = [measure_exactly(made, outputs_of(twin, x)) for x, made in before]
        except Exception as error:
            raise RefusedError(
                f"stack {path!r} cannot get further blocks: the network does not run with them: {first_line(error)}; "
                f"{_OTHER_STACK}; {_AS_BEFORE}"
            ) from None
        if all(change <= share for change in measured):
            return
        worst = max(measured)
        what = f"by up to {100 * worst:.2g} %" if isfinite(worst) else "their number or shape"
        raise RefusedError(
            f"stack {path!r} cannot get further blocks: the outputs would change {what}, since the network uses states "
            f"between its blocks, how many there are, or random numbers; {_OTHER_STACK}; {_AS_BEFORE}"
        )


_OTHER_STACK = "name other stacks in blocks, or widen it with mlp, heads or channels"
_AS_BEFORE = "the network is as it was"


def _try_outputs(model: nn.Module, example: Example) -> Answers | None:
    """Return the outputs for an example of another size; ``None`` if the network does not take it."""
    try:
        return outputs_of(model, example)
    except Exception:
        return None


def _refuse(change: float, bound: float, dtype: str) -> None:
    raise RefusedError(
        f"the growth changes the outputs by {change:.3g} in {dtype}, the bound is {bound:.3g}; {_AS_BEFORE}, nothing "
        "is saved; please report this"
    )


@dataclass(frozen=True)
class GrowthData:
    """What a grown network is trained on.

    Args:
        sources: The data.
        training: How it is trained.
        precision: The precision of forward passes.
        objective: What it is trained for; ``None``: what fits the labels.
    """

    sources: Sequence[Source]
    training: GrowthTraining
    precision: str = "float32"
    objective: Objective | None = None

    def train(self, model: nn.Module, axes: AxisGraph, plan: Plan, record: Record, progress: Progress) -> None:
        """Train a grown network, and log the loss before and after.

        Args:
            model: The network after the growth.
            axes: Its axes before.
            plan: The plan of the growth.
            record: The run, which gets the row; the loss is measured where it is kept.
            progress: Called with (steps done, steps in all, what is being done).
        """
        training, new = self.training, added_entries(model, axes, plan)
        with autocasting(model, self.precision):
            before = self._measure_loss(model) if record.kept else 0.0
            train_grown(model, self.sources, new, training, objective=self.objective, progress=progress)
            if record.kept:
                row: dict[str, Any] = {"loss_before": before, "loss_after": self._measure_loss(model)}
                row |= {"steps": training.steps, "train": "new" if training.new_only else "all", "lr": training.lr}
                record.log("training", **row, parameters=sum(int(entries.sum()) for entries in new.values()))

    def _measure_loss(self, model: nn.Module) -> float:
        """Return the mean loss on the data; the random state of loaders that shuffle is restored."""
        with preserve_random_state(*(generator for source in self.sources for generator in source.generators)):
            return mean_loss(model, self.sources, self.objective)
