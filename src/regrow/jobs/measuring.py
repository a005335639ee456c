"""Measurements of a model before and after a cut: size, quality, and the quantity that its budget counts."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from regrow import evaluation
from regrow.allocation.cost import cost_of
from regrow.core.amounts import STEPS_PER_UNIT, Measure
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.errors import first_line
from regrow.core.objectives import CLASSIFICATION, MULTI_LABEL, NEXT_TOKEN, Objective
from regrow.core.sources import Batch, Source, preserve_random_state, seed_generators
from regrow.data.batch_streams import join_batches
from regrow.evaluation.measure import count_positions
from regrow.evaluation.scores import Evaluation, evaluate_objective
from regrow.evaluation.timing import fastest_pass, fastest_passes, set_row_length
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.recording import ActiveRun, Record
from regrow.nets import Loaded
from regrow.nets.devices import autocasting
from regrow.streaming.network import StreamedNetwork


@dataclass(frozen=True)
class EvaluationData:
    """The data on which a run measures its networks, and how."""

    halves: SourceHalves  # networks are evaluated on the evaluation halves
    objective: Objective | None = None  # what networks are trained for; `None`: text with a tokenizer, else classes
    precision: str = "float32"  # the precision of forward passes
    windows: int = 1  # how many windows of text run at a time


def round_column(recoveries: int) -> dict[str, int]:
    """Return a column of metrics rows: ``{"round": recoveries}`` from a network's second recovery on, ``{}`` before."""
    return {"round": recoveries} if recoveries > 1 else {}


def measure_network(
    run: ActiveRun,
    loaded: Loaded,
    axes: AxisGraph,
    data: EvaluationData,
    name: str,
    *,
    network: StreamedNetwork | None = None,
    recoveries: int = 0,
) -> dict[str, evaluation.Perplexity]:
    """Log size and quality of a model; return source → perplexity, ``{}`` if none is measured.

    ``name``: of the model in the rows; ``network``: the model if it runs one block at a time; ``recoveries``: how many
    it has had. For text, all ranks must call this. Loaders that shuffle give the same order each time, and all random
    state is restored. For objectives that reports have no rows for, only the size is measured. An error is a warning
    where ``data.halves.evaluates_on_calibration``.
    """
    record, objective = run.record, data.objective
    if not record.wants_measurements:
        return {}
    loaded = loaded if network is None else replace(loaded, model=network.model)
    columns: dict[str, Any] = {"model": name, **round_column(recoveries)}
    size = evaluation.size(loaded.model, axes.counted, next(loaded.model.parameters()).dtype)
    counts = {"params_all": size["parameters"], "params_counted": size["counted"], "macs": evaluation.macs(axes)}
    record.log("size", columns | counts, bytes=size["bytes"], dtype=size["dtype"])
    tests = data.halves.evaluation if objective in (None, CLASSIFICATION, MULTI_LABEL, NEXT_TOKEN) else ()
    generators = [generator for source in tests for generator in source.generators]
    perplexities: dict[str, evaluation.Perplexity] = {}
    with preserve_random_state(generators), autocasting(loaded.model, data.precision):
        seed_generators(generators)
        results: Iterable[evaluation.Perplexity | evaluation.Accuracy | Evaluation]
        if objective is NEXT_TOKEN or (objective is None and loaded.tokenizer is not None):
            joined = [join_batches(test, data.windows) for test in tests]
            results = _evaluate_text(run, loaded, joined, name, network)
        else:
            results = _evaluate_examples(run, loaded, tests, name, objective)
        try:
            for result in results:
                row = _make_row(result, columns, data.halves.calibration_names)
                record.log("perplexity" if isinstance(result, evaluation.Perplexity) else "choice", row)
                if isinstance(result, evaluation.Perplexity):
                    perplexities[result.source] = result
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if not data.halves.evaluates_on_calibration:
                raise
            line = f"the quality of the network is not measured: {first_line(error)}; give validation= data"
            warnings.warn(line, stacklevel=2)
    run.progress(len(tests), len(tests), f"evaluating the {name} model")
    return perplexities


def _make_row(
    result: evaluation.Perplexity | evaluation.Accuracy | Evaluation,
    columns: Mapping[str, Any],
    calibration_names: Collection[str],
) -> dict[str, Any]:
    """Return the metrics row of a result: of text its perplexity, of other data the fraction right, or the score.

    ``columns``: further columns; ``calibration_names``: the sources that are ``seen`` in the row.
    """
    task = {"task": result.source, **columns}
    if isinstance(result, Evaluation):
        return {**task, "acc": result.score, "acc_se": result.score_error, "n": result.count}
    if isinstance(result, evaluation.Accuracy):
        return {**task, "acc": result.accuracy, "acc_se": result.error, "n": len(result.right)}
    windows = result.record()
    return {
        **columns,
        "source": result.source,
        "seen": result.source in calibration_names,
        "ppl": result.ppl,
        "nll": result.mean,
        "se": result.error,
        "tokens": windows["tokens"],
        "bits_per_byte": result.bits_per_byte,
        "nll_per_window": windows["nll_per_window"],
    }


