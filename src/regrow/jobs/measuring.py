"""Measurements of a model before and after a cut: size, quality, and the quantity that its budget counts."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from regrow import evaluation
from regrow.allocation.cost import cost_of
from regrow.core.amounts import STEPS, Measure
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.objectives import CLASSIFICATION, MULTI_LABEL, NEXT_TOKEN, Objective
from regrow.core.progress import Progress
from regrow.core.sources import Batch, Source, preserve_random_state, seed_generators
from regrow.distributed import SINGLE, ProcessRank
from regrow.evaluation.objective import Evaluation, evaluate_objective
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.recording import Record
from regrow.nets import Loaded
from regrow.nets.devices import autocasting
from regrow.streaming.network import StreamedNetwork
from regrow.tracing.capture import first_line


def measure_run(
    record: Record,
    loaded: Loaded,
    axes: AxisGraph,
    data: SourceHalves,
    name: str,
    progress: Progress,
    *,
    precision: str = "float32",
    objective: Objective | None = None,
    lenient: bool = False,
    network: StreamedNetwork | None = None,
    ranks: ProcessRank = SINGLE,
    known: dict[str, evaluation.Perplexity | evaluation.Accuracy] | None = None,
    recoveries: int = 0,
) -> dict[str, evaluation.Perplexity]:
    """Log size and quality of a model, and return its perplexities for paired comparison; no result depends on this.

    Loaders that shuffle give the same order each time, and their random state is restored.
    """
    if not record.measured:
        return {}
    loaded = loaded if network is None else replace(loaded, model=network.model)
    columns: dict[str, Any] = {"model": name} | ({"round": recoveries} if recoveries > 1 else {})
    size = evaluation.size(loaded.model, axes.counted, next(loaded.model.parameters()).dtype)
    counts = {"params_all": size.parameters, "params_counted": size.counted, "macs": evaluation.macs(axes)}
    record.log("size", **columns, **counts, bytes=size.bytes, dtype=size.dtype)
    tests = data.evaluation if objective in (None, CLASSIFICATION, MULTI_LABEL, NEXT_TOKEN) else ()
    generators = [generator for source in tests for generator in source.generators]
    perplexities: dict[str, evaluation.Perplexity] = {}
    with preserve_random_state(*generators), autocasting(loaded.model, precision):
        seed_generators(*generators)
        results: Iterable[evaluation.Perplexity | evaluation.Accuracy | Evaluation]
        if known and all(source.name in known for source in tests):
            results = [known[source.name] for source in tests]
        elif objective is NEXT_TOKEN or (objective is None and loaded.tokenizer is not None):
            results = _evaluate_text(loaded, tests, name, progress, network, ranks)
        else:
            results = _evaluate(loaded, tests, name, progress, objective)
        try:
            for result in results:
                if isinstance(result, evaluation.Perplexity):
                    perplexities[result.source] = result
                    _log_perplexity(record, result, columns, result.source in data.seen)
                else:
                    if isinstance(result, Evaluation):
                        score, error, n = result.score, result.score_error, result.count
                    else:
                        score, error, n = result.accuracy, result.error, len(result.right)
                    record.log("choice", task=result.source, **columns, acc=score, acc_se=error, n=n)
                if known is not None and not isinstance(result, Evaluation):
                    known[result.source] = result
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if not lenient:
                raise
            line = f"the quality of the network is not measured: {first_line(error)}; give validation= data"
            warnings.warn(line, stacklevel=2)
    progress(len(tests), len(tests), f"evaluating the {name} model")
    return perplexities


def _log_perplexity(record: Record, result: evaluation.Perplexity, columns: Mapping[str, Any], seen: bool) -> None:
    windows = result.record()
    record.log(
        "perplexity",
        **columns,
        source=result.source,
        seen=seen,
        ppl=result.ppl,
        nll=result.mean,
        se=result.error,
        tokens=windows["tokens"],
        bits_per_byte=result.bits_per_byte,
        nll_per_window=windows["nll_per_window"],
    )


def _evaluate(
    loaded: Loaded, tests: Sequence[Source], name: str, progress: Progress, objective: Objective | None
) -> Iterator[evaluation.Accuracy | Evaluation]:
    for i, source in enumerate(tests):
        progress(i, len(tests), f"evaluating the {name} model on {source.name}")
        first = (batch.labels for batch in islice(source, 1))
        classes = objective is CLASSIFICATION and all(isinstance(one, Tensor) and one.dim() == 1 for one in first)
        if objective is None or classes:
            yield evaluation.accuracy(loaded.model, source)
        else:
            yield evaluate_objective(loaded.model, source, objective)


def _evaluate_text(
    loaded: Loaded,
    tests: Sequence[Source],
    name: str,
    progress: Progress,
    network: StreamedNetwork | None,
    ranks: ProcessRank,
) -> Iterator[evaluation.Perplexity]:
    """Yield the perplexity of a language model on each source; with several ranks, on rank 0."""
    shares = [ranks.share(source.batches) for source in tests]
    walk = network.outputs([batch for share in shares for batch in share]) if network and tests else None
    for i, (source, share) in enumerate(zip(tests, shares, strict=True)):
        progress(i, len(tests), f"evaluating the {name} model on {source.name}")
        outputs = None if walk is None else islice(walk, len(share))
        yield evaluation.perplexity(loaded.model, source, tokenizer=loaded.tokenizer, outputs=outputs, ranks=ranks)


def log_pairs(
    record: Record,
    before: Mapping[str, evaluation.Perplexity],
    after: Mapping[str, evaluation.Perplexity],
    cut: Mapping[str, evaluation.Perplexity],
) -> None:
    """Log paired differences in log-perplexity of the model after a run to the one before it; of these a page shows."""
    for name in (name for name in cut if name in after):
        pair = evaluation.paired_difference(cut[name], after[name])
        record.log("paired", source=name, delta_nll=pair.mean, se=pair.error, of=["cut", "pruned"])
    for name in (name for name in before if name in after):
        pair = evaluation.paired_difference(before[name], after[name])
        record.log("paired", source=name, delta_nll=pair.mean, se=pair.error)


def log_budget(record: Record, model: nn.Module, before: AxisGraph, after: AxisGraph, budget: Budget) -> None:
    """Log the quantity that a budget counts, before and after a cut, if that is an absolute target or time.

    For time, the rows have the prediction and the measured time, the fastest of several passes, before and after.
    """
    if budget.target is None and budget.measure != Measure.TIME:
        return
    was, now = (cost_of(axes, budget).total for axes in (before, after))
    row: dict[str, Any] = {"asked": budget.limit(was), "before": was, "after": now}
    if budget.measure == Measure.TIME:
        row |= {"predicted": now, "after": evaluation.fastest_pass(model, timed_input(before, budget))}
        row = {name: steps / STEPS[Measure.TIME] for name, steps in row.items()}
    context = budget.target.context if budget.target else 0
    device = budget.timing.device if budget.timing else ""
    record.log("budget", measure=str(budget.measure), context=context, device=device, **row)


def timed_input(axes: AxisGraph, budget: Budget) -> Batch:
    """Return the input of a timed pass: the traced example, or as many tokens as a target names."""
    batch = Batch(axes.example.args, axes.example.kwargs)
    tokens = budget.target.context if budget.target else 0
    return evaluation.lengthen(batch, tokens) if tokens else batch
