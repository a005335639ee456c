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
from regrow.core.objectives import CLASSIFICATION, MULTI_LABEL, NEXT_TOKEN, Objective
from regrow.core.sources import Batch, Source, preserve_random_state, seed_generators
from regrow.evaluation.quality import Evaluation, evaluate_objective
from regrow.evaluation.timing import fastest_pass, set_row_length
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.recording import ActiveRun, Record
from regrow.nets import Loaded
from regrow.nets.devices import autocasting
from regrow.streaming.network import StreamedNetwork
from regrow.tracing.capture import trim_error


@dataclass(frozen=True)
class EvaluationData:
    """The data on which a run measures its networks, and how."""

    halves: SourceHalves  # networks are evaluated on the evaluation halves
    objective: Objective | None = None  # what networks are trained for; `None`: text with a tokenizer, else classes
    precision: str = "float32"  # the precision of forward passes


def measure_run(
    run: ActiveRun,
    loaded: Loaded,
    axes: AxisGraph,
    data: EvaluationData,
    name: str,
    *,
    network: StreamedNetwork | None = None,
    recoveries: int = 0,
) -> dict[str, evaluation.Perplexity]:
    """Log size and quality of a model, and return its perplexities for paired comparison; no result depends on this.

    ``name`` is that of the model in the rows, ``network`` the model if it runs one block at a time. Loaders that
    shuffle give the same order each time, and their random state is restored. Of an objective without rows, only the
    size is measured.
    """
    record, objective = run.record, data.objective
    if not record.measured:
        return {}
    loaded = loaded if network is None else replace(loaded, model=network.model)
    columns: dict[str, Any] = {"model": name} | ({"round": recoveries} if recoveries > 1 else {})
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
            results = _evaluate_text(run, loaded, tests, name, network)
        else:
            results = _evaluate(run, loaded, tests, name, objective)
        try:
            for result in results:
                row = _row_of(result, columns, data.halves.seen)
                record.log("perplexity" if isinstance(result, evaluation.Perplexity) else "choice", row)
                if isinstance(result, evaluation.Perplexity):
                    perplexities[result.source] = result
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if not data.halves.lenient:
                raise
            line = f"the quality of the network is not measured: {trim_error(error)}; give validation= data"
            warnings.warn(line, stacklevel=2)
    run.progress(len(tests), len(tests), f"evaluating the {name} model")
    return perplexities


def _row_of(
    result: evaluation.Perplexity | evaluation.Accuracy | Evaluation, columns: Mapping[str, Any], seen: Collection[str]
) -> dict[str, Any]:
    """Return the row of a result: of text its perplexity, of other data the share that is right, or the score."""
    if isinstance(result, Evaluation):
        score = {"acc": result.score, "acc_se": result.score_error, "n": result.count}
        return {"task": result.source, **columns, **score}
    if isinstance(result, evaluation.Accuracy):
        score = {"acc": result.accuracy, "acc_se": result.error, "n": len(result.right)}
        return {"task": result.source, **columns, **score}
    windows = result.record()
    return {
        **columns,
        "source": result.source,
        "seen": result.source in seen,
        "ppl": result.ppl,
        "nll": result.mean,
        "se": result.error,
        "tokens": windows["tokens"],
        "bits_per_byte": result.bits_per_byte,
        "nll_per_window": windows["nll_per_window"],
    }


def _evaluate(
    run: ActiveRun, loaded: Loaded, tests: Sequence[Source], name: str, objective: Objective | None
) -> Iterator[evaluation.Accuracy | Evaluation]:
    for i, source in enumerate(tests):
        run.progress(i, len(tests), f"evaluating the {name} model on {source.name}")
        labels = [batch.labels for batch in islice(source, 1)]
        classes = objective is CLASSIFICATION and all(isinstance(x, Tensor) and x.dim() == 1 for x in labels)
        if objective is None or classes:
            yield evaluation.accuracy(loaded.model, source)
        else:
            yield evaluate_objective(loaded.model, source, objective)


def _evaluate_text(
    run: ActiveRun, loaded: Loaded, tests: Sequence[Source], name: str, network: StreamedNetwork | None
) -> Iterator[evaluation.Perplexity]:
    """Yield the perplexity of a language model on each source; with several ranks, on rank 0."""
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
    """Log paired differences in log-perplexity of a model to an earlier one, on each source that both have."""
    for name in (name for name in before if name in after):
        mean, error = evaluation.paired_difference(before[name], after[name])
        record.log("paired", {"source": name, "delta_nll": mean, "se": error, **(columns or {})})


def log_budget(record: Record, model: nn.Module, before: AxisGraph, after: AxisGraph, budget: Budget) -> None:
    """Log the quantity that a budget counts, before and after a cut, if that is an absolute target or time.

    For time, the rows have the prediction and the measured time, the fastest of several passes, before and after.
    """
    if budget.target is None and budget.measure != Measure.TIME:
        return
    was, now = (cost_of(axes, budget).total for axes in (before, after))
    amounts: dict[str, float] = {"asked": budget.limit(was), "before": was, "after": now}
    if budget.measure == Measure.TIME:
        amounts |= {"predicted": now, "after": fastest_pass(model, timed_input(before, budget))}
        amounts = {name: steps / STEPS_PER_UNIT[Measure.TIME] for name, steps in amounts.items()}
    context = budget.target.context if budget.target else 0
    device = budget.timing.device if budget.timing else ""
    record.log("budget", {"measure": str(budget.measure), "context": context, "device": device} | amounts)


def timed_input(axes: AxisGraph, budget: Budget) -> Batch:
    """Return the input of a timed pass: the traced example, or as many tokens as a target names."""
    batch = Batch(axes.example.args, axes.example.kwargs)
    tokens = budget.target.context if budget.target else 0
    return set_row_length(batch, tokens) if tokens else batch