def _evaluate_examples(
    run: ActiveRun, loaded: Loaded, tests: Sequence[Source], name: str, objective: Objective | None
) -> Iterator[evaluation.Accuracy | Evaluation]:
    """Yield on each source the accuracy (of classes, and without objective), or the score of another objective."""
    for i, source in enumerate(tests):
        run.progress(i, len(tests), f"evaluating the {name} model on {source.name}")
        labels = [batch.labels for batch in islice(source, 1)]
        has_classes = objective is CLASSIFICATION and all(isinstance(x, Tensor) and x.dim() == 1 for x in labels)
        if objective is None or has_classes:
            yield evaluation.accuracy(loaded.model, source)
        else:
            yield evaluate_objective(loaded.model, source, objective)


def _evaluate_text(
    run: ActiveRun, loaded: Loaded, tests: Sequence[Source], name: str, network: StreamedNetwork | None
) -> Iterator[evaluation.Perplexity]:
    """Yield the perplexity of a language model on each source; ranks share the work, and rank 0 has the result.

    ``name``: of the model in progress reports; ``network``: the model if it runs one block at a time, else ``None``.
    """
    shares = [run.ranks.share(source.batches) for source in tests]
    walk = network.outputs([batch for share in shares for batch in share]) if network and tests else None
    for i, (source, share) in enumerate(zip(tests, shares, strict=True)):
        run.progress(i, len(tests), f"evaluating the {name} model on {source.name}")
        outputs = None if walk is None else islice(walk, len(share))
        yield evaluation.perplexity(loaded.model, source, tokenizer=loaded.tokenizer, outputs=outputs, ranks=run.ranks)


def log_pairs(
    record: Record,
    before: Mapping[str, evaluation.Perplexity],
    after: Mapping[str, evaluation.Perplexity],
    columns: Mapping[str, object] | None = None,
) -> None:
    """Log the mean difference in log-perplexity, ``after`` minus ``before``, paired by window, of each common source.

    Both are source → perplexity; ``columns``: further columns of the rows.
    """
    for name in (name for name in before if name in after):
        mean, error = evaluation.paired_difference(before[name], after[name])
        record.log("paired", {"source": name, "delta_nll": mean, "se": error, **(columns or {})})


def log_budget(record: Record, model: nn.Module, before: AxisGraph, after: AxisGraph, budget: Budget) -> None:
    """Log a row with the size in the budget's measure, before and after a cut, if it is an absolute target or time.

    ``model``: the cut network; ``before``, ``after``: axes. For time, in ms, the size after the cut is that of the
    fastest of several passes, with the prediction beside it.
    """
    if budget.target is None and budget.measure != Measure.TIME:
        return
    old_cost, new_cost = (cost_of(axes, budget).total for axes in (before, after))
    amounts: dict[str, float] = {"asked": budget.limit(old_cost), "before": old_cost, "after": new_cost}
    if budget.measure == Measure.TIME:
        amounts |= {"predicted": new_cost, "after": fastest_pass(model, make_timed_input(before, budget))}
        amounts = {name: steps / STEPS_PER_UNIT[Measure.TIME] for name, steps in amounts.items()}
    context = budget.target.context if budget.target else 0
    device = budget.timing.device if budget.timing else ""
    record.log("budget", {"measure": str(budget.measure), "context": context, "device": device} | amounts)


def log_speed(
    record: Record, before: nn.Module, after: nn.Module, axes: AxisGraph, tokens: int, precision: str
) -> None:
    """Log the milliseconds of a pass of the network before a cut, and after it, measured in alternation.

    ``axes``: before the cut; ``tokens``: the length of the timed rows; 0: the traced example is timed as it is.
    """
    batch = Batch(axes.example.args, axes.example.kwargs)
    batch = set_row_length(batch, tokens) if tokens else batch
    with preserve_random_state(()), autocasting(before, precision), autocasting(after, precision):
        times = fastest_passes((before, after), batch, repeats=5)
    whole, found = (time / STEPS_PER_UNIT[Measure.TIME] for time in times)
    columns = {"tokens": count_positions(batch) if tokens else 0, "device": str(next(after.parameters()).device)}
    record.log("latency", columns, whole=whole, found=found)


def make_timed_input(axes: AxisGraph, budget: Budget) -> Batch:
    """Return the input of a timed pass: the traced example, in rows of as many tokens as the target says, if any."""
    batch = Batch(axes.example.args, axes.example.kwargs)
    tokens = budget.target.context if budget.target else 0
    return set_row_length(batch, tokens) if tokens else batch
